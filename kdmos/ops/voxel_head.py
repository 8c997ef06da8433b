"""The student's last layer, evaluated only at the voxels that hold a point."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import native, reference
from kdmos.settings import PolarGrid


def voxel_head(features: Tensor, voxels: Tensor, weight: Tensor, bias: Tensor, grid: PolarGrid) -> Tensor:
    """Class logits of the given voxels: the 1x1 convolution to Z x classes channels, at those places only.

    The native op reads features of any floating type and computes in float32 (float64 for float64), under autocast
    too.

    Args:
        features: Decoder output, float [B, D, R, A].
        voxels: int64 [V], ascending, as `polar_grid` gives them: ((scan * R + ring) * A + sector) * Z + height.
            B * R * A * Z at the end is padding.
        weight: [Z * classes, D, 1, 1], height-major.
        bias: [Z * classes].
        grid: The polar grid.
    Returns: [V, classes], 0 for padding.
    Raises: ValueError if the shapes do not fit.
    """
    rings, sectors, heights = grid.bins
    if features.ndim != 4 or tuple(features.shape[2:]) != (rings, sectors):
        raise ValueError(f"voxel_head: expected features [B, D, {rings}, {sectors}], got {list(features.shape)}")
    if weight.shape[0] % heights or weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"voxel_head: expected weight [{heights} * classes, {features.shape[1]}, 1, 1], got {list(weight.shape)}"
        )
    if native.serves(features):
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        weight, bias = weight.flatten(1).to(wide).contiguous(), bias.to(wide).contiguous()
        return torch.ops.kdmos.voxel_head(native.channels_last(features), voxels.contiguous(), weight, bias, heights)
    return reference.voxel_head(features, voxels, weight, bias, grid)


@native.fake("voxel_head")
def _(features, voxels, weight, bias, heights):
    return weight.new_empty(voxels.shape[0], weight.shape[0] // heights)


@native.fake("voxel_head_backward")
def _(gradient, features, voxels, weight, heights):
    return (
        native.like_channels_last(features, *features.shape),
        torch.empty_like(weight),
        weight.new_empty(weight.shape[0]),
    )


def _keep(ctx, inputs, output) -> None:
    features, voxels, weight, _, ctx.heights = inputs
    ctx.save_for_backward(features, voxels, weight)


def _backward(ctx, gradient):
    features, voxels, weight = ctx.saved_tensors
    gradients = torch.ops.kdmos.voxel_head_backward(gradient.contiguous(), features, voxels, weight, ctx.heights)
    return gradients[0], None, gradients[1], gradients[2], None


native.differentiate("voxel_head", _backward, _keep)
