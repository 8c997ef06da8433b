"""Objects found and false ones by hand, and clusters against a search cell by cell."""

import json
import time

import numpy as np
import pytest

from kdmos.errors import InputError
from kdmos.objects import CELL, ObjectTally, clusters

STATIC, PARKED, CAR, PERSON = 40, 10, 252, 254
HAND = """
  n   x    y   raw id  instance  found  what it is
  12  5    0   252     1         6      a car, found by half exactly
  11  5    5   254     2         5      a person, missed: less than half
  9   5    10  252     3         9      too small for an object
  20  5    15  252     0         20     moving, of no instance
  10  20   0   10      4         10     a false object on a parked car
  9   20   5   10      5         9      too small for a false object
  30  20   10  0       0         30     unlabeled, no false object
  15  5.5  0   40      0         15     spill-over of the car
  40  30   0   40      0         0      static, and predicted so
"""


def scan(*blocks):
    """Labels, predictions and points of blocks of (number, x, y, raw id, instance, number predicted moving)."""
    labels = np.concatenate([np.full(n, raw | instance << 16, np.uint32) for n, _, _, raw, instance, _ in blocks])
    moving = np.concatenate([np.arange(n) < found for n, *_, found in blocks])
    points = np.concatenate([np.tile(np.array([[x, y, 0, 0.5]], np.float32), (n, 1)) for n, x, y, *_ in blocks])
    return labels, moving, points


def tally(*scans):
    total = ObjectTally()
    for one in scans:
        total.add(*one)
    return total


def false_objects(*blocks):
    return tally(scan(*blocks)).false_objects


@pytest.fixture
def by_hand():
    rows = [line.split()[:6] for line in HAND.strip().splitlines()[1:]]
    return scan(*((int(n), float(x), float(y), *map(int, rest)) for n, x, y, *rest in rows))


# --- what is counted


def test_a_scan_by_hand(by_hand):
    scores = tally(by_hand).scores()
    assert scores == {
        "objects": 2,
        "object_recall": 1 / 2,
        "false_objects_per_scan": 1,
        "by_kind": [
            {"kind": "car", "points": 41, "recall": 35 / 41, "objects": 1, "object_recall": 1},
            {"kind": "person", "points": 11, "recall": 5 / 11, "objects": 1, "object_recall": 0},
        ],
    }
    assert json.loads(json.dumps(scores)) == scores


def test_the_order_of_the_points_does_not_count(by_hand):
    order = np.random.default_rng(0).permutation(len(by_hand[0]))
    assert tally([array[order] for array in by_hand]).scores() == tally(by_hand).scores()


def test_tallies_of_scans_and_of_sequences_add_up(by_hand):
    other = scan((10, 5, 0, CAR, 1, 4), (10, 9, 0, CAR, 2, 5), (30, 20, 0, STATIC, 0, 30), (30, 30, 0, STATIC, 0, 30))
    scores = tally(by_hand, other).scores()
    assert scores["objects"] == 4 and scores["object_recall"] == 2 / 4  # the same instance in two scans is two objects
    assert scores["false_objects_per_scan"] == 3 / 2
    assert [row["points"] for row in scores["by_kind"]] == [61, 11]
    assert (tally(by_hand) + tally(other)).scores() == scores


def test_one_instance_of_two_kinds_is_two_objects():
    scores = tally(scan((10, 5, 0, CAR, 1, 10), (10, 5, 0, PERSON, 1, 0))).scores()
    assert scores["objects"] == 2 and scores["object_recall"] == 0.5


def test_labels_without_instances_have_no_objects():
    one = tally(scan((30, 5, 0, CAR, 0, 30), (30, 20, 0, STATIC, 0, 30)))
    assert one.lacks_instances()
    assert one.scores() == {
        "objects": 0,
        "object_recall": None,
        "false_objects_per_scan": 1,
        "by_kind": [{"kind": "car", "points": 30, "recall": 1, "objects": 0, "object_recall": None}],
    }
    small = tally(scan((3, 5, 0, CAR, 1, 3)))
    assert not small.lacks_instances() and small.scores()["object_recall"] is None


def test_every_moving_id_has_a_kind():
    every = tally(scan(*((1, 0, 0, raw, 1, 1) for raw in range(251, 260))))
    assert [row["kind"] for row in every.scores()["by_kind"]] == [
        *("moving", "car", "cyclist", "person", "motorcyclist", "on-rails", "bus", "truck", "other vehicle")
    ]


def test_nothing_to_count():
    nothing = {"objects": 0, "object_recall": None, "by_kind": []}
    assert ObjectTally().scores() == {**nothing, "false_objects_per_scan": None}
    empty = tally((np.zeros(0, np.uint32), np.zeros(0, bool), np.zeros((0, 4), np.float32)))
    assert empty.scores() == {**nothing, "false_objects_per_scan": 0} and not empty.lacks_instances()


def test_non_finite_points_belong_to_no_object():
    labels, moving, points = scan((10, 5, 0, CAR, 1, 10), (10, 20, 0, STATIC, 0, 10))
    for column, value in ((0, np.nan), (1, np.inf), (2, np.nan)):
        broken = points.copy()
        broken[[0, 10], column] = value
        scores = tally((labels, moving, broken)).scores()
        assert (scores["objects"], scores["false_objects_per_scan"]) == (0, 0)
        assert scores["by_kind"][0]["points"] == 10  # as in the IoU
    assert tally((labels, moving, points[:, :2])).scores()["objects"] == 1


def test_what_cannot_be_counted(by_hand):
    labels, moving, points = by_hand
    with pytest.raises(InputError, match="of the same points, got 156, 155 and 156"):
        tally((labels, moving[1:], points))
    with pytest.raises(InputError, match=r"labels: 156 of 156 labels have an unknown raw id \(3\)"):
        tally((np.full_like(labels, 3), moving, points))


# --- false objects


def test_what_touches_by_a_corner_is_one_false_object():
    assert false_objects((5, 20.2, 0.2, STATIC, 0, 5), (5, 20.7, 0.7, STATIC, 0, 5)) == 1
    assert false_objects((5, 20.7, 0.2, STATIC, 0, 5), (5, 20.2, 0.7, STATIC, 0, 5)) == 1
    assert false_objects((10, 20.2, 0.2, STATIC, 0, 10), (10, 20.7, 0.7, STATIC, 0, 10)) == 1
    assert false_objects((10, 20.2, 0.2, STATIC, 0, 10), (10, 21.2, 0.2, STATIC, 0, 10)) == 2
    assert false_objects((5, 20.2, 0.2, STATIC, 0, 5), (5, 21.2, 0.2, STATIC, 0, 5)) == 0


def test_spill_over_counts_unless_it_touches_a_found_part():
    spilt = (20, 5.6, 0, STATIC, 0, 20)
    assert false_objects((10, 5, 0, CAR, 1, 1), spilt) == 0
    assert false_objects((10, 5, 0, CAR, 0, 1), spilt) == 0  # it needs no instances
    assert false_objects((10, 5, 0, CAR, 1, 0), spilt) == 1
    assert false_objects((10, 4.4, 0, CAR, 1, 10), spilt) == 1


def test_unlabeled_points_join_no_clusters():
    assert false_objects((5, 0, 0, STATIC, 0, 5), (9, 0.5, 0, 0, 0, 9), (5, 1, 0, STATIC, 0, 5)) == 0
    assert false_objects((5, 0, 0, STATIC, 0, 5), (9, 0.5, 0, PARKED, 0, 9), (5, 1, 0, STATIC, 0, 5)) == 1


def test_unlabeled_counts_where_it_means_static():
    """The labels of a sequence say that; a scan of it by itself may hold no mover."""
    scans = [
        scan((10, 5, 0, CAR, 0, 10), (10, 20, 0, 0, 0, 10), (10, 5.5, 0, 0, 0, 10)),
        scan((10, 20, 0, 0, 0, 10)),
    ]
    one = tally(*scans)
    assert one.scores()["false_objects_per_scan"] == 0
    one.count_unlabeled_as_static()
    one.count_unlabeled_as_static()
    assert one.scores()["false_objects_per_scan"] == 1
    assert (one + tally(*scans)).scores()["false_objects_per_scan"] == 0.5


def test_all_predicted_moving():
    x = np.arange(0, 100, 0.1)
    points = np.stack([x, np.zeros_like(x)], 1)
    labels = np.full(len(x), STATIC, np.uint32)
    everywhere = np.ones(len(x), bool)
    assert tally((labels, everywhere, points)).false_objects == 1
    labels[500] = CAR | 1 << 16
    assert tally((labels, everywhere, points)).false_objects == 0


# --- clusters


def cluster_by_search(cells):
    """Sets of cells, each reached from one of its own over neighbours."""
    left, found = set(map(tuple, cells)), set()
    while left:
        reached, edge = set(), [left.pop()]
        while edge:
            x, y = edge.pop()
            reached.add((x, y))
            near = {(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge += near
        found.add(frozenset(reached))
    return found


@pytest.mark.parametrize("density", [0.1, 0.3, 0.4, 0.5, 0.9])
def test_clusters_are_those_of_a_search(density):
    generator = np.random.default_rng(int(10 * density))
    cells = np.argwhere(generator.random((40, 30)) < density) - [20, 15]
    points = np.repeat(cells, 2, axis=0) * CELL + generator.uniform(0.01, CELL - 0.01, (2 * len(cells), 2))
    cluster = clusters(points.astype(np.float32))
    assert (cluster[::2] == cluster[1::2]).all()
    found = {frozenset(map(tuple, cells[cluster[::2] == i].tolist())) for i in np.unique(cluster)}
    assert found == cluster_by_search(cells.tolist())


def test_clusters_of_long_winding_shapes_are_one():
    angle = np.linspace(0, 40 * np.pi, 60_000)
    spiral = 0.3 * angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)  # 1.9 m between its turns
    assert not clusters(spiral).any()
    comb = [(x, y * CELL) for x in range(100) for y in range(50)] + [(x * CELL, 0) for x in range(200)]
    for teeth in (1, -1):
        assert not clusters(np.array(comb) * [1, teeth]).any()


def test_cells_on_borders_at_the_origin_and_far_away():
    assert len(np.unique(clusters(np.array([[-0.1, 0], [0.1, 0], [0.99, 0], [1.0, 0], [2.0, 0]])))) == 2
    # Ends of neighbouring rows do not touch, and the largest number fits.
    far = np.array([[3e38, 0.2], [-3e38, 0.7], [-3e38, 0.2], [3e38, 3e38], [-3e38, -3e38]], np.float32)
    assert clusters(far)[1] == clusters(far)[2] and len(np.unique(clusters(far))) == 4
    assert clusters(np.zeros((0, 2))).tolist() == []


def test_a_bad_predictor_is_counted_in_little_time():
    generator = np.random.default_rng(0)
    points = generator.uniform(-60, 60, (120_000, 2)).astype(np.float32)
    one = np.where(generator.random(120_000) < 0.9, STATIC, CAR | 1 << 16).astype(np.uint32), points[:, 0] > 0, points
    seconds = []
    for _ in range(5):
        start = time.process_time()
        tally(one)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05  # 60,000 points; about 0.015 on one core
