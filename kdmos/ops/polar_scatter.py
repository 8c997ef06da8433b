"""Max pooling of point features over BEV cells, and cells into the dense bird's-eye view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdmos.ops import native, reference
from kdmos.ops.polar_grid import PointOrder, sort_by_cell
from kdmos.settings import PolarGrid

CHUNK = 4096  # rows of `linear_max` at a time: a product of 4 MB, which stays in the cache of a core


def polar_scatter(
    features: Tensor, cell: Tensor, num_cells: int, order: PointOrder | None = None
) -> tuple[Tensor, Tensor]:
    """Largest feature of the points in each BEV cell, and which point it came from.

    Deterministic, the gradient too. Under autocast: in the type of the features.

    Args:
        features: Point features, float [N, C].
        cell: Cell rank of each point, int64 [N]; ranks outside [0, num_cells) are padding and skipped.
        num_cells: Number of cells, >= 0.
        order: The points sorted by `cell`, if that is known (`GriddedPoints.by_cell`): saves the sorting.
    Returns: maximum [num_cells, C], 0 for a cell without points; argmax int64 [num_cells, C], -1 there.
        Ties go to the lowest point index, and so does their gradient.
    Raises: ValueError if the shapes do not fit or the features are not floating point.
    Source: the per-cell max pooling of MotionBEV (RA-L 2023).
    """
    if features.ndim != 2 or cell.shape != features.shape[:1]:
        raise ValueError(
            f"polar_scatter: expected features [N, C] and cell [N], got {list(features.shape)} and {list(cell.shape)}"
        )
    if not features.is_floating_point():
        raise ValueError(f"polar_scatter: features must be floating point, got {features.dtype}")
    if native.serves(features):
        order = order or sort_by_cell(cell, num_cells)
        return torch.ops.kdmos.polar_scatter(features.contiguous(), *order)
    return reference.polar_scatter(features, cell, num_cells)


@torch.no_grad()
def cell_max(features: Tensor, order: PointOrder) -> Tensor:
    """Largest feature of the points of each cell: `polar_scatter` where nobody asks which point it came from.

    For inference: there is no gradient. Deterministic. Under autocast: in the type of the features.

    Args:
        features: Point features, float [N, C].
        order: The points sorted by cell, M cells.
    Returns: [M, C], 0 for a cell without points. NaN wins.
    Raises: ValueError if the shapes do not fit or the features are not floating point.
    """
    if features.ndim != 2 or order.order.shape != features.shape[:1]:
        raise ValueError(
            f"cell_max: expected features [N, C] and an order [N], got {list(features.shape)} and "
            f"{list(order.order.shape)}"
        )
    if not features.is_floating_point():
        raise ValueError(f"cell_max: features must be floating point, got {features.dtype}")
    if native.serves(features):
        return torch.ops.kdmos.cell_max(features.contiguous(), *order)
    return reference.cell_max(features, *order)


def cells_to_bev(values: Tensor, cells: Tensor, num_scans: int, grid: PolarGrid) -> Tensor:
    """Values of the occupied cells in the dense BEV layout, 0 elsewhere.

    Args:
        values: float [M, C].
        cells: int64 [M], ascending, as `polar_grid` gives them; B * R * A at the end is padding and skipped.
        num_scans: B.
        grid: The polar grid.
    Returns: [B, C, R, A], channels last in memory.
    Raises: ValueError if M differs.
    """
    if values.shape[0] != cells.shape[0]:
        raise ValueError(f"cells_to_bev: {len(values)} values but {len(cells)} cells")
    if native.serves(values):
        rings, sectors, _ = grid.bins
        dense = torch.ops.kdmos.cells_to_bev(values.contiguous(), cells, num_scans * rings * sectors)
        return dense.view(num_scans, rings, sectors, -1).permute(0, 3, 1, 2)  # [B, C, R, A]
    return reference.cells_to_bev(values, cells, num_scans, grid)


def polar_scatter_bev(
    features: Tensor, cell: Tensor, cells: Tensor, num_scans: int, grid: PolarGrid, order: PointOrder | None = None
) -> Tensor:
    """`polar_scatter` straight into the dense layout: float [N, C] -> [B, C, R, A]; see there."""
    if native.serves(features) and not (features.requires_grad and torch.is_grad_enabled()):
        rings, sectors, _ = grid.bins
        order = order or sort_by_cell(cell, cells.shape[0])
        places = num_scans * rings * sectors
        dense = torch.ops.kdmos.polar_scatter_bev(features.contiguous(), *order, cells, places)
        return dense.view(num_scans, rings, sectors, -1).permute(0, 3, 1, 2)  # [B, C, R, A]
    maximum, _ = polar_scatter(features, cell, len(cells), order)
    return cells_to_bev(maximum, cells, num_scans, grid)


def linear_max(rows: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
    """Largest `row @ weight.T + bias` of the rows of each cell, whose product [N, C] is never whole in memory.

    Under autocast the product is made in the autocast type.

    Args:
        rows: float [N, D], sorted by cell: those of cell m are start[m]:start[m + 1]. No cell is empty.
        weight: [C, D].
        bias: [C].
        start: int64 [M + 1], from 0 to N.
    Returns: [M, C].
    """
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    rows, weight = rows.to(dtype), weight.to(dtype)
    if native.serves(rows):
        maximum = LinearMax.apply(rows, weight, start)
    else:
        cell = torch.repeat_interleave(start.diff(), output_size=len(rows))
        maximum, _ = reference.polar_scatter(rows @ weight.T, cell, len(start) - 1)
    return maximum + bias  # a cell's maximum moves with it


def sorted_max(rows: Tensor, start: Tensor) -> Tensor:
    """Largest of the rows of each cell, float [N, C] sorted by cell -> [M, C], 0 for a cell without rows; no gradient.

    Rows from start[M] on are padding.
    """
    if native.serves(rows):
        return torch.ops.kdmos.cell_max(rows, None, start)
    return reference.cell_max(rows, None, start)


class LinearMax(torch.autograd.Function):
    """`linear_max` without the bias, a chunk of whole cells after the other on a CPU."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, start: Tensor) -> Tensor:
        maxima, ctx.chunks, argmax = [], chunks(start), []
        for first, last, begin, end in ctx.chunks:
            product = rows[begin:end] @ weight.T
            maximum, point = torch.ops.kdmos.polar_scatter(product, None, chunk_start(start, first, last, begin))
            maxima.append(maximum)
            argmax.append(point.int())
        ctx.save_for_backward(rows, weight, start, *argmax)
        return joined(maxima)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, start, *argmax = ctx.saved_tensors
        to_rows, to_weight = torch.empty_like(rows), torch.zeros_like(weight, dtype=torch.float32)
        gradient = gradient.contiguous()
        for (first, last, begin, end), point in zip(ctx.chunks, argmax):
            product = torch.ops.kdmos.polar_scatter_backward(
                gradient[first:last], point.long(), None, chunk_start(start, first, last, begin), end - begin
            )
            torch.mm(product, weight, out=to_rows[begin:end])
            to_weight += product.T @ rows[begin:end]
        return to_rows, to_weight.to(weight.dtype), None


def chunks(start: Tensor) -> list[tuple[int, int, int, int]]:
    """Runs of whole cells of about CHUNK rows: (first cell, last cell, first row, last row), ends excluded.

    One run on other devices than a CPU, which they would only keep waiting, and for a compiler, which knows no values.
    """
    num_cells = len(start) - 1
    if start.device.type != "cpu" or torch.compiler.is_compiling():
        return [(0, num_cells, 0, None)]
    num_rows = int(start[-1])
    cuts = torch.searchsorted(start, torch.tensor(range(CHUNK, num_rows, CHUNK), dtype=torch.int64)).unique().tolist()
    cuts = [0, *(cut for cut in cuts if 0 < cut < num_cells), num_cells]
    begins = start[torch.tensor(cuts)].tolist()
    return list(zip(cuts[:-1], cuts[1:], begins[:-1], begins[1:]))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts one after the other, at least one; a single one as it is, which torch would copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def chunk_start(start: Tensor, first: int, last: int, begin: int) -> Tensor:
    """Where the cells of a chunk start in its own rows, which begin at row `begin`."""
    start = start[first : last + 1]
    return start - begin if begin else start  # on a GPU one launch less


@native.fake("polar_scatter")
def _(features, order, start):
    size = (start.shape[0] - 1, features.shape[1])
    return features.new_empty(size), features.new_empty(size, dtype=torch.int64)


@native.fake("polar_scatter_backward")
def _(gradient, argmax, order, start, num_points):
    return gradient.new_empty(num_points, gradient.shape[1])


@native.fake("cell_max")
def _(features, order, start):
    return features.new_empty(start.shape[0] - 1, features.shape[1])


@native.fake("polar_scatter_bev")
def _(features, order, start, cells, num_places):
    return features.new_empty(num_places, features.shape[1])


@native.fake("cells_to_bev")
def _(values, cells, num_places):
    return values.new_empty(num_places, values.shape[1])


def _keep_argmax(ctx, inputs, output) -> None:
    features, order, start = inputs
    ctx.num_points = features.shape[0]
    ctx.has_order = order is not None
    ctx.save_for_backward(output[1], start, *([order] if ctx.has_order else []))
    ctx.mark_non_differentiable(output[1])


def _to_points(ctx, gradient, _):
    argmax, start, *order = ctx.saved_tensors
    order = order[0] if ctx.has_order else None
    gradient = torch.ops.kdmos.polar_scatter_backward(gradient.contiguous(), argmax, order, start, ctx.num_points)
    return gradient, None, None


def _keep_cells(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


native.differentiate("polar_scatter", _to_points, _keep_argmax)
native.differentiate("cells_to_bev", lambda ctx, g: (g.index_select(0, *ctx.saved_tensors), None, None), _keep_cells)
