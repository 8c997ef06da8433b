"""What the students are built of: convolutions that wrap round in phi, the co-attention gate, upsampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmos import ops
from kdmos.models.normed import can_be_joined, normed_layers


class CircularConv2d(nn.Conv2d):
    """3x3 convolution on [B, C, R, A] whose sectors wrap round (phi) and whose rings end in zeros (rho).

    Several inputs count as one, their channels in the order given; what is smaller than the first is padded with zeros.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=(1, 0))

    def forward(self, *parts: Tensor) -> Tensor:
        return super().forward(ops.wrap_around(parts))


class ConvBlock(nn.Sequential):
    """`depth` times circular convolution, batch normalisation, LeakyReLU 0.01."""

    def __init__(self, in_channels: int, out_channels: int, depth: int = 2) -> None:
        layers = []
        for step in range(depth):
            layer = nn.Sequential()
            layer.conv = CircularConv2d(out_channels if step else in_channels, out_channels)
            layer.norm = nn.BatchNorm2d(out_channels)
            layer.activation = nn.LeakyReLU(0.01, inplace=True)
            layers.append(layer)
        super().__init__(*layers)

    def forward(self, *parts: Tensor) -> Tensor:
        """One input, or several that count as one."""
        if all(can_be_joined(layer.norm) for layer in self):
            return normed_layers(parts, [(layer.conv, layer.norm, layer.activation.negative_slope) for layer in self])
        for layer in self:
            parts = (layer.activation(layer.norm(layer.conv(*parts))),)
        return parts[0]


class CoAttention(nn.Module):
    """Lets the motion branch say where, and in which channels, to look in the appearance branch.

    One scalar gate per branch, then spatial attention from motion, then channel attention; the result takes
    the appearance feature's place. Source: the co-attention module of MotionBEV (RA-L 2023).
    """

    def __init__(self, appearance_channels: int, motion_channels: int) -> None:
        super().__init__()
        self.fuse = ConvBlock(appearance_channels + motion_channels, 32, depth=1)
        self.gate = CircularConv2d(32, 2)
        self.spatial = nn.Conv2d(motion_channels, 1, kernel_size=1)
        self.channel = nn.Conv2d(appearance_channels, appearance_channels, kernel_size=1)

    def forward(self, appearance: Tensor, motion: Tensor) -> Tensor:
        """[B, ca, H, W], [B, cm, H, W] -> [B, ca, H, W]."""
        gates = torch.sigmoid(self.gate(self.fuse(appearance, motion))).mean((2, 3))
        return attend(appearance, motion, gates, self.spatial, self.channel)


def attend(appearance: Tensor, motion: Tensor, gates: Tensor, spatial: nn.Conv2d, channel: nn.Conv2d) -> Tensor:
    """The second half of the co-attention: [B, ca, H, W], [B, cm, H, W] and a gate of either, [B, 2]."""
    batch, channels, height, width = appearance.shape
    gates = gates.to(appearance.dtype)
    # 1) where: gating the motion feature is gating its 1x1 convolution without the bias
    seen = F.conv2d(motion, spatial.weight) * gates[:, 1, None, None, None]
    seen = torch.sigmoid(seen + spatial.bias[:, None, None]).view(batch, -1, 1)  # [B, H * W, 1]
    # 2) in which channels, by the mean of what is seen
    pixels = appearance.permute(0, 2, 3, 1).view(batch, -1, channels)
    mean = (pixels.mT @ seen).view(batch, channels) / (height * width) * gates[:, :1]
    # not as a convolution: on a single pixel its gradient differed in the last bit from run to run
    scale = F.linear(mean, channel.weight.flatten(1), channel.bias).softmax(1) * channels
    scale = scale.view(batch, 1, channels)
    # 3) seen * gated appearance * scale + gated appearance, as appearance * [seen, 1] @ [scale, 1] * gate:
    # only matrix products and one multiplication go over all pixels and channels
    factor = torch.cat([scale, torch.ones_like(scale)], 1) * gates[:, :1, None]  # [B, 2, ca]
    factor = torch.cat([seen, torch.ones_like(seen)], 2) @ factor  # [B, H * W, ca]
    return (pixels * factor).view(batch, height, width, channels).permute(0, 3, 1, 2)


class DySample(nn.Module):
    """Upsampling that learns where to sample; [B, C, H, W] -> [B, C, scale * H, scale * W].

    Args:
        channels: C, a multiple of `groups` (style "pl": of scale^2 too).
        scale: Output pixels per input pixel and axis.
        style: "lp" predicts offsets, then shuffles them to their sub-pixels; "pl" shuffles the input first.
        groups: Groups of channels that share their places.
        dyscope: Whether a second convolution scales the offsets (sigmoid times 0.5 instead of 0.25).
        scope_bias: Whether that convolution has a bias: not in the paper's code, but in KDMOS's.
        circular: Whether the last axis wraps round, as phi does (ours).
    Raises: ValueError for an unknown style or channels that do not divide.
    Source: Liu et al., Learning to Upsample by Learning to Sample, ICCV 2023.
    """

    def __init__(
        self,
        channels: int,
        scale: int = 2,
        style: str = "lp",
        groups: int = 4,
        dyscope: bool = False,
        scope_bias: bool = False,
        circular: bool = False,
    ) -> None:
        super().__init__()
        if style not in ("lp", "pl"):
            raise ValueError(f"DySample: style must be 'lp' or 'pl', got {style!r}")
        if channels % groups or (style == "pl" and channels % scale**2):
            raise ValueError(
                f"DySample: {channels} channels do not divide (groups {groups}, scale {scale}, style {style})"
            )
        self.scale, self.style, self.groups, self.circular = scale, style, groups, circular
        inputs, outputs = (channels, 2 * groups * scale**2) if style == "lp" else (channels // scale**2, 2 * groups)
        self.offset = nn.Conv2d(inputs, outputs, kernel_size=1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)
        self.scope = nn.Conv2d(inputs, outputs, kernel_size=1, bias=scope_bias) if dyscope else None
        if dyscope:
            nn.init.zeros_(self.scope.weight)
            if scope_bias:
                nn.init.zeros_(self.scope.bias)
        # p0: the centres of the sub-pixels, channels (x or y, group, sub-row, sub-column)
        centre = (torch.arange(scale) - (scale - 1) / 2) / scale
        start = torch.stack([centre.expand(scale, scale), centre[:, None].expand(scale, scale)])
        start = start[:, None].expand(2, groups, scale, scale).reshape(1, -1, 1, 1)
        self.register_buffer("start", start.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        inputs = F.pixel_shuffle(x, self.scale) if self.style == "pl" else x
        offset = self.offset(inputs)
        offset = offset * (0.25 if self.scope is None else self.scope(inputs).sigmoid() * 0.5)
        if self.style == "pl":
            offset = F.pixel_unshuffle(offset, self.scale)
        # Half precision cannot tell pixels apart beyond 2048 sub-steps: the places are summed in float32.
        offset = offset.float() if offset.dtype in (torch.float16, torch.bfloat16) else offset
        return ops.dysample(x, offset + self.start, self.scale, self.groups, self.circular)


class DropBlock2d(nn.Module):
    """Drops square regions of all channels alike in training and rescales what is kept.

    Source: Ghiasi et al., DropBlock, NeurIPS 2018; one mask for all channels as in the authors' network.
    """

    def __init__(self, probability: float = 0.5, block: int = 7) -> None:
        super().__init__()
        self.probability, self.block = probability, block

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        seeds = torch.rand(x.shape[0], 1, *x.shape[2:], device=x.device) < self.probability / self.block**2
        kept = 1 - F.max_pool2d(seeds.float(), self.block, stride=1, padding=self.block // 2)
        return x * (kept * (kept.numel() / kept.sum().clamp(min=1))).to(x.dtype)


class Dropout(nn.Dropout):
    """Drops half of the values in training and doubles the others, with quicker draws than its base on a CPU."""

    def __init__(self) -> None:
        super().__init__(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.empty_like(x, dtype=torch.uint8).random_(0, 2).mul_(2)
