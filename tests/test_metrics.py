"""Confusion tables by hand, and the numbers of the public evaluation and of the authors' scripts."""

import math

import numpy as np
import pytest

from kdmos import metrics
from kdmos.errors import InputError

# rows truth, columns prediction: unlabeled, static, moving
BY_HAND = np.array([[5, 1, 2], [1, 6, 3], [4, 2, 8]])


def test_confusion_by_hand():
    truth = np.array([0, 0, 1, 1, 1, 2])
    predicted = np.array([0, 2, 1, 1, 2, 2], np.uint8)
    table = metrics.confusion(truth, predicted, 3)
    assert table.dtype == np.int64
    assert table.tolist() == [[1, 0, 1], [0, 2, 1], [0, 0, 1]]


def test_tables_of_scans_add_up():
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 4, (2, 100)).astype(np.uint8)
    parts = sum(metrics.confusion(truth[i : i + 30], predicted[i : i + 30], 4) for i in range(0, 100, 30))
    np.testing.assert_array_equal(parts, metrics.confusion(truth, predicted, 4))


def test_points_without_a_class_do_not_count():
    assert metrics.confusion(np.array([255, 1, 0]), np.array([1, 1, 1]), 2).tolist() == [[0, 1], [0, 1]]


def test_no_points():
    table = metrics.confusion(np.zeros(0, int), np.zeros(0, int), 2)
    assert table.tolist() == [[0, 0], [0, 0]]
    assert np.isnan(metrics.iou(table)).all()


@pytest.mark.parametrize(
    "truth, predicted, message",
    [
        ([0, 1], [0], r"got \[2\] and \[1\]"),
        ([[0, 1]], [[0, 1]], r"got \[1, 2\]"),
        ([0, 3], [0, 1], r"truth must lie in 0\.\.2, got 0\.\.3"),
        ([0, 1], [0, 255], r"predicted must lie in 0\.\.2, got 0\.\.255"),
        ([-1, 1], [0, 1], r"truth must lie in 0\.\.2, got -1\.\.1"),
    ],
)
def test_what_cannot_be_counted(truth, predicted, message):
    with pytest.raises(InputError, match=message):
        metrics.confusion(np.array(truth), np.array(predicted), 3)


def test_iou_precision_recall_by_hand():
    np.testing.assert_allclose(metrics.iou(BY_HAND), [5 / 13, 6 / 13, 8 / 19])
    np.testing.assert_allclose(metrics.precision(BY_HAND), [5 / 10, 6 / 9, 8 / 13])
    np.testing.assert_allclose(metrics.recall(BY_HAND), [5 / 8, 6 / 10, 8 / 14])


def test_unlabeled_truth_is_dropped_and_unlabeled_predictions_are_misses():
    kept = metrics.ignore_truth(BY_HAND, 0)
    assert kept.tolist() == [[0, 0, 0], [1, 6, 3], [4, 2, 8]]
    assert BY_HAND[0, 0] == 5  # the table given stays as it was
    assert metrics.moving_iou(BY_HAND, 2) == pytest.approx(8 / (8 + 3 + 6))
    assert metrics.moving_iou(BY_HAND, 2, ignore_index=None) == pytest.approx(8 / 19)


def test_absent_classes_are_nan():
    table = np.array([[4, 0, 0], [0, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(metrics.iou(table), [4 / 5, math.nan, 0])
    np.testing.assert_array_equal(metrics.precision(table), [4 / 5, math.nan, math.nan])
    np.testing.assert_array_equal(metrics.recall(table), [1, math.nan, 0])
    assert math.isnan(metrics.moving_iou(table, 1))


@pytest.fixture(scope="module")
def authors(golden):
    """The golden's arrays, and truth and prediction under the lookup table of the given name."""
    with np.load(golden("a6_eval.npz"), allow_pickle=False) as archive:
        arrays = dict(archive)

    def classes(table: str):
        return (arrays[table][arrays[name] & 0xFFFF] for name in ("raw_labels", "raw_preds"))

    return arrays, classes


def test_equals_the_public_evaluation(authors):
    arrays, classes = authors
    table = metrics.confusion(*classes("api_lut"), 3)
    np.testing.assert_array_equal(table.T, arrays["api_conf"])  # theirs has the truth in columns
    assert metrics.moving_iou(table, 2) == pytest.approx(arrays["api_iou"][2], rel=1e-12)
    found = metrics.iou(metrics.ignore_truth(table, 0))
    np.testing.assert_allclose(found, arrays["api_iou"], rtol=1e-12)
    assert found[1:].mean() == pytest.approx(arrays["api_miou"], rel=1e-12)
    kept = metrics.ignore_truth(table, 0)
    assert np.trace(kept) / kept[:, 1:].sum() == pytest.approx(arrays["api_acc"], rel=1e-12)


def test_equals_the_authors_evaluation(authors):
    arrays, classes = authors
    table = metrics.confusion(*classes("lut"), 4)
    np.testing.assert_array_equal(table.T, arrays["conf"])
    np.testing.assert_allclose(metrics.iou(table), arrays["iou"], rtol=1e-12)
    assert metrics.iou(table).mean() == pytest.approx(arrays["miou"], rel=1e-12)
    assert np.trace(table) / table.sum() == pytest.approx(arrays["acc"], rel=1e-12)


def test_equals_the_authors_training_script(authors):
    arrays, classes = authors
    # It drops unlabeled predictions too, so its numbers lie above the public ones.
    table = metrics.confusion(*classes("lut"), 4)[1:, 1:]
    np.testing.assert_array_equal(table, arrays["hist_crop"])
    np.testing.assert_allclose(metrics.iou(table), arrays["hist_crop_iou"], rtol=1e-12)


def test_movable_as_a_class_or_as_static_gives_one_moving_iou(authors):
    _, classes = authors
    truth, predicted = classes("lut")
    four = metrics.confusion(truth, predicted, 4)
    merged = np.array([0, 1, 1, 2])
    three = metrics.confusion(merged[truth], merged[predicted], 3)
    assert metrics.moving_iou(four, 3) == metrics.moving_iou(three, 2)


# --- intervals of means


def test_the_interval_of_two_values_by_hand():
    # Means of two draws of {0, 1}: 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4.
    assert metrics.bootstrap_interval([0, 1]) == (0, 1)
    assert metrics.bootstrap_interval([0, 1], confidence=0.4) == (0.5, 0.5)


def test_the_interval_of_shares_is_that_of_the_binomial():
    # Twenty draws with probability 1/2: at most 5 in 2.1 % of the cases, at most 6 in 5.8 %; as many above 14.
    assert metrics.bootstrap_interval([0] * 10 + [1] * 10, samples=50_000) == pytest.approx((0.3, 0.7))


def test_the_interval_is_the_same_each_time_and_leaves_out_what_is_unknown():
    values = np.random.default_rng(0).random(30)
    low, high = metrics.bootstrap_interval(values)
    assert low < values.mean() < high
    assert metrics.bootstrap_interval([None, *values, math.nan]) == (low, high)
    assert metrics.bootstrap_interval(values, seed=1) != (low, high)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 30**0.5, rel=0.03)


def test_the_interval_of_one_value_or_none():
    assert metrics.bootstrap_interval([0.3, None]) == (0.3, 0.3)
    assert np.isnan(metrics.bootstrap_interval([None, math.nan])).all()
    for options in ({"confidence": 1}, {"confidence": 0}, {"samples": 0}):
        with pytest.raises(InputError, match="bootstrap_interval: expected confidence"):
            metrics.bootstrap_interval([0, 1], **options)
