"""A student for runtimes that have none of our ops: from points that know their cells to their logits, in plain torch.

What becomes an ONNX file. Gridding and residuals stay outside: integer work of little cost, which `onnx_inputs` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmos import ops
from kdmos.models.fast import FastStudent
from kdmos.models.student import Student
from kdmos.ops import reference
from kdmos.ops.mlp_max import point_mlp
from kdmos.settings import PolarGrid


def wrap_around(parts: Sequence[Tensor], halo: int = 1) -> Tensor:
    """`ops.wrap_around` as slices laid side by side."""
    rings, sectors = parts[0].shape[2:]
    x = torch.cat([F.pad(p, (0, sectors - p.shape[3], 0, rings - p.shape[2])) for p in parts], 1)
    return torch.cat([x[..., sectors - halo :], x, x[..., :halo]], 3)


def dysample(x: Tensor, offset: Tensor, scale: int = 2, groups: int = 4, circular: bool = False) -> Tensor:
    """`ops.dysample` of one image as gathers of whole pixels: many runtimes do not have grid_sample."""
    _, channels, height, width = x.shape
    size = (groups, scale * height, scale * width)
    # channels of offset: (xy, group, sub-row, sub-column); sub-pixels go to their place in the output
    shift = F.pixel_shuffle(offset, scale).view(2, *size)
    column = shift[0] + torch.arange(width, dtype=offset.dtype).repeat_interleave(scale)
    row = shift[1] + torch.arange(height, dtype=offset.dtype).repeat_interleave(scale)[:, None]
    row = row.clamp(0, height - 1)
    column = column if circular else column.clamp(0, width - 1)
    left, top = column.floor(), row.floor()
    right, below = left + 1, (top + 1).clamp(max=height - 1)
    left, right = ((c.remainder(width) if circular else c.clamp(max=width - 1)) for c in (left, right))

    pixels = x.view(groups, -1, height * width).mT.reshape(-1, channels // groups)  # [G * H * W, C / G]
    first = torch.arange(groups)[:, None, None] * (height * width)  # pixel of each group

    def at(row: Tensor, column: Tensor) -> Tensor:
        place = first + (row * width + column).long()
        return pixels.index_select(0, place.flatten()).view(*size, -1)

    right_share, below_share = (column - column.floor())[..., None], (row - top)[..., None]
    above = at(top, left) * (1 - right_share) + at(top, right) * right_share
    under = at(below, left) * (1 - right_share) + at(below, right) * right_share
    out = above * (1 - below_share) + under * below_share  # [G, sH, sW, C / G]
    return out.permute(0, 3, 1, 2).reshape(1, channels, *size[1:])


def co_attention(appearance: Tensor, motion: Tensor, fused: Tensor, *layers: tuple[Tensor, Tensor]):
    """`ops.co_attention` in plain torch."""
    return reference.co_attention(appearance, motion, fused, *(part for layer in layers for part in layer))


class ExportableStudent(FastStudent):
    """A `FastStudent` in float32 behind the gridding, for one scan: the same layers, in operations that ONNX has.

    Args:
        student: Any student; its weights are copied.
    """

    def __init__(self, student: Student) -> None:
        super().__init__(student)
        for module in self.modules():
            module.wrap_around, module.dysample, module.co_attention = wrap_around, dysample, co_attention
            module.cells_to_image = reference.cells_to_image

    def forward(self, features: Tensor, residual: Tensor, cell_rank: Tensor, cells: Tensor, height: Tensor) -> Tensor:
        """Logits of each point.

        Args: As `onnx_inputs` makes them.
            features: float32 [N, 9].
            residual: float32 [N, K].
            cell_rank: int64 [N].
            cells: int64 [M].
            height: int64 [N].
        Returns: float32 [N, C].
        """

        def cell_maximum(rows: Tensor) -> Tensor:
            # Becomes ScatterElements. ScatterND would index whole rows, but onnxruntime (seen in 1.31) lets its
            # threads race for the rows of a cell.
            index = cell_rank[:, None].expand(-1, rows.shape[1])
            lowest = rows.new_full((cells.shape[0], rows.shape[1]), -torch.inf)
            return lowest.scatter_reduce(0, index, rows, "amax")

        grid = self.settings.grid
        appearance = self.compressed(cell_maximum(point_mlp(features, self.mlp, self.last)))
        appearance = self.appearance.image(appearance, cells, 1, grid)
        motion = self.motion.image(cell_maximum(residual), cells, 1, grid)
        x = self.unet(appearance, motion)
        # the head at the cells that have points: all their heights, of which each point reads its own
        columns = x.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, cells)  # [M, 32]
        logits = F.linear(columns, self.head_weight.flatten(1), self.head_bias)
        return logits.view(-1, len(self.classes)).index_select(0, cell_rank * grid.bins[2] + height)


class OneScan(nn.Module):
    """points [N, 4], offsets [2] and residual [N, K] of a scan -> logits [N, C]: tensors alone, for `torch.export`."""

    def __init__(self, student: FastStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, points: Tensor, offsets: Tensor, residual: Tensor) -> Tensor:
        return self.student(points, offsets, residual).point_logits


def onnx_inputs(points: np.ndarray | Tensor, residual: np.ndarray | Tensor, grid: PolarGrid) -> dict[str, np.ndarray]:
    """The inputs of an exported ONNX file for one scan; docs/deployment.md has it in plain numpy, to be rewritten.

    Args:
        points: float32 [N, 4] = x, y, z in metres, remission; finite, N >= 1.
        residual: float32 [N, K], the motion channels.
        grid: The student's polar grid, R rings x A sectors x Z heights.
    Returns: by input name
        features: float32 [N, 9]: offsets of (rho, phi, z) from the bin centre; rho, phi, z; x, y; remission.
        residual: as given.
        cell_rank: int64 [N]: which of `cells` each point lies in.
        cells: int64 [M], ascending: ring * A + sector of each cell that has points.
        height: int64 [N]: height bin of each point, 0..Z-1.
    Raises: ValueError if the shapes do not fit or there is no point.
    """
    points, residual = torch.as_tensor(points), torch.as_tensor(residual)
    if len(points) == 0 or residual.ndim != 2 or len(residual) != len(points):
        raise ValueError(
            f"onnx_inputs: expected points [N, 4] and residual [N, K], N >= 1, got {list(points.shape)} and "
            f"{list(residual.shape)}"
        )
    gridded = ops.polar_grid(points, torch.tensor([0, len(points)]), grid)
    inputs = {
        "features": gridded.features,
        "residual": residual,
        "cell_rank": gridded.cell_rank,
        "cells": gridded.cells,
        "height": gridded.voxels[gridded.voxel_rank] % grid.bins[2],
    }
    return {name: tensor.numpy() for name, tensor in inputs.items()}
