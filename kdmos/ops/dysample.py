"""Learned upsampling: each output pixel samples its input at a place the network chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import native, reference

MOST_PLACES = 64  # groups * scale^2 of the native ops


def dysample(x: Tensor, offset: Tensor, scale: int = 2, groups: int = 4, circular: bool = False) -> Tensor:
    """Input sampled bilinearly at offset places, `scale` x `scale` output pixels for each input pixel.

    Sub-pixel (i, j) of input pixel (h, w) takes its group of channels at (h + dy, w + dx), clamped to the
    border. Under autocast: in the type of x, places in float32. On a GPU the gradient of x is summed in no fixed order.

    Args:
        x: float [B, C, H, W]; C a multiple of `groups`. Channels last is fastest.
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
    if native.serves(x) and groups * scale * scale <= MOST_PLACES:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        offset = native.channels_last(offset.to(wide))
        return torch.ops.kdmos.dysample(native.channels_last(x), offset, scale, groups, circular)
    return reference.dysample(x, offset, scale, groups, circular)


@native.fake("dysample")
def _(x, offset, scale, groups, circular):
    batch, channels, height, width = x.shape
    return native.like_channels_last(x, batch, channels, scale * height, scale * width)


@native.fake("dysample_backward")
def _(gradient, x, offset, scale, groups, circular):
    return native.like_channels_last(x, *x.shape), native.like_channels_last(offset, *offset.shape)


def _keep(ctx, inputs, output) -> None:
    x, offset, *ctx.settings = inputs
    ctx.save_for_backward(x, offset)


def _backward(ctx, gradient):
    x, offset = ctx.saved_tensors
    gradient = native.channels_last(gradient)
    return *torch.ops.kdmos.dysample_backward(gradient, x, offset, *ctx.settings), None, None, None


native.differentiate("dysample", _backward, _keep)
