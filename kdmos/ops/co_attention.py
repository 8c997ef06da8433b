"""Where, and in which channels, motion says to look: the co-attention of the student, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import native, reference

Layer = tuple[Tensor, Tensor]  # weight and bias


def co_attention(
    appearance: Tensor,
    motion: Tensor,
    fused: Tensor,
    gate: Layer,
    spatial: Layer,
    channel: Layer,
) -> tuple[Tensor, Tensor, Tensor]:
    """Appearance looked at as the motion says, and the 2x2 maxima of it and of the motion.

    One gate per branch, the mean over all pixels of sigmoid(3x3 convolution of `fused`), whose sectors wrap round and
    whose rings end in zeros. Both branches are multiplied with theirs; then s = sigmoid(<spatial, motion>), a value a
    pixel, and c = ca softmax(channel @ mean(s * appearance)), a value a channel; the result is appearance * (s c + 1).
    Float32 inside whatever the images are (float64 for float64), under autocast too. No gradients.

    Args:
        appearance: float [B, ca, H, W], H and W >= 2. Channels last is fastest, for all three images.
        motion: [B, cm, H, W], of the same dtype.
        fused: [B, D, H, W], of the same dtype: both branches convolved.
        gate: [2, D, 3, 3] and [2], for appearance and for motion.
        spatial: [1, cm, 1, 1] and [1].
        channel: [ca, ca, 1, 1] and [ca].
    Returns: the result [B, ca, H, W]; its maxima [B, ca, H // 2, W // 2]; those of motion [B, cm, H // 2, W // 2].
    Raises: ValueError if shapes or dtypes do not fit.
    Source: the co-attention module of MotionBEV (RA-L 2023).
    """
    batch, channels, height, width = appearance.shape
    size = (batch, height, width)
    for name, image in (("motion", motion), ("fused", fused)):
        if image.ndim != 4 or (image.shape[0], *image.shape[2:]) != size or image.dtype != appearance.dtype:
            raise ValueError(
                f"co_attention: expected {name} {appearance.dtype} {[batch, '*', height, width]}, "
                f"got {image.dtype} {list(image.shape)}"
            )
    if min(height, width) < 2:
        raise ValueError(f"co_attention: an image of {height} x {width} pixels has no half")
    wide = torch.float64 if appearance.dtype == torch.float64 else torch.float32
    layers = []
    for name, layer, out, shape in (
        ("gate", gate, 2, (fused.shape[1], 3, 3)),
        ("spatial", spatial, 1, (motion.shape[1], 1, 1)),
        ("channel", channel, channels, (channels, 1, 1)),
    ):
        if (tuple(layer[0].shape), tuple(layer[1].shape)) != ((out, *shape), (out,)):
            got = f"{list(layer[0].shape)} and {list(layer[1].shape)}"
            raise ValueError(f"co_attention: expected {name} {[out, *shape]} and {[out]}, got {got}")
        layers += [part.to(wide).contiguous() for part in layer]
    if native.serves(appearance):
        images = [native.channels_last(image) for image in (appearance, motion, fused)]
        return torch.ops.kdmos.co_attention(*images, *layers)
    return reference.co_attention(appearance, motion, fused, *layers)


@native.fake("co_attention")
def _(appearance, motion, fused, gate, gate_bias, spatial, spatial_bias, channel, channel_bias):
    batch, channels, height, width = appearance.shape
    half = (height // 2, width // 2)
    return (
        native.like_channels_last(appearance, batch, channels, height, width),
        native.like_channels_last(appearance, batch, channels, *half),
        native.like_channels_last(appearance, batch, motion.shape[1], *half),
    )
