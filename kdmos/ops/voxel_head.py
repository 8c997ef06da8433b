"""The student's last layer, evaluated only at the voxels that hold a point."""

from __future__ import annotations

from torch import Tensor

from kdmos.ops import reference
from kdmos.settings import PolarGrid


def voxel_head(features: Tensor, voxels: Tensor, weight: Tensor, bias: Tensor, grid: PolarGrid) -> Tensor:
    """Class logits of the given voxels: the 1x1 convolution to Z x classes channels, at those places only.

    Args:
        features: Decoder output, float [B, D, R, A].
        voxels: int64 [V] as `polar_grid` gives them: ((scan * R + ring) * A + sector) * Z + height.
        weight: [Z * classes, D, 1, 1], height-major.
        bias: [Z * classes].
        grid: The polar grid.
    Returns: [V, classes].
    Raises: ValueError if the shapes do not fit.
    """
    rings, sectors, heights = grid.bins
    if features.ndim != 4 or tuple(features.shape[2:]) != (rings, sectors):
        raise ValueError(f"voxel_head: expected features [B, D, {rings}, {sectors}], got {list(features.shape)}")
    if weight.shape[0] % heights or weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"voxel_head: expected weight [{heights} * classes, {features.shape[1]}, 1, 1], got {list(weight.shape)}"
        )
    return reference.voxel_head(features, voxels, weight, bias, grid)
