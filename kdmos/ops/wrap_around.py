"""Closing the circle of phi before a convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdmos.ops import native, reference


def wrap_around(parts: Sequence[Tensor], halo: int = 1) -> Tensor:
    """Images joined along their channels, with the first and last sectors repeated beyond the ends.

    One copy each way, where `torch.cat` and a circular `F.pad` need two and the backward of the latter far more.

    Args:
        parts: float [B, C_i, R_i, A_i]; those smaller than the first get zeros after their last ring and sector.
            Images of different types are joined in the one that holds all.
        halo: Sectors repeated at either end, <= A_0.
    Returns: [B, sum C_i, R_0, A_0 + 2 * halo], channels last in memory.
    Raises: ValueError if the batches differ, a later part is larger than the first, or the halo wider than it.
    """
    batch, _, rings, sectors = parts[0].shape
    if any(p.shape[0] != batch or p.shape[2] > rings or p.shape[3] > sectors for p in parts):
        raise ValueError(f"wrap_around: parts {[list(p.shape) for p in parts]} do not fit the first of them")
    if not 0 <= halo <= sectors:
        raise ValueError(f"wrap_around: a halo of {halo} around {sectors} sectors")
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    parts = [part.to(dtype) for part in parts]
    if native.serves(parts[0]):
        return torch.ops.kdmos.wrap_around([native.channels_last(part) for part in parts], halo)
    return reference.wrap_around(parts, halo)


@native.fake("wrap_around")
def _(parts, halo):
    batch, _, rings, sectors = parts[0].shape
    return native.like_channels_last(parts[0], batch, sum(p.shape[1] for p in parts), rings, sectors + 2 * halo)


@native.fake("wrap_around_backward")
def _(gradient, shapes, halo):
    triples = zip(shapes[::3], shapes[1::3], shapes[2::3])
    return [native.like_channels_last(gradient, gradient.shape[0], *shape) for shape in triples]


def _keep(ctx, inputs, output) -> None:
    parts, ctx.halo = inputs
    ctx.shapes = [size for part in parts for size in part.shape[1:]]


def _backward(ctx, gradient):
    return torch.ops.kdmos.wrap_around_backward(native.channels_last(gradient), ctx.shapes, ctx.halo), None


native.differentiate("wrap_around", _backward, _keep)
