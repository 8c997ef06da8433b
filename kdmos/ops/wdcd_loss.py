"""Decoupled distillation, the whole family in one op: tables say which point counts how much."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import native, reference

NORMALISERS = ("point", "weight", "class")
MOST_CLASSES = 32  # of the native op


def wdcd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    tckd: Tensor,
    nckd: Tensor,
    weight: Tensor,
    temperature: float,
    normaliser: str,
    offsets: Tensor | None = None,
    floor: float = 0.0,
) -> Tensor:
    """Weighted sum over the points of their target-class and non-target-class divergence from the teacher.

    With p = softmax(z / T), target t, b = (p_t, 1 - p_t) and q = softmax of the non-target logits / T:
    TCKD = KL(b_teacher | b_student), NCKD = KL(q_teacher | q_student), and a point of class c adds
    tckd[c] * weight[c] * TCKD / D_t + nckd[c] * weight[c] * NCKD / D_n, where D is, by `normaliser`,
    "point": the number of points with a weight; "weight": the sum of the weights of the points (for TCKD of
    those with tckd[c] != 0); "class": the points of class c in the same scan, times the number of scans.
    A term whose D is 0 is 0.

    Args:
        student: Logits, float [N, C], 2 <= C. Half types are computed in float32.
        teacher: Logits, float [N, C]; receives no gradient.
        labels: Classes, integer [N]; values outside [0, C), such as 255, count nothing.
        tckd, nckd, weight: float [C].
        temperature: T > 0.
        normaliser: One of NORMALISERS.
        offsets: int64 [B + 1], rows of each scan; None: one scan.
        floor: Added to each of the student's probabilities inside TCKD: a point it is certain to get wrong by
            more than this counts no more and loses its gradient.
    Returns: Scalar.
    Raises: ValueError if the shapes do not fit or the normaliser is unknown.
    Source: KDMOS (IROS 2025); DKD (Zhao et al., CVPR 2022) for the decoupling.
    """
    if student.ndim != 2 or teacher.shape != student.shape or labels.shape != student.shape[:1]:
        raise ValueError(
            f"wdcd_loss: expected student and teacher [N, C] and labels [N], got {list(student.shape)}, "
            f"{list(teacher.shape)} and {list(labels.shape)}"
        )
    if student.shape[1] < 2 or any(table.shape != student.shape[1:] for table in (tckd, nckd, weight)):
        raise ValueError(f"wdcd_loss: expected tables [C] for C = {student.shape[1]} >= 2 classes")
    if normaliser not in NORMALISERS:
        raise ValueError(f"wdcd_loss: normaliser must be one of {NORMALISERS}, got {normaliser!r}")
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher, tckd, nckd, weight = (t.to(dtype) for t in (student, teacher, tckd, nckd, weight))
    labels = labels if labels.dtype == torch.uint8 else labels.long()
    if native.serves(student) and student.shape[1] <= MOST_CLASSES:
        with_gradient = student.requires_grad and torch.is_grad_enabled()
        rows = (student.contiguous(), teacher.detach().contiguous(), labels.contiguous())
        tables = torch.stack([tckd, nckd, weight])
        options = (float(temperature), NORMALISERS.index(normaliser), float(floor), with_gradient)
        return torch.ops.kdmos.wdcd_loss(*rows, tables, offsets, *options)[0]
    with torch.autocast(student.device.type, enabled=False):
        return reference.wdcd_loss(
            student, teacher, labels.long(), tckd, nckd, weight, temperature, normaliser, offsets, floor
        )


@native.fake("wdcd_loss")
def _(student, teacher, labels, tables, offsets, temperature, normaliser, floor, with_gradient):
    return student.new_empty(()), student.new_empty(student.shape[0] if with_gradient else 0, student.shape[1])


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])  # formed with the loss
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros in place of its gradient


def _backward(ctx, gradient, _):
    (rows,) = ctx.saved_tensors
    return None if gradient is None else rows * gradient, *(None,) * 8


native.differentiate("wdcd_loss", _backward, _keep)
