"""Points to polar voxels: features, indices, and the ranks that every later op works with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdmos.ops import reference
from kdmos.settings import PolarGrid


class GriddedPoints(NamedTuple):
    """Where N packed points lie in the polar grid.

    features: float [N, 9]: offsets of (rho, phi, z) from the bin centre; rho, phi, z; x, y; remission.
    index: int64 [N, 3]: ring, sector, height.
    cell_rank: int64 [N]: row of the point's BEV cell in `cells`.
    cells: int64 [M], ascending: (scan * R + ring) * A + sector of each occupied cell.
    voxel_rank: int64 [N]: row of the point's voxel in `voxels`.
    voxels: int64 [V], ascending: cell * Z + height of each occupied voxel.
    """

    features: Tensor
    index: Tensor
    cell_rank: Tensor
    cells: Tensor
    voxel_rank: Tensor
    voxels: Tensor


@torch.no_grad()
def polar_grid(points: Tensor, offsets: Tensor, grid: PolarGrid) -> GriddedPoints:
    """Voxel, BEV cell and the nine input features of each point.

    Index = floor((clip(v) - min) / interval) in float64; the feature offsets are those of the unclipped point.
    A point within 1e-5 of a cell border may fall on the other side on another backend.

    Args:
        points: float32 [N, 4] = x, y, z in metres, remission; finite.
        offsets: int64 [B + 1], rows of each scan.
        grid: The polar grid.
    Returns: `GriddedPoints`. The number of occupied cells and voxels is read back from the device once.
    Raises: ValueError if the points are not [N, 4] or the offsets do not end at N.
    Source: the polar features of PolarNet (CVPR 2020) as used by MotionBEV (RA-L 2023).
    """
    if points.ndim != 2 or points.shape[1] != 4:
        raise ValueError(f"polar_grid: expected points [N, 4], got {list(points.shape)}; is remission missing?")
    if offsets.device.type == "cpu" and offsets[-1] != len(points):  # elsewhere reading it would wait for the device
        raise ValueError(f"polar_grid: offsets end at {int(offsets[-1])}, but there are {len(points)} points")
    return GriddedPoints(*reference.polar_grid(points, offsets, grid))
