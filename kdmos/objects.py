"""Moving objects that were found and false ones, counted over labelled scans.

An *object* is, in one scan, all points of one moving instance: they share their whole label, the raw id of something
moving and an instance other than 0. It counts from `MIN_OBJECT_POINTS` points on, and is *found* if at least
`FOUND_SHARE` of its points are predicted moving. Object recall is the share of objects that are found. Labels may have
no instances; then there are no objects, and object recall is None.

A *false object* is a cluster of at least `MIN_OBJECT_POINTS` points that are predicted moving and of which none
truly moves. Clusters are connected components of the cells, `CELL` metres wide and seen from above, that such points
occupy; the eight cells around one are its neighbours. So what spills over from a mover is no false object where it
touches a part of the mover that was found. Points whose truth is unlabeled are in no cluster. Instances are not
needed.

Non-finite points belong to no object, true or false. Among the points of a kind they count like all others, as they
do in the IoU.
"""

from __future__ import annotations

import numpy as np

from kdmos.data.labels import CLASSES, MOVING_KINDS, to_classes
from kdmos.errors import InputError

MIN_OBJECT_POINTS = 10
FOUND_SHARE = 0.5
CELL = 0.5  # metres

UNLABELED, STATIC, MOVING = range(len(CLASSES[3]))
_KINDS = np.array(list(MOVING_KINDS))
_FAR = 1 << 29  # metres; what lies farther off, in finite nonsense, shares the outermost cells
_ROW = 1 << 32  # numbers of cells that a row has room for, so that no cell's neighbour is in a wrong row


class ObjectTally:
    """Counts of one sequence; those of several add up.

    kinds: int64 [kinds, 4], a row each of `MOVING_KINDS`: points, points found, objects, objects found.
    false_objects: Number of false objects.
    scans: Number of scans.
    """

    def __init__(self) -> None:
        self.kinds = np.zeros((len(MOVING_KINDS), 4), np.int64)
        self.false_objects = self.scans = 0
        self._in_instances = 0  # moving points with an instance
        self._false_if_static = 0  # false objects of the scans without a static point, were unlabeled static there

    def add(self, labels: np.ndarray, moving: np.ndarray, points: np.ndarray) -> None:
        """Count one scan.

        Args:
            labels: True labels, uint32 [n]: raw id in the low 16 bits, instance in the high ones.
            moving: Whether each point is predicted moving, bool [n].
            points: Their coordinates, float [n, >= 2], metres; x and y first.
        Raises: InputError if the lengths differ or a raw id is unknown.
        """
        if not len(labels) == len(moving) == len(points):
            raise InputError(
                f"objects: expected labels, predictions and coordinates of the same points, got {len(labels)}, "
                f"{len(moving)} and {len(points)}"
            )
        truth = to_classes(labels, CLASSES[3], "labels")
        self.scans += 1
        self._add_movers(labels, moving, points, np.flatnonzero(truth == MOVING))
        knows_static = (truth == STATIC).any()
        claimed = np.flatnonzero(moving & (truth != UNLABELED) if knows_static else moving)
        claimed = claimed[_finite(points[claimed])]
        false = count_false_objects(points[claimed], truth[claimed] == MOVING)
        if knows_static:
            self.false_objects += false
        else:
            self._false_if_static += false

    def _add_movers(self, labels: np.ndarray, moving: np.ndarray, points: np.ndarray, movers: np.ndarray) -> None:
        label, found = labels[movers], moving[movers]
        self.kinds[:, 0] += _per_kind(label)
        self.kinds[:, 1] += _per_kind(label[found])
        within = label >> 16 > 0
        self._in_instances += int(np.count_nonzero(within))
        within &= _finite(points[movers])
        objects, index = np.unique(label[within], return_inverse=True)
        sizes = np.bincount(index, minlength=len(objects))
        hits = np.bincount(index[found[within]], minlength=len(objects))
        large = sizes >= MIN_OBJECT_POINTS
        self.kinds[:, 2] += _per_kind(objects[large])
        self.kinds[:, 3] += _per_kind(objects[large & (hits >= FOUND_SHARE * sizes)])

    def lacks_instances(self) -> bool:
        """Whether something moves and no moving point has an instance, so that objects cannot be told apart."""
        return bool(self.kinds[:, 0].any() and not self._in_instances)

    def count_unlabeled_as_static(self) -> None:
        """For labels that know no static points: false objects among unlabeled ones count after all."""
        self.false_objects += self._false_if_static
        self._false_if_static = 0

    def __add__(self, other: ObjectTally) -> ObjectTally:
        total = ObjectTally()
        for name, count in vars(self).items():
            setattr(total, name, count + getattr(other, name))
        return total

    def scores(self) -> dict:
        """What was counted, JSON-able.

        Returns: `objects`, `object_recall`, `false_objects_per_scan` and `by_kind` [{`kind`, `points`, `recall` of the
            points, `objects`, `object_recall`}] of the kinds that occur; shares in 0..1, None where there is nothing
            to count.
        """
        _, _, objects, found = self.kinds.sum(0).tolist()
        return {
            "objects": objects,
            "object_recall": _share(found, objects),
            "false_objects_per_scan": _share(self.false_objects, self.scans),
            "by_kind": [
                {
                    "kind": kind,
                    "points": of_kind[0],
                    "recall": _share(of_kind[1], of_kind[0]),
                    "objects": of_kind[2],
                    "object_recall": _share(of_kind[3], of_kind[2]),
                }
                for kind, of_kind in zip(MOVING_KINDS.values(), self.kinds.tolist())
                if of_kind[0]
            ],
        }


def count_false_objects(points: np.ndarray, truly_moving: np.ndarray) -> int:
    """Number of false objects among the points that are predicted moving.

    Args:
        points: Finite coordinates, float [n, >= 2], metres; x and y first.
        truly_moving: bool [n].
    """
    if np.count_nonzero(~truly_moving) < MIN_OBJECT_POINTS:
        return 0
    cluster = clusters(points)
    sizes, movers = np.bincount(cluster), np.bincount(cluster, weights=truly_moving)
    return int(np.count_nonzero((sizes >= MIN_OBJECT_POINTS) & (movers == 0)))


def clusters(points: np.ndarray) -> np.ndarray:
    """Cluster of each point: connected components of the occupied cells, eight neighbours each.

    Args:
        points: Finite coordinates, float [n, >= 2], metres; x and y first.
    Returns: int64 [n], the rank of the first cell of its cluster: equal in one cluster, and below n.
    """
    column, row = np.floor(np.clip(points[:, :2], -_FAR, _FAR) / CELL).astype(np.int64).T
    cells, cell = np.unique(row * _ROW + column, return_inverse=True)
    pairs = []
    for step in (1, _ROW - 1, _ROW, _ROW + 1):  # the other four neighbours have it as one of theirs
        at = np.searchsorted(cells, cells + step)
        pairs.append(np.stack([np.arange(len(cells)), at])[:, cells.take(at, mode="clip") == cells + step])
    one, other = np.concatenate(pairs, axis=1)

    first = np.arange(len(cells))  # of each cell's cluster, as far as it is known
    while len(one):
        np.minimum.at(first, np.maximum(one, other), np.minimum(one, other))
        while (first[first] != first).any():
            first = first[first]
        one, other = first[one], first[other]
        one, other = one[one != other], other[one != other]
    return first[cell]


def _finite(points: np.ndarray) -> np.ndarray:
    return np.isfinite(points[:, :3]).all(1)


def _per_kind(labels: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(_KINDS, labels & 0xFFFF), minlength=len(_KINDS))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
