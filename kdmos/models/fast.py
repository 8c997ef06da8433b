"""A trained student made ready for inference: norms folded into the layers before them, half precision where wished."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmos import ops
from kdmos.models.blocks import CoAttention, ConvBlock, DySample
from kdmos.models.student import DecoderLevel, Encoder, Student, StudentOutput
from kdmos.ops import native
from kdmos.ops.mlp_max import linear_relu
from kdmos.precision import products, usable_precision, uses_tf32
from kdmos.settings import PolarGrid

REACH = 2  # cells: what a level's two 3x3 convolutions see beyond their input
WINOGRAD_INPUTS = 64  # channels from which a convolution is transformed: with fewer, more background is left out


def fold(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [out, ...] and bias of a layer followed by a batch norm, as one layer."""
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = torch.zeros_like(norm.running_mean) if bias is None else bias
    return weight * factor.view(-1, *[1] * (weight.ndim - 1)), (bias - norm.running_mean) * factor + norm.bias


class FoldedConv(nn.Module):
    """3x3 convolution without padding in phi, its norm folded in, and LeakyReLU."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, slope: float, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = fold(conv.weight, conv.bias, norm)
        self.slope = slope
        self.fused = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.weight = weight.detach().to(dtype, memory_format=torch.channels_last)
        self.bias = bias.detach().to(dtype)
        self.transformed = None
        if self.weight.shape[1] >= WINOGRAD_INPUTS and ops.can_winograd([self.weight], len(self.weight)):
            self.transformed = ops.winograd_weight(weight.detach(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and not torch.compiler.is_compiling():
            # oneDNN applies the activation before the result leaves the registers; but a compiler joins them itself,
            # and what is exported must run elsewhere too
            sizes = ((1, 0), (1, 1), (1, 1), 1)
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *sizes, "leaky_relu", [self.slope], ""
            )
        if x.device.type != "cpu" and native.serves(x):  # cuDNN's bias is a pass of its own, the activation another
            x = native.channels_last(F.conv2d(x, self.weight, None, padding=(1, 0)))
            ops.bias_activation(x, self.bias, self.slope)
            return x
        return F.leaky_relu_(F.conv2d(x, self.weight, self.bias, padding=(1, 0)), self.slope)

    def whole(self, parts: Sequence[Tensor], distance: Tensor | None, near: int) -> Tensor:
        """Of parts that count as one, circular in phi; background where the `distance` is more than `near`.

        One with many inputs is computed everywhere: there is little background so deep in the network. From there on an
        image's background is constant up to rounding alone, and no later layer takes it for granted.
        """
        if self.transformed is not None and ops.can_winograd(parts, len(self.weight)):
            return ops.winograd_conv(parts, self.transformed, self.bias, self.slope)
        return ops.masked_conv(parts, self.weight, self.bias, distance, near, True, self.slope)


class FoldedBlock(nn.Module):
    """A conv block. For torch the circle is closed once for all its convolutions: each takes one sector off either end.

    `ops.masked_conv` closes it by itself, and takes the parts as they are.
    """

    wrap_around = staticmethod(ops.wrap_around)  # an attribute, because `ExportableStudent` has its own

    def __init__(self, block: ConvBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(FoldedConv(layer.conv, layer.norm, layer.activation.negative_slope, dtype) for layer in block)
        )

    def forward(self, *parts: Tensor, distance: Tensor | None = None, reach: int = 0) -> Tensor:
        """Parts that count as one, convolved everywhere.

        With a `distance` (see `ops.cell_distance`) they must be background where it is more than `reach`: this needs
        less work on a CPU, where each convolution carries them one cell on.
        """
        if ops.can_mask(parts, len(self.convs[0].weight)):
            for conv, near in zip(self.convs, range(reach + 1, reach + 1 + len(self.convs))):
                parts = (conv.whole(parts, distance, near),)
            return parts[0]
        if parts[0].shape[3] >= len(self.convs):
            return self.convs(self.wrap_around(parts, len(self.convs)))
        for conv in self.convs:  # the circle is shorter than what they need of it
            parts = (conv(self.wrap_around(parts)),)
        return parts[0]

    def at_cells(self, *parts: Tensor, distance: Tensor | None) -> Tensor:
        """As `forward`; with a `distance` what is not 0 away may be left unset."""
        if distance is None or not ops.can_mask(parts, len(self.convs[0].weight)):
            return self(*parts)
        for conv, near in zip(self.convs, reversed(range(len(self.convs)))):
            parts = (ops.masked_conv(parts, conv.weight, conv.bias, distance, near, False, conv.slope),)
        return parts[0]


class FoldedAttention(nn.Module):
    """`CoAttention` with its norm folded in, and the pooling that follows.

    [B, ca, H, W] and [B, cm, H, W] -> the attended appearance, and what the next level takes of either branch.
    """

    co_attention = staticmethod(ops.co_attention)

    def __init__(self, attention: CoAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.fuse = FoldedBlock(attention.fuse, dtype)
        self.layers = [
            (layer.weight.detach().contiguous(), layer.bias.detach())  # as the op takes them
            for layer in (attention.gate, attention.spatial, attention.channel)
        ]

    def forward(
        self, appearance: Tensor, motion: Tensor, distance: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`distance` is that of the appearance's level, which reaches wherever the motion does."""
        fused = self.fuse(appearance, motion, distance=distance, reach=REACH)
        return self.co_attention(appearance, motion, fused, *self.layers)


class FoldedEncoder(nn.Module):
    """An encoder branch; its first norm becomes the values of the cells and of the background."""

    cells_to_image = staticmethod(ops.cells_to_image)

    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FoldedBlock(block, dtype) for block in encoder.blocks)
        norm = encoder.norm
        self.factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
        self.background = (norm.bias - norm.running_mean * self.factor).detach()
        self.dtype = dtype

    def image(self, values: Tensor, cells: Tensor, num_scans: int, grid: PolarGrid) -> Tensor:
        """Normalised dense image [B, C, R, A] of values [M, C]. Not folded into the convolution: its padding is 0."""
        return self.cells_to_image(values, cells, self.factor, self.background, num_scans, grid, self.dtype)

    def distances(self, occupied: Tensor, cells: Tensor, num_scans: int, bins: tuple[int, int, int]) -> list[Tensor]:
        """Of each level: how far what is not background lies, if those `cells` are it that are `occupied`, bool [M]."""
        rings, sectors, _ = bins
        places = num_scans * rings * sectors
        near = cells.new_zeros(places + 1, dtype=torch.bool).index_copy_(0, cells, occupied)  # the last as in `image`
        near, out = near[:places].view(num_scans, rings, sectors), []
        for _ in self.blocks:
            out.append(ops.cell_distance(near, REACH + 2))  # what the attention convolves is at most REACH + 1 away
            near = out[-1] <= REACH
            near = near[:, : near.shape[1] // 2 * 2, : near.shape[2] // 2 * 2]  # pooling leaves out an odd last one
            near = near[:, ::2, ::2] | near[:, ::2, 1::2] | near[:, 1::2, ::2] | near[:, 1::2, 1::2]
        return out


class FoldedDecoderLevel(nn.Module):
    dysample = staticmethod(ops.dysample)

    def __init__(self, level: DecoderLevel, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.block = level.up, FoldedBlock(level.block, dtype)
        self.dtype = dtype
        if isinstance(level.up, DySample) and level.up.style == "lp" and level.up.scope is None:
            offset = level.up.offset
            self.weight = (0.25 * offset.weight).detach().to(dtype)
            self.bias = (0.25 * offset.bias + level.up.start.flatten()).detach().float()
        else:
            self.weight = None

    def upsample(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return self.up(x.float()).to(self.dtype)
        # the start is added in float32, the bias's type: half precision cannot tell sub-pixels apart
        offset = F.conv2d(x, self.weight) + self.bias[:, None, None]
        return self.dysample(x, offset, self.up.scale, self.up.groups, self.up.circular)

    def forward(self, x: Tensor, skip: Tensor, distance: Tensor | None = None) -> Tensor:
        """Everywhere; with a `distance` what is not 0 away may be left unset."""
        return self.block.at_cells(skip, self.upsample(x), distance=distance)


class FastStudent(nn.Module):
    """A student for inference alone: the same answers in less time.

    Batch norms are folded, convolution and activation are one step, the point MLP and the maximum over cells another.
    In float32 the logits differ by rounding only. In half precision the first layer of the point MLP, the gates and the
    places of DySample stay in float32.

    Args:
        student: Any student; its weights are copied.
        precision: "float32", "tf32", "bfloat16" or "float16"; one that the device cannot compute in natively becomes
            float32, with a warning.
    Raises: ValueError for another precision.
    """

    def __init__(self, student: Student, precision: str = "float32") -> None:
        super().__init__()
        self.settings, self.header = student.settings, student.header
        self.dtype = dtype = usable_precision(precision, student.head.weight.device)
        self.tf32 = uses_tf32(precision, student.head.weight.device)
        with torch.no_grad():
            self._fold(copy.deepcopy(student), dtype)
        self.requires_grad_(False).eval()

    def _fold(self, student: Student, dtype: torch.dtype) -> None:
        mlp, unet = student.point_mlp, student.unet
        layers = [fold(layer[0].weight, layer[0].bias, layer[1]) for layer in mlp.layers]
        # the norm of the features goes into the first layer: it has no padding
        factor = mlp.norm.weight / (mlp.norm.running_var + mlp.norm.eps).sqrt()
        shift = mlp.norm.bias - mlp.norm.running_mean * factor
        (weight, bias), *others = layers
        layers = [(weight * factor, weight @ shift + bias), *((w.to(dtype), b.to(dtype)) for w, b in others)]
        self.mlp = [(w.detach(), b.detach()) for w, b in layers]
        compress = student.compress
        self.last = mlp.out.weight.detach().to(dtype)
        # the bias of the last layer moves a maximum with it, and so moves on into the next layer
        self.compress = compress.weight.detach().to(dtype)
        self.compress_bias = (compress.weight @ mlp.out.bias + compress.bias).detach().to(dtype)
        self.appearance, self.motion = (FoldedEncoder(branch, dtype) for branch in (unet.appearance, unet.motion))
        self.attention = nn.ModuleList(FoldedAttention(attention, dtype) for attention in unet.attention)
        self.decoder = nn.ModuleList(FoldedDecoderLevel(level, dtype) for level in unet.decoder)
        self.head_weight, self.head_bias = (p.detach() for p in (student.head.weight, student.head.bias))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.settings.classes

    @property
    def moving(self) -> int:
        return self.settings.moving

    def compressed(self, maximum: Tensor) -> Tensor:
        """[M, 256] -> [M, 32], what a cell has in the dense view."""
        return linear_relu(maximum, self.compress, self.compress_bias)

    def unet(
        self,
        appearance: Tensor,
        motion: Tensor,
        distances: Sequence[Tensor | None] = (None,) * 5,
        motion_distances: Sequence[Tensor | None] = (None,) * 4,
    ) -> Tensor:
        """[B, 32, R, A] and [B, K, R, A] -> [B, 32, R, A]; where distances are given, it is right at cells with points.

        distances, motion_distances: Of each level of either branch, see `FoldedEncoder.distances`.
        """
        skips = []
        for level, attention in enumerate(self.attention):
            appearance = self.appearance.blocks[level](appearance, distance=distances[level])
            motion = self.motion.blocks[level](motion, distance=motion_distances[level])
            attended, appearance, motion = attention(appearance, motion, distances[level])
            skips.append(attended)
        x = self.appearance.blocks[-1](appearance, distance=distances[-1])
        *decoder, last = self.decoder
        for level in decoder:
            x = level(x, skips.pop())
        return last(x, skips.pop(), distances[0])  # the head reads nothing but cells with points

    @torch.inference_mode()
    def forward(
        self,
        points: Tensor,
        offsets: Tensor,
        residual: Tensor,
        fixed_size: bool = False,
        max_cells: int | None = None,
    ) -> StudentOutput:
        """As `Student.forward`; the logits are float32 whatever the precision.

        `fixed_size`, `max_cells`: See `ops.polar_grid`.
        """
        if not points.is_cuda:
            return self._forward(points, offsets, residual, fixed_size, max_cells)
        with products(self.tf32):
            return self._forward(points, offsets.to(points.device), residual, fixed_size, max_cells)

    def _forward(
        self, points: Tensor, offsets: Tensor, residual: Tensor, fixed_size: bool, max_cells: int | None
    ) -> StudentOutput:
        num_scans, grid = offsets.numel() - 1, self.settings.grid
        gridded = ops.polar_grid(points, offsets, grid, fixed_size, max_cells)
        order = gridded.by_cell
        cells, bins = gridded.cells, grid.bins
        values = self.compressed(ops.mlp_max(gridded.features, self.mlp, self.last, order))
        appearance = self.appearance.image(values, cells, num_scans, grid)
        motion = ops.cell_max(residual, order)
        # Cells without points are background, for motion those without residuals too. Most layers keep away from it.
        distances, motion_distances = [None] * len(self.appearance.blocks), [None] * len(self.motion.blocks)
        if ops.can_mask([appearance]):
            occupied = torch.ones_like(cells, dtype=torch.bool)
            distances = self.appearance.distances(occupied, cells, num_scans, bins)
            motion_distances = self.motion.distances((motion != 0).any(1), cells, num_scans, bins)
        motion = self.motion.image(motion, cells, num_scans, grid)
        x = self.unet(appearance, motion, distances, motion_distances)
        return StudentOutput(ops.voxel_head(x, gridded.voxels, self.head_weight, self.head_bias, grid), gridded)


class PointLogits(NamedTuple):
    """point_logits: float32 [N, C]."""

    point_logits: Tensor


class GraphedStudent(FastStudent):
    """A `FastStudent` that answers for one scan from a CUDA graph: one launch instead of some hundred.

    The work is always that for `capacity` points and `max_cells` cells, whatever the scan has; the graph is captured at
    the first scan. A batch of several scans, or a scan of more points, goes the way of `FastStudent`. A scan of more
    cells is found out only when the device is done: its logits are all NaN, and `settled` makes them anew. Scans follow
    each other on one stream. On a CPU the same work is done without a graph.

    Args:
        student: Any student; its weights are copied. On a GPU its ops must be native.
        precision: As for `FastStudent`.
        capacity: Points of the largest scan to expect; the 64 beams of SemanticKITTI give up to 130,000.
        max_cells: BEV cells with points, likewise; there they are some 25,000.
    Raises: ValueError for another precision.
    """

    WARM_UP = 3  # runs before the capture: libraries choose their kernels and allocate what they keep

    def __init__(
        self, student: Student, precision: str = "float32", capacity: int = 1 << 17, max_cells: int = 3 << 14
    ) -> None:
        super().__init__(student, precision)
        like, channels = self.head_weight, self.settings.motion.num_channels
        self.capacity, self.max_cells = capacity, max_cells
        self.points, self.residual = (like.new_zeros(capacity, size, dtype=torch.float32) for size in (4, channels))
        self.offsets = like.new_zeros(2, dtype=torch.int64)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None  # what the graph writes
        # whether the cells of the last scan had room; what the graph writes to, and the scan, to begin anew
        self.has_room = torch.ones(1, dtype=torch.bool, pin_memory=like.is_cuda)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.inference_mode()
    def forward(self, points: Tensor, offsets: Tensor, residual: Tensor) -> StudentOutput | PointLogits:
        """As `FastStudent.forward`; for one scan the values of its offsets are not looked at.

        Raises: ValueError if the shapes do not fit.
        """
        num_points = len(points)
        self._last = None
        if offsets.numel() != 2 or num_points > self.capacity:
            return super().forward(points, offsets, residual)
        for name, given, held in (("points", points, self.points), ("residual", residual, self.residual)):
            if given.shape != held[:num_points].shape:
                raise ValueError(f"student: expected {name} {[num_points, held.shape[1]]}, got {list(given.shape)}")
            held[:num_points] = given  # what a longer scan left behind them is padding
        self.offsets[1:].fill_(num_points)
        self._last = points, offsets, residual
        if not self.points.is_cuda:
            logits, self.has_room = self._of_capacity()
            return PointLogits(logits[:num_points])
        with torch.cuda.device(self.points.device):
            if self.graph is None:
                self._capture()
            self.graph.replay()
            return PointLogits(self.logits[:num_points].clone())  # the next scan overwrites them

    def settled(self, logits: Tensor) -> Tensor:
        """`logits`, the last answer, once the device is done with it; those without limits if its cells had no room.

        Waits for nothing: the caller has.
        """
        if self._last is None or bool(self.has_room):
            return logits
        return super().forward(*self._last).point_logits

    def _of_capacity(self) -> tuple[Tensor, Tensor]:
        """Logits [capacity, C], all NaN if the cells have no room, and whether they have, bool [1]."""
        sizes = {"fixed_size": True, "max_cells": self.max_cells}
        out = super().forward(self.points, self.offsets, self.residual, **sizes)
        has_room = out.gridded.cell_start[-1:] == self.offsets[1:]
        return torch.where(has_room, out.point_logits, torch.nan), has_room

    def _capture(self) -> None:
        ours, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(ours)
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                self._of_capacity()
        ours.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may do as they like
            self.logits, has_room = self._of_capacity()
            self.has_room.copy_(has_room, non_blocking=True)
        self.graph = graph  # only when the capture succeeded
