"""Batch norm in training followed by LeakyReLU, as one operation that can be made again from what it read."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import native, reference


def norm_activation(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, slope: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """LeakyReLU of x normalised by its own mean and variance, and these two.

    z = f((x - mean) / sqrt(variance + eps) * weight + bias), f(a) = a if a > 0 else slope * a, by channel. Computed
    in float32 (float64 for float64), sums across chunks of rows joined in float64: the same on any number of threads.

    Args:
        x: float [P, C] or [B, C, R, A]; float32, float64, float16 or bfloat16. Channels last is fastest.
        weight: [C].
        bias: [C].
        eps: Added to the variance.
        slope: Of LeakyReLU; 0 is ReLU.
    Returns: z like x, images channels last; mean and variance [C], float32 (float64 for float64), of which gradients
        are not passed on. The variance is the biased one, its divisor P; both are 0 where x is empty.
    Raises: ValueError if the shapes do not fit, or a channel has a single value.
    """
    _check("norm_activation", x, weight, bias)
    if x.numel() == x.shape[1]:
        raise ValueError(f"norm_activation: more than one value a channel is needed, got {list(x.shape)}")
    if native.serves(x):
        out, mean, variance = torch.ops.kdmos.norm_activation(_rows(x), *_wide(x, weight, bias), eps, slope)
        return _shaped(out, x), mean, variance
    return reference.norm_activation(x, *_wide(x, weight, bias), eps, slope)


def norm_activation_again(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, slope: float = 0.01
) -> Tensor:
    """What `norm_activation` returned first, bit for bit, from its other results. Without a gradient.

    Args: those of `norm_activation`, and the mean and variance that it returned.
    Raises: ValueError if the shapes do not fit.
    """
    _check("norm_activation_again", x, mean, variance, weight, bias)
    x, channels = x.detach(), _wide(x, mean, variance, weight.detach(), bias.detach())
    if native.serves(x):
        return _shaped(torch.ops.kdmos.norm_activation_again(_rows(x), *channels, eps, slope), x)
    return reference.norm_activation_again(x, *channels, eps, slope)


def norm_activation_backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, from that of `norm_activation`'s first result.

    Args: gradient, like x; the others as for `norm_activation_again`.
    Returns: the gradients; of x in its type, of weight and bias in float32 (float64 for float64).
    Raises: ValueError if the shapes do not fit.
    """
    _check("norm_activation_backward", x, mean, variance, weight, bias)
    if gradient.shape != x.shape:
        raise ValueError(f"norm_activation_backward: gradient {list(gradient.shape)} for x {list(x.shape)}")
    gradient, channels = gradient.to(x.dtype), _wide(x, mean, variance, weight, bias)
    if native.serves(x):
        to_x, to_weight, to_bias = torch.ops.kdmos.norm_activation_backward(
            _rows(gradient), _rows(x), *channels, eps, slope
        )
        return _shaped(to_x, x), to_weight, to_bias
    return reference.norm_activation_backward(gradient, x, *channels, eps, slope)


def _check(op: str, x: Tensor, *channels: Tensor) -> None:
    if x.ndim not in (2, 4):
        raise ValueError(f"{op}: expected x [P, C] or [B, C, R, A], got {list(x.shape)}")
    if any(list(each.shape) != [x.shape[1]] for each in channels):
        raise ValueError(f"{op}: expected [{x.shape[1]}] by channel, got {[list(each.shape) for each in channels]}")


def _wide(x: Tensor, *channels: Tensor) -> list[Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return [each.to(wide).contiguous() for each in channels]


def _rows(x: Tensor) -> Tensor:
    """[P, C] of rows or of an image, a copy only where the memory is not in that order."""
    return (x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])).contiguous()


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """The way back."""
    if like.ndim == 2:
        return rows
    batch, channels, height, width = like.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


@native.fake("norm_activation")
def _(x, weight, bias, eps, slope):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@native.fake("norm_activation_again")
def _(x, mean, variance, weight, bias, eps, slope):
    return torch.empty_like(x)


@native.fake("norm_activation_backward")
def _(gradient, x, mean, variance, weight, bias, eps, slope):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx, inputs, output) -> None:
    x, weight, bias, *ctx.settings = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(x, mean, variance, weight, bias)


def _backward(ctx, gradient, *_):
    gradients = torch.ops.kdmos.norm_activation_backward(gradient.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return *gradients, None, None


native.differentiate("norm_activation", _backward, _keep)
