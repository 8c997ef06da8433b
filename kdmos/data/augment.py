"""Random changes to a scan as a whole: drawn from (seed, epoch, scan), applied on the step's device."""

from __future__ import annotations

import math
import zlib

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


def _random(seed: int, epoch: int, scan: ScanId) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, zlib.crc32(scan.sequence.encode()), scan.frame])


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
