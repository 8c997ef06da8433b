"""How the height range of a cell changed between two windows of scans, read at the points."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import reference
from kdmos.settings import ResidualGrid


@torch.no_grad()
def height_residual(
    points: Tensor,
    offsets: Tensor,
    transforms: Tensor,
    grid: ResidualGrid,
    newer: tuple[int, int],
    older: tuple[tuple[int, int], ...],
    read: tuple[int, int],
) -> Tensor:
    """Height-range difference between a newer and one or more older windows, at the points of some scans.

    With I = max z - min z of a window's points in a cell (0 if it has none), a point of the newer window gets
    I_newer - I_older of its cell, one of the older window I_older - I_newer, any other 0. With A - B the
    difference, it is kept where 0.2 A >= B, 0.4 <= A <= 4 m and B's window sees the cell: a cell is occluded
    if it and all cells farther out on its ray have B = 0. Everything else is 0.

    Args:
        points: float32 [N, >= 3], x, y, z in metres, each scan in its own frame; non-finite points get 0.
        offsets: int64 [S + 1], rows of each scan, oldest first.
        transforms: float64 [S, 4, 4], from each scan's frame to the frame the cells are laid in.
        grid: The residual grid with its limits.
        newer: Scans (start, stop) of the newer window.
        older: Scans (start, stop) of each older window, one output channel each.
        read: Scans (start, stop) whose points are asked for.
    Returns: float32 [points of the scans read, len(older)], metres.
    Raises: ValueError if the shapes do not fit or a window is empty or outside [0, S].
    Source: the residual maps of MotionBEV (RA-L 2023).
    """
    num_scans = offsets.numel() - 1
    if points.ndim != 2 or points.shape[1] < 3:
        raise ValueError(f"height_residual: expected points [N, >= 3], got {list(points.shape)}")
    if transforms.shape != (num_scans, 4, 4):
        raise ValueError(
            f"height_residual: expected transforms [{num_scans}, 4, 4] for the {num_scans} scans of offsets, "
            f"got {list(transforms.shape)}"
        )
    for start, stop in (newer, *older, read):
        if not 0 <= start < stop <= num_scans:
            raise ValueError(f"height_residual: scans ({start}, {stop}) are not among 0..{num_scans}")
    return reference.height_residual(points, offsets, transforms.double(), grid, newer, older, read)
