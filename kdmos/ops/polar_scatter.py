"""Max pooling of point features over BEV cells, and cells into the dense bird's-eye view."""

from __future__ import annotations

from torch import Tensor

from kdmos.ops import reference
from kdmos.settings import PolarGrid


def polar_scatter(features: Tensor, cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Largest feature of the points in each BEV cell, and which point it came from.

    Args:
        features: Point features, float [N, C].
        cell: Cell rank of each point, int64 [N]; ranks outside [0, num_cells) are padding and skipped.
        num_cells: Number of cells, >= 0.
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
    return reference.polar_scatter(features, cell, num_cells)


def cells_to_bev(values: Tensor, cells: Tensor, num_scans: int, grid: PolarGrid) -> Tensor:
    """Values of the occupied cells in the dense BEV layout, 0 elsewhere.

    Args:
        values: float [M, C].
        cells: int64 [M] as `polar_grid` gives them.
        num_scans: B.
        grid: The polar grid.
    Returns: [B, C, R, A], channels last in memory.
    Raises: ValueError if M differs.
    """
    if len(values) != len(cells):
        raise ValueError(f"cells_to_bev: {len(values)} values but {len(cells)} cells")
    return reference.cells_to_bev(values, cells, num_scans, grid)


def polar_scatter_bev(features: Tensor, cell: Tensor, cells: Tensor, num_scans: int, grid: PolarGrid) -> Tensor:
    """`polar_scatter` straight into the dense layout: float [N, C] -> [B, C, R, A]; see there."""
    maximum, _ = polar_scatter(features, cell, len(cells))
    return cells_to_bev(maximum, cells, num_scans, grid)
