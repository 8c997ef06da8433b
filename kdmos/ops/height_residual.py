"""How the height range of a cell changed between two windows of scans, read at the points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdmos.ops import native, reference
from kdmos.settings import ResidualGrid


@torch.no_grad()
def height_residual(
    scans: Sequence[Tensor],
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
        scans: S tensors float32 [n, >= 3], oldest first: x, y, z in metres, each in its own frame. Non-finite
            points get 0. They need not lie behind one another in memory: a window slides without a copy.
        transforms: float64 [S, 4, 4], from each scan's frame to the frame the cells are laid in.
        grid: The residual grid with its limits.
        newer: Scans (start, stop) of the newer window.
        older: Scans (start, stop) of each older window, one output channel each.
        read: Scans (start, stop) whose points are asked for.
    Returns: float32 [points of the scans read, len(older)], metres.
    Raises: ValueError if the shapes do not fit or a window is empty or outside [0, S].
    Source: the residual maps of MotionBEV (RA-L 2023).
    """
    _check("height_residual", scans)
    if transforms.shape != (len(scans), 4, 4):
        raise ValueError(
            f"height_residual: expected transforms [{len(scans)}, 4, 4] for {len(scans)} scans, "
            f"got {list(transforms.shape)}"
        )
    for start, stop in (newer, *older, read):
        if not 0 <= start < stop <= len(scans):
            raise ValueError(f"height_residual: scans ({start}, {stop}) are not among 0..{len(scans)}")
    transforms = transforms.double().contiguous()
    if native.serves(transforms):
        windows = [bound for window in (newer, *older) for bound in window]
        return torch.ops.kdmos.height_residual(_rows(scans), transforms, *_settings(grid), windows, list(read))
    return reference.height_residual(scans, transforms, grid, newer, older, read)


@torch.no_grad()
def height_residual_sequence(scans: Sequence[Tensor], transforms: Tensor, grid: ResidualGrid) -> Tensor:
    """All K channels of the published form over a run of scans, in one pass.

    Step i compares the newer half of scans i..i + K - 1 with the older half, as `height_residual` does. What scan
    i + j reads there is its channel K - 1 - j: channel k of a scan is read k scans later.

    Args:
        scans: S tensors as for `height_residual`.
        transforms: float64 [S - K + 1, K, 4, 4]: for each step, from each of its scans' frames to its newest one's.
        grid: The residual grid with its limits.
    Returns: float32 [points of all scans, K], metres; 0 where the run has no step for a channel.
    Raises: ValueError if the shapes do not fit.
    Source: the residual maps of MotionBEV (RA-L 2023).
    """
    _check("height_residual_sequence", scans)
    steps, num_channels = transforms.shape[:2] if transforms.ndim == 4 else (-1, 0)
    if transforms.shape[2:] != (4, 4) or num_channels % 2 or not steps == len(scans) - num_channels + 1 >= 1:
        raise ValueError(
            f"height_residual_sequence: expected transforms [S - K + 1, K, 4, 4] for {len(scans)} scans and even K, "
            f"got {list(transforms.shape)}"
        )
    transforms = transforms.double().contiguous()
    if native.serves(transforms):
        return torch.ops.kdmos.height_residual_sequence(_rows(scans), transforms, *_settings(grid))
    return reference.height_residual_sequence(scans, transforms, grid)


def _check(op: str, scans: Sequence[Tensor]) -> None:
    for points in scans:
        if points.ndim != 2 or points.shape[1] < 3:
            raise ValueError(f"{op}: expected scans [n, >= 3], got {list(points.shape)}")


def _rows(scans: Sequence[Tensor]) -> list[Tensor]:
    """The native ops read float32 rows that lie whole in memory, at any distance from one another."""
    return [(scan if scan.stride(1) == 1 else scan.contiguous()).float() for scan in scans]


def _settings(grid: ResidualGrid) -> tuple[list[int], list[float]]:
    limits = [grid.max_range, *grid.z, grid.min_ratio, grid.min_height, grid.max_height]
    return [grid.rows, grid.columns], [float(limit) for limit in limits]


@native.fake("height_residual")
def _(scans, transforms, bins, limits, windows, read):
    num_points = sum(scan.shape[0] for scan in scans[read[0] : read[1]])
    return transforms.new_empty(num_points, len(windows) // 2 - 1, dtype=torch.float32)


@native.fake("height_residual_sequence")
def _(scans, transforms, bins, limits):
    return transforms.new_empty(sum(scan.shape[0] for scan in scans), transforms.shape[1], dtype=torch.float32)
