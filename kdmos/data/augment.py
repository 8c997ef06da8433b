"""Random changes to a scan as a whole: drawn from (seed, epoch, scan), applied on the step's device."""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdmos.data.batch import ScanId
from kdmos.ops.reference import scan_index


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
    mixed = (x * 73856093) ^ (y * 19349663) ^ (z * 83492791) ^ change.key
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D
    mixed = (mixed ^ (mixed >> 13)) * 0x297A2D39
    low, high = (mixed >> 8) & 0xFFFF, (mixed >> 24) & 0xFFFF
    factor = ((high / 0x8000 - 1) * change.spread).exp() * (low >= change.dark * 0x10000)
    return (change.gain * points[:, 3].clamp(0, 1) ** change.gamma * factor).clamp(0, 1)


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
