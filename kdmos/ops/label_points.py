"""From logits to what is written of a point: its raw label, and how likely it moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdmos.ops import native, reference

MOST_CLASSES = 32


def label_points(logits: Tensor, moving: int, raw: Sequence[int], labels: Tensor, probability: Tensor) -> None:
    """Writes the raw label of the likeliest class and the probability of the moving one, in one pass.

    labels[i] = raw[argmax(logits[i])], probability[i] = softmax(logits[i])[moving]. Of equal logits the first counts,
    and NaN above all others, as in torch. For inference: no gradient.

    The results may lie in pinned host memory while the logits are on a GPU, which then writes there by itself. Nothing
    waits for it: keep the results, and wait for the stream, before you read them.

    Args:
        logits: float32 [n, C], 1 <= C <= 32.
        moving: Index of the moving class.
        raw: Label of each class, C of them in [0, 2^32).
        labels: uint32 [n], contiguous; written. On the logits' device, or on the CPU, pinned.
        probability: float32 [n], contiguous; written. Likewise.
    Raises: ValueError if shape, type, device or layout do not fit; RuntimeError if a GPU is to write into host memory
        that is not pinned.
    """
    num_points, num_classes = logits.shape if logits.ndim == 2 else (-1, 0)
    if not 1 <= num_classes <= MOST_CLASSES or logits.dtype != torch.float32:
        raise ValueError(
            f"label_points: expected logits float32 [n, 1..{MOST_CLASSES}], got {logits.dtype} {list(logits.shape)}"
        )
    if len(raw) != num_classes or not 0 <= moving < num_classes or not 0 <= min(raw) <= max(raw) < 1 << 32:
        raise ValueError(
            f"label_points: expected {num_classes} raw labels in [0, 2^32) and one of these classes as the moving one, "
            f"got {list(raw)} and {moving}"
        )
    for name, result, dtype in (("labels", labels, torch.uint32), ("probability", probability, torch.float32)):
        fits = result.shape == (num_points,) and result.dtype == dtype and result.is_contiguous()
        if not fits or result.device not in (logits.device, torch.device("cpu")):
            raise ValueError(
                f"label_points: expected {name} {dtype} [{num_points}], contiguous, on {logits.device} or pinned, got "
                f"{result.dtype} {list(result.shape)} on {result.device} with strides {list(result.stride())}"
            )
    if native.serves(logits):
        torch.ops.kdmos.label_points(logits.contiguous(), moving, raw, labels, probability)
    else:
        reference.label_points(logits, moving, raw, labels, probability)


@native.fake("label_points")
def _(logits, moving, raw, labels, probability):
    return None
