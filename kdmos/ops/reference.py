"""The ops in plain torch: the specification that every other backend is tested against.

Shapes, units and errors stand with the public functions of `kdmos.ops`; here is only the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdmos.settings import PolarGrid, ResidualGrid


def copy_scan(points: Tensor, out: Tensor, most: float) -> Tensor:
    finite, remission = points.isfinite().all(1), points[:, 3]
    odd = finite & ((remission < 0) | (remission > most))
    out.copy_(points.masked_fill(~finite[:, None], math.nan))
    return torch.stack([(~finite).sum(), odd.sum()])


def label_points(logits: Tensor, moving: int, raw: Sequence[int], labels: Tensor, probability: Tensor) -> None:
    labels.copy_(torch.tensor(raw, device=logits.device)[logits.argmax(1)])
    probability.copy_(logits.softmax(1)[:, moving])


def scan_index(offsets: Tensor, num_points: int) -> Tensor:
    """Scan of each point, int64 [N]."""
    scans = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(scans, offsets.diff(), output_size=num_points)


def polar_grid(points: Tensor, offsets: Tensor, grid: PolarGrid, fixed_size: bool = False, max_cells: int = -1):
    if fixed_size:
        num_points, num_places = int(offsets[-1]), (offsets.numel() - 1) * grid.bins[0] * grid.bins[1]
        num_cells = len(points) if max_cells < 0 else min(max_cells, len(points))
        gridded = polar_grid(points[:num_points], offsets, grid)
        return padded(gridded, len(points), num_cells, num_places, grid.bins[2])
    x, y, z, remission = points.unbind(1)
    rho, phi = torch.sqrt(x * x + y * y), torch.atan2(y, x)
    position = torch.stack([rho, phi, z], 1).double()  # float64: an index must not depend on float32 rounding

    lower, upper, interval = (position.new_tensor(v) for v in (grid.lower, grid.upper, grid.interval))
    index = ((position.clamp(lower, upper) - lower) / interval).floor()
    centre = (index + 0.5) * interval + lower
    offset = (position - centre).to(points.dtype)
    features = torch.cat([offset, torch.stack([rho, phi, z, x, y, remission], 1)], 1)  # [N, 9]

    index = index.long()
    rings, sectors, heights = grid.bins
    cell = (scan_index(offsets, len(points)) * rings + index[:, 0]) * sectors + index[:, 1]
    voxels, voxel_rank, in_voxel = torch.unique(cell * heights + index[:, 2], return_inverse=True, return_counts=True)
    # Voxels of one cell are neighbours in that order, so one sort serves both.
    cells, cell_of_voxel = torch.unique_consecutive(voxels // heights, return_inverse=True)
    voxel_start = F.pad(in_voxel.cumsum(0), (1, 0))
    cell_start = voxel_start[F.pad(torch.bincount(cell_of_voxel, minlength=len(cells)).cumsum(0), (1, 0))]
    order = voxel_rank.argsort(stable=True)
    return features, cell_of_voxel[voxel_rank], cells, cell_start, voxel_rank, voxels, voxel_start, order


def padded(gridded, N: int, num_cells: int, num_places: int, heights: int):
    """The results of `polar_grid` with as many points, cells and voxels as given; cells beyond have no place."""
    features, cell_rank, cells, cell_start, voxel_rank, voxels, voxel_start, order = gridded
    num_points = len(features)

    def fill(tensor: Tensor, length: int, value: int) -> Tensor:
        return torch.cat([tensor, tensor.new_full((length - len(tensor), *tensor.shape[1:]), value)])

    return (
        fill(features, N, 0),
        fill(cell_rank, N, N),
        fill(cells[:num_cells], num_cells, num_places),
        fill(cell_start[: num_cells + 1], num_cells + 1, num_points),
        fill(voxel_rank, N, N - 1),
        fill(voxels, N, num_places * heights),
        fill(voxel_start, N + 1, num_points),
        torch.cat([order, torch.arange(num_points, N, device=order.device)]),
    )


def voxel_label(voxel_rank: Tensor, labels: Tensor, num_voxels: int, num_classes: int) -> Tensor:
    # Labels outside the model's classes (255) vote too, as one class above all others.
    vote = labels.long().clamp(max=num_classes)
    votes = torch.zeros(num_voxels * (num_classes + 1), dtype=torch.int64, device=labels.device)
    votes.scatter_add_(0, voxel_rank * (num_classes + 1) + vote, torch.ones_like(vote))
    winner = votes.view(num_voxels, num_classes + 1).argmax(1)  # first maximum = lower class
    return winner.masked_fill(winner == num_classes, 255).to(torch.uint8)


class CellMaximum(torch.autograd.Function):
    """`polar_scatter`; the gradient goes to one point, the one named by argmax."""

    @staticmethod
    def forward(ctx, features: Tensor, cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
        num_points, channels = ctx.shape = features.shape
        inside = (cell >= 0) & (cell < num_cells)
        target = torch.where(inside, cell, num_cells)[:, None].expand(-1, channels)  # last row: padding
        largest = features.new_full((num_cells + 1, channels), -math.inf)
        largest.scatter_reduce_(0, target, features, "amax")
        # The number of each point, N higher if another is larger: as floats, which torch reduces far quicker.
        exact = torch.float32 if num_points < 2**23 else torch.float64
        point = torch.arange(num_points, device=cell.device, dtype=exact)[:, None]
        point = (largest.gather(0, target) > features).to(exact).mul_(num_points).add_(point)
        argmax = point.new_full((num_cells + 1, channels), num_points)
        argmax = argmax.scatter_reduce_(0, target, point, "amin")[:num_cells].long()
        empty = argmax == num_points
        ctx.save_for_backward(argmax)
        argmax = argmax.masked_fill(empty, -1)
        ctx.mark_non_differentiable(argmax)
        return largest[:num_cells].masked_fill(empty, 0.0), argmax

    @staticmethod
    def backward(ctx, gradient: Tensor, _) -> tuple[Tensor, None, None]:
        (argmax,) = ctx.saved_tensors
        num_points, channels = ctx.shape
        points = gradient.new_zeros(num_points + 1, channels)  # last row: of empty cells
        return points.scatter_(0, argmax, gradient)[:num_points], None, None


def polar_scatter(features: Tensor, cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    return CellMaximum.apply(features, cell, num_cells)


def cell_max(features: Tensor, order: Tensor | None, start: Tensor) -> Tensor:
    row = torch.arange(len(features), device=features.device)
    cell = torch.searchsorted(start, row, right=True) - 1  # the last that does not start after the row
    features = features if order is None else features.index_select(0, order)
    return polar_scatter(features, cell, len(start) - 1)[0]


def cells_to_bev(values: Tensor, cells: Tensor, num_scans: int, grid: PolarGrid) -> Tensor:
    rings, sectors, _ = grid.bins
    places = num_scans * rings * sectors
    dense = values.new_zeros(places + 1, values.shape[1]).index_copy(0, cells, values)[:places]  # last row: padding
    return dense.view(num_scans, rings, sectors, -1).permute(0, 3, 1, 2)  # [B, C, R, A]


def cells_to_image(
    values: Tensor,
    cells: Tensor,
    factor: Tensor,
    background: Tensor,
    num_scans: int,
    grid: PolarGrid,
    dtype: torch.dtype,
) -> Tensor:
    rings, sectors, _ = grid.bins
    places = num_scans * rings * sectors
    rows = torch.addcmul(background, values.float(), factor).to(dtype)
    dense = background.to(dtype).repeat(places + 1, 1)
    dense = dense.index_copy(0, cells.clamp(max=places), rows)[:places]  # last row: padding
    return dense.view(num_scans, rings, sectors, values.shape[1]).permute(0, 3, 1, 2)  # [B, C, R, A]


def project(xyz: Tensor, grid: ResidualGrid) -> tuple[Tensor, Tensor]:
    """Residual cell of each point, int64 [N], and whether it lies on the grid at all, bool [N]."""
    x, y, z = xyz.unbind(1)
    distance = torch.sqrt(x * x + y * y + z * z)
    inside = (distance > 0) & (distance < grid.max_range) & (z > grid.z[0]) & (z < grid.z[1])
    row = (0.5 * (torch.atan2(y, x) / math.pi + 1.0) * grid.rows).floor().clamp(0, grid.rows - 1)
    column = ((1.0 - distance / grid.max_range) * grid.columns).floor().clamp(0, grid.columns - 1)
    cell = torch.where(inside, row * grid.columns + column, 0.0).long()  # where: NaN has no integer
    return cell, inside


def height_residual(
    scans: Sequence[Tensor],
    transforms: Tensor,
    grid: ResidualGrid,
    newer: tuple[int, int],
    older: tuple[tuple[int, int], ...],
    read: tuple[int, int],
) -> Tensor:
    num_cells, like = grid.rows * grid.columns, scans[0]
    lowest = like.new_full((len(scans), num_cells), math.inf)
    highest = like.new_full((len(scans), num_cells), -math.inf)
    places = []
    # 1) the heights of each scan, seen from the frame that is asked for
    for scan, points in enumerate(scans):
        rotation, translation = transforms[scan, :3, :3], transforms[scan, :3, 3]
        xyz = (points[:, :3].double() @ rotation.T + translation).to(points.dtype)
        cell, inside = project(xyz, grid)
        places.append((cell, inside))
        lowest[scan].scatter_reduce_(0, cell[inside], xyz[inside, 2], "amin")
        highest[scan].scatter_reduce_(0, cell[inside], xyz[inside, 2], "amax")

    # 2) the height range of a window, and what is hidden in it
    def height_range(window: tuple[int, int]) -> tuple[Tensor, Tensor]:
        extent = highest[slice(*window)].amax(0) - lowest[slice(*window)].amin(0)
        extent = extent.clamp(min=0.0).view(grid.rows, grid.columns)  # -inf: an empty cell
        occluded = (extent > 0).cumsum(1) == 0  # columns run from far to near
        return extent, occluded

    def difference(first, second) -> Tensor:
        (extent, _), (other, other_occluded) = first, second
        keep = (grid.min_ratio * extent >= other) & ~other_occluded
        keep &= (extent >= grid.min_height) & (extent <= grid.max_height)
        return torch.where(keep, extent - other, 0.0).view(-1)

    # 3) each point reads the cell it lies in, from its own window's side
    new = height_range(newer)
    out = like.new_zeros(sum(len(scans[scan]) for scan in range(*read)), len(older))
    for channel, window in enumerate(older):
        old = height_range(window)
        sides = ((newer, difference(new, old)), (window, difference(old, new)))
        row = 0
        for scan in range(*read):
            cell, inside = places[scan]
            for (start, stop), value in sides:
                if start <= scan < stop:
                    out[row : row + len(cell), channel] = torch.where(inside, value[cell], 0.0)
            row += len(cell)
    return out


def height_residual_sequence(scans: Sequence[Tensor], transforms: Tensor, grid: ResidualGrid) -> Tensor:
    num_channels, half = transforms.shape[1], transforms.shape[1] // 2
    lengths = [len(scan) for scan in scans]
    out = scans[0].new_zeros(sum(lengths), num_channels)
    channels = out.split(lengths)
    for step, into_newest in enumerate(transforms):
        window = scans[step : step + num_channels]
        halves = ((half, num_channels), ((0, half),))
        residual = height_residual(window, into_newest, grid, *halves, (0, num_channels))
        for i, part in enumerate(residual[:, 0].split([len(scan) for scan in window])):
            channels[step + i][:, num_channels - 1 - i] = part  # read that many scans later
    return out


class WrapAround(torch.autograd.Function):
    """`wrap_around`: one copy each way."""

    @staticmethod
    def forward(ctx, halo: int, *parts: Tensor) -> Tensor:
        ctx.halo, ctx.shapes = halo, [part.shape for part in parts]
        batch, _, rings, sectors = parts[0].shape
        channels = [part.shape[1] for part in parts]
        size = (batch, sum(channels), rings, sectors + 2 * halo)
        out = parts[0].new_zeros(size).contiguous(memory_format=torch.channels_last)
        for place, part in zip(out.split(channels, 1), parts):
            place[:, :, : part.shape[2], halo : halo + part.shape[3]] = part
        if halo:
            out[..., :halo], out[..., -halo:] = out[..., sectors : sectors + halo], out[..., halo : 2 * halo]
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, halo = [], ctx.halo
        end = gradient.shape[3] - halo
        for part, shape in zip(gradient.split([shape[1] for shape in ctx.shapes], 1), ctx.shapes):
            inner = part[..., halo:end].clone(memory_format=torch.channels_last)
            if halo:
                inner[..., -halo:] += part[..., :halo]
                inner[..., :halo] += part[..., end:]
            gradients.append(inner[:, :, : shape[2], : shape[3]])
        return None, *gradients


def wrap_around(parts: Sequence[Tensor], halo: int) -> Tensor:
    return WrapAround.apply(halo, *parts)


def masked_conv(
    parts: Sequence[Tensor], weight: Tensor, bias: Tensor, distance: Tensor, near: int, slope: float
) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    image, weight, bias = wrap_around(parts, 1), weight.to(wide), bias.to(wide)
    out = F.leaky_relu(F.conv2d(image.to(wide), weight, bias, padding=(1, 0)), slope).to(image.dtype)
    beyond = distance > near
    first = beyond.to(torch.uint8).argmax(2)  # of each ring [B, R]
    background = out.gather(3, first[:, None, :, None].expand(-1, out.shape[1], -1, 1))  # [B, O, R, 1]
    return torch.where(beyond[:, None], background, out)


# the matrices of F(2x2, 3x3) in Lavin and Gray (CVPR 2016): of inputs, weights, outputs
WINOGRAD_B = ((1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0))
WINOGRAD_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
WINOGRAD_A = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))


def winograd_conv(parts: Sequence[Tensor], weight: Tensor, bias: Tensor, slope: float) -> Tensor:
    dtype, (height, width) = weight.dtype, parts[0].shape[2:]
    wide = torch.promote_types(dtype, torch.float32)
    b, a = bias.new_tensor(WINOGRAD_B, dtype=wide), bias.new_tensor(WINOGRAD_A, dtype=wide)
    image = F.pad(wrap_around(parts, 1).to(wide), (0, width % 2, 1, 1 + height % 2))
    tiles = image.unfold(2, 4, 2).unfold(3, 4, 2)  # [B, C, H / 2, W / 2, 4, 4]
    tiles = torch.einsum("im,bchwmn,jn->bhwijc", b, tiles, b).to(dtype).to(wide)
    weight = weight.transpose(2, 3).reshape(4, 4, bias.numel(), -1)  # [4, 4, O, C]
    products = torch.einsum("bhwijc,ijoc->bohwij", tiles, weight.to(wide))
    out = torch.einsum("im,bohwmn,jn->bohiwj", a, products, a).flatten(4).flatten(2, 3)[:, :, :height, :width]
    out = F.leaky_relu(out + bias.to(wide)[:, None, None], slope).to(dtype)
    return out.contiguous(memory_format=torch.channels_last)


def co_attention(
    appearance: Tensor,
    motion: Tensor,
    fused: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    spatial: Tensor,
    spatial_bias: Tensor,
    channel: Tensor,
    channel_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, dtype, channels = gate.dtype, appearance.dtype, appearance.shape[1]
    gates = torch.sigmoid(
        F.conv2d(torch.cat([fused[..., -1:], fused, fused[..., :1]], 3).to(wide), gate, gate_bias, padding=(1, 0))
    ).mean((2, 3))  # [B, 2]
    gated_appearance, gated_motion = (
        image.to(wide) * gates[:, branch, None, None, None] for branch, image in enumerate((appearance, motion))
    )
    where = torch.sigmoid(F.conv2d(gated_motion, spatial, spatial_bias))  # [B, 1, H, W]
    seen = where * gated_appearance
    which = F.conv2d(seen.mean((2, 3), keepdim=True), channel, channel_bias).softmax(1) * channels  # [B, ca, 1, 1]
    out = (seen * which + gated_appearance).to(dtype)
    results = (out, F.max_pool2d(out, 2), F.max_pool2d(motion, 2))
    return tuple(image.contiguous(memory_format=torch.channels_last) for image in results)


def bias_activation(x: Tensor, bias: Tensor, slope: float) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    (bias,) = by_channel(x, bias.to(wide))
    x.copy_(F.leaky_relu(x.to(wide) + bias, slope))


def by_channel(x: Tensor, *values: Tensor) -> list[Tensor]:
    """Values [C] against x [P, C] or [B, C, R, A]."""
    return [value.view(1, -1, *[1] * (x.ndim - 2)) for value in values]


def norm_activation_again(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> Tensor:
    normed = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
    return F.leaky_relu(normed, slope)


class NormActivation(torch.autograd.Function):
    """`norm_activation`; the activation's input is made again for the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> tuple[Tensor, ...]:
        rows = x.transpose(0, 1).flatten(1).to(weight.dtype)  # [C, P]
        mean = rows.sum(1) / max(1, rows.shape[1])
        variance = (rows - mean[:, None]).square().sum(1) / max(1, rows.shape[1])
        ctx.save_for_backward(x, mean, variance, weight, bias)
        ctx.settings = eps, slope
        ctx.mark_non_differentiable(mean, variance)
        return norm_activation_again(x, mean, variance, weight, bias, eps, slope), mean, variance

    @staticmethod
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor | None, ...]:
        return *norm_activation_backward(gradient, *ctx.saved_tensors, *ctx.settings), None, None


def norm_activation(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> tuple[Tensor, ...]:
    return NormActivation.apply(x, weight, bias, eps, slope)


def norm_activation_backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    over = [axis for axis in range(x.ndim) if axis != 1]
    num_rows = max(1, x.numel() // x.shape[1])
    invstd = torch.rsqrt(variance + eps)
    mean, invstd, weight, bias = by_channel(x, mean, invstd, weight, bias)
    normed = (x - mean) * invstd
    gradient = torch.where(normed * weight + bias > 0, gradient, gradient * slope).to(normed.dtype)
    to_weight, to_bias = (gradient * normed).sum(over, keepdim=True), gradient.sum(over, keepdim=True)
    to_x = weight * invstd * (gradient - (to_bias + normed * to_weight) / num_rows)
    return to_x.to(x.dtype), to_weight.flatten(), to_bias.flatten()


def dysample(x: Tensor, offset: Tensor, scale: int, groups: int, circular: bool) -> Tensor:
    batch, channels, height, width = x.shape
    # channels of offset: (xy, group, sub-row, sub-column); sub-pixels go to their place in the output
    shift = F.pixel_shuffle(offset, scale).view(batch, 2, groups, scale * height, scale * width)
    column = torch.arange(width, device=x.device, dtype=offset.dtype).repeat_interleave(scale)
    row = torch.arange(height, device=x.device, dtype=offset.dtype).repeat_interleave(scale)
    column, row = shift[:, 0] + column, shift[:, 1] + row[:, None]
    if circular:  # one more column, the first again: the gap between the last and the first is sampled there
        x, column = F.pad(x, (0, 1, 0, 0), mode="circular"), column.remainder(width)
        width += 1
    place = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], -1).flatten(0, 1)
    x = x.reshape(batch * groups, channels // groups, height, width)
    # Half precision cannot name a place: at column 200 its steps are as wide as a pixel.
    wide = torch.promote_types(x.dtype, torch.float32)
    out = F.grid_sample(x.to(wide), place.to(wide), mode="bilinear", padding_mode="border", align_corners=False)
    return out.view(batch, channels, *out.shape[2:]).to(x.dtype)


def voxel_head(features: Tensor, voxels: Tensor, weight: Tensor, bias: Tensor, grid: PolarGrid) -> Tensor:
    heights = grid.bins[2]
    padding = voxels == len(features) * grid.bins[0] * grid.bins[1] * heights
    voxels = voxels.masked_fill(padding, 0)
    # index_select, because the gradient of plain indexing is summed in another order each time
    columns = features.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, voxels // heights)  # [V, D]
    logits = F.linear(columns, weight.flatten(1), bias).view(len(voxels), heights, weight.shape[0] // heights)
    height = (voxels % heights)[:, None, None].expand(-1, 1, logits.shape[2])
    return logits.gather(1, height)[:, 0].masked_fill(padding[:, None], 0.0)  # [V, classes]


def wdcd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    tckd: Tensor,
    nckd: Tensor,
    weight: Tensor,
    temperature: float,
    normaliser: str,
    offsets: Tensor | None,
    floor: float,
) -> Tensor:
    num_points, num_classes = student.shape
    in_scan = torch.zeros_like(labels) if offsets is None else scan_index(offsets, num_points)
    num_scans = 1 if offsets is None else offsets.numel() - 1
    labelled = (labels >= 0) & (labels < num_classes)
    target = torch.where(labelled, labels, 0)

    # 1) what one point of each class counts in each scan
    count = torch.zeros(num_scans * num_classes, dtype=student.dtype, device=student.device)
    count = count.scatter_add(0, in_scan * num_classes + target, labelled.to(student.dtype))
    count = count.view(num_scans, num_classes)
    if normaliser == "class":  # mean over each class of a scan, sum over classes, mean over scans
        total_t = total_n = count * num_scans
    elif normaliser == "weight":  # weighted means, TCKD over the classes that have it
        total_t, total_n = (count * weight * (tckd != 0)).sum(), (count * weight).sum()
    else:  # "point": mean over the points that have a weight
        total_t = total_n = (count * (weight != 0)).sum()
    share_t = torch.where(total_t > 0, tckd * weight / total_t, 0.0).expand(num_scans, -1)
    share_n = torch.where(total_n > 0, nckd * weight / total_n, 0.0).expand(num_scans, -1)
    share_t = torch.where(labelled, share_t[in_scan, target], 0.0)
    share_n = torch.where(labelled, share_n[in_scan, target], 0.0)

    # 2) the two divergences of each point
    is_target = F.one_hot(target, num_classes).bool()

    def decouple(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits / temperature
        log_all = logits.logsumexp(1)
        log_rest = logits.masked_fill(is_target, -math.inf).logsumexp(1)
        log_target = logits.gather(1, target[:, None])[:, 0]
        log_b = torch.stack([log_target - log_all, log_rest - log_all], 1)  # target or not, [N, 2]
        log_q = (logits - log_rest[:, None]).masked_fill(is_target, 0.0)  # among the others, [N, C]
        return log_b, log_q

    (student_b, student_q), (teacher_b, teacher_q) = decouple(student), decouple(teacher.detach())
    if floor > 0:  # on each class's probability
        share = student_b.new_tensor([floor, (num_classes - 1) * floor])
        student_b = torch.logaddexp(student_b, share.log())
    q = teacher_q.exp().masked_fill(is_target, 0.0)
    tckd_point = (teacher_b.exp() * (teacher_b - student_b)).sum(1)
    nckd_point = (q * (teacher_q - student_q)).sum(1)
    return (share_t * tckd_point + share_n * nckd_point).sum()


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    gate: Tensor | None,
    delta_bias: Tensor,
    offsets: Tensor,
) -> Tensor:
    dt = F.softplus(delta + delta_bias)
    decay = torch.exp(dt[:, :, None] * a)  # [N, D, S]
    push = (dt * u)[:, :, None] * b[:, None]
    points, y = list(zip(decay.unbind(), push.unbind(), c.unbind())), []
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        state = torch.zeros_like(a)
        for decay_t, push_t, c_t in points[first:last]:
            state = decay_t * state + push_t
            y.append(state @ c_t)
    y = torch.stack(y) + skip * u if y else skip * u
    return y if gate is None else y * F.silu(gate)
