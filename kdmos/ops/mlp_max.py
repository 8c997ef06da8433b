"""A point MLP and the maximum over the points of each cell, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdmos.ops import native
from kdmos.ops.polar_grid import PointOrder
from kdmos.ops.polar_scatter import chunk_start, chunks, joined, sorted_max

OUTPUTS = 32  # of a layer, that the native kernel takes at a time


@torch.no_grad()
def mlp_max(points: Tensor, layers: Sequence[tuple[Tensor, Tensor]], last: Tensor, order: PointOrder) -> Tensor:
    """Largest output of a point MLP over the points of each cell.

    Layers followed by ReLU, then one without bias. Sums are rounded to a layer's type, products of half precision added
    in float32. For inference: there is no gradient. Under autocast: unchanged.

    Args:
        points: float32 [N, D].
        layers: At least one: weight [D', D] and bias [D'] of each. The first may be of float32 and the others, `last`
            included, of another type.
        last: [C, D].
        order: The points sorted by cell, M cells.
    Returns: [M, C], of the type of `last`; 0 for a cell without points. NaN wins.
    Raises: ValueError if the shapes do not fit.
    Source: the point network of PolarNet (CVPR 2020) as used by MotionBEV (RA-L 2023).
    """
    inputs = points.shape[1:]
    for weight, bias in (*layers, (last, None)):
        if weight.ndim != 2 or weight.shape[1:] != inputs or (bias is not None and bias.shape != weight.shape[:1]):
            got = f"{list(weight.shape)}" + ("" if bias is None else f" and {list(bias.shape)}")
            raise ValueError(f"mlp_max: expected weight [D', {', '.join(map(str, inputs))}] and bias [D'], got {got}")
        inputs = weight.shape[:1]
    if order.order.shape != points.shape[:1]:
        raise ValueError(f"mlp_max: {len(points)} points, but an order of {len(order.order)}")
    weights = [weight for weight, _ in layers] + [last]
    if has_kernel(points, weights):
        biases = [bias.float().contiguous() for _, bias in layers]
        return torch.ops.kdmos.mlp_max(points.contiguous(), [w.contiguous() for w in weights], biases, *order)
    out = []
    points = points.index_select(0, order.order)
    for first, end, begin, stop in chunks(order.start):
        x = point_mlp(points[begin:stop], layers, last)
        out.append(sorted_max(x, chunk_start(order.start, first, end, begin)))
    return joined(out)


def has_kernel(points: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether all of it is one native kernel's; else it goes layer by layer, a chunk of whole cells after the other."""
    types = {weight.dtype for weight in weights[1:]}
    fits = points.dtype == weights[0].dtype == torch.float32 and not any(len(weight) % OUTPUTS for weight in weights)
    return fits and len(types) == 1 and native.multiplies(weights[0]) and native.multiplies(weights[1])


def point_mlp(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]], last: Tensor) -> Tensor:
    """[n, D] -> [n, C]: the layers of `mlp_max`, of each point."""
    for weight, bias in layers:
        x = linear_relu(x.to(weight.dtype), weight, bias)
    return x.to(last.dtype) @ last.T


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[n, D] -> [n, D'], ReLU of weight [D', D] and bias [D']; without gradient."""
    if x.device.type != "cpu" and native.serves(x):  # cuBLASLt adds and cuts before the result leaves its registers
        return torch._addmm_activation(bias, x, weight.T)
    return F.linear(x, weight, bias).relu_()


@native.fake("mlp_max")
def _(points, weights, biases, order, start):
    return weights[-1].new_empty(start.shape[0] - 1, weights[-1].shape[0])
