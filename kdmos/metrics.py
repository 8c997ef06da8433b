"""Confusion tables and what is read off them, as the public SemanticKITTI MOS evaluation counts; intervals of means."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kdmos.errors import InputError

NO_CLASS = 255  # a truth that the model has no class for: the point is not counted


def confusion(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """How many points of each true class were predicted as each class.

    Args:
        truth: Class of each point, integers [N] in 0..C-1, or `NO_CLASS`.
        predicted: Predicted class, integers [N] in 0..C-1.
        num_classes: C, at most 255.
    Returns: int64 [C, C], rows truth, columns prediction. Tables of several scans add up.
    Raises: InputError if the lengths differ or a class is out of range.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.ndim != 1 or truth.shape != predicted.shape:
        raise InputError(
            f"confusion: expected truth and prediction of the same points [N], got {list(truth.shape)} and "
            f"{list(predicted.shape)}"
        )
    for name, classes in (("truth", truth[truth != NO_CLASS]), ("predicted", predicted)):
        if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
            raise InputError(
                f"confusion: {name} must lie in 0..{num_classes - 1}, got {classes.min()}..{classes.max()}"
            )
    counted = truth != NO_CLASS
    cell = truth[counted].astype(np.int64) * num_classes + predicted[counted]
    return np.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)


def ignore_truth(confusion: np.ndarray, index: int) -> np.ndarray:
    """The same table without the points whose truth is `index`.

    Predicting `index` for another point stays counted, and is a miss: that column is kept.
    """
    kept = confusion.copy()
    kept[index] = 0
    return kept


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, float64 [C]: TP / (TP + FP + FN).

    A class that occurs in neither truth nor prediction is nan; the public evaluation calls it 0.
    """
    hits = np.diag(confusion)
    return _share(hits, confusion.sum(0) + confusion.sum(1) - hits)


def precision(confusion: np.ndarray) -> np.ndarray:
    """Share of the points predicted as a class that are of it, float64 [C]; nan where none was predicted."""
    return _share(np.diag(confusion), confusion.sum(0))


def recall(confusion: np.ndarray) -> np.ndarray:
    """Share of a class's points that were predicted as it, float64 [C]; nan where it has no point."""
    return _share(np.diag(confusion), confusion.sum(1))


def moving_iou(confusion: np.ndarray, moving: int, ignore_index: int | None = 0) -> float:
    """IoU of the moving class, as SemanticKITTI's `evaluate_mos.py` counts it.

    Points whose truth is `ignore_index` (unlabeled) do not count; predicting unlabeled for a labelled point is
    a miss. Whether movable is a class of its own or part of static makes no difference to it.

    Args:
        confusion: int [C, C], rows truth; summed over all scans, never an average of IoUs.
        moving: Index of the moving class.
        ignore_index: Index of the unlabeled class, None where the model has none.
    Returns: 0..1, nan where nothing moves and nothing was predicted to.
    """
    return float(iou(confusion if ignore_index is None else ignore_truth(confusion, ignore_index))[moving])


def bootstrap_interval(
    values: Iterable[float | None], confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of the values, such as one score a sequence.

    Args:
        values: None and nan are left out.
        confidence: Share of the resampled means that lie in the interval, in 0..1, both ends excluded.
        samples: How often as many values are drawn with replacement, >= 1.
        seed: Of the draws; the same one gives the same interval.
    Returns: lower and upper end; (value, value) of one value, (nan, nan) of none.
    Raises: InputError if confidence or samples is out of range.
    """
    if not 0 < confidence < 1 or samples < 1:
        raise InputError(
            f"bootstrap_interval: expected confidence in 0..1 and samples >= 1, got {confidence} and {samples}"
        )
    known = np.array([value for value in values if value is not None], np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return np.nan, np.nan
    drawn = np.random.default_rng(seed).integers(len(known), size=(samples, len(known)))
    low, high = np.quantile(known[drawn].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
