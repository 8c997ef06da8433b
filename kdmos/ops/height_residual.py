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
        transforms: float64 [S, 4, 4], from each scan's frame to the frame the cells are laid in; best on the CPU.
        grid: The residual grid with its limits.
        newer: Scans (start, stop) of the newer window.
        older: Scans (start, stop) of each older window, one output channel each.
        read: Scans (start, stop) whose points are asked for.
    Returns: float32 [points of the scans read, len(older)], metres.
    Raises: ValueError if the shapes do not fit or a window is empty or outside [0, S].
    Source: the residual maps of MotionBEV (RA-L 2023).
    """
    _check("height_residual", scans)
    like = scans[0]
    lengths = [len(points) for points in scans[slice(*read)]]
    out = torch.zeros(sum(lengths), len(older), device=like.device)
    height_residual_into(scans, transforms, grid, newer, older, read, out.split(lengths), [0] * len(lengths))
    return out


@torch.no_grad()
def height_residual_into(
    scans: Sequence[Tensor],
    transforms: Tensor,
    grid: ResidualGrid,
    newer: tuple[int, int],
    older: tuple[tuple[int, int], ...],
    read: tuple[int, int],
    out: Sequence[Tensor],
    channels: Sequence[int],
) -> None:
    """`height_residual` into tensors that are there: the channels that a stream's scans wait with.

    Args: The first as for `height_residual`; transforms on the CPU save a copy and a wait, wherever the scans are.
        out: float32 [n, >= channel + len(older)] of each scan that is read, on the scans' device; 0 where values go.
        channels: The column of each, where the first of its values goes.
    Raises: ValueError if the shapes do not fit or a window is empty or outside [0, S].
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
    sizes = [(len(points), channel + len(older)) for points, channel in zip(scans[slice(*read)], channels)]
    if [len(out), len(channels)] != [read[1] - read[0]] * 2 or any(
        to.ndim != 2 or len(to) != size or to.shape[1] < columns for to, (size, columns) in zip(out, sizes)
    ):
        raise ValueError(
            f"height_residual: expected places [n, >= columns] of {sizes}, got {[list(to.shape) for to in out]}"
        )
    if native.serves(scans[0]):
        windows = [bound for window in (newer, *older) for bound in window]
        inputs = _rows(scans), _on_host(transforms), *_settings(grid), windows, list(read)
        torch.ops.kdmos.height_residual(*inputs, list(out), list(channels))
        return
    values = reference.height_residual(scans, transforms.to(scans[0].device, torch.float64), grid, newer, older, read)
    for to, part, channel in zip(out, values.split([size for size, _ in sizes]), channels):
        to[:, channel : channel + len(older)] = part


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
    if native.serves(scans[0]):
        return torch.ops.kdmos.height_residual_sequence(_rows(scans), _on_host(transforms), *_settings(grid))
    return reference.height_residual_sequence(scans, transforms.to(scans[0].device, torch.float64), grid)


def _check(op: str, scans: Sequence[Tensor]) -> None:
    for points in scans:
        if points.ndim != 2 or points.shape[1] < 3:
            raise ValueError(f"{op}: expected scans [n, >= 3], got {list(points.shape)}")


def _rows(scans: Sequence[Tensor]) -> list[Tensor]:
    """The native ops read float32 rows that lie whole in memory, at any distance from one another."""
    return [(scan if scan.stride(1) == 1 else scan.contiguous()).float() for scan in scans]


def _on_host(transforms: Tensor) -> Tensor:
    """The kernels take transforms as arguments of their launches."""
    return transforms.to("cpu", torch.float64).contiguous()


def _settings(grid: ResidualGrid) -> tuple[list[int], list[float]]:
    limits = [grid.max_range, *grid.z, grid.min_ratio, grid.min_height, grid.max_height]
    return [grid.rows, grid.columns], [float(limit) for limit in limits]


@native.fake("height_residual")
def _(scans, transforms, bins, limits, windows, read, out, channels):
    return None


@native.fake("height_residual_sequence")
def _(scans, transforms, bins, limits):
    return scans[0].new_empty(sum(scan.shape[0] for scan in scans), transforms.shape[1])
