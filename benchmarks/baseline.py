"""The frozen denominator of every speed claim: KDMOS as its authors arrange it, in plain torch and numpy.

Residual channels and gridding in numpy on the host, `torch.unique` + `scatter_reduce` for the BEV cells,
contiguous float32 throughout, DySample as pixel_shuffle + grid_sample, a head evaluated in every voxel, the
distillation loss as a chain of separate ops. Straightforward, neither slowed down nor tuned: nothing is
fused, folded, kept between calls or left out. Where plain numpy or torch offers two obvious ways, the faster
one is here.

This file imports nothing from `kdmos`, is compared with the authors' own outputs in
`tests/benchmarks/test_baseline.py`, and is never changed: a change would move every ratio measured so far.
One part was added later: the selective scan in chunks, for the teacher, whose authors scan in CUDA alone. It
is ours, in plain torch.
Module names are the keys of the authors' state_dict. Source: KDMOS (IROS 2025, arXiv 2506.14130), MotionBEV
(RA-L 2023), DySample (ICCV 2023).

Letters: B scans in a batch, n points of one scan, N points of the batch, K residual channels, C classes,
R x A polar rings and sectors, Z height bins.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

UNLABELED, MOVING = 0, 3  # the four classes: unlabeled, static, movable, moving

# Residual grid: yaw x range, metres.
RESIDUAL_ROWS, RESIDUAL_COLUMNS = 360, 480
RESIDUAL_RANGE = 60.0
RESIDUAL_Z = (-4.0, 2.0)

# Student grid: (rho, phi, z) in metres and radians. Intervals divide by bins - 1, as published.
R, A, Z = 480, 360, 32
GRID_MIN = np.array([1.85, -np.pi, -4.0])
GRID_MAX = np.array([50.15, np.pi, 2.0])
GRID_INTERVAL = (GRID_MAX - GRID_MIN) / (np.array([R, A, Z]) - 1)

PROBABILITY_FLOOR = 1e-8  # added to every class's probability in the released distillation loss
WDCD_WEIGHTS = (0.0, 1.0716, 22.0882, 421.3364)  # inverse share of each class in SemanticKITTI, as released


# --- Motion features (numpy) ----------------------------------------------------------------------


def residual_cells(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residual-grid cell of each point, and which points lie inside the grid.

    Args:
        points: float32 [n, 3], metres. The arithmetic stays in float32, as published.
    Returns: cell int64 [n], row * 480 + column, 0 where outside; inside bool [n]. Row 0 looks backwards
        (yaw -pi), rows run counter-clockwise; column 0 is the farthest.
    """
    distance = np.linalg.norm(points, axis=1)
    z = points[:, 2]
    inside = (distance > 0) & (distance < RESIDUAL_RANGE) & (z > RESIDUAL_Z[0]) & (z < RESIDUAL_Z[1])
    yaw = np.arctan2(points[:, 1], points[:, 0])
    row = np.floor(0.5 * (yaw / np.pi + 1.0) * RESIDUAL_ROWS)
    column = np.floor((1.0 - distance / RESIDUAL_RANGE) * RESIDUAL_COLUMNS)
    row = np.clip(row, 0, RESIDUAL_ROWS - 1).astype(np.int64)
    column = np.clip(column, 0, RESIDUAL_COLUMNS - 1).astype(np.int64)
    return np.where(inside, row * RESIDUAL_COLUMNS + column, 0), inside


def height_range(cell: np.ndarray, z: np.ndarray) -> np.ndarray:
    """max z - min z of the points in each residual cell, float32 [360, 480]; 0 in empty and one-point cells.

    `np.minimum.at` / `np.maximum.at`: from numpy 1.25 on about twenty times faster than sorting the cells and
    `reduceat` (2.4 against 43 ms for the 490 k points of four real scans).
    """
    lowest = np.full(RESIDUAL_ROWS * RESIDUAL_COLUMNS, np.inf, dtype=np.float32)
    highest = np.full(RESIDUAL_ROWS * RESIDUAL_COLUMNS, -np.inf, dtype=np.float32)
    np.minimum.at(lowest, cell, z)
    np.maximum.at(highest, cell, z)
    extent = np.zeros_like(lowest)
    np.subtract(highest, lowest, out=extent, where=highest >= lowest)
    return extent.reshape(RESIDUAL_ROWS, RESIDUAL_COLUMNS)


def occlusion_mask(extent: np.ndarray) -> np.ndarray:
    """Cells that, like all cells farther out on their ray, have no height range: bool [360, 480].

    An empty ray is occluded from end to end.
    """
    return ~np.maximum.accumulate(extent != 0, axis=1)  # column 0 is the farthest


def height_difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """first - second where `first` holds something of object height and `second`, not occluded, has at most a
    fifth of it; else 0. An empty cell counts as height 0 on either side.
    """
    keep = (0.2 * first >= second) & (first >= 0.4) & (first <= 4.0) & ~occlusion_mask(second)
    return np.where(keep, first - second, np.float32(0))


def residual_step(scans: Sequence[np.ndarray], poses_lidar: np.ndarray) -> list[np.ndarray]:
    """Height residual of K consecutive scans, seen from the last one.

    Args:
        scans: K scans, oldest first, float32 [n, >=3]; K even. The newer window is the last K / 2 of them.
        poses_lidar: LiDAR poses (world from LiDAR), float64 [K, 4, 4].
    Returns: K arrays float32 [n]: newer - older for the scans of the newer window, older - newer for the
        others; 0 for points outside the residual grid.
    """
    K = len(scans)
    lidar_from_world = np.linalg.inv(poses_lidar[-1])
    cells, inside, heights = [], [], []
    for scan, pose in zip(scans, poses_lidar, strict=True):
        transform = lidar_from_world @ pose
        points = scan[:, :3].astype(np.float64) @ transform[:3, :3].T + transform[:3, 3]
        points = points.astype(np.float32)
        cell, valid = residual_cells(points)
        cells.append(cell)
        inside.append(valid)
        heights.append(points[:, 2])

    windows = []
    for window in (slice(K // 2, K), slice(0, K // 2)):
        valid = np.concatenate(inside[window])
        cell, z = np.concatenate(cells[window]), np.concatenate(heights[window])
        windows.append(height_range(cell[valid], z[valid]))
    newer, older = windows
    newer_minus_older = height_difference(newer, older).ravel()
    older_minus_newer = height_difference(older, newer).ravel()

    residuals = []
    for i in range(K):
        difference = newer_minus_older if i >= K // 2 else older_minus_newer
        residuals.append(np.where(inside[i], difference[cells[i]], np.float32(0)))
    return residuals


def residual_channels(scans: Sequence[np.ndarray], poses_lidar: np.ndarray, num_channels: int = 8) -> list[np.ndarray]:
    """Published residual channels of a whole sequence: channel k of scan f is computed at time t = f + k.

    Args:
        scans: S scans, float32 [n, >=3], metres.
        poses_lidar: LiDAR poses (world from LiDAR), [S, 4, 4].
        num_channels: K, even; windows are K / 2 scans long.
    Returns: S arrays float32 [n, K]; 0 where t < K - 1 or t >= S.
    """
    poses_lidar = np.asarray(poses_lidar, dtype=np.float64)
    channels = [np.zeros((len(scan), num_channels), dtype=np.float32) for scan in scans]
    for t in range(num_channels - 1, len(scans)):
        first = t - num_channels + 1
        residuals = residual_step(scans[first : t + 1], poses_lidar[first : t + 1])
        for i, residual in enumerate(residuals):
            channels[first + i][:, num_channels - 1 - i] = residual
    return channels


# --- Gridding (numpy) -----------------------------------------------------------------------------


def polar_grid(
    points: np.ndarray, labels: np.ndarray | None = None, num_classes: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Point features, polar grid indices and, if there are labels, the label of every voxel.

    Args:
        points: float32 [n, 4] = x, y, z, remission.
        labels: Classes (not raw ids), integers in [0, num_classes), [n].
        num_classes: C.
    Returns: features float32 [n, 9] (offsets of the unclipped rho, phi, z from the bin centre; rho, phi, z;
        x, y; remission); grid index int64 [n, 3] (ring, sector, height); voxel labels uint8 [480, 360, 32] or
        None. As published, rho and phi are computed in float32 and everything after them in float64.
    """
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    polar = np.stack((np.sqrt(x**2 + y**2), np.arctan2(y, x), z), axis=1)  # [n, 3] float32
    grid_index = np.floor((np.clip(polar, GRID_MIN, GRID_MAX) - GRID_MIN) / GRID_INTERVAL).astype(np.int64)
    centre = (grid_index + 0.5) * GRID_INTERVAL + GRID_MIN
    features = np.concatenate((polar - centre, polar, points[:, [0, 1, 3]]), axis=1).astype(np.float32)
    voxel_label = None if labels is None else majority_label(grid_index, labels, num_classes)
    return features, grid_index, voxel_label


def majority_label(grid_index: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Most frequent label in each voxel, uint8 [480, 360, 32], 0 in empty voxels.

    Unlabeled points vote too, ties go to the lower class. Works on the sorted list of (voxel, label) pairs,
    as the authors do.
    """
    voxel = np.ravel_multi_index(tuple(grid_index.T), (R, A, Z))
    pairs = np.sort(voxel * num_classes + labels)  # [n]
    # 1) count equal pairs
    pair_start = np.flatnonzero(np.diff(pairs, prepend=-1))
    count = np.diff(pair_start, append=len(pairs))
    voxel, label = np.divmod(pairs[pair_start], num_classes)
    # 2) the largest count of each voxel; packed with the class so that the lower class wins a tie
    voxel_start = np.flatnonzero(np.diff(voxel, prepend=-1))
    best = np.maximum.reduceat(count * num_classes + (num_classes - 1 - label), voxel_start)
    voxel_label = np.full(R * A * Z, UNLABELED, dtype=np.uint8)
    voxel_label[voxel[voxel_start]] = num_classes - 1 - best % num_classes
    return voxel_label.reshape(R, A, Z)


# --- Student (torch) ------------------------------------------------------------------------------


class PointNet(nn.Module):
    """Point features [N, 9] -> [N, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm1d(9)
        self.layer1 = nn.Sequential(nn.Linear(9, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.out = nn.Linear(128, 256)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(self.layer3(self.layer2(self.layer1(self.bn1(features)))))


def pad_circular(x: Tensor) -> Tensor:
    """One more column on either side, wrapped around in phi; the convolution itself pads rho with zeros."""
    return F.pad(x, (1, 1, 0, 0), mode="circular")


def convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=(1, 0)),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(),
    )


class ConvBlock(nn.Module):
    """One or two times (circular 3x3 convolution, batch norm, LeakyReLU 0.01)."""

    def __init__(self, in_channels: int, out_channels: int, num_convs: int = 2) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels)
        if num_convs == 2:
            self.conv2 = convolution(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.children():
            x = conv(pad_circular(x))
        return x


class InConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.BatchNorm2d(in_channels), ConvBlock(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Down(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mpconv = nn.Sequential(nn.MaxPool2d(2), ConvBlock(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.mpconv(x)


class CoAttention(nn.Module):
    """Motion-guided attention on the gated appearance feature."""

    def __init__(self, appearance_channels: int, motion_channels: int) -> None:
        super().__init__()
        self.conv1x1_channel_wise = nn.Conv2d(appearance_channels, appearance_channels, 1)
        self.conv1x1_spatial = nn.Conv2d(motion_channels, 1, 1)

    def forward(self, appearance: Tensor, motion: Tensor) -> Tensor:
        spatial = torch.sigmoid(self.conv1x1_spatial(motion)) * appearance
        channel = self.conv1x1_channel_wise(F.adaptive_avg_pool2d(spatial, 1))  # [B, ca, 1, 1]
        channel = torch.softmax(channel, dim=1) * channel.shape[1]
        return spatial * channel + appearance


class CoAttentionGate(nn.Module):
    """Weighs both branches by one scalar each, then lets motion guide appearance."""

    def __init__(self, appearance_channels: int, motion_channels: int) -> None:
        super().__init__()
        self.fuse_feature1 = ConvBlock(appearance_channels + motion_channels, 32, num_convs=1)
        self.fuse_feature2 = nn.Conv2d(32, 2, 3, padding=(1, 0))
        self.attention_module = CoAttention(appearance_channels, motion_channels)

    def forward(self, appearance: Tensor, motion: Tensor) -> Tensor:
        fused = self.fuse_feature1(torch.cat((appearance, motion), dim=1))
        gate = torch.sigmoid(self.fuse_feature2(pad_circular(fused)))
        gate = F.adaptive_avg_pool2d(gate, 1)  # [B, 2, 1, 1]
        return self.attention_module(gate[:, 0:1] * appearance, gate[:, 1:2] * motion)


class DySample(nn.Module):
    """Upsampling by 2 at learned positions, style `lp`, 4 groups, offset factor 0.25."""

    scale, groups = 2, 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(channels, 2 * self.groups * self.scale**2, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)
        # Where plain bilinear upsampling looks, from the centre of its input pixel: channels are
        # (xy, group, sub-row, sub-column).
        step = (torch.arange(self.scale) - (self.scale - 1) / 2) / self.scale
        sub_row, sub_column = torch.meshgrid(step, step, indexing="ij")
        start = torch.stack((sub_column, sub_row))[:, None].repeat(1, self.groups, 1, 1)
        self.register_buffer("init_pos", start.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return dysample(x, self.offset(x) * 0.25 + self.init_pos, self.scale, self.groups)


def dysample(x: Tensor, offset: Tensor, scale: int = 2, groups: int = 4) -> Tensor:
    """x upsampled by `scale`: an output pixel reads x bilinearly at its input pixel's centre plus an offset.

    Args:
        x: [B, C, H, W].
        offset: In input pixels, start positions included, [B, 2 groups scale scale, H, W]; channels are
            (xy, group, sub-row, sub-column).
    Returns: [B, C, scale H, scale W]; positions beyond the image read its border.
    """
    B, C, H, W = x.shape
    rows = torch.arange(H, dtype=x.dtype, device=x.device) + 0.5
    columns = torch.arange(W, dtype=x.dtype, device=x.device) + 0.5
    pixel = torch.stack((columns.expand(H, W), rows[:, None].expand(H, W))).view(1, 2, 1, H, W)
    size = torch.tensor([W, H], dtype=x.dtype, device=x.device).view(1, 2, 1, 1, 1)
    position = 2 * (pixel + offset.view(B, 2, -1, H, W)) / size - 1  # -1 and 1 are the outer edges
    position = F.pixel_shuffle(position.view(B, -1, H, W), scale)  # [B, 2 groups, scale H, scale W]
    position = position.view(B, 2, groups, scale * H, scale * W)
    position = position.permute(0, 2, 3, 4, 1).contiguous().flatten(0, 1)  # [B groups, scale H, scale W, 2]
    x = x.reshape(B * groups, C // groups, H, W)
    x = F.grid_sample(x, position, mode="bilinear", padding_mode="border", align_corners=False)
    return x.view(B, C, scale * H, scale * W)


class DropBlock(nn.Module):
    """Drops squares of 7 x 7 pixels in training, the same for all channels, and rescales what is kept."""

    block_size, probability = 7, 0.5

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        seed_probability = self.probability / self.block_size**2
        seeds = (torch.rand(x.shape[0], 1, *x.shape[2:], device=x.device) < seed_probability).to(x.dtype)
        dropped = F.max_pool2d(seeds, self.block_size, stride=1, padding=self.block_size // 2)
        kept = 1 - dropped  # [B, 1, H, W]
        return x * kept * (kept.numel() / kept.sum())


class Up(nn.Module):
    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = DySample(in_channels)
        self.conv = ConvBlock(in_channels + skip_channels, out_channels)
        self.dropblock = DropBlock()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        missing_rows, missing_columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, (0, missing_columns, 0, missing_rows))  # the odd row or column goes after
        return self.dropblock(self.conv(torch.cat((skip, x), dim=1)))


class OutConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DualBranchUNet(nn.Module):
    """Appearance [B, 32, R, A] and motion [B, K, R, A] -> voxel logits [B, Z C, R, A], height-major."""

    def __init__(self, num_classes: int, num_channels: int) -> None:
        super().__init__()
        self.inc = InConv(32, 32)
        self.down1 = Down(32, 64)
        self.down2 = Down(64, 128)
        self.down3 = Down(128, 256)
        self.down4 = Down(256, 256)
        self.res_inc = InConv(num_channels, 16)
        self.res_down1 = Down(16, 32)
        self.res_down2 = Down(32, 64)
        self.res_down3 = Down(64, 128)
        self.CGM0 = CoAttentionGate(32, 16)
        self.CGM1 = CoAttentionGate(64, 32)
        self.CGM2 = CoAttentionGate(128, 64)
        self.CGM3 = CoAttentionGate(256, 128)
        self.up3 = Up(256, 256, 128)
        self.up2 = Up(128, 128, 64)
        self.up1 = Up(64, 64, 32)
        self.up0 = Up(32, 32, 32)
        self.dropout = nn.Dropout(0.5)
        self.outc = OutConv(32, Z * num_classes)

    def forward(self, appearance: Tensor, motion: Tensor) -> Tensor:
        motion0 = self.res_inc(motion)
        motion1 = self.res_down1(motion0)
        motion2 = self.res_down2(motion1)
        motion3 = self.res_down3(motion2)
        skip0 = self.CGM0(self.inc(appearance), motion0)
        skip1 = self.CGM1(self.down1(skip0), motion1)
        skip2 = self.CGM2(self.down2(skip1), motion2)
        skip3 = self.CGM3(self.down3(skip2), motion3)
        x = self.up3(self.down4(skip3), skip3)
        x = self.up2(x, skip2)
        x = self.up1(x, skip1)
        x = self.up0(x, skip0)
        return self.outc(self.dropout(x))


class BEVModel(nn.Module):
    """Only a name in the authors' state_dict."""

    def __init__(self, num_classes: int, num_channels: int) -> None:
        super().__init__()
        self.network = DualBranchUNet(num_classes, num_channels)

    def forward(self, appearance: Tensor, motion: Tensor) -> Tensor:
        return self.network(appearance, motion)


def cell_max(values: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """Largest value of the points in each cell, [num_cells, channels]; 0 in a cell without points."""
    zeros = values.new_zeros(num_cells, values.shape[1])
    return zeros.scatter_reduce(0, cell[:, None].expand_as(values), values, "amax", include_self=False)


class Student(nn.Module):
    """The KDMOS student.

    Args of forward (one entry a scan):
        features: float32 [n, 9], as `polar_grid` gives them.
        grid_index: int64 [n, 3], ring, sector, height.
        residuals: float32 [n, K].
    Returns: voxel logits [B, C, R, A, Z], evaluated everywhere.
    """

    def __init__(self, num_classes: int = 4, num_channels: int = 8) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_channels = num_channels
        self.pt_model_in = PointNet()
        self.fea_compression = nn.Sequential(nn.Linear(256, 32), nn.ReLU())
        self.BEV_model = BEVModel(num_classes, num_channels)

    def forward(self, features: list[Tensor], grid_index: list[Tensor], residuals: list[Tensor]) -> Tensor:
        B = len(features)
        # 1) BEV cells that hold a point, by a flat id: `unique` of (scan, ring, sector) rows gives the same
        #    list, but much slower
        cell = torch.cat([(i * R + index[:, 0]) * A + index[:, 1] for i, index in enumerate(grid_index)])
        occupied, rank = torch.unique(cell, return_inverse=True)
        # 2) max over the points of a cell
        bev = self.fea_compression(cell_max(self.pt_model_in(torch.cat(features)), rank, len(occupied)))
        motion = cell_max(torch.cat(residuals), rank, len(occupied))
        # 3) dense images
        appearance = self.to_image(bev, occupied, B)
        motion = self.to_image(motion, occupied, B)
        logits = self.BEV_model(appearance, motion)  # [B, Z C, R, A]
        return logits.permute(0, 2, 3, 1).reshape(B, R, A, Z, self.num_classes).permute(0, 4, 1, 2, 3)

    @staticmethod
    def to_image(values: Tensor, occupied: Tensor, B: int) -> Tensor:
        # The authors' image stays channels-last up to the first padding. Contiguous costs about the same, and the
        # first batch norm's statistics come out right in training (on a CPU, channels-last, the variance of the
        # motion image is 0.1 % low).
        image = values.new_zeros(B * R * A, values.shape[1])
        image[occupied] = values
        return image.view(B, R, A, -1).permute(0, 3, 1, 2).contiguous()


def gather_points(voxel_logits: Tensor, grid_index: list[Tensor]) -> list[Tensor]:
    """Logits of each point's voxel, [n, C] a scan.

    Args:
        voxel_logits: [B, C, R, A, Z].
        grid_index: int64 [n, 3] a scan.
    """
    point_logits = []
    for logits, index in zip(voxel_logits, grid_index, strict=True):
        ring, sector, height = index.unbind(dim=1)
        point_logits.append(logits[:, ring, sector, height].T)
    return point_logits


@torch.no_grad()
def predict(student: Student, points: list[np.ndarray], residuals: list[np.ndarray]) -> list[Tensor]:
    """Point logits [n, C] of raw scans: gridding, conversion to torch, student, gather.

    Args:
        student: In eval mode.
        points: float32 [n, 4] a scan.
        residuals: float32 [n, K] a scan.
    """
    batch = make_batch(points, residuals, device=next(student.parameters()).device)
    voxel_logits = student(batch["features"], batch["grid_index"], batch["residuals"])
    return gather_points(voxel_logits, batch["grid_index"])


def load_authors_weights(student: Student, path: str) -> None:
    """Loads the authors' state_dict; only the attention layers that their forward never uses are left out."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    dead = ("motion_channel_attention", "motion_spatial_attention")
    student.load_state_dict({name: w for name, w in weights.items() if not any(d in name for d in dead)})


# --- Selective scan (torch) -----------------------------------------------------------------------


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    gate: Tensor,
    delta_bias: Tensor,
    length: int = 64,
) -> Tensor:
    """Mamba's recurrence (2023) on one sequence, in pieces of `length` chunks of `length` points.

    Inside a piece all chunks take each step together, then the chunks' ends are chained. Every factor is at most 1,
    so that strong decay does no harm. With gradient a piece is recomputed in the backward, or memory would not do.

    Args:
        u, delta, gate: [N, D].
        a: [D, S], negative.
        b, c: [N, S].
        skip, delta_bias: [D].
    Returns: [N, D].
    """
    dt = F.softplus(delta + delta_bias)
    state, y = torch.zeros_like(a), []
    for piece in zip(*(x.split(length * length) for x in (u, dt, b, c))):
        if torch.is_grad_enabled():
            out, state = checkpoint(scan_piece, *piece, a, state, length, use_reentrant=False)
        else:
            out, state = scan_piece(*piece, a, state, length)
        y.append(out)
    return (torch.cat(y) + skip * u) * F.silu(gate)


def scan_piece(
    u: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, state: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Output [n, D] of a piece, and the state [D, S] after it."""
    n = len(u)  # steps of 0 at the end change nothing
    u, dt, b, c = (F.pad(x, (0, 0, 0, -n % length)).unflatten(0, (-1, length)) for x in (u, dt, b, c))
    decay = torch.exp(dt[..., None] * a).unbind(1)
    push = ((dt * u)[..., None] * b[:, :, None]).unbind(1)
    local = [push[0]]  # [chunks, D, S], as if every chunk began at 0
    for t in range(1, length):
        local.append(torch.addcmul(push[t], decay[t], local[-1]))
    through = torch.exp(dt.cumsum(1)[..., None] * a)  # decay since the start of the chunk, [chunks, length, D, S]
    start = [state]
    for end, factor in zip(local[-1].unbind(), through[:, -1].unbind()):
        start.append(torch.addcmul(end, factor, start[-1]))
    states = torch.addcmul(torch.stack(local, 1), through, torch.stack(start[:-1])[:, None])
    return (states @ c[..., None])[..., 0].flatten(0, 1)[:n], start[-1]


# --- Losses and training step (torch) -------------------------------------------------------------


def lovasz_softmax(probabilities: Tensor, labels: Tensor, ignore: int = UNLABELED) -> Tensor:
    """Lovasz-softmax over the classes present (Berman et al., CVPR 2018); 0 if nothing is labelled.

    Args:
        probabilities: [B, C, R, A, Z].
        labels: int64 [B, R, A, Z].
    """
    num_classes = probabilities.shape[1]
    probabilities = probabilities.permute(0, 2, 3, 4, 1).reshape(-1, num_classes)
    labels = labels.reshape(-1)
    valid = labels != ignore
    probabilities, labels = probabilities[valid], labels[valid]
    losses = []
    for c in range(num_classes):
        foreground = (labels == c).to(probabilities.dtype)
        total = foreground.sum()
        if total == 0:
            continue
        errors = (foreground - probabilities[:, c]).abs()
        errors, order = torch.sort(errors, descending=True)
        foreground = foreground[order]
        intersection = total - foreground.cumsum(0)
        union = total + (1 - foreground).cumsum(0)
        jaccard = 1 - intersection / union
        jaccard = torch.cat((jaccard[:1], jaccard[1:] - jaccard[:-1]))
        losses.append(torch.dot(errors, jaccard))
    return torch.stack(losses).mean() if losses else probabilities.sum()


def segmentation_loss(voxel_logits: Tensor, voxel_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Lovasz-softmax on the dense voxel grid, unlabeled voxels ignored; 0 if all are.

    Args:
        voxel_logits: [B, C, R, A, Z].
        voxel_labels: int64 [B, R, A, Z].
    """
    cross_entropy = F.cross_entropy(voxel_logits, voxel_labels, ignore_index=UNLABELED, reduction="sum")
    cross_entropy = cross_entropy / (voxel_labels != UNLABELED).sum().clamp(min=1)
    return cross_entropy, lovasz_softmax(torch.softmax(voxel_logits, dim=1), voxel_labels)


def wdcd_authors_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0
) -> tuple[Tensor, Tensor]:
    """NCKD, weighted by class over all points, and TCKD, the mean over moving points; no factor T^2.

    Args:
        student, teacher: Point logits [N, C].
        labels: int64 [N]. Unlabeled points weigh 0.
    Without labelled points NCKD is 0, without moving points TCKD is 0 (the authors' are NaN).
    """
    target = F.one_hot(labels, student.shape[1]).bool()
    # 1) the non-target classes among themselves: -1000 keeps the target out of the softmax
    masked_student = (student / temperature).masked_fill(target, -1000.0)
    masked_teacher = (teacher / temperature).masked_fill(target, -1000.0)
    log_q_student = F.log_softmax(masked_student, dim=1)
    q_teacher = F.softmax(masked_teacher, dim=1) + PROBABILITY_FLOOR
    divergence = F.kl_div(log_q_student, q_teacher, reduction="none").sum(dim=1)  # [N]
    weights = student.new_tensor(WDCD_WEIGHTS)[labels]
    nckd = (weights * divergence).sum() / weights.sum().clamp(min=1)
    # 2) the target class against all others, moving points only
    moving = labels == MOVING
    b_student = target_and_rest(student[moving], target[moving], temperature)
    b_teacher = target_and_rest(teacher[moving], target[moving], temperature)
    tckd = F.kl_div(torch.log(b_student), b_teacher, reduction="sum") / moving.sum().clamp(min=1)
    return nckd, tckd


def target_and_rest(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Probability of the target class and of all others, [N, 2]."""
    probabilities = F.softmax(logits / temperature, dim=1) + PROBABILITY_FLOOR
    return torch.stack(((probabilities * target).sum(dim=1), (probabilities * ~target).sum(dim=1)), dim=1)


def wdcd_authors_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0, beta: float = 3.0
) -> Tensor:
    """The released distillation loss, beta NCKD + TCKD (arguments as in `wdcd_authors_terms`)."""
    nckd, tckd = wdcd_authors_terms(student, teacher, labels, temperature)
    return beta * nckd + tckd


def make_batch(
    points: list[np.ndarray],
    residuals: list[np.ndarray],
    labels: list[np.ndarray] | None = None,
    teacher_logits: list[np.ndarray] | None = None,
    device: torch.device | str = "cpu",
) -> dict:
    """Gridded scans as tensors.

    Args (one entry a scan):
        points: float32 [n, 4].
        residuals: float32 [n, K].
        labels: Classes (not raw ids), integers [n].
        teacher_logits: float32 [n, C].
    Returns: lists `features`, `grid_index`, `residuals`; given labels also the list `labels` and
        `voxel_labels`, int64 [B, R, A, Z]; given teacher logits also the list `teacher_logits`.
    """
    grids = [polar_grid(scan, None if labels is None else labels[i]) for i, scan in enumerate(points)]
    batch = {
        "features": [torch.from_numpy(features).to(device) for features, _, _ in grids],
        "grid_index": [torch.from_numpy(index).to(device) for _, index, _ in grids],
        "residuals": [torch.from_numpy(residual).to(device) for residual in residuals],
    }
    if labels is not None:
        batch["labels"] = [torch.from_numpy(label.astype(np.int64)).to(device) for label in labels]
        voxel_labels = np.stack([voxel_label for _, _, voxel_label in grids])
        batch["voxel_labels"] = torch.from_numpy(voxel_labels).to(device).long()
    if teacher_logits is not None:
        batch["teacher_logits"] = [torch.from_numpy(logits).to(device) for logits in teacher_logits]
    return batch


def training_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    batch: dict,
    gamma: float = 0.3,
    temperature: float = 4.0,
    beta: float = 3.0,
) -> dict[str, Tensor]:
    """One optimizer step (the authors' is SGD) on CE + Lovasz + gamma (beta NCKD + TCKD).

    Args:
        student: In the mode the caller chose; `student.train()` for training.
        batch: From `make_batch`, with labels and teacher logits.
    Returns: detached scalars `cross_entropy`, `lovasz`, `nckd`, `tckd`, `total`.
    """
    optimizer.zero_grad()
    voxel_logits = student(batch["features"], batch["grid_index"], batch["residuals"])
    point_logits = torch.cat(gather_points(voxel_logits, batch["grid_index"]))
    cross_entropy, lovasz = segmentation_loss(voxel_logits, batch["voxel_labels"])
    nckd, tckd = wdcd_authors_terms(
        point_logits, torch.cat(batch["teacher_logits"]), torch.cat(batch["labels"]), temperature
    )
    total = cross_entropy + lovasz + gamma * (beta * nckd + tckd)
    total.backward()
    optimizer.step()
    losses = {"cross_entropy": cross_entropy, "lovasz": lovasz, "nckd": nckd, "tckd": tckd, "total": total}
    return {name: loss.detach() for name, loss in losses.items()}
