"""The label of a voxel: what most of its points say."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import native, reference
from kdmos.ops.polar_grid import PointOrder, sort_by_cell


@torch.no_grad()
def voxel_label(
    voxel_rank: Tensor, labels: Tensor, num_voxels: int, num_classes: int, order: PointOrder | None = None
) -> Tensor:
    """Majority label of the points in each voxel; unlabeled points vote too, ties go to the lower class.

    Args:
        voxel_rank: int64 [N] in [0, num_voxels), from `polar_grid`.
        labels: uint8 or int64 [N], classes in [0, num_classes), or 255 for no class.
        num_voxels: V.
        num_classes: C <= 254.
        order: The points sorted by `voxel_rank`, if that is known (`GriddedPoints.by_voxel`): saves the sorting.
    Returns: uint8 [V].
    Raises: ValueError if the lengths differ.
    """
    if voxel_rank.shape != labels.shape:
        raise ValueError(f"voxel_label: {len(voxel_rank)} ranks but {len(labels)} labels")
    if native.serves(labels):
        order = order or sort_by_cell(voxel_rank, num_voxels)
        return torch.ops.kdmos.voxel_label(labels.to(torch.uint8).contiguous(), *order, num_classes)
    return reference.voxel_label(voxel_rank, labels, num_voxels, num_classes)


@native.fake("voxel_label")
def _(labels, order, voxel_start, num_classes):
    return labels.new_empty(voxel_start.shape[0] - 1)
