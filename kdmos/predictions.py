"""What is known of a scan's points beside themselves: their true classes, and whether they were predicted to move."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kdmos.data.labels import CLASSES, to_classes
from kdmos.data.profile import profile_of
from kdmos.data.semantic_kitti import read_labels, read_manifest
from kdmos.data.source import ScanSource, WithPoses
from kdmos.data.sources import open_sources
from kdmos.errors import InputError
from kdmos.odometry import saved_poses

NAMES = CLASSES[4]
UNLABELED, MOVING = NAMES.index("unlabeled"), NAMES.index("moving")


def predicted_sources(
    path: str | Path,
    names: Iterable[str] | None,
    predictions: str | Path,
    topic: str | None = None,
    scores: bool = False,
) -> list[ScanSource]:
    """The sequences at a path that a folder has predictions of, with the poses that these were made with.

    Args:
        path, names: Of the scans, see `open_sources`; sequences that are named must have predictions.
        topic: Of a bag; None: the one that was predicted.
        predictions: Folder that holds sequences/<name>/predictions/, as kdmos predict writes it.
        scores: Predictions are the .score files, not the .label files.
    Raises: InputError if there is no such folder, or it has predictions of none, or of another topic.
    """
    if not Path(predictions).is_dir():
        raise InputError(f"{predictions}: no such folder; kdmos predict writes it")
    manifest = read_manifest(predictions) or {}
    made_of = manifest.get("topic")
    if topic is not None and made_of is not None and topic != made_of:
        raise InputError(f"--topic {topic}: {predictions} holds predictions of {made_of}")
    sources = open_sources(path, names, topic or made_of, profile_of(manifest).remission_scale)
    suffix, option = (".score", " --scores") if scores else (".label", "")
    folders = {source.name: source.prediction_path(predictions, 0).parent for source in sources}
    without = [name for name, folder in folders.items() if not any(folder.glob(f"*{suffix}"))]
    if len(without) == len(sources) or (names is not None and without):
        raise InputError(
            f"{folders[without[0]]}: no {suffix} file, so no prediction of sequence {without[0]}; "
            f"kdmos predict{option} writes them"
        )
    found = [source for source in sources if source.name not in without]
    saved = [saved_poses(predictions, path, source) for source in found]
    return [source if poses is None else WithPoses(source, poses) for source, poses in zip(found, saved)]


def true_classes(source: ScanSource, frame: int, num_points: int) -> np.ndarray | None:
    """True class of each point, uint8 [n], indices into `NAMES`; None where the frame has no labels.

    Raises: InputError if they cannot be used.
    """
    if not source.has_labels or not source.labels_path(frame).exists():
        return None
    return to_classes(source.read_labels(frame, num_points), NAMES, source.labels_path(frame))


def predicted_moving(
    source: ScanSource, predictions: str | Path, frame: int, num_points: int, threshold: float | None = None
) -> np.ndarray:
    """Whether each point was predicted to move, bool [n].

    Args:
        source, predictions, frame: Which scan, and the folder of predictions.
        num_points: Of the scan.
        threshold: Moving is what has at least this moving probability; None: what is labelled so.
    Raises: InputError if there is no prediction of the frame, or it is of another length.
    """
    path = source.prediction_path(predictions, frame)
    path = path if threshold is None else path.with_suffix(".score")
    if not path.exists():
        raise InputError(f"{path}: no prediction of this scan")
    if threshold is None:
        return to_classes(read_labels(path, num_points), NAMES, path) == MOVING
    scores = np.fromfile(path, "<f2")
    if len(scores) != num_points:
        raise InputError(
            f"{path}: has {len(scores)} scores, but its scan has {num_points} points; predictions and scans must "
            "belong together"
        )
    return scores >= threshold
