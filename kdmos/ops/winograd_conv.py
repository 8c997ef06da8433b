"""Convolution after Winograd: four multiplications where the plain one has nine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdmos.ops import native, reference

OUTPUTS = 32  # that the native kernel takes at a time
CHANNELS = 16  # of a part, likewise
STEP = {torch.float32: 1, torch.bfloat16: 2}  # inputs that one instruction multiplies


def can_winograd(parts: Sequence[Tensor], outputs: int) -> bool:
    """Whether `winograd_conv` has a native kernel for these parts and so many outputs, see `native.multiplies`."""
    fits = parts[0].dtype in STEP and not any(part.shape[1] % CHANNELS for part in parts)
    return fits and not outputs % OUTPUTS and native.multiplies(parts[0])


def winograd_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight of a convolution, transformed once for `winograd_conv`: G g Gt.

    Args:
        weight: float [O, C, 3, 3]; transformed in float32 or wider.
        dtype: float32 or bfloat16, in which it is multiplied; rounded at the end.
    Returns: [16, O / 32, C / s, 32, s], of `dtype`, in the order that the kernel reads; s = 1, or 2 in bfloat16. Place
        4 i + j comes first.
    Raises: ValueError for another dtype, or if O or C do not fit.
    """
    outputs, channels = weight.shape[:2]
    step = STEP.get(dtype)
    if step is None or outputs % OUTPUTS or channels % CHANNELS or weight.shape[2:] != (3, 3):
        expected = f"[O, C, 3, 3], O a multiple of {OUTPUTS}, C of {CHANNELS}, and float32 or bfloat16"
        raise ValueError(f"winograd_conv: expected weight {expected}; got {list(weight.shape)} and {dtype}")
    g = weight.new_tensor(reference.WINOGRAD_G)
    wide = torch.einsum("im,ocmn,jn->ijoc", g, weight, g).to(dtype)
    packed = wide.reshape(16, outputs // OUTPUTS, OUTPUTS, channels // step, step)
    return packed.transpose(2, 3).contiguous()


@torch.no_grad()
def winograd_conv(parts: Sequence[Tensor], weight: Tensor, bias: Tensor, slope: float = 1.0) -> Tensor:
    """3x3 convolution, circular in phi, zeros beyond rho, with LeakyReLU: of 2x2 outputs at a time.

    Equal to the convolution but for rounding; where that sees infinity, it may be NaN. In bfloat16 the transformed
    inputs are rounded once more than it does; products are added in float32, the result is rounded once. For inference:
    there is no gradient. Under autocast: unchanged.

    Args:
        parts: float [B, C_i, R_i, A_i], one image together as in `wrap_around`; of one type. Channels last is fastest.
        weight: From `winograd_weight`, of the same type.
        bias: [O].
        slope: Of LeakyReLU, in [0, 1]; 1 for none.
    Returns: [B, O, R_0, A_0], channels last in memory.
    Raises: ValueError if the shapes or types do not fit.
    Source: F(2x2, 3x3) of Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (CVPR 2016).
    """
    batch, _, rings, sectors = parts[0].shape
    if any(p.shape[0] != batch or p.shape[2] > rings or p.shape[3] > sectors for p in parts):
        raise ValueError(f"winograd_conv: parts {[list(p.shape) for p in parts]} do not fit the first of them")
    channels, step = sum(part.shape[1] for part in parts), STEP.get(weight.dtype, 1)
    shape = (16, bias.numel() // OUTPUTS, channels // step, OUTPUTS, step)
    if weight.shape != shape or channels % step or any(part.dtype != weight.dtype for part in parts):
        got = f"{list(weight.shape)} {weight.dtype} and {channels} channels of {[part.dtype for part in parts]}"
        raise ValueError(f"winograd_conv: expected transformed weight {list(shape)} of the parts' type, got {got}")
    if bias.shape != (shape[1] * OUTPUTS,):
        raise ValueError(f"winograd_conv: expected bias [{shape[1] * OUTPUTS}], got {list(bias.shape)}")
    if not 0 <= slope <= 1:
        raise ValueError(f"winograd_conv: slope must be in [0, 1], got {slope}")
    if can_winograd(parts, bias.numel()):
        parts, bias = [native.channels_last(part) for part in parts], bias.float().contiguous()
        return torch.ops.kdmos.winograd_conv(parts, weight.contiguous(), bias, slope)
    return reference.winograd_conv(parts, weight, bias, slope)


@native.fake("winograd_conv")
def _(parts, weight, bias, slope):
    return native.like_channels_last(parts[0], parts[0].shape[0], bias.numel(), *parts[0].shape[2:])
