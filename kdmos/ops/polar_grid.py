"""Points to polar voxels: features, indices, and the sort and ranks that every later op works with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdmos.ops import native, reference
from kdmos.settings import PolarGrid


class PointOrder(NamedTuple):
    """Points sorted by the cells (or voxels) they lie in.

    order: int64 [N], points; those of cell m are order[start[m]:start[m + 1]].
    start: int64 [M + 1]. Points from start[M] on lie in no cell.
    """

    order: Tensor
    start: Tensor


class GriddedPoints(NamedTuple):
    """Where N packed points lie in the polar grid.

    features: float [N, 9]: offsets of (rho, phi, z) from the bin centre; rho, phi, z; x, y; remission.
    cell_rank: int64 [N]: row of the point's BEV cell in `cells`.
    cells: int64 [M], ascending: (scan * R + ring) * A + sector of each occupied cell.
    cell_start: int64 [M + 1], see `by_cell`.
    voxel_rank: int64 [N]: row of the point's voxel in `voxels`.
    voxels: int64 [V], ascending: cell * Z + height of each occupied voxel.
    voxel_start: int64 [V + 1], see `by_voxel`.
    order: int64 [N]: the points sorted by voxel, those of a voxel in their order.

    Of fixed size, M = V = N, and there is padding, which the ops that take these skip:
        cells and voxels without points come last: B * R * A and B * R * A * Z, beyond the grid; they start where the
        points end;
        padding points come last in `order`, in no cell or voxel; their features are 0, their cell_rank N, which is no
        cell, their voxel_rank N - 1, a voxel without points;
        with `max_cells`, M is that; cells beyond have no place, their points a rank from M on, and `cell_start` ends
        before the points do: that is how to see it.
    """

    features: Tensor
    cell_rank: Tensor
    cells: Tensor
    cell_start: Tensor
    voxel_rank: Tensor
    voxels: Tensor
    voxel_start: Tensor
    order: Tensor

    @property
    def by_cell(self) -> PointOrder:
        return PointOrder(self.order, self.cell_start)

    @property
    def by_voxel(self) -> PointOrder:
        return PointOrder(self.order, self.voxel_start)

    def index(self, grid: PolarGrid) -> Tensor:
        """Ring, sector and height of each point, int64 [N, 3]."""
        rings, sectors, heights = grid.bins
        voxel = self.voxels[self.voxel_rank]
        cell = voxel // heights
        return torch.stack([cell // sectors % rings, cell % sectors, voxel % heights], 1)


@torch.no_grad()
def polar_grid(
    points: Tensor, offsets: Tensor, grid: PolarGrid, fixed_size: bool = False, max_cells: int | None = None
) -> GriddedPoints:
    """Voxel, BEV cell and the nine input features of each point.

    Index = floor((clip(v) - min) / interval) in float64; the feature offsets are those of the unclipped point.
    A point within 1e-5 of a cell border may fall on the other side on another backend. Under autocast: unchanged.

    Args:
        points: float32 [N, 4] = x, y, z in metres, remission; finite.
        offsets: int64 [B + 1], rows of each scan.
        grid: The polar grid.
        fixed_size: Whether the sizes of the results depend on N alone, as a CUDA graph needs. The offsets may then end
            before N: the rows after are padding, of any value. For inference: `voxel_head` and `cells_to_bev` have no
            gradient with padding.
        max_cells: Cells that there is room for, if of fixed size; None: as many as points. A scan of 120 k points has
            some 25 k, and room is work for what comes after.
    Returns: `GriddedPoints`. The number of occupied cells and voxels is read back from the device once, of fixed size
        never by the native ops.
    Raises: ValueError if the points are not [N, 4] or the offsets do not end at N.
    Source: the polar features of PolarNet (CVPR 2020) as used by MotionBEV (RA-L 2023).
    """
    if points.ndim != 2 or points.shape[1] != 4:
        raise ValueError(f"polar_grid: expected points [N, 4], got {list(points.shape)}; is remission missing?")
    # elsewhere reading it would wait for the device
    if (
        not fixed_size
        and offsets.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and offsets[-1] != len(points)
    ):
        raise ValueError(f"polar_grid: offsets end at {int(offsets[-1])}, but there are {len(points)} points")
    size = fixed_size, -1 if max_cells is None else max_cells
    if native.serves(points) and points.dtype == torch.float32:
        shape = (list(grid.lower), list(grid.upper), list(grid.interval), list(grid.bins))
        return GriddedPoints(*torch.ops.kdmos.polar_grid(points.contiguous(), offsets.contiguous(), *shape, *size))
    return GriddedPoints(*reference.polar_grid(points, offsets, grid, *size))


@native.fake("polar_grid")
def _(points, offsets, lower, upper, interval, bins, fixed_size=False, max_cells=-1):
    num_points = num_cells = num_voxels = points.shape[0]
    if fixed_size and max_cells >= 0:
        num_cells = min(max_cells, num_points)
    if not fixed_size:
        context = torch.library.get_ctx()
        num_cells, num_voxels = context.new_dynamic_size(), context.new_dynamic_size()
    sizes = (num_points, num_cells, num_cells + 1, num_points, num_voxels, num_voxels + 1, num_points)
    return points.new_empty(num_points, 9), *(points.new_empty(size, dtype=torch.int64) for size in sizes)


@native.fake("sort_by_cell")
def _(cell, num_cells):
    return torch.empty_like(cell), cell.new_empty(num_cells + 1)


def sort_by_cell(cell: Tensor, num_cells: int) -> PointOrder:
    """Points sorted by cell, those of a cell in their order, those outside [0, num_cells) last."""
    return PointOrder(*torch.ops.kdmos.sort_by_cell(cell.contiguous(), num_cells))
