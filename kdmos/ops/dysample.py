"""Learned upsampling: each output pixel samples its input at a place the network chooses."""

from __future__ import annotations

from torch import Tensor

from kdmos.ops import reference


def dysample(x: Tensor, offset: Tensor, scale: int = 2, groups: int = 4, circular: bool = False) -> Tensor:
    """Input sampled bilinearly at offset places, `scale` x `scale` output pixels for each input pixel.

    Sub-pixel (i, j) of input pixel (h, w) takes its group of channels at (h + dy, w + dx), clamped to the
    border.

    Args:
        x: float [B, C, H, W]; C a multiple of `groups`.
        offset: float [B, 2 * groups * scale^2, H, W], input pixels; channels are (x or y, group, i, j).
        scale: Output pixels per input pixel and axis.
        groups: Groups of channels that share their places.
        circular: Whether the last axis (phi) wraps round instead of being clamped.
    Returns: [B, C, scale * H, scale * W].
    Raises: ValueError if the shapes do not fit.
    Source: Liu et al., Learning to Upsample by Learning to Sample, ICCV 2023.
    """
    expected = [x.shape[0], 2 * groups * scale * scale, *x.shape[2:]]
    if x.ndim != 4 or list(offset.shape) != expected:
        raise ValueError(f"dysample: expected offset {expected} for x {list(x.shape)}, got {list(offset.shape)}")
    if x.shape[1] % groups:
        raise ValueError(f"dysample: {x.shape[1]} channels do not divide into {groups} groups")
    return reference.dysample(x, offset, scale, groups, circular)
