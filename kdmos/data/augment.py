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
    rng = np.random.default_rng([seed, epoch, zlib.crc32(scan.sequence.encode()), scan.frame])
    # All numbers are drawn, wanted or not: switching one kind off leaves the others as they were.
    angle, mirror, shift = rng.uniform(0, 2 * math.pi), rng.integers(0, 2, size=2), rng.normal(size=3)
    angle = angle if rotate else 0.0
    rotation = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    signs = np.append(1 - 2 * mirror, 1) if flip else np.ones(3)
    return np.column_stack([signs[:, None] * rotation, translation * shift])


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
