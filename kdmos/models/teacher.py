"""MambaMOS, the teacher: a U-Net over the voxels of several scans, with state-space blocks along space-filling curves.

Module names are those of the published state_dict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmos import ops
from kdmos.data.multi_scan import VoxelBatch, Window, find_voxels, gather_window, representatives, voxel_batch
from kdmos.models.backends import SpconvVoxels, check_backend, convolve, scan, uses
from kdmos.ops import Neighbours
from kdmos.precision import products
from kdmos.settings import TeacherSettings

STATE, EXPAND, KERNEL = 16, 2, 5  # of the state-space blocks: state size, inner channels, width of their convolutions


class Sequences(NamedTuple):
    """Rows cut into sequences that convolutions along them do not cross.

    order: int64 [N], which row comes where.
    inverse: int64 [N], where each row went.
    offsets: int64 [S + 1], sequence s is order[offsets[s]:offsets[s + 1]].
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, order: Tensor, sizes: Tensor) -> Sequences:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return cls(order, inverse, F.pad(sizes.cumsum(0), (1, 0)))


@dataclass
class Level:
    """Voxels of one resolution, shared by all blocks that work at it.

    grid: int64 [N, 3]. sample: int64 [N], ascending. time: int64 [N], age of the voxel's scan, 0 the newest.
    codes: int64 [curves, N]. depth: Bits per axis of the codes. num_samples, num_times: B and T.
    """

    grid: Tensor
    sample: Tensor
    time: Tensor
    codes: Tensor
    depth: int
    num_samples: int
    num_times: int
    _kept: dict = field(default_factory=dict)

    def _keep(self, key, make):
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def neighbours(self, backend: str) -> Neighbours | SpconvVoxels:
        find = SpconvVoxels if uses("spconv", backend, self.grid.device) else ops.find_neighbours
        return self._keep("neighbours", lambda: find(self.grid, self.sample))

    def along(self, curve: int) -> Sequences:
        """All scans of a sample as one sequence along a curve."""

        def make() -> Sequences:
            order = self.codes[curve].argsort(stable=True)  # the sample is in the upper bits
            return Sequences.of(order, torch.bincount(self.sample, minlength=self.num_samples))

        return self._keep(curve, make)

    def scans_along(self, curve: int) -> Sequences:
        """Each scan of a sample as a sequence of its own: `order` is of the rows of `along(curve)`."""

        def make() -> Sequences:
            key = (self.sample * self.num_times + self.time)[self.along(curve).order]
            sizes = torch.bincount(key, minlength=self.num_samples * self.num_times)
            return Sequences.of(key.argsort(stable=True), sizes)

        return self._keep(("scans", curve), make)

    def halved(self) -> tuple[Level, Tensor]:
        """Voxels twice as large; and the row of each voxel's parent in them, int64 [N]."""
        shift = min(1, self.depth)
        codes = self.codes >> 3 * shift
        _, parent = codes[0].unique(return_inverse=True)
        num_parents = int(parent.max()) + 1
        # the first child stands for all in what cannot be averaged, its scan among them
        first = torch.full((num_parents,), len(parent), device=parent.device)
        first.scatter_reduce_(0, parent, torch.arange(len(parent), device=parent.device), "amin")
        above = Level(
            self.grid[first] >> shift,
            self.sample[first],
            self.time[first],
            codes[:, first],
            self.depth - shift,
            self.num_samples,
            self.num_times,
        )
        return above, parent


class SubmanifoldConv3d(nn.Module):
    """Weight [D, 3, 3, 3, C], as spconv's SubMConv3d."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, 3, 3, 3, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        bound = 1 / math.sqrt(27 * in_channels)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, neighbours: Neighbours | SpconvVoxels) -> Tensor:
        return convolve(x, self.weight, self.bias, neighbours)


class DropPath(nn.Module):
    """Leaves a branch out in training, for each voxel with the same probability, and rescales it otherwise.

    Per voxel and not per sample, as the authors' code does: its rows are voxels.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        return x * (torch.rand(len(x), 1, device=x.device) < keep).to(x.dtype) / keep


class MotionAwareStateSpaceModel(nn.Module):
    """A state-space model over all scans along a curve, gated by what each scan says for itself.

    A depth-wise convolution goes along all scans as one sequence, another along each scan; the first one's sigmoid
    says how much of the second is added to it. Source: MambaMOS (ACM MM 2024); Gu and Dao, Mamba, 2023.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner, rank = EXPAND * channels, math.ceil(channels / 16)
        self.inner, self.rank, self.backend = inner, rank, "auto"
        self.norm = nn.LayerNorm(channels)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, KERNEL, groups=inner, padding=KERNEL // 2)
        self.conv1d_single = nn.Conv1d(inner, inner, KERNEL, groups=inner, padding=KERNEL // 2)
        self.x_proj = nn.Linear(inner, rank + 2 * STATE, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.A_log = nn.Parameter(torch.arange(1.0, STATE + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        # steps between 0.001 and 0.1 at the start, after the softplus
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        step = torch.exp(torch.rand(inner) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor, together: Sequences, alone: Sequences) -> Tensor:
        """[N, C] in any order -> [N, C] in the same."""
        hidden = self.norm(x.index_select(0, together.order))
        hidden, gate = self.in_proj(hidden).chunk(2, dim=1)
        # What stands beyond the end of a sequence, up to the longest one's, is a padded zero after norm and projection
        padding = self.in_proj.weight[: self.inner] @ self.norm.bias
        all_scans = along_sequences(hidden, self.conv1d, padding, together.offsets)
        one_scan = along_sequences(hidden.index_select(0, alone.order), self.conv1d_single, padding, alone.offsets)
        one_scan = F.silu(one_scan).index_select(0, alone.inverse)
        u = F.silu(all_scans.sigmoid() * one_scan + all_scans)
        step, b, c = self.x_proj(u).split([self.rank, STATE, STATE], dim=1)
        y = scan(
            self.backend,
            u,
            F.linear(step, self.dt_proj.weight),
            -self.A_log.float().exp(),
            b,
            c,
            self.D.float(),
            gate,
            self.dt_proj.bias.float(),
            together.offsets,
        )
        return self.out_proj(y).index_select(0, together.inverse)


def along_sequences(x: Tensor, conv: nn.Conv1d, padding: Tensor, offsets: Tensor) -> Tensor:
    """A depth-wise convolution along each of the sequences in x, [N, D] -> [N, D].

    Before a sequence and after the longest one stand zeros; after a shorter one `padding` [D], for as long as the
    longest lasts: the authors pad to a rectangle, and trained weights have seen it.
    """
    halo = conv.padding[0]
    sizes, num_sequences = offsets.diff(), len(offsets) - 1
    # each sequence is followed by `halo` rows of padding and by `halo` of zeros, which are the next one's start
    of_row = torch.repeat_interleave(torch.arange(num_sequences, device=x.device), sizes, output_size=len(x))
    place = torch.arange(len(x), device=x.device) + 2 * halo * of_row
    rows = x.new_zeros(len(x) + 2 * halo * num_sequences, x.shape[1]).index_copy(0, place, x)
    beyond = torch.arange(halo, device=x.device)
    padded = sizes[:, None] + beyond < sizes.max()  # [S, halo]
    ends = offsets[1:, None] + 2 * halo * torch.arange(num_sequences, device=x.device)[:, None] + beyond
    values = torch.where(padded.flatten()[:, None], padding, 0).to(x.dtype)
    rows = rows.index_copy(0, ends.flatten(), values)
    return conv(rows.T[None])[0].T.index_select(0, place)


class Mlp(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A convolution for the place, a state-space model along one curve, an MLP; each is added to what it took."""

    def __init__(self, channels: int, ratio: float, drop_path: float, curve: int) -> None:
        super().__init__()
        self.curve = curve
        self.cpe = nn.ModuleList(
            [SubmanifoldConv3d(channels, channels), nn.Linear(channels, channels), nn.LayerNorm(channels)]
        )
        self.norm1 = nn.Sequential(nn.LayerNorm(channels))
        self.attn = nn.ModuleDict({"mamba": MotionAwareStateSpaceModel(channels)})
        self.norm2 = nn.Sequential(nn.LayerNorm(channels))
        self.mlp = nn.Sequential(Mlp(channels, int(ratio * channels)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, level: Level, convolved: Tensor | None = None) -> Tensor:
        """[N, C] -> [N, C]; the convolution reads `convolved` in place of x, if it is given."""
        conv, linear, norm = self.cpe
        x = x + norm(linear(conv(x if convolved is None else convolved, level.neighbours(self.attn["mamba"].backend))))
        along, alone = level.along(self.curve), level.scans_along(self.curve)
        x = x + self.drop_path(self.attn["mamba"](self.norm1(x), along, alone))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _batch_norm(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)


class Pooling(nn.Module):
    """Twice as large voxels: the largest of each feature."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, out_channels)
        self.norm = nn.Sequential(_batch_norm(out_channels))

    def forward(self, x: Tensor, parent: Tensor, num_parents: int) -> Tensor:
        maximum, _ = ops.polar_scatter(self.proj(x), parent, num_parents)
        return F.gelu(self.norm(maximum))


class Unpooling(nn.Module):
    """Back to the smaller voxels: what each had before, plus what its parent has."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(in_channels, out_channels), _batch_norm(out_channels), nn.GELU())
        self.proj_skip = nn.Sequential(nn.Linear(skip_channels, out_channels), _batch_norm(out_channels), nn.GELU())

    def forward(self, x: Tensor, parent: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and its skip part alone."""
        skip = self.proj_skip(skip)
        return skip + self.proj(x).index_select(0, parent), skip


class Embedding(nn.Module):
    """Features along the first curve, with the age of their scan mixed in by convolutions of its own."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int) -> nn.Conv1d:
            return nn.Conv1d(inputs, outputs, kernel_size=3, padding=1, bias=False)

        self.stem = nn.Sequential(conv(in_channels - 1, channels), nn.GELU())
        self.tn_stem1 = nn.Sequential(conv(1, 1), nn.GELU())
        self.tn_stem2 = nn.Sequential(conv(1, channels), nn.GELU())
        self.stem_final = nn.Sequential(conv(channels, channels), _batch_norm(channels), nn.GELU())
        self.drop = nn.Dropout(0.3)

    def forward(self, features: Tensor, along: Sequences) -> Tensor:
        """[N, in_channels], age last -> [N, channels]."""
        # The authors pad all samples to the longest; the second convolution and the norm see the padded rows.
        sizes = along.offsets.diff()
        num_samples, longest = len(sizes), int(sizes.max())
        sample = torch.repeat_interleave(torch.arange(num_samples, device=sizes.device), sizes)
        place = torch.arange(len(features), device=sizes.device) + (longest * sample - along.offsets[sample])
        padded = features.new_zeros(num_samples * longest, features.shape[1])
        features = torch.cat([features[:, :-1], features[:, -1:] + 1], 1)  # ages from 1: 0 is padding
        padded = padded.index_copy(0, place, features.index_select(0, along.order))
        padded = padded.view(num_samples, longest, -1).transpose(1, 2)  # [B, in_channels, longest]
        x, age = self.stem(padded[:, :-1]), padded[:, -1:]
        x = x + self.tn_stem2(age) + x * self.tn_stem1(age)
        x = self.drop(self.stem_final(x)).transpose(1, 2).flatten(0, 1)
        return x.index_select(0, place).index_select(0, along.inverse)


class MambaMosBackbone(nn.Module):
    """Voxels of several scans -> features of the same voxels."""

    def __init__(self, settings: TeacherSettings) -> None:
        super().__init__()
        self.curves, self.num_scans = settings.curves, settings.num_scans
        # The authors draw anew, after each pooling, which curve is the first, in inference too.
        self.shuffle_in_inference = False
        channels, depths = settings.encoder_channels, settings.encoder_depths
        self.embedding = Embedding(settings.in_channels, channels[0])

        def blocks(stage: nn.ModuleDict, width: int, drop_paths: list[float]) -> nn.ModuleDict:
            for i, drop_path in enumerate(drop_paths):
                stage[f"block{i}"] = Block(width, settings.mlp_ratio, drop_path, i % len(self.curves))
            return stage

        drop_paths = torch.linspace(0, settings.drop_path, sum(depths)).split(list(depths))
        self.enc = nn.ModuleDict()
        for s, width in enumerate(channels):
            stage = nn.ModuleDict({"down": Pooling(channels[s - 1], width)} if s else {})
            self.enc[f"enc{s}"] = blocks(stage, width, drop_paths[s].tolist())
        depths, widths = settings.decoder_depths, (*settings.decoder_channels, channels[-1])
        drop_paths = torch.linspace(0, settings.drop_path, sum(depths)).split(list(depths))
        self.dec = nn.ModuleDict()
        for s in reversed(range(len(depths))):
            stage = nn.ModuleDict({"up": Unpooling(widths[s + 1], channels[s], widths[s])})
            self.dec[f"dec{s}"] = blocks(stage, widths[s], drop_paths[s].tolist()[::-1])

    def first_level(self, batch: VoxelBatch) -> Level:
        depth = int(batch.grid.max()).bit_length()
        sample = torch.repeat_interleave(
            torch.arange(batch.num_samples, device=batch.grid.device), batch.offsets.diff(), output_size=len(batch.grid)
        )
        codes = torch.stack([ops.curve_code(batch.grid, depth, curve, sample) for curve in self.curves])
        return Level(batch.grid.long(), sample, batch.time.long(), codes, depth, batch.num_samples, self.num_scans)

    def forward(self, batch: VoxelBatch) -> Tensor:
        """[V, channels of the last decoder stage]."""
        level = self.first_level(batch)
        x = self.embedding(batch.features, level.along(0))
        below = []
        for stage in self.enc.values():
            if "down" in stage:
                above, parent = level.halved()
                if self.training or self.shuffle_in_inference:
                    above.codes = above.codes[torch.randperm(len(self.curves))]
                below.append((level, parent, x))
                x, level = stage["down"](x, parent, len(above.grid)), above
            x = self._blocks(stage, x, level)
        for stage in self.dec.values():
            level, parent, skip = below.pop()
            # The authors' first convolution after unpooling reads the skip alone; trained weights rely on it.
            x, skip = stage["up"](x, parent, skip)
            x = self._blocks(stage, x, level, skip)
        return x

    @staticmethod
    def _blocks(stage: nn.ModuleDict, x: Tensor, level: Level, convolved: Tensor | None = None) -> Tensor:
        for name, block in stage.items():
            if name.startswith("block"):
                x, convolved = block(x, level, convolved), None
        return x


@dataclass
class Voting:
    """How voxels with several points are answered.

    In training a voxel's point is drawn from those of all scans, and that is what tells standing from moving: where
    something stands, voxel after voxel has points of all ages. So it is drawn here, always the same way.

    turns: Forward passes; each draws anew, and a point gets the mean of the logits of the passes it stood for its voxel
        in, or of all its voxel's if it never did.
    total: The sum instead of the mean, as in the authors' cache: a point that stood more often gets larger logits.
    newest: Take points of the newest scan, in turns, where a voxel has one: no point gets the answer for what was in
        its place before, but what stands looks as if it had just come, and is often taken for moving.
    """

    turns: int = 1
    total: bool = False
    newest: bool = False


class Teacher(nn.Module):
    """MambaMOS: moving-object segmentation of the newest of several scans.

    Args:
        settings: Its shape; None: the published one.
    Source: Zeng et al., MambaMOS, ACM MM 2024; the framework of Pointcept (Point Transformer V3).
    """

    def __init__(self, settings: TeacherSettings | None = None) -> None:
        super().__init__()
        self.settings = settings = settings or TeacherSettings()
        self.header: dict = {}  # what the checkpoint it was loaded from says about itself
        self.dtype = torch.float32  # of the matrix products in `point_logits`
        self.tf32 = False  # whether a GPU may round their float32 factors
        self.voting = Voting()
        self.seg_head = nn.Linear(settings.decoder_channels[0], len(settings.classes))
        self.backbone = MambaMosBackbone(settings)

    def use_backend(self, name: str) -> None:
        """Choose whose kernels run: "auto" (on a GPU those of spconv and mamba-ssm where installed, else ours),
        "native", "spconv" (its convolution, our scan) or "mamba" (its scan, our convolution).

        Raises: ValueError for another name, or one that is not installed.
        """
        check_backend(name)
        for module in self.modules():
            if isinstance(module, MotionAwareStateSpaceModel):
                module.backend = name

    @property
    def classes(self) -> tuple[str, ...]:
        return self.settings.classes

    @property
    def moving(self) -> int:
        return self.settings.moving

    def forward(self, batch: VoxelBatch) -> Tensor:
        """Logits of each voxel, [V, classes]."""
        return self.seg_head(self.backbone(batch))

    def point_logits(self, scans: list[Tensor], poses: Tensor) -> Tensor:
        """Logits of the points of the newest scan, float32 [n, classes].

        Args:
            scans: float32 [n_i, 4], finite, oldest first; the newest `settings.num_scans` of them count.
            poses: float64 [len(scans), 4, 4], world from LiDAR.
        Raises: ValueError if the newest scan is empty, InputError if points are too far apart.
        """
        return self.window_logits(gather_window(scans, poses, self.settings.num_scans))

    def window_logits(self, window: Window) -> Tensor:
        """Logits of the points of a window's newest scan, float32 [n, classes]; raises as `point_logits`."""
        newest, voting = int((window.age == 0).sum()), self.voting
        if newest == 0:
            raise ValueError("teacher: the newest scan has no point")
        voxels = find_voxels(window, self.settings.voxel)
        of_voxel = 0.0
        of_point = torch.zeros(newest, len(self.classes), device=window.points.device)
        turns = torch.zeros(newest, dtype=torch.int64, device=window.points.device)
        generator = None if voting.newest else torch.Generator().manual_seed(0)
        for turn in range(voting.turns):
            points = representatives(window, voxels, turn, generator)
            autocast = torch.autocast(points.device.type, self.dtype, enabled=self.dtype != torch.float32)
            with autocast, products(self.tf32):
                logits = self(voxel_batch([(window, voxels.grid, points)])).float()
            of_voxel = of_voxel + logits
            current = points < newest  # the newest scan's points come first
            of_point.index_add_(0, points[current], logits[current])
            turns.index_add_(0, points[current], torch.ones_like(points[current]))
        if not voting.total:
            of_voxel, of_point = of_voxel / voting.turns, of_point / turns.clamp(min=1)[:, None]
        return torch.where(turns[:, None] > 0, of_point, of_voxel[voxels.voxel[:newest]])
