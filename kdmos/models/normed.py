"""Layers followed by batch norm and LeakyReLU in training, with what they keep for the backward cut to a third."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmos import ops

Layer = tuple[nn.Module, nn.Module, float]  # linear layer, its batch norm, slope of LeakyReLU


def can_be_joined(norm: nn.Module) -> bool:
    """Whether `normed_layers` does what calling this norm would do."""
    if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d) or not norm.training:
        return False
    return norm.affine and norm.running_mean is not None and norm.momentum is not None


def normed_layers(parts: Sequence[Tensor], layers: Sequence[Layer]) -> Tensor:
    """Linear layers, each followed by its batch norm in training mode and LeakyReLU, as one differentiable step.

    Torch keeps three tensors a layer for the backward: what enters the linear layer, what leaves it, what leaves the
    activation. This keeps what leaves the linear layer alone, and makes the others again from it.

    Args:
        parts: What goes in: images [B, C_i, R_i, A_i] joined as by `ops.wrap_around`, or one tensor of rows [N, C].
        layers: (`CircularConv2d` or `nn.Linear` with a bias, batch norm that `can_be_joined`, slope; 0 is ReLU).
    Returns: [B, C, R, A] or [N, C]. The running means and variances are moved on, as the norms' own call does.
    Raises: ValueError if a channel has a single value, whose variance is not defined.
    """
    device = parts[0].device.type
    if torch.is_autocast_enabled(device):  # what is kept is what the linear layer reads
        parts = [part.to(torch.get_autocast_dtype(device)) for part in parts]
    parameters = [p for linear, norm, _ in layers for p in (linear.weight, linear.bias, norm.weight, norm.bias)]
    return NormedLayers.apply(layers, len(parts), *parts, *parameters)


class NormedLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layers: Sequence[Layer], num_parts: int, *tensors: Tensor) -> Tensor:
        inputs, kept = tensors[:num_parts], []
        for (_, norm, slope), (weight, bias, gamma, beta) in zip(layers, _groups(4, tensors[num_parts:])):
            y = _linear(inputs, weight, bias)
            z, mean, variance = ops.norm_activation(y, gamma, beta, norm.eps, slope)
            _move_on(norm, mean, variance, y.numel() // y.shape[1])
            kept += [y, mean, variance]
            inputs = (z,)
        ctx.save_for_backward(*tensors, *kept)
        ctx.num_parts, ctx.settings = num_parts, [(norm.eps, slope) for _, norm, slope in layers]
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        end = ctx.num_parts + 4 * len(ctx.settings)
        parts, parameters, kept = (
            ctx.saved_tensors[: ctx.num_parts],
            _groups(4, ctx.saved_tensors[ctx.num_parts : end]),
            _groups(3, ctx.saved_tensors[end:]),
        )
        needs = ctx.needs_input_grad[2:]  # after `layers` and `num_parts`
        to_parameters = []
        for index in reversed(range(len(parameters))):
            weight, bias, *norm = parameters[index]
            gradient, *to_norm = ops.norm_activation_backward(gradient, *kept[index], *norm, *ctx.settings[index])
            inputs, wanted = parts, needs[: len(parts)]
            if index:  # what entered is what the layer before returned
                z = ops.norm_activation_again(*kept[index - 1], *parameters[index - 1][2:], *ctx.settings[index - 1])
                inputs, wanted = (z,), (True,)
            to_inputs, to_weight = _linear_backward(gradient, inputs, weight, wanted)
            # The norm takes away again whatever constant the bias adds: its gradient is zero, torch's but for rounding.
            to_linear = to_weight, torch.zeros_like(bias)
            to_parameters = [*to_linear, *(to.to(p.dtype) for to, p in zip(to_norm, norm)), *to_parameters]
            gradient = to_inputs[0]
        return None, None, *to_inputs, *to_parameters


def _groups(size: int, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(*[iter(tensors)] * size))


def _move_on(norm: nn.Module, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics of a norm, by those of a batch with `count` values a channel."""
    norm.num_batches_tracked.add_(1)
    if count > 0:
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)


def _linear(parts: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    if weight.ndim == 2:
        return F.linear(parts[0], weight, bias)
    return F.conv2d(ops.wrap_around(parts), weight, bias, padding=(1, 0))


def _linear_backward(
    gradient: Tensor, parts: Sequence[Tensor], weight: Tensor, wanted: Sequence[bool]
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the parts, where wanted, and of the weight."""
    narrow = weight.to(gradient.dtype)  # as autocast had it
    if weight.ndim == 2:
        to_rows = gradient @ narrow if wanted[0] else None
        return [to_rows], (gradient.T @ parts[0]).to(weight.dtype)
    with torch.enable_grad():
        parts = [part.detach().requires_grad_(want) for part, want in zip(parts, wanted)]
        image = ops.wrap_around(parts)
    to_image, to_weight, _ = torch.ops.aten.convolution_backward(
        gradient, image.detach(), narrow, None, (1, 1), (1, 0), (1, 1), False, (0, 0), 1, (any(wanted), True, False)
    )
    sources = [part for part in parts if part.requires_grad]
    found = iter(torch.autograd.grad(image, sources, to_image) if sources else ())
    return [next(found) if want else None for want in wanted], to_weight.to(weight.dtype)
