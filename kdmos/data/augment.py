"""Random changes to a scan as a whole: drawn from (seed, epoch, scan), applied on the step's device."""

from __future__ import annotations

import math
import zlib
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdmos.data.batch import ScanId
from kdmos.ops.reference import project, scan_index
from kdmos.settings import ResidualGrid


def draw_transform(
    seed: int, epoch: int, scan: ScanId, rotate: bool = True, flip: bool = True, translation: float = 0.1
) -> np.ndarray:
    """A random rigid or mirrored motion of one scan, the same for the same (seed, epoch, scan) everywhere.

    Args:
        seed, epoch, scan: What the randomness is a function of.
        rotate: Yaw, uniform over the full turn.
        flip: Mirror x and y, each with probability 1/2, after the rotation.
        translation: Standard deviation per axis, metres, added last.
    Returns: float64 [3, 4], applied to column vectors.
    """
    rng = _random(seed, epoch, scan)
    # All numbers are drawn, wanted or not: switching one kind off leaves the others as they were.
    angle, mirror, shift = rng.uniform(0, 2 * math.pi), rng.integers(0, 2, size=2), rng.normal(size=3)
    matrix = _turned(angle if rotate else 0.0, mirror if flip else np.zeros(2, int))
    return np.column_stack([matrix, translation * shift])


def draw_window_transform(
    seed: int, epoch: int, scan: ScanId, rotate: float = 0.5, scale: tuple[float, float] = (0.9, 1.1), flip: bool = True
) -> np.ndarray:
    """A random turned, scaled or mirrored copy of a window of scans, as `draw_transform`.

    Args:
        seed, epoch, scan: What the randomness is a function of.
        rotate: Probability of a yaw, uniform over the full turn.
        scale: Lowest and highest factor, uniform between.
        flip: Mirror x and y, each with probability 1/2, after the rotation.
    Returns: float64 [3, 4], applied to column vectors.
    Source: the augmentation of MambaMOS (ACM MM 2024).
    """
    rng = _random(seed, epoch, scan)
    turned, angle = rng.uniform() < rotate, rng.uniform(-math.pi, math.pi)
    factor, mirror = rng.uniform(*scale), rng.integers(0, 2, size=2)
    matrix = factor * _turned(angle if turned else 0.0, mirror if flip else np.zeros(2, int))
    return np.column_stack([matrix, np.zeros(3)])


class RemissionChange(NamedTuple):
    """What `change_remission` makes of a scan's remission: gain * r ** gamma, then patch by patch.

    patch: Edge of the cubes of space that are one patch, metres. spread: A patch has its own factor, log-uniform within
    exp(+-spread). dark: Share of the patches whose remission is 0. key: Which patches.
    """

    gain: float
    gamma: float
    patch: float
    spread: float
    dark: float
    key: int


NO_REMISSION = 1 / 8  # share of the changed scans that lose it: some sensors have none


def draw_remission(seed: int, epoch: int, scan: ScanId, share: float) -> RemissionChange | None:
    """Another remission for one scan, the same for the same (seed, epoch, scan) everywhere.

    Remission differs from sensor to sensor and on car paint from panel to panel, often down to 0. A student that never
    saw this takes it for a sign of what moves.

    Args:
        seed, epoch, scan: What the randomness is a function of.
        share: Of the scans that are changed, 0..1.
    Returns: the change; None: none.
    """
    rng = _random(seed, epoch, scan, 1)
    changed, lost = rng.random(2) < (share, NO_REMISSION)
    gain, gamma, patch = np.exp2(rng.uniform((-1, -1, -2), (1, 1, 1))).tolist()
    spread, dark = rng.uniform(0, (0.7, 0.6)).tolist()
    key = int(rng.integers(1 << 31))
    if not changed:
        return None
    return RemissionChange(0.0 if lost else gain, gamma, patch, spread, dark, key)


def change_remission(points: Tensor, offsets: Tensor, changes: list[RemissionChange | None]) -> Tensor:
    """Change the remission of each scan's points.

    Args:
        points: float32 [N, 4], x, y, z in metres, remission 0..1.
        offsets: int64 [B + 1].
        changes: Of each scan; None: none.
    Returns: float32 [N, 4], new unless nothing changes; remission in 0..1.
    """
    if not any(changes):
        return points
    parts = [
        part if change is None else torch.cat([part[:, :3], _changed(part, change)[:, None]], 1)
        for part, change in zip(points.tensor_split(offsets[1:-1].cpu()), changes)
    ]
    return torch.cat(parts)


def _changed(points: Tensor, change: RemissionChange) -> Tensor:
    """[n], the new remission of a scan."""
    x, y, z = (points[:, :3] / change.patch).floor().to(torch.int64).unbind(1)
    # 16 bits of a patch's hash say whether it is dark, 16 others its factor
    mixed = _mixed((x * 73856093) ^ (y * 19349663) ^ (z * 83492791) ^ change.key)
    low, high = (mixed >> 8) & 0xFFFF, (mixed >> 24) & 0xFFFF
    factor = ((high / 0x8000 - 1) * change.spread).exp() * (low >= change.dark * 0x10000)
    return (change.gain * points[:, 3].clamp(0, 1) ** change.gamma * factor).clamp(0, 1)


class FalseMotion(NamedTuple):
    """What `add_false_motion` puts into a scan's motion channels.

    share: Of the cells that get some. rows: Neighbouring yaw rows that get it together. key: Which cells.
    """

    share: float
    rows: int
    key: int


MOST_FALSE = 0.4  # of the cells of a scan; what moves has other channels than 0 in nearly all of its cells


def draw_false_motion(seed: int, epoch: int, scan: ScanId, share: float) -> FalseMotion | None:
    """False motion for one scan, the same for the same (seed, epoch, scan) everywhere.

    Args:
        seed, epoch, scan: What the randomness is a function of.
        share: Of the scans that are changed, 0..1.
    Returns: the change; None: none.
    """
    rng = _random(seed, epoch, scan, 2)
    changed, amount = rng.random() < share, rng.uniform(0, MOST_FALSE)
    rows, key = rng.integers(1, 5), rng.integers(1 << 31)
    return FalseMotion(amount, int(rows), int(key)) if changed else None


def add_false_motion(
    points: Tensor,
    offsets: Tensor,
    residual: Tensor,
    still: Tensor,
    grid: ResidualGrid,
    changes: list[FalseMotion | None],
) -> Tensor:
    """Give cells of what stands the motion channels of something that came or went.

    An upright side that a wrong pose or a turn of the sensor shifts over a cell's border does this. It fills the cell
    to its whole height, in at most half of the channels that the scan has: a channel that is 0 all over counts as one
    that needs scans which are not there.

    Args:
        points: float32 [N, 4], in the sensor's frame.
        offsets: int64 [B + 1].
        residual: float32 [N, K], metres.
        still: bool [N], which points stand.
        grid: The residual grid of the channels.
        changes: Of each scan; None: none.
    Returns: float32 [N, K], new unless nothing changes; what is not 0 stays.
    """
    if not any(changes):
        return residual
    out, bounds = residual.clone(), offsets.tolist()
    for change, start, end in zip(changes, bounds, bounds[1:]):
        if change is not None:
            part = residual[start:end]
            false = _false_motion(points[start:end], part, still[start:end], grid, change)
            out[start:end] = torch.where(part == 0, false, part)
    return out


def _false_motion(points: Tensor, residual: Tensor, still: Tensor, grid: ResidualGrid, change: FalseMotion) -> Tensor:
    """[n, K], 0 where there is none."""
    cell, inside = project(points[:, :3], grid)
    takes = inside & still
    low, high = points.new_full((2, grid.rows * grid.columns), math.inf)
    low.scatter_reduce_(0, cell[takes], points[takes, 2], "amin")
    high.scatter_reduce_(0, cell[takes], -points[takes, 2], "amin")
    extent = (-high - low)[cell]  # -inf: an empty cell
    row, column = cell // grid.columns, cell % grid.columns
    mixed = _mixed((row // change.rows) * grid.columns + column ^ change.key)
    chosen = takes & ((mixed >> 8 & 0xFFFF) < change.share * 0x10000)
    chosen &= (extent >= grid.min_height) & (extent <= grid.max_height)
    known = residual.any(0)
    count, place = known.sum(), known.cumsum(0) - 1
    first, length = (mixed >> 24) % count.clamp(min=1), (mixed >> 32) % (count // 2).clamp(min=1) + 1
    on = known & (count > 1) & (place >= first[:, None]) & (place < (first + length)[:, None])
    return torch.where(on & chosen[:, None], extent[:, None], 0.0)


class Sector(NamedTuple):
    """What of a scan `mix_sectors` keeps.

    about: Which points the sector may be about: "moving", "evidence" (stands, yet has a channel other than 0), "any".
    pick: Which of these, 0..1. place: Where in the sector it lies, 0..1.
    """

    about: str
    pick: float
    place: float


def draw_sector(seed: int, epoch: int, scan: ScanId) -> Sector:
    """A sector of one scan, the same for the same (seed, epoch, scan) everywhere."""
    rng = _random(seed, epoch, scan, 3)
    return Sector(str(rng.choice(("moving", "evidence", "any"))), *rng.random(2).tolist())


def mix_sectors(
    points: Tensor,
    offsets: Tensor,
    residual: Tensor,
    moving: Tensor,
    sectors: list[Sector],
    together: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make one scan of a sector each of some.

    Most of a scan is road and walls, learnt soon. A step that sees the interesting third of three scans costs as much
    as one that sees one scan.

    Args:
        points: float32 [N, 4].
        offsets: int64 [B + 1].
        residual: float32 [N, K].
        moving: bool [N], which points move.
        sectors: Of each scan.
        together: How many scans become one; a rest of g scans becomes one of g sectors, a single scan stays whole.
    Returns: points float32 [M, 4], each scan turned until its sector has its place; kept int64 [M], their rows;
        offsets int64 [ceil(B / together) + 1].
    Source: the swap of scenes of PolarMix (NeurIPS 2022); that a sector is about something is ours.
    """
    parts, rows, lengths, bounds = [], [], [0], offsets.tolist()
    for scan, (start, end) in enumerate(pairwise(bounds)):
        first = scan - scan % together
        number, count = scan - first, min(together, len(sectors) - first)
        part, inside = points[start:end], torch.arange(end - start, device=points.device)
        if count > 1 and len(part):
            about = _about(sectors[scan], residual[start:end], moving[start:end])
            x, y = part[int(about[int(sectors[scan].pick * len(about))]), :2].tolist()
            part = _yawed(part, (number + sectors[scan].place) / count * 2 * math.pi - math.atan2(y, x))
            azimuth = torch.atan2(part[:, 1], part[:, 0]).remainder(2 * math.pi)
            inside = inside[(azimuth * (count / (2 * math.pi))).long() == number]
        parts.append(part[inside])
        rows.append(inside + start)
        if number:
            lengths[-1] += len(inside)
        else:
            lengths.append(len(inside))
    return torch.cat(parts), torch.cat(rows), torch.tensor(lengths, device=offsets.device).cumsum(0)


def _about(sector: Sector, residual: Tensor, moving: Tensor) -> Tensor:
    """int64 [m > 0], the points that a sector may be about; all where there is none of its kind."""
    if sector.about == "moving":
        found = moving.nonzero()[:, 0]
    elif sector.about == "evidence":
        found = (residual.any(1) & ~moving).nonzero()[:, 0]
    else:
        return torch.arange(len(moving))
    return found if len(found) else torch.arange(len(moving))


def _yawed(points: Tensor, angle: float) -> Tensor:
    x, y, rest = points[:, 0], points[:, 1], points[:, 2:]
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.cat([torch.stack([cos * x - sin * y, sin * x + cos * y], 1), rest], 1)


def _mixed(key: Tensor) -> Tensor:
    """A hash of int64, itself not negative."""
    key = (key ^ (key >> 15)) * 0x2C1B3C6D
    return (key ^ (key >> 13)) * 0x297A2D39 & 0x7FFFFFFFFFFFFFFF


def _random(seed: int, epoch: int, scan: ScanId, *purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, zlib.crc32(scan.sequence.encode()), scan.frame, *purpose])


def _turned(angle: float, mirror: np.ndarray) -> np.ndarray:
    """[3, 3]: a yaw, then x and y mirrored where asked for."""
    rotation = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    return np.append(1 - 2 * mirror, 1)[:, None] * rotation


def apply_transforms(points: Tensor, offsets: Tensor, transforms: np.ndarray) -> Tensor:
    """Move the points of each scan by its transform.

    Args:
        points: float32 [N, 4], x, y, z in metres, remission (kept).
        offsets: int64 [B + 1].
        transforms: float64 [B, 3, 4].
    Returns: float32 [N, 4], new.
    """
    matrix = torch.from_numpy(transforms).to(points.device)[scan_index(offsets, len(points))]  # [N, 3, 4]
    xyz = (matrix[:, :, :3] * points[:, None, :3]).sum(2) + matrix[:, :, 3]
    return torch.cat([xyz.to(points.dtype), points[:, 3:]], 1)
