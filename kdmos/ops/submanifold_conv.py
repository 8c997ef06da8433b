"""Sparse 3-D convolution whose outputs are where its inputs are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kdmos.ops import native

OFFSETS = list(product((-1, 0, 1), repeat=3))  # (dx, dy, dz), in the order of the weights
CENTRE = len(OFFSETS) // 2  # the offsets before it mirror those after it: where b is a's neighbour, a is b's


class Neighbours(NamedTuple):
    """Which voxels touch: at each of the 13 offsets after (0, 0, 0), voxel `here[k][i]` has voxel `there[k][i]`.

    One for all convolutions over the same voxels.
    """

    here: list[Tensor]
    there: list[Tensor]


def find_neighbours(grid: Tensor, batch: Tensor) -> Neighbours:
    """Pairs of voxels of the same sample that share a face, an edge or a corner.

    Args:
        grid: int [N, 3], the voxels of each sample; >= 0.
        batch: int [N], >= 0.
    Returns: The pairs, int64 rows of `grid`, in the order of the voxels: equal rows stand next to each other, in
        `here` and in `there`. Of a voxel that occurs more than once, the first is found, as in spconv.
    Raises: ValueError if the shapes do not fit.
    """
    if grid.ndim != 2 or grid.shape[1] != 3 or batch.shape != grid.shape[:1]:
        raise ValueError(
            f"find_neighbours: expected grid [N, 3] and batch [N], got {list(grid.shape)} and {list(batch.shape)}"
        )
    if len(grid) == 0:
        return Neighbours([batch.long()] * CENTRE, [batch.long()] * CENTRE)
    # keys with an empty voxel beyond either end of each axis: a key plus an offset's is the neighbour's, or nobody's
    extent = (grid.amax(0).long() + 3).tolist()
    stride = torch.tensor([extent[1] * extent[2], extent[2], 1], device=grid.device)
    key = ((grid.long() + 1) * stride).sum(1) + batch.long() * (extent[0] * extent[1] * extent[2])
    key, order = key.sort(stable=True)
    here, there = [], []
    for dx, dy, dz in OFFSETS[CENTRE + 1 :]:
        wanted = key + (dx * extent[1] * extent[2] + dy * extent[2] + dz)
        place = torch.searchsorted(key, wanted).clamp_(max=len(key) - 1)
        found = (key[place] == wanted).nonzero().squeeze(1)
        here.append(order[found])
        there.append(order[place[found]])
    return Neighbours(here, there)


def submanifold_conv(x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Neighbours) -> Tensor:
    """3x3x3 convolution over the occupied voxels alone; the empty ones are 0 and stay out.

    An output is summed offset by offset, in float32 (float64 for float64), and rounded once. Deterministic, the
    gradient too, as far as torch's matrix products are. Under autocast: products in the autocast type.

    Args:
        x: float [N, C].
        weight: float [D, 3, 3, 3, C], axes x, y, z as in spconv.
        bias: float [D] or None.
        neighbours: Of these N voxels, as `find_neighbours` orders them.
    Returns: [N, D].
    Raises: ValueError if the shapes do not fit.
    Source: Graham et al., 3D Semantic Segmentation with Submanifold Sparse Convolutional Networks, CVPR 2018.
    """
    if x.ndim != 2 or weight.ndim != 5 or list(weight.shape[1:]) != [3, 3, 3, x.shape[1]]:
        raise ValueError(
            f"submanifold_conv: expected x [N, C] and weight [D, 3, 3, 3, C], got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x, weight))
    out = SubmanifoldConv.apply(x, weight, *neighbours.here, *neighbours.there)
    return out if bias is None else out + bias


class SubmanifoldConv(torch.autograd.Function):
    """Gather, multiply, add: a matrix product for each offset, over the voxels that have a neighbour there."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, *pairs)
        weights = weight.reshape(len(weight), 27, -1).permute(1, 2, 0)  # [27, C, D]
        out = _wide(x @ weights[CENTRE])
        for k, outputs, inputs in _directions(pairs):
            _add_rows(out, outputs, x.index_select(0, inputs) @ weights[k])
        return out.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight, *pairs = ctx.saved_tensors
        weights = weight.reshape(len(weight), 27, -1).transpose(0, 1)  # [27, D, C]
        to_x, to_weight = _wide(gradient @ weights[CENTRE]), torch.empty_like(weights)
        to_weight[CENTRE] = gradient.T @ x
        for k, outputs, inputs in _directions(pairs):
            rows = gradient.index_select(0, outputs)
            _add_rows(to_x, inputs, rows @ weights[k])
            to_weight[k] = rows.T @ x.index_select(0, inputs)
        return to_x.to(x.dtype), to_weight.transpose(0, 1).reshape(weight.shape), *[None] * len(pairs)


def _directions(pairs: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(offset, voxels that have a neighbour there, these neighbours) for all offsets but the centre."""
    for i, (here, there) in enumerate(zip(pairs[:CENTRE], pairs[CENTRE:])):
        yield CENTRE + 1 + i, here, there
        yield CENTRE - 1 - i, there, here


def _wide(rows: Tensor) -> Tensor:
    """In the type of the sums."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _add_rows(to: Tensor, index: Tensor, rows: Tensor) -> None:
    """`to.index_add_(0, index, rows)` in the type of `to`, which torch does value by value.

    Equal values of the index stand next to each other, as `find_neighbours` has them: on a GPU the native op relies on
    it.
    """
    if native.serves(to):
        torch.ops.kdmos.add_rows(to, index, rows)
    else:
        to.index_add_(0, index, _wide(rows))


@native.fake("add_rows")
def _(to, index, rows):
    return None
