"""Losses: segmentation on voxels, and the distillation family on points."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmos import ops
from kdmos.data.labels import IGNORE

WDCD_NORMALISERS = {"authors": "weight", "paper": "class", "dcd": "point"}
# What the authors' released code weighs unlabeled, static, movable and moving points with.
AUTHORS_WEIGHTS = (0.0, 1.0716, 22.0882, 421.3364)


def at_least_float32(logits: Tensor) -> Tensor:
    """Sums over 100,000 points do not fit half precision: losses are computed in float32, or float64 if given."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = 0, class_weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the labelled rows, 0 if there is none.

    Args:
        logits: float [N, C].
        labels: integer [N]; `ignore_index` and 255 count nothing.
        ignore_index: The class that means unlabeled; negative if the model has none.
        class_weights: float [C]; the mean is then weighted by them.
    Returns: Scalar.
    """
    logits, labels = at_least_float32(logits), labels.long()
    labels = labels.masked_fill(labels == IGNORE, ignore_index)
    weight = None if class_weights is None else class_weights.to(logits)
    total = F.cross_entropy(logits, labels, weight, ignore_index=ignore_index, reduction="sum")
    labelled = labels != ignore_index
    if weight is None:
        return total / labelled.sum().clamp(min=1)
    mass = (weight[labels.clamp(min=0)] * labelled).sum()
    return total / torch.where(mass > 0, mass, 1.0)


def lovasz_softmax(logits: Tensor, labels: Tensor, ignore_index: int = 0) -> Tensor:
    """Lovasz extension of the Jaccard loss, mean over the classes present in the labels; 0 if none is.

    Args:
        logits: float [N, C].
        labels: integer [N]; `ignore_index` and 255 count nothing.
        ignore_index: The class that means unlabeled; negative if the model has none.
    Returns: Scalar.
    Source: Berman et al., The Lovasz-Softmax loss, CVPR 2018.
    """
    logits, labels = at_least_float32(logits), labels.long()
    num_classes = logits.shape[1]
    labelled = (labels != ignore_index) & (labels != IGNORE)
    truth = F.one_hot(torch.where(labelled, labels, 0), num_classes).T * labelled  # [C, N]
    # An ignored row has error 0: it sorts behind all errors and adds nothing. No row needs to be taken out.
    error = (truth - logits.softmax(1).T).abs() * labelled  # [C, N]
    error, order = error.sort(1, descending=True)
    truth = truth.gather(1, order).to(error.dtype)
    size = truth.sum(1, keepdim=True)
    intersection = size - truth.cumsum(1)
    union = size + (labelled[order].to(truth) - truth).cumsum(1)
    jaccard = 1 - intersection / union.clamp(min=1)
    gradient = jaccard.diff(dim=1, prepend=jaccard.new_zeros(num_classes, 1))
    present = size[:, 0] > 0
    loss = (error * gradient).sum(1)
    return torch.where(present, loss, 0.0).sum() / present.sum().clamp(min=1)


class Table(NamedTuple):
    """What a point of each class counts: see `kdmos.ops.wdcd_loss`."""

    tckd: tuple[float, ...]
    nckd: tuple[float, ...]
    weight: tuple[float, ...]


class DecoupledDistillation(nn.Module):
    """Distillation in a target part (TCKD) and a non-target part (NCKD), weighted per class.

    Base of `WDCD` and `DKD`, and the place for any other table: see `kdmos.ops.wdcd_loss` for the formula.

    Args:
        table: The `Table` for a number of classes, as a function of it.
        temperature: T.
        normaliser: "point", "weight" or "class".
        scale: Factor on the result.
        floor: Added to the student's probabilities inside TCKD.
        uses_nckd: Whether any class has a non-target part, which two classes do not allow.
    """

    def __init__(
        self,
        table: Callable[[int], Table],
        temperature: float,
        normaliser: str,
        scale: float = 1.0,
        floor: float = 0.0,
        uses_nckd: bool = True,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"{type(self).__name__}: temperature must be positive, got {temperature}")
        self.table, self.temperature, self.normaliser = table, temperature, normaliser
        self.scale, self.floor, self.uses_nckd = scale, floor, uses_nckd

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, scan_offsets: Tensor | None = None
    ) -> Tensor:
        """Args:
            student_logits, teacher_logits: float [N, C] of the points.
            labels: integer [N].
            scan_offsets: int64 [B + 1], rows of each scan of the batch; None: one scan.
        Returns: Scalar.
        Raises: ValueError for two classes where NCKD is asked for.
        """
        num_classes = student_logits.shape[1]
        if num_classes == 2 and self.uses_nckd:
            raise ValueError(
                f"{type(self).__name__}: with two classes the non-target part is a distribution over one class "
                "and NCKD is 0 whatever the teacher says; distil models of three or more classes, or use KD"
            )
        student_logits = at_least_float32(student_logits)
        tables = (student_logits.new_tensor(values) for values in self.table(num_classes))
        loss = ops.wdcd_loss(
            student_logits,
            teacher_logits,
            labels,
            *tables,
            self.temperature,
            self.normaliser,
            scan_offsets,
            self.floor,
        )
        return loss * self.scale


class WDCD(DecoupledDistillation):
    """Weighted decoupled class distillation: TCKD + beta NCKD on moving points, beta NCKD on the others.

    Args:
        variant: "authors": their released code: NCKD a weighted mean over all points (weights `class_weights`),
            TCKD a mean over moving points. "paper": each point divided by its class's share among the labelled
            points of its scan, which is the sum over the classes present of the class mean; mean over scans.
            "dcd": the paper's unweighted form, mean over labelled points.
        temperature: T; 4 in the authors' code, not given in the paper.
        beta: Weight of NCKD; 3 in the authors' code, not given in the paper.
        moving: Index of the moving class; negative counts from the end.
        ignore_index: The class that means unlabeled; negative if the model has none.
        class_weights: One per class, "authors" only; None: theirs, for four classes.
        moving_parts, other_parts: Whether (TCKD, NCKD) are used on moving points and on the others: the
            ablation of the paper's Table V.
    Raises: ValueError for an unknown variant, or weights that do not fit the classes.
    Source: KDMOS (IROS 2025). "authors" keeps the 1e-8 that their code adds to the student's probabilities in
        TCKD: it decides where the student is certain and wrong. The one in their NCKD only shifts its value by
        about 1e-5, without a gradient, and is left out.
    """

    def __init__(
        self,
        variant: str = "authors",
        temperature: float = 4.0,
        beta: float = 3.0,
        moving: int = -1,
        ignore_index: int = 0,
        class_weights: tuple[float, ...] | None = None,
        moving_parts: tuple[bool, bool] = (True, True),
        other_parts: tuple[bool, bool] = (False, True),
    ) -> None:
        if variant not in WDCD_NORMALISERS:
            raise ValueError(f"WDCD: variant must be one of {tuple(WDCD_NORMALISERS)}, got {variant!r}")
        if class_weights is not None and variant != "authors":
            raise ValueError(f"WDCD: class_weights belong to variant 'authors'; {variant!r} counts the points itself")

        def table(num_classes: int) -> Table:
            weight = [0.0 if c == ignore_index else 1.0 for c in range(num_classes)]
            if variant == "authors":
                weight = AUTHORS_WEIGHTS if class_weights is None else class_weights
                if len(weight) != num_classes:
                    raise ValueError(
                        f"WDCD: variant 'authors' has {len(weight)} class weights but the logits have {num_classes} "
                        "classes; give class_weights or use variant 'paper'"
                    )
            is_moving = [c == moving % num_classes for c in range(num_classes)]
            parts = [moving_parts if m else other_parts for m in is_moving]
            tckd = [float(part[0]) for part in parts]
            if variant == "authors":
                # Their TCKD is a plain mean over moving points: the weight of one class alone cancels out.
                tckd = [t if w else 0.0 for t, w in zip(tckd, weight)]
            return Table(tuple(tckd), tuple(beta * part[1] for part in parts), tuple(weight))

        floor = 1e-8 if variant == "authors" else 0.0
        uses_nckd = beta != 0 and (moving_parts[1] or other_parts[1])
        super().__init__(table, temperature, WDCD_NORMALISERS[variant], floor=floor, uses_nckd=uses_nckd)


class DKD(DecoupledDistillation):
    """Decoupled knowledge distillation: T^2 (alpha TCKD + beta NCKD), mean over labelled points.

    Source: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, ignore_index: int = 0) -> None:
        def table(num_classes: int) -> Table:
            weight = tuple(0.0 if c == ignore_index else 1.0 for c in range(num_classes))
            return Table((alpha,) * num_classes, (beta,) * num_classes, weight)

        super().__init__(table, temperature, "point", scale=temperature**2, uses_nckd=beta != 0)


def labelled_mean(values: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean of [N] values over the labelled points, 0 if there is none."""
    labelled = (labels != ignore_index) & (labels != IGNORE)
    return torch.where(labelled, values, 0.0).sum() / labelled.sum().clamp(min=1)


class KD(nn.Module):
    """Knowledge distillation: T^2 KL(teacher | student) of the softened classes, mean over labelled points.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """

    def __init__(self, temperature: float = 4.0, ignore_index: int = 0) -> None:
        super().__init__()
        self.temperature, self.ignore_index = temperature, ignore_index

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, scan_offsets: Tensor | None = None
    ) -> Tensor:
        """float [N, C] twice, integer [N] -> scalar; `scan_offsets` does not matter here."""
        student = F.log_softmax(at_least_float32(student_logits) / self.temperature, 1)
        teacher = F.log_softmax(at_least_float32(teacher_logits.detach()) / self.temperature, 1)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        return self.temperature**2 * labelled_mean(divergence, labels, self.ignore_index)


class LogitStdKD(KD):
    """KD between standardised logits: z minus its mean, over 1e-7 + its unbiased standard deviation.

    Source: Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024.
    """

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, scan_offsets: Tensor | None = None
    ) -> Tensor:
        """As `KD`. Raises: ValueError for two classes."""
        if student_logits.shape[1] == 2:
            raise ValueError(
                "LogitStdKD: two standardised logits are the same two numbers for every point, so nothing can be "
                "learnt from them; distil models of three or more classes, or use KD"
            )

        def standardise(logits: Tensor) -> Tensor:
            logits = at_least_float32(logits)
            return (logits - logits.mean(1, keepdim=True)) / (1e-7 + logits.std(1, keepdim=True))

        return super().forward(standardise(student_logits), standardise(teacher_logits), labels)


class OFA(nn.Module):
    """-sum_c ((p_teacher,c + y_c)^eps - y_c) log p_student,c, mean over labelled points.

    Source: Hao et al., One-for-All, NeurIPS 2023. eps = 1.5 is our default; their runs use 1 to 2.
    """

    def __init__(self, eps: float = 1.5, temperature: float = 1.0, ignore_index: int = 0) -> None:
        super().__init__()
        self.eps, self.temperature, self.ignore_index = eps, temperature, ignore_index

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, scan_offsets: Tensor | None = None
    ) -> Tensor:
        """float [N, C] twice, integer [N] -> scalar; `scan_offsets` does not matter here."""
        student = F.log_softmax(at_least_float32(student_logits) / self.temperature, 1)
        teacher = F.softmax(at_least_float32(teacher_logits.detach()) / self.temperature, 1)
        num_classes = student.shape[1]
        target = labels.long()
        truth = F.one_hot(torch.where((target >= 0) & (target < num_classes), target, 0), num_classes)
        points = -(((teacher + truth) ** self.eps - truth) * student).sum(1)
        return labelled_mean(points, labels, self.ignore_index)


DISTILLATION = {"wdcd": WDCD, "dkd": DKD, "kd": KD, "logit_std_kd": LogitStdKD, "ofa": OFA}
