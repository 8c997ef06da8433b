"""What a 4-D network reads: the last scans in the newest one's frame, one point a voxel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdmos.data.batch import pack
from kdmos.errors import InputError

MOST_VOXELS = 1 << 16  # per axis, what the curves' codes have bits for


@dataclass(frozen=True)
class VoxelBatch:
    """B samples with V occupied voxels in all, one point standing for each.

    grid: int64 [V, 3], voxel of each sample, from 0.
    features: float32 [V, 5] = x, y, z (metres, newest scan's frame), remission, age of the scan (0: the newest).
    offsets: int64 [B + 1]; sample b owns rows offsets[b]:offsets[b + 1].
    """

    grid: Tensor
    features: Tensor
    offsets: Tensor

    @property
    def num_samples(self) -> int:
        return self.offsets.numel() - 1

    @property
    def time(self) -> Tensor:
        """int64 [V], age of the scan each voxel's point is of."""
        return self.features[:, -1].long()


class Window(NamedTuple):
    """The points of several scans in the newest one's frame.

    points: float64 [N, 4] = x, y, z, remission; the newest scan's come first, in its order.
    age: int64 [N], 0 for the newest scan.
    """

    points: Tensor
    age: Tensor


def gather_window(scans: list[Tensor], poses: Tensor, num_scans: int) -> Window:
    """The newest scans as one cloud.

    Where there are fewer, the oldest stands in for those before it, as in the authors' data.

    Args:
        scans: float32 [n, 4], oldest first.
        poses: float64 [len(scans), 4, 4], world from LiDAR.
        num_scans: How many are wanted.
    """
    transforms = torch.linalg.inv(poses[-1]) @ poses
    points, ages = [], []
    for age in range(num_scans):
        index = max(0, len(scans) - 1 - age)
        scan, transform = scans[index].double(), transforms[index].to(scans[index].device)
        if age:
            scan = torch.cat([scan[:, :3] @ transform[:3, :3].T + transform[:3, 3], scan[:, 3:]], 1)
        points.append(scan)
        ages.append(torch.full((len(scan),), age, device=scan.device))
    return Window(torch.cat(points), torch.cat(ages))


class Voxels(NamedTuple):
    """Occupied voxels of a window.

    grid: int64 [V, 3], from 0. voxel: int64 [N], which one each point is in.
    order, start: int64 [N], [V + 1]; the points of voxel v are order[start[v]:start[v + 1]], newer scans' first.
    """

    grid: Tensor
    voxel: Tensor
    order: Tensor
    start: Tensor


def find_voxels(window: Window, size: float) -> Voxels:
    """Voxels of `size` metres that hold points. Raises: InputError if the points are too far apart for their codes."""
    grid = torch.floor(window.points[:, :3] / size)
    grid = grid - grid.amin(0)
    if (most := grid.max().item() + 1) > MOST_VOXELS:  # before the cast, which would wrap around
        raise InputError(f"points {most * size:g} m apart do not fit {MOST_VOXELS} voxels of {size:g} m")
    grid = grid.long()
    extent = (grid.amax(0) + 1).tolist()
    key = (grid[:, 0] * extent[1] + grid[:, 1]) * extent[2] + grid[:, 2]
    # the points come newest scan first: a stable sort keeps them so within a voxel
    sorted_key, order = key.sort(stable=True)
    _, voxel, counts = torch.unique_consecutive(sorted_key, return_inverse=True, return_counts=True)
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    back = torch.empty_like(voxel)
    back[order] = voxel
    return Voxels(grid[order[start[:-1]]], back, order, start)


def representatives(window: Window, voxels: Voxels, turn: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """The point that stands for each voxel, int64 [V].

    Args:
        window: The points.
        voxels: Of the window.
        turn: Without a generator: each turn takes the next point of every voxel, of those of the newest scan where it
            has any, and begins again after the last.
        generator: Draw a point instead, of whatever scan, as the authors do.
    """
    sizes, first = voxels.start.diff(), voxels.start[:-1]
    if generator is not None:
        drawn = torch.rand(len(sizes), generator=generator, dtype=torch.float64).to(sizes.device)
        return voxels.order[first + (drawn * sizes).long()]
    newest = torch.zeros_like(sizes).index_add_(0, voxels.voxel, (window.age == 0).long())
    return voxels.order[first + turn % torch.where(newest > 0, newest, sizes)]


def nearest_share(xyz: Tensor, centre: Tensor, share: float) -> Tensor:
    """Rows of the share of the points that lies nearest to a point, ascending; at least one. [N, 3], [3] -> int64."""
    count = max(1, int(share * len(xyz)))
    return (xyz - centre).square().sum(1).topk(count, largest=False).indices.sort().values


def voxel_batch(samples: list[tuple[Window, Tensor, Tensor]]) -> VoxelBatch:
    """Pack samples: a window, voxels of it [V, 3], and the point that stands for each of them [V]."""
    features = [torch.cat([window.points[r], window.age[r, None]], 1).float() for window, _, r in samples]
    packed, offsets = pack(features)
    return VoxelBatch(torch.cat([grid for _, grid, _ in samples]), packed, offsets)
