"""The BEV students: point MLP, max over polar cells, dual-branch U-Net, and a head at occupied voxels only."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdmos import ops
from kdmos.data.batch import pack
from kdmos.models.blocks import CoAttention, ConvBlock, DropBlock2d, Dropout, DySample
from kdmos.models.normed import can_be_joined, normed_layers
from kdmos.motion import motion_channels
from kdmos.ops import GriddedPoints
from kdmos.settings import STUDENTS, StudentSettings


class StudentOutput(NamedTuple):
    """Logits where the scans have points.

    voxel_logits: float [V, C] of the occupied voxels.
    gridded: Where the points lie; a point's logits are those of its voxel.
    """

    voxel_logits: Tensor
    gridded: GriddedPoints

    @property
    def point_logits(self) -> Tensor:
        """float [N, C]."""
        # not plain indexing, whose gradient is summed in another order each time
        return self.voxel_logits.index_select(0, self.gridded.voxel_rank)


class PointMlp(nn.Module):
    """Features of a point, BN(9), then 32, 64, 128 with BN and ReLU, and 256 linear; of them the largest of each cell.

    [N, 9] sorted by cell and where each cell starts, int64 [M + 1] -> [M, 256].
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (9, 32, 64, 128)
        self.norm = nn.BatchNorm1d(widths[0])
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True)) for a, b in pairwise(widths))
        )
        self.out = nn.Linear(widths[-1], 256)

    def forward(self, features: Tensor, start: Tensor) -> Tensor:
        x = self.norm(features)
        if all(can_be_joined(norm) for _, norm, _ in self.layers):
            x = normed_layers([x], [(linear, norm, 0.0) for linear, norm, _ in self.layers])
        else:
            x = self.layers(x)
        return ops.linear_max(x, self.out.weight, self.out.bias, start)


class Encoder(nn.Module):
    """BN, then one conv block per level, each but the first after 2x2 max pooling."""

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.blocks = nn.ModuleList(ConvBlock(a, b) for a, b in zip((in_channels, *widths), widths))
        self.pool = nn.MaxPool2d(2)

    def level(self, index: int, x: Tensor) -> Tensor:
        return self.blocks[index](self.pool(x) if index else self.norm(x))


class DecoderLevel(nn.Module):
    """Upsample, join with the skip, convolve."""

    def __init__(self, below: int, skip: int, width: int, upsampler: str) -> None:
        super().__init__()
        if upsampler == "dysample":
            self.up = DySample(below)
        else:
            self.up = nn.ConvTranspose2d(below, below, kernel_size=2, stride=2)
        self.block = ConvBlock(below + skip, width)
        self.drop = DropBlock2d()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.drop(self.block(skip, self.up(x)))


class DualBranchUNet(nn.Module):
    """[B, 32, R, A] appearance and [B, K, R, A] motion -> [B, 32, R, A]."""

    APPEARANCE, MOTION, DECODER = (32, 64, 128, 256, 256), (16, 32, 64, 128), (128, 64, 32, 32)

    def __init__(self, num_channels: int, upsampler: str) -> None:
        super().__init__()
        self.appearance = Encoder(32, self.APPEARANCE)
        self.motion = Encoder(num_channels, self.MOTION)
        self.attention = nn.ModuleList(CoAttention(a, m) for a, m in zip(self.APPEARANCE, self.MOTION))
        below = (self.APPEARANCE[-1], *self.DECODER)
        skips = self.APPEARANCE[-2::-1]
        self.decoder = nn.ModuleList(
            DecoderLevel(b, s, width, upsampler) for b, s, width in zip(below, skips, self.DECODER)
        )

    def forward(self, appearance: Tensor, motion: Tensor) -> Tensor:
        skips = []
        for level, attention in enumerate(self.attention):
            appearance = self.appearance.level(level, appearance)
            motion = self.motion.level(level, motion)
            appearance = attention(appearance, motion)
            skips.append(appearance)
        x = self.appearance.level(len(skips), appearance)
        for level in self.decoder:
            x = level(x, skips.pop())
        return x


class Student(nn.Module):
    """Moving-object segmentation of scans in bird's-eye view.

    Source: MotionBEV (RA-L 2023); KDMOS (IROS 2025) for the DySample decoder.
    """

    def __init__(self, settings: StudentSettings | None = None) -> None:
        super().__init__()
        self.settings = settings = settings or StudentSettings()
        self.header: dict = {}  # what the checkpoint it was loaded from says about itself
        self.point_mlp = PointMlp()
        self.compress = nn.Linear(256, 32)
        self.unet = DualBranchUNet(settings.motion.num_channels, STUDENTS[settings.name])
        self.dropout = Dropout()
        self.head = nn.Conv2d(32, settings.grid.bins[2] * len(settings.classes), kernel_size=1)
        self.to(memory_format=torch.channels_last)  # as the ops lay out their results: twice as fast on a CPU

    @property
    def classes(self) -> tuple[str, ...]:
        return self.settings.classes

    @property
    def moving(self) -> int:
        return self.settings.moving

    def forward(self, points: Tensor, offsets: Tensor, residual: Tensor) -> StudentOutput:
        """Logits of a packed batch.

        Args:
            points: float32 [N, 4], finite.
            offsets: int64 [B + 1].
            residual: float32 [N, K], motion channels as `settings.motion` describes them.
        Raises: ValueError if the shapes do not fit or the whole batch has no point (one scan of it may).
        """
        channels = self.settings.motion.num_channels
        if residual.shape != (len(points), channels):
            raise ValueError(f"student: expected residual [{len(points)}, {channels}], got {list(residual.shape)}")
        if len(points) == 0:
            raise ValueError("student: the batch has no point")
        num_scans, grid = offsets.numel() - 1, self.settings.grid
        gridded = ops.polar_grid(points, offsets, grid)
        order = gridded.by_cell

        # 1) points to cells: the largest of each feature, compressed
        sorted_features = gridded.features.index_select(0, order.order)
        maximum = self.point_mlp(sorted_features, order.start)
        appearance = ops.cells_to_bev(torch.relu(self.compress(maximum)), gridded.cells, num_scans, grid)
        motion = ops.polar_scatter_bev(residual, gridded.cell_rank, gridded.cells, num_scans, grid, order)
        # 2) the network in bird's-eye view, 3) back to the voxels that hold points
        features = self.dropout(self.unet(appearance, motion))
        logits = ops.voxel_head(features, gridded.voxels, self.head.weight, self.head.bias, grid)
        return StudentOutput(logits, gridded)

    def motion_channels(self, scans: list[Tensor], poses: Tensor) -> list[Tensor]:
        """The motion channels that this student was trained with; see `kdmos.motion.motion_channels`."""
        motion = self.settings.motion
        return motion_channels(scans, poses, motion.num_channels, motion.lookahead, motion.form, motion.grid)

    def point_logits(self, points: list[Tensor], residuals: list[Tensor]) -> list[Tensor]:
        """Logits of each point of some scans, as one batch: a scan at a time needs the least memory.

        Args:
            points: B tensors float32 [n, 4], finite, n > 0.
            residuals: B tensors float32 [n, K].
        Returns: B tensors float [n, C].
        """
        packed, offsets = pack(points)
        logits = self(packed, offsets, torch.cat(residuals)).point_logits
        return list(logits.split([len(scan) for scan in points]))
