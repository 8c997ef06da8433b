"""Scans, labels and poses as SemanticKITTI stores them, from a data root or one bare sequence folder."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kdmos.data.labels import CLASSES, to_classes
from kdmos.data.poses import read_poses, read_text
from kdmos.data.source import ScanSource
from kdmos.errors import InputError, unreadable

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "valid": ("08",),
    "test": tuple(str(number) for number in range(11, 22)),
}
# KITTI-road as the authors of KDMOS and MotionBEV divide it.
ROAD_SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("30", "31", "32", "33", "34", "40"),
    "valid": ("35", "36", "37", "38", "39", "41"),
}

SPLIT_NAMES = (*SPLITS, *(f"road-{name}" for name in ROAD_SPLITS))

MANIFEST = "predict.json"  # beside predictions: what they were made with
ROOTS = ("sequences", "Deskewed_LiDAR")  # what holds the sequences in a data root: SemanticKITTI's, HeLiMOS's
POINT_BYTES = 16  # x, y, z, remission as float32
# Remission is 0..1 by convention and 0..0.99 in KITTI; converters of other sensors overshoot a little. In a file
# with another number of columns the 4th value read is mostly a coordinate: in real ones over 90 % of them lie
# outside 0..2. So a scan is refused when more than 1 % do; fewer are noise of single points, and no reason to
# lose the scan.
MAX_REMISSION = 2.0
MAX_ODD_SHARE = 0.01
MIN_MOVING_POINTS = 10  # a scan with more of them is always trained on; of the others every 10th
KEEP_EVERY = 10


def read_manifest(predictions: str | Path) -> dict | None:
    """What the predictions of a folder were made with, None if their maker did not say.

    Raises: InputError if the note is damaged.
    """
    path = Path(predictions) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: not a JSON object; predict again, or delete it if these are no kdmos predictions")
    return manifest


def split_sequences(split: str, kitti_road: bool = False) -> tuple[str, ...]:
    """Names of a split's sequences: "train", "valid" or "test"; with `kitti_road` also KITTI-road's, whose own are
    "road-train" and "road-valid".

    Warns if that takes in road 41. Raises InputError for another split.
    """
    if split not in SPLIT_NAMES:
        raise InputError(f"split '{split}': expected one of {', '.join(SPLIT_NAMES)}")
    own, split = SPLITS.get(split, ()), split.removeprefix("road-")
    road = ROAD_SPLITS.get(split, ()) if kitti_road or not own else ()
    if "41" in road:
        warnings.warn(
            f"KITTI-road sequence 41 ({split}) overlaps SemanticKITTI test sequence 20: a model chosen with it "
            "has seen part of the test set",
            stacklevel=2,
        )
    return own + road


def split_frames(root: str | Path, split: str) -> frozenset[int] | None:
    """Frame numbers of a split in a data set that divides the scans of every sequence, as HeLiMOS does.

    Args:
        root: Data root; the split is the file train.txt, val.txt or test.txt in it, one frame number a line.
        split: "train", "valid" or "test".
    Returns: None where there is no such file.
    Raises: InputError if it holds something else.
    """
    path = Path(root) / f"{'val' if split == 'valid' else split}.txt"
    if not path.is_file():
        return None
    words = read_text(path, "split").split()
    if not words or not all(re.fullmatch("[0-9]+", word) for word in words):
        raise InputError(f"{path}: expected the frame numbers of the split, one a line")
    return frozenset(map(int, words))


def read_points(path: str | Path, remission_scale: float = 1.0) -> np.ndarray:
    """Points of one scan file, in file order and as stored.

    Args:
        path: File of float32 x, y, z (metres, LiDAR frame), remission.
        remission_scale: What brings the remission to 0..1.
    Returns: float32 [n, 4], n >= 1. Single non-finite points stay in: the caller drops and counts them.
    Raises: InputError if the file cannot be read, is empty, is cut short, has another number of columns (the
        likely one is named), or holds no finite point.
    """
    values, size = _read_values(path, "<f4", "scan")
    if size == 0:
        raise InputError(f"{path}: the scan is empty (0 bytes); export it again or leave the file out")
    points = values[: len(values) // 4 * 4].reshape(-1, 4)
    fits, remission = _plausible(points, remission_scale)
    if size % POINT_BYTES or not fits:
        raise InputError(f"{path}: {_column_fault(values, size, fits, remission)}")
    if not len(remission):
        raise InputError(f"{path}: none of the {len(points)} points is finite; export the scan again or leave it out")
    return points


def _read_values(path: str | Path, dtype: str, what: str) -> tuple[np.ndarray, int]:
    """All whole values of a binary file, and its size in bytes."""
    try:
        return np.fromfile(path, dtype), os.stat(path).st_size
    except OSError as error:
        raise unreadable(path, what, error) from None


def _plausible(points: np.ndarray, remission_scale: float) -> tuple[bool, np.ndarray]:
    """Whether the 4th column can be remission, and that column over the finite points."""
    finite = np.isfinite(points)
    remission = points[:, 3]
    if not finite.all():  # column by column: all(axis=1) over four columns is six times slower
        remission = remission[finite[:, 0] & finite[:, 1] & finite[:, 2] & finite[:, 3]]
    return not is_odd(remission, remission_scale), remission


def is_odd(remission: np.ndarray, scale: float = 1.0) -> bool:
    """Whether these values [n] cannot be remission that `scale` brings to 0..1: more than noise is far outside."""
    odd = np.count_nonzero((remission < 0) | (remission > MAX_REMISSION * scale))
    return odd > MAX_ODD_SHARE * len(remission)


def likely_scale(remission: np.ndarray) -> int:
    """The full scale that sensors use and nearly all of these values [n] stay below."""
    scales = (100, 255, 4095, 65535)
    top = np.quantile(remission, 1 - MAX_ODD_SHARE)
    return next((scale for scale in scales if top <= scale), int(top))


def _column_fault(values: np.ndarray, size: int, fits: bool, remission: np.ndarray) -> str:
    """What is wrong with a file that does not hold whole points of four columns."""
    expected = "expected 4 float32 columns x, y, z, remission (0..1)"
    whole = size % POINT_BYTES == 0
    got = f"got {size} bytes, {size / POINT_BYTES:.2f} points of {POINT_BYTES} bytes"
    if not whole and fits:
        return f"the scan is truncated: {expected}, {got}; copy or export it again"
    if whole:
        got = f"but read so, the 4th column runs from {remission.min():g} to {remission.max():g}"
    columns = _likely_columns(values, size)
    if columns == 3:
        advice = "the file likely has 3 columns: add a remission column (0 where it is not known)"
    elif columns == 4 and whole:
        advice = (
            "the file likely has 4 columns but another remission scale: divide by the full one, likely "
            f"{likely_scale(remission)} (kdmos predict: remission_scale in a --sensor file)"
        )
    elif columns == 4:
        advice = "the file likely has 4 columns and was cut short: copy or export it again"
    elif columns:
        advice = f"the file likely has {columns} columns: keep x, y, z and remission, scaled to 0..1"
    else:
        advice = "no count from 3 to 6 columns fits it: export it again as float32 x, y, z, remission"
    return f"wrong number of columns: {expected}, {got}; {advice}"


def _likely_columns(values: np.ndarray, size: int) -> int | None:
    """Column count, 3 to 6, that explains the values best among those that divide the file, or None.

    Under the right count each column is one quantity (|x| is large, |z| and remission are small), under a wrong
    one every column is the same mixture. So the share of the variance that lies between the columns tells: 0.4
    to 0.8 for the right count in real scans, below 0.01 for a count that shares no factor with it. A multiple of
    the right count does no better than that, hence a larger count must win clearly. Four is a candidate whatever
    the size, because the file may have been cut short.
    """
    magnitude = np.log1p(np.abs(np.nan_to_num(values.astype(np.float64))))
    fallback, best, best_share = None, None, 0.1
    for columns in (3, 4, 5, 6):
        divides = size % (4 * columns) == 0
        if not (divides or columns == 4) or len(values) < 2 * columns:
            continue
        rows = magnitude[: len(values) // columns * columns].reshape(-1, columns)
        share = rows.mean(axis=0).var() / max(rows.var(), 1e-12)
        if share > 1.2 * best_share:
            best, best_share = columns, share
        if divides and columns != 4:
            fallback = fallback or columns  # columns alike, e.g. random numbers: the size alone speaks
    return best or fallback


def read_labels(path: str | Path, num_points: int | None) -> np.ndarray:
    """Raw labels of one scan, uint32 [n]: raw id in the low 16 bits, instance in the high ones.

    Args:
        path: File of uint32, one for each point of the scan in its order.
        num_points: Points of the scan; None reads the labels without their scan.
    Raises: InputError if the file cannot be read, is cut short or has another length than the scan.
    """
    labels, size = _read_values(path, "<u4", "label")
    if size % 4:
        raise InputError(f"{path}: the label file is truncated: {size} bytes, expected 4 a point; copy it again")
    if num_points is not None and len(labels) != num_points:
        raise InputError(
            f"{path}: the label file has {len(labels)} labels, but its scan has {num_points} points; "
            "labels and scan must come from the same data set and version"
        )
    return labels


@dataclass(frozen=True)
class Sequence(ScanSource):
    """One sequence folder on disk.

    name: what scans are called by, e.g. "08".
    folder: holds velodyne/ and, where known, labels/, poses.txt and calib.txt.
    frames: frame numbers in velodyne/, ascending; gaps may occur.
    width: digits of a file name, zero-padded; 6 in SemanticKITTI.
    remission_scale: what brings the remission to 0..1; points come as stored, it only tells whether they can be.
    """

    name: str
    folder: Path
    frames: tuple[int, ...]
    width: int = 6
    remission_scale: float = 1.0

    def points_path(self, frame: int) -> Path:
        return self.folder / "velodyne" / f"{frame:0{self.width}d}.bin"

    def labels_path(self, frame: int) -> Path:
        return self.folder / "labels" / f"{frame:0{self.width}d}.label"

    def where(self, frame: int) -> str:
        return str(self.points_path(frame))

    def num_points(self, frame: int) -> int | None:
        """By the size of its file; 0 where that is a broken link."""
        path = self.points_path(frame)
        return path.stat().st_size // POINT_BYTES if path.exists() else 0

    def stamps(self) -> np.ndarray | None:
        """Seconds, from times.txt, whose row i belongs to frame number i; None without it.

        Raises: InputError if it lacks rows or holds something else.
        """
        path = self.folder / "times.txt"
        if not path.exists():
            return None
        try:
            times = np.array([float(row) for row in read_text(path, "times").split()])
        except ValueError:
            times = np.zeros(0)
        if len(times) <= self.frames[-1] or not np.isfinite(times).all():
            raise InputError(
                f"{path}: expected a time in seconds for each frame up to {self.frames[-1]}, got {len(times)}"
            )
        return times[list(self.frames)]

    def read_points(self, frame: int) -> np.ndarray:
        """Points float32 [n, 4] of a frame; see `read_points`."""
        return read_points(self.points_path(frame), self.remission_scale)

    def read_labels(self, frame: int, num_points: int | None) -> np.ndarray:
        """Raw labels uint32 [n] of a frame; see `read_labels`."""
        return read_labels(self.labels_path(frame), num_points)

    @property
    def has_labels(self) -> bool:
        """Whether there is any label; a single missing one is an error when it is read."""
        return any((self.folder / "labels").glob("*.label"))

    @property
    def has_poses(self) -> bool:
        return self.poses_path.exists()

    @property
    def poses_path(self) -> Path:
        """In the folder, or as KITTI odometry has it: poses/NN.txt beside sequences/."""
        own, beside = self.folder / "poses.txt", self.folder.parent.parent / "poses" / f"{self.folder.name}.txt"
        return beside if beside.exists() and not own.exists() else own

    def poses(self) -> np.ndarray:
        """LiDAR pose of each frame, float64 [len(frames), 4, 4], in the frame of LiDAR 0; see `read_poses`.

        The files are read once. Raises InputError also if poses.txt has no row for a frame.
        """
        if self.frames[-1] >= len(self._pose_rows):
            raise InputError(
                f"{self.poses_path}: has {len(self._pose_rows)} rows, but the scans go up to frame "
                f"{self.frames[-1]}; row i (from 0) must be the pose of frame number i"
            )
        return self._pose_rows[list(self.frames)]

    @cached_property
    def _pose_rows(self) -> np.ndarray:
        return read_poses(self.poses_path, self.folder / "calib.txt")


def find_sequences(
    root: str | Path, names: Iterable[str] | None = None, remission_scale: float = 1.0
) -> list[Sequence]:
    """Sequences under a folder, in the order of `names`, else by name.

    Args:
        root: A data root (holds sequences/NN/, or Deskewed_LiDAR/<sensor>/ as HeLiMOS does), the folder of sequences in
            it, or one bare sequence folder (holds velodyne/), whose name is the folder's.
        names: Which sequences; None means all that have scans.
        remission_scale: What brings their remission to 0..1.
    Raises: InputError if a path or a named sequence is missing, there is no scan, or its name is no number.
    """
    root = Path(os.path.abspath(Path(root).expanduser()))  # a name for "."; symbolic links keep theirs
    if not root.is_dir():
        raise InputError(
            f"{root}: {'is not a folder' if root.exists() else 'does not exist'}; expected a data root or a "
            "sequence folder"
        )
    if (root / "velodyne").is_dir():
        folders = {root.name: root}
    else:
        parent = next((root / name for name in ROOTS if (root / name).is_dir()), root)
        folders = {f.name: f for f in sorted(parent.iterdir()) if (f / "velodyne").is_dir()}
    if not folders:
        raise InputError(
            f"{root}: no sequence here; expected sequences/NN/velodyne/*.bin (a data root), NN/velodyne/*.bin or "
            "velodyne/*.bin below it; bare scans go into a folder named velodyne"
        )
    wanted = list(folders) if names is None else list(names)
    missing = [name for name in wanted if name not in folders]
    if missing:
        raise InputError(f"{root}: no sequence {', '.join(missing)}; found {', '.join(folders)}")
    return [_sequence(name, folders[name], remission_scale) for name in wanted]


def _sequence(name: str, folder: Path, remission_scale: float) -> Sequence:
    # Names with a leading dot are the leftovers of copying tools ("._000000.bin"), never scans.
    stems = sorted(f[:-4] for f in os.listdir(folder / "velodyne") if f.endswith(".bin") and f[0] != ".")
    if not stems:
        raise InputError(f"{folder / 'velodyne'}: holds no scan (*.bin); copy the scans of sequence {name} there")
    for stem in stems:
        if not re.fullmatch("[0-9]+", stem):
            raise InputError(
                f"{folder / 'velodyne' / stem}.bin: expected a frame number as the name, like 000000.bin; rename "
                "it or move it away"
            )
    shortest = min(stems, key=len)
    width = len(shortest)
    for stem in stems:
        if f"{int(stem):0{width}d}" != stem:
            raise InputError(
                f"{folder / 'velodyne'}: {shortest}.bin and {stem}.bin are padded differently; rename the scans to "
                "one width, like 000000.bin"
            )
    return Sequence(name, folder, tuple(sorted(map(int, stems))), width, remission_scale)


def drop_static_scans(
    sequence: Sequence,
    list_file: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, ...]:
    """Frames worth training on: those with more than 10 moving points, and every 10th of the others.

    Args:
        sequence: Needs labels, unless a list is given.
        list_file: Takes the frames from here instead: lines `SEQ FRAME` or `SEQ/FRAME`; what follows is
            ignored, as are blank lines and those that begin with #. Listed scans that are not on disk are left
            out with a warning.
        progress: Called as progress(scans done, scans) while labels are read.
    Returns: frame numbers, ascending.
    Raises: InputError for a label file that cannot be used, a malformed line, or a list that names no scan of
        the sequence.
    """
    if list_file is not None:
        return _listed_frames(sequence, list_file)
    moving, others = [], []
    for done, frame in enumerate(sequence.frames, start=1):
        classes = to_classes(sequence.read_labels(frame, None), CLASSES[2], sequence.labels_path(frame))
        enough = np.count_nonzero(classes == CLASSES[2].index("moving")) > MIN_MOVING_POINTS
        (moving if enough else others).append(frame)
        if progress is not None:
            progress(done, len(sequence.frames))
    return tuple(sorted(moving + others[::KEEP_EVERY]))


def _listed_frames(sequence: Sequence, list_file: str | Path) -> tuple[int, ...]:
    listed = set()
    for number, line in enumerate(read_text(list_file, "list").splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(.+?)(?:/|\s+)([0-9]+)(?:\s.*)?", line)
        if match is None:
            raise InputError(f"{list_file}: line {number} is '{line[:60]}', expected 'SEQ FRAME' such as '00 000123'")
        if match[1] == sequence.name:
            listed.add(int(match[2]))
    kept = tuple(frame for frame in sequence.frames if frame in listed)
    if not kept:
        raise InputError(
            f"{list_file}: names {len(listed)} scans of sequence {sequence.name}, none of them in "
            f"{sequence.folder}; give the list that belongs to this data, or leave the sequence out"
        )
    if len(kept) < len(listed):
        warnings.warn(
            f"{list_file}: {len(listed) - len(kept)} of its {len(listed)} scans of sequence {sequence.name} are "
            f"not in {sequence.folder}; going on without them",
            stacklevel=3,
        )
    return kept
