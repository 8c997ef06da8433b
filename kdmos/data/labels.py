"""SemanticKITTI's raw label ids and the classes of a model: one table each way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from kdmos.errors import InputError

# Kinds of movers by their raw id. 251 says no more than that it moves: predictions have it, and some data sets.
MOVING_KINDS: dict[int, str] = {
    251: "moving",
    252: "car",
    253: "cyclist",
    254: "person",
    255: "motorcyclist",
    256: "on-rails",
    257: "bus",
    258: "truck",
    259: "other vehicle",
}
RAW_IDS: dict[str, tuple[int, ...]] = {
    "unlabeled": (0, 1),
    "static": (9, 40, 44, 48, 49, 50, 51, 52, 60, 70, 71, 72, 80, 81, 99),
    "movable": (10, 11, 13, 15, 16, 18, 20, 30, 31, 32, 250),
    "moving": tuple(MOVING_KINDS),
}
# The usual class lists by their length. MotionBEV's published weights have two classes, KDMOS's four.
CLASSES: dict[int, tuple[str, ...]] = {
    2: ("static", "moving"),
    3: ("unlabeled", "static", "moving"),
    4: ("unlabeled", "static", "movable", "moving"),
}
IGNORE = 255  # the point has no class in this model: no loss, no score
_UNKNOWN = 254  # inside the table only: no such raw id
# What predictions are written as, so that the public SemanticKITTI tools read them right.
_WRITTEN_STATIC, _WRITTEN_MOVABLE, _WRITTEN_MOVING = 9, 250, 251


def class_table(classes: Sequence[str]) -> np.ndarray:
    """Class index of every raw id, as a lookup table over the low 16 bits of a label.

    Args:
        classes: Class names of the model in the order of its outputs, from the keys of `RAW_IDS`; "static"
            and "moving" must be among them.
    Returns: uint8 [65536], read-only. Where the model lacks a class, movable counts as static and unlabeled
        as `IGNORE`; ids that SemanticKITTI does not have are 254.
    Raises: InputError if a name is unknown or double, or "static" or "moving" is missing.
    """
    return _class_table(tuple(classes))


@lru_cache(maxsize=8)
def _class_table(classes: tuple[str, ...]) -> np.ndarray:
    names = set(classes)
    if len(names) != len(classes) or not {"static", "moving"} <= names <= RAW_IDS.keys():
        raise InputError(
            f"classes {list(classes)}: expected different names of {list(RAW_IDS)}, with 'static' and "
            f"'moving' among them; usual lists are {[list(usual) for usual in CLASSES.values()]}"
        )
    index = {name: i for i, name in enumerate(classes)}
    index.setdefault("movable", index["static"])
    index.setdefault("unlabeled", IGNORE)
    table = np.full(1 << 16, _UNKNOWN, np.uint8)
    for name, raw_ids in RAW_IDS.items():
        table[list(raw_ids)] = index[name]
    table.setflags(write=False)  # one table is shared by all callers
    return table


def to_classes(raw: np.ndarray, classes: Sequence[str], path: str | Path) -> np.ndarray:
    """Class of each point in this model.

    Args:
        raw: Labels as stored, uint32 [n]: raw id in the low 16 bits, instance in the high ones.
        classes: Class names of the model, as for `class_table`.
        path: Where the labels come from, for the message.
    Returns: uint8 [n], class index or `IGNORE`.
    Raises: InputError naming path and ids if a raw id is not one of SemanticKITTI's.
    """
    found = class_table(classes)[raw & 0xFFFF]
    unknown = found == _UNKNOWN
    if unknown.any():
        ids = np.unique(raw[unknown] & 0xFFFF).tolist()
        shown = ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
        raise InputError(
            f"{path}: {np.count_nonzero(unknown)} of {len(raw)} labels have an unknown raw id ({shown}); "
            "expected SemanticKITTI's ids: map your own to them, e.g. 9 static, 251 moving, 0 unlabeled"
        )
    return found


def to_raw(predicted: np.ndarray, classes: Sequence[str], written: int = 2, moving: int | None = None) -> np.ndarray:
    """Raw labels of predicted classes, as the public SemanticKITTI tools read them.

    Args:
        predicted: Class index of each point in this model, any integer type [n].
        classes: Class names of the model; any, because only moving and "movable" are written apart.
        written: 2 writes moving 251 and everything else 9; 4 also writes movable 250.
        moving: Index of the moving class; None: of the class named "moving".
    Returns: uint32 [n], every one of them 9, 250 or 251; points without a class (`IGNORE`) get 9.
    Raises: InputError if `written` is neither 2 nor 4, or no class is the moving one.
    """
    if written not in (2, 4):
        raise InputError(f"written classes: expected 2 (9, 251) or 4 (9, 250, 251), got {written}")
    if moving is None:
        if "moving" not in classes:
            raise InputError(f"classes {list(classes)}: expected 'moving' among them, or the index of the moving one")
        moving = list(classes).index("moving")
    raw = np.full(len(predicted), _WRITTEN_STATIC, np.uint32)
    if written == 4 and "movable" in classes:
        raw[predicted == classes.index("movable")] = _WRITTEN_MOVABLE
    raw[predicted == moving] = _WRITTEN_MOVING
    return raw
