"""The operations of the hot path, one file each; `reference` is their specification in plain torch."""

from kdmos.ops.bias_activation import bias_activation
from kdmos.ops.cells_to_image import cells_to_image
from kdmos.ops.co_attention import co_attention
from kdmos.ops.copy_scan import copy_scan
from kdmos.ops.dysample import dysample
from kdmos.ops.height_residual import height_residual, height_residual_into, height_residual_sequence
from kdmos.ops.label_points import label_points
from kdmos.ops.masked_conv import can_mask, cell_distance, masked_conv
from kdmos.ops.mlp_max import mlp_max
from kdmos.ops.native import backend
from kdmos.ops.norm_activation import norm_activation, norm_activation_again, norm_activation_backward
from kdmos.ops.polar_grid import GriddedPoints, PointOrder, polar_grid
from kdmos.ops.polar_scatter import cell_max, cells_to_bev, linear_max, polar_scatter, polar_scatter_bev
from kdmos.ops.selective_scan import selective_scan
from kdmos.ops.serialization import CURVES, curve_code
from kdmos.ops.submanifold_conv import Neighbours, find_neighbours, submanifold_conv
from kdmos.ops.voxel_head import voxel_head
from kdmos.ops.voxel_label import voxel_label
from kdmos.ops.wdcd_loss import wdcd_loss
from kdmos.ops.winograd_conv import can_winograd, winograd_conv, winograd_weight
from kdmos.ops.wrap_around import wrap_around

__all__ = [
    "CURVES",
    "GriddedPoints",
    "Neighbours",
    "PointOrder",
    "backend",
    "bias_activation",
    "can_mask",
    "can_winograd",
    "cell_distance",
    "cell_max",
    "cells_to_bev",
    "cells_to_image",
    "co_attention",
    "copy_scan",
    "curve_code",
    "dysample",
    "find_neighbours",
    "height_residual",
    "height_residual_into",
    "height_residual_sequence",
    "label_points",
    "linear_max",
    "masked_conv",
    "mlp_max",
    "norm_activation",
    "norm_activation_again",
    "norm_activation_backward",
    "polar_grid",
    "polar_scatter",
    "polar_scatter_bev",
    "selective_scan",
    "submanifold_conv",
    "voxel_head",
    "voxel_label",
    "wdcd_loss",
    "winograd_conv",
    "winograd_weight",
    "wrap_around",
]
