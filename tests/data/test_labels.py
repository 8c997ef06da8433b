"""Raw label ids to classes and back, by hand-worked tables."""

import numpy as np
import pytest

from kdmos.data.labels import CLASSES, IGNORE, RAW_IDS, class_table, to_classes, to_raw
from kdmos.errors import InputError

# raw id -> class with (static, moving), (unlabeled, static, moving), all four
TABLE = {
    0: (IGNORE, 0, 0),
    1: (IGNORE, 0, 0),
    9: (0, 1, 1),
    40: (0, 1, 1),
    72: (0, 1, 1),
    99: (0, 1, 1),
    10: (0, 1, 2),
    32: (0, 1, 2),
    250: (0, 1, 2),
    251: (1, 2, 3),
    252: (1, 2, 3),
    259: (1, 2, 3),
}


@pytest.mark.parametrize("column, count", [(0, 2), (1, 3), (2, 4)])
def test_classes_by_hand(column, count):
    raw = np.array(list(TABLE), np.uint32)
    expected = np.array([row[column] for row in TABLE.values()], np.uint8)
    found = to_classes(raw, CLASSES[count], "a.label")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_every_raw_id_of_the_contract_and_no_other():
    known = np.flatnonzero(class_table(CLASSES[4]) != 254)
    static = [9, 40, 44, *range(48, 53), 60, 70, 71, 72, 80, 81, 99]
    movable = [10, 11, 13, 15, 16, 18, 20, 30, 31, 32, 250]
    assert known.tolist() == sorted([0, 1, *static, *movable, *range(251, 260)])
    assert sum(map(len, RAW_IDS.values())) == len(known)  # no id stands in two classes


def test_order_of_the_classes_is_the_models():
    found = to_classes(np.array([0, 40, 10, 252], np.uint32), ("moving", "static"), "a.label")
    assert found.tolist() == [IGNORE, 1, 1, 0]


def test_instance_in_the_high_bits_is_ignored():
    assert to_classes(np.array([(7 << 16) | 252, (65535 << 16) | 40], np.uint32), CLASSES[4], "a").tolist() == [3, 1]


def test_no_points():
    assert to_classes(np.zeros(0, np.uint32), CLASSES[2], "a").shape == (0,)
    assert to_raw(np.zeros(0, np.uint8), CLASSES[2]).shape == (0,)


def test_unknown_raw_ids_are_named():
    raw = np.array([40, (3 << 16) | 7, 260, 260, 65535], np.uint32)
    with pytest.raises(InputError, match=r"seq/000003\.label: 4 of 5 labels .*\(7, 260, 65535\)"):
        to_classes(raw, CLASSES[4], "seq/000003.label")
    with pytest.raises(InputError, match=r"\(100, 101, 102, 103, 104 and 15 more\)"):
        to_classes(np.arange(100, 120, dtype=np.uint32), CLASSES[4], "a.label")


@pytest.mark.parametrize(
    "classes",
    [("static",), ("unlabeled", "moving"), ("static", "moving", "moving"), ("static", "moving", "car"), ()],
)
def test_class_lists_that_cannot_be(classes):
    with pytest.raises(InputError, match="expected different names of"):
        class_table(classes)


def test_table_is_shared_so_it_cannot_be_changed():
    table = class_table(list(CLASSES[4]))
    assert table is class_table(CLASSES[4]) and table.dtype == np.uint8 and table.shape == (65536,)
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 1


@pytest.mark.parametrize(
    "predicted, count, written, expected",
    [
        ([0, 1], 2, 2, [9, 251]),
        ([0, 1], 2, 4, [9, 251]),
        ([0, 1, 2], 3, 2, [9, 9, 251]),
        ([0, 1, 2, 3, IGNORE], 4, 2, [9, 9, 9, 251, 9]),
        ([0, 1, 2, 3, IGNORE], 4, 4, [9, 9, 250, 251, 9]),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_written_labels_by_hand(predicted, count, written, expected, dtype):
    raw = to_raw(np.array(predicted, dtype), CLASSES[count], written)
    assert raw.dtype == np.uint32
    assert raw.tolist() == expected


def test_written_class_count_must_be_known():
    with pytest.raises(InputError, match=r"expected 2 \(9, 251\) or 4 .* got 3"):
        to_raw(np.zeros(1, np.uint8), CLASSES[4], written=3)
    with pytest.raises(InputError, match="'moving' among them"):
        to_raw(np.zeros(1, np.uint8), ("static",))


def test_real_labels_have_no_unknown_id(realdata):
    path = realdata("semantickitti-single-000964/labels/000964.label")
    counts = np.bincount(to_classes(np.fromfile(path, np.uint32), CLASSES[4], path), minlength=4)
    # from the class counts in the data's README: 0 + 1; all else; 10 + 18; 252
    assert counts.tolist() == [1767 + 58, 120485 - 1825 - 10524 - 1110, 10400 + 124, 1110]
