"""Convolution where a BEV image is more than background: most of its cells see no point at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdmos.ops import native, reference

OUTPUTS = 16  # that the native kernel takes at a time
INPUTS = {torch.float32: 1, torch.bfloat16: 2}  # likewise


def can_mask(parts: Sequence[Tensor], outputs: int = OUTPUTS) -> bool:
    """Whether `masked_conv` has a native kernel for these parts and so many output channels, see `native.multiplies`.

    Without one it convolves everywhere, slower than torch does.
    """
    step = INPUTS.get(parts[0].dtype)
    fits = step and not outputs % OUTPUTS and not any(part.shape[1] % step for part in parts)
    return bool(fits) and native.multiplies(parts[0])


@torch.no_grad()
def masked_conv(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    distance: Tensor | None = None,
    near: int = 0,
    fill: bool = True,
    slope: float = 1.0,
) -> Tensor:
    """3x3 convolution, circular in phi, zeros beyond rho, with LeakyReLU: computed near what is there alone.

    A cell at most `near` away is computed. One beyond takes the value of the first such cell of its ring, which is its
    own where the parts are background there: an image whose rings are constant wherever no point was seen stays one,
    since a convolution does the same all along a ring. So the result is that of convolving everywhere, for less work.

    Sums are made in float32 and rounded once. For inference: there is no gradient. Under autocast: unchanged.

    Args:
        parts: float [B, C_i, R_i, A_i], one image together as in `wrap_around`; of one type. Channels last is fastest.
        weight: [O, sum C_i, 3, 3], of the same type.
        bias: [O].
        distance: uint8 [B, R_0, A_0], see `cell_distance`; None to compute all cells.
        near: Distance up to which cells are computed.
        fill: Whether the others take the background of their ring; else they are left unset.
        slope: Of LeakyReLU, in [0, 1]; 1 for none.
    Returns: [B, O, R_0, A_0], channels last in memory.
    Raises: ValueError if the shapes or types do not fit.
    """
    batch, _, rings, sectors = parts[0].shape
    if any(p.shape[0] != batch or p.shape[2] > rings or p.shape[3] > sectors for p in parts):
        raise ValueError(f"masked_conv: parts {[list(p.shape) for p in parts]} do not fit the first of them")
    channels = sum(part.shape[1] for part in parts)
    if weight.shape[1:] != (channels, 3, 3) or bias.shape != weight.shape[:1]:
        expected, got = f"[O, {channels}, 3, 3] and bias [O]", f"{list(weight.shape)} and {list(bias.shape)}"
        raise ValueError(f"masked_conv: expected weight {expected}, got {got}")
    if any(tensor.dtype != weight.dtype for tensor in parts):
        raise ValueError(f"masked_conv: parts {[p.dtype for p in parts]} and weight {weight.dtype} differ in type")
    if distance is None:
        distance = parts[0].new_zeros(batch, rings, sectors, dtype=torch.uint8)
    if distance.shape != (batch, rings, sectors) or distance.dtype != torch.uint8:
        got = f"{distance.dtype} {list(distance.shape)}"
        raise ValueError(f"masked_conv: expected distance uint8 {[batch, rings, sectors]}, got {got}")
    if not 0 <= slope <= 1:
        raise ValueError(f"masked_conv: slope must be in [0, 1], got {slope}")
    if can_mask(parts, len(weight)):
        parts, bias = [native.channels_last(part) for part in parts], bias.float().contiguous()
        return torch.ops.kdmos.masked_conv(parts, weight, bias, slope, distance.contiguous(), near, fill)
    return reference.masked_conv(parts, weight, bias, distance, near, slope)


@native.fake("masked_conv")
def _(parts, weight, bias, slope, distance, near, fill):
    return native.like_channels_last(parts[0], parts[0].shape[0], weight.shape[0], *parts[0].shape[2:])


def cell_distance(occupied: Tensor, most: int) -> Tensor:
    """How many rings or sectors away the nearest occupied cell is, the larger of the two; at most `most`.

    A 3x3 convolution sees one farther. Sectors wrap round.

    Args:
        occupied: bool [B, R, A].
        most: In [1, 255]; also where there is no occupied cell.
    Returns: uint8 [B, R, A].
    """
    near, distance = occupied, (~occupied).to(torch.uint8)
    for _ in range(most - 1):
        along = near | near.roll(1, 2) | near.roll(-1, 2)
        near = along.clone()
        near[:, 1:] |= along[:, :-1]
        near[:, :-1] |= along[:, 1:]
        distance += ~near
    return distance
