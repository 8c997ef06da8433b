"""What follows a convolution: its bias and LeakyReLU, in one pass over its result."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import native, reference


def bias_activation(x: Tensor, bias: Tensor, slope: float) -> None:
    """x = f(x + bias) in place, f(a) = a if a > 0 else slope * a, by channel.

    Computed in float32 (float64 for float64) and rounded once. For inference: no gradient.

    Args:
        x: float [B, C, H, W], channels last in memory, or rows [N, C], contiguous; float32, float64, float16 or
            bfloat16. Written.
        bias: [C], of the type of x or float32.
        slope: Of LeakyReLU, in [0, 1]; 0 is ReLU.
    Raises: ValueError if shape, type, layout or slope do not fit.
    """
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not (last or (x.ndim == 2 and x.is_contiguous())) or not x.is_floating_point():
        raise ValueError(
            "bias_activation: expected floating point x [B, C, H, W], channels last, or contiguous rows [N, C], got "
            f"{x.dtype} {list(x.shape)} with strides {list(x.stride())}"
        )
    if list(bias.shape) != [x.shape[1]] or bias.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"bias_activation: expected bias [{x.shape[1]}], {x.dtype} or float32, got {bias.dtype} {list(bias.shape)}"
        )
    if not 0 <= slope <= 1:
        raise ValueError(f"bias_activation: expected a slope in [0, 1], got {slope}")
    if native.serves(x):
        torch.ops.kdmos.bias_activation(x, bias.contiguous(), slope)
    else:
        reference.bias_activation(x, bias, slope)


@native.fake("bias_activation")
def _(x, bias, slope):
    return None
