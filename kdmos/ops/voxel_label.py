"""The label of a voxel: what most of its points say."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import reference


@torch.no_grad()
def voxel_label(voxel_rank: Tensor, labels: Tensor, num_voxels: int, num_classes: int) -> Tensor:
    """Majority label of the points in each voxel; unlabeled points vote too, ties go to the lower class.

    Args:
        voxel_rank: int64 [N] in [0, num_voxels), from `polar_grid`.
        labels: uint8 or int64 [N], classes in [0, num_classes), or 255 for no class.
        num_voxels: V.
        num_classes: C.
    Returns: uint8 [V].
    Raises: ValueError if the lengths differ.
    """
    if voxel_rank.shape != labels.shape:
        raise ValueError(f"voxel_label: {len(voxel_rank)} ranks but {len(labels)} labels")
    return reference.voxel_label(voxel_rank, labels, num_voxels, num_classes)
