"""Copying a scan and looking at it in one pass: which points cannot be used, and whether the remission is one."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import native, reference


def copy_scan(points: Tensor, out: Tensor, most: float) -> Tensor:
    """Copies a scan into memory that is there, and counts what is wrong with it.

    A point with any value that is not finite becomes NaN in all four. For inference: no gradient.

    Args:
        points: float32 [n, 4] = x, y, z (metres, LiDAR frame), remission; rows at any distance, each whole in memory.
        out: float32 [n, 4], contiguous, on the same device, pinned or not; written.
        most: The largest remission to expect.
    Returns: int64 [2] on the same device: points that are not finite; points that are, with a remission below 0 or
        above `most`. The same on any number of threads.
    Raises: ValueError if shape, type, device or layout do not fit.
    """
    if points.ndim != 2 or points.shape[1] != 4 or points.dtype != torch.float32 or points.stride(1) != 1:
        raise ValueError(
            f"copy_scan: expected points float32 [n, 4], each row whole in memory, got {points.dtype} "
            f"{list(points.shape)} with strides {list(points.stride())}"
        )
    if out.shape != points.shape or out.dtype != points.dtype or out.device != points.device or not out.is_contiguous():
        raise ValueError(
            f"copy_scan: expected out float32 {list(points.shape)} on {points.device}, contiguous, got {out.dtype} "
            f"{list(out.shape)} on {out.device} with strides {list(out.stride())}"
        )
    if native.serves(points):
        return torch.ops.kdmos.copy_scan(points, out, most)
    return reference.copy_scan(points, out, most)


@native.fake("copy_scan")
def _(points, out, most):
    return points.new_empty(2, dtype=torch.int64)
