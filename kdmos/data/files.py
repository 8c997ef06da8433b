"""A folder of scan files under any names: .bin, .npy, .pcd or .ply."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from kdmos.data import semantic_kitti
from kdmos.data.poses import poses_from_file
from kdmos.data.source import ScanSource
from kdmos.errors import InputError

REMISSION = ("remission", "intensity", "reflectivity")  # what sensors and their drivers call it, the best name first
# Numbers from here on are times or serial numbers, no frame numbers: those between two of them cannot be gaps.
MAX_FRAME = 1_000_000
# File names that are times since 1970: as seconds, milliseconds, microseconds, nanoseconds.
STAMPS = {r"[1-9][0-9]{8,9}\.[0-9]+": 1.0, "[1-9][0-9]{12}": 1e-3, "[1-9][0-9]{15}": 1e-6, "[1-9][0-9]{18}": 1e-9}


@dataclass(frozen=True)
class FileScans(ScanSource):
    """Scans in files of one kind.

    name: The folder's. files: One a frame, in the order of time where all names are times, else in natural order
    (scan2 before scan10). frames: Their numbers where all names are numbers, else positions from 0. remission_scale:
    What brings the remission of .bin files to 0..1; it is only used to tell whether they have four columns.
    """

    name: str
    folder: Path
    files: tuple[Path, ...]
    frames: tuple[int, ...]
    width: int = 6
    remission_scale: float = 1.0

    @cached_property
    def _file_of(self) -> dict[int, Path]:
        return dict(zip(self.frames, self.files))

    def read_points(self, frame: int) -> np.ndarray:
        path = self._file_of[frame]
        if path.suffix.lower() == ".bin":
            return semantic_kitti.read_points(path, self.remission_scale)
        return usable(READERS[path.suffix.lower()](path), path)

    def where(self, frame: int) -> str:
        return str(self._file_of[frame])

    def num_points(self, frame: int) -> int | None:
        path = self._file_of[frame]
        if path.suffix.lower() != ".bin":
            return None
        return path.stat().st_size // semantic_kitti.POINT_BYTES if path.exists() else 0

    def stamps(self) -> np.ndarray | None:
        """Seconds, where all file names are times since 1970, as datasets with stamped poses have them."""
        return _times(self.files)

    @cached_property
    def _poses_path(self) -> Path | None:
        beside = (self.folder / "poses.txt", self.folder.parent / "poses.txt")
        return next((path for path in beside if path.is_file()), None)

    @property
    def has_poses(self) -> bool:
        return self._poses_path is not None

    def poses(self) -> np.ndarray:
        """From poses.txt in the folder or beside it, with calib.txt where that lies there too; see `poses_from_file`.

        Raises: InputError if it is missing or wrong.
        """
        if self._poses_path is None:
            raise InputError(
                f"{self.folder}: has no poses.txt, nor has the folder around it; kdmos predict finds poses by odometry"
            )
        calib = self._poses_path.with_name("calib.txt")
        return poses_from_file(self, self._poses_path, calib if calib.is_file() else None)


def find_files(folder: Path, remission_scale: float = 1.0) -> FileScans | None:
    """The scans of a folder, None if it holds none.

    Raises: InputError if they are of several kinds, or the library that reads them is missing.
    """
    # Names with a leading dot are the leftovers of copying tools ("._scan.bin"), never scans.
    found = [path for path in folder.iterdir() if path.suffix.lower() in KINDS and path.name[0] != "."]
    files = sorted(found, key=_natural)
    kinds = sorted({path.suffix.lower() for path in files})
    if not files:
        return None
    if len(kinds) > 1:
        raise InputError(f"{folder}: holds {' and '.join(kinds)} files; put the scans of one kind into a folder alone")
    library = LIBRARIES.get(kinds[0])
    if library and find_spec(library) is None:
        raise InputError(f"{folder}: reading {kinds[0]} needs {library}: pip install 'kdmos[files]'")
    times = _times(files)
    if times is not None:
        files = [files[i] for i in times.argsort(kind="stable")]  # .25 is before .5, though 25 is after 5
    numbers = [int(path.stem) if re.fullmatch("[0-9]{1,18}", path.stem) else MAX_FRAME for path in files]
    are_frames = max(numbers) < MAX_FRAME and len(set(numbers)) == len(numbers)
    frames = tuple(numbers) if are_frames else tuple(range(len(files)))
    return FileScans(folder.name, folder, tuple(files), frames, remission_scale=remission_scale)


def _times(files: Sequence[Path]) -> np.ndarray | None:
    """Seconds since 1970 that the names of the files say, float64 [n]; None where not all of them do."""
    for pattern, unit in STAMPS.items():
        if all(re.fullmatch(pattern, path.stem) for path in files):
            return np.array([float(path.stem) * unit for path in files])
    return None


def _natural(path: Path) -> tuple:
    """Numbers within names count as numbers; at odd places of the split are the numbers, so like meets like."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", path.stem)))


def usable(points: np.ndarray, where: object) -> np.ndarray:
    """The points, if there is anything in them. Raises: InputError for a scan without a finite point."""
    if not len(points):
        raise InputError(f"{where}: the scan is empty (no points); export it again or leave it out")
    if not np.isfinite(points).all(1).any():
        raise InputError(f"{where}: none of the {len(points)} points is finite; export the scan again or leave it out")
    return points


def points_of_fields(fields: Mapping[str, np.ndarray], where: object) -> np.ndarray:
    """Points of named columns.

    Args:
        fields: [n] by name, in any case: x, y, z of float32 or float64, and one of `REMISSION` of any numeric type;
            others are left out.
        where: The scan, for messages.
    Returns: float32 [n, 4] = x, y, z, remission as stored; 0 where there is none.
    Raises: InputError if x, y or z is missing or not a float, or one of the four is not one number a point.
    """
    known = {name.lower().removeprefix("scalar_"): column for name, column in fields.items()}  # as CloudCompare writes
    names = [*"xyz", *(name for name in REMISSION if name in known)][:4]
    for name, kinds in zip(names, ("f", "f", "f", "fiu")):
        if name not in known or known[name].ndim != 1 or known[name].dtype.kind not in kinds:
            wanted = "float fields x, y and z" if name in "xyz" else f"one number a point in {name}"
            there = [f"{name} ({column.dtype}{list(column.shape[1:]) or ''})" for name, column in fields.items()]
            raise InputError(f"{where}: expected {wanted}; the fields are {', '.join(there) or 'none'}")
    points = np.zeros((len(known["x"]), 4), np.float32)
    with np.errstate(over="ignore"):  # a value beyond float32 is not finite
        for i, name in enumerate(names):
            points[:, i] = known[name]
    return points


def _read_npy(path: Path) -> np.ndarray:
    def read() -> np.ndarray:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file)  # np.load would also take archives, and what is pickled

    array = _read(path, "NumPy", read)
    if array.dtype.names:
        array = array.reshape(-1)  # organised ones row by row
        return points_of_fields({name: array[name] for name in array.dtype.names}, path)
    if array.ndim != 2 or array.shape[1] not in (3, 4) or array.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: expected an array [n, 4] of x, y, z, remission, or [n, 3] without it, got "
            f"{list(array.shape)} of {array.dtype}; keep the first columns that are these"
        )
    points = np.zeros((len(array), 4), np.float32)
    with np.errstate(over="ignore"):
        points[:, : array.shape[1]] = array
    return points


def _read_pcd(path: Path) -> np.ndarray:
    from pypcd4 import PointCloud

    cloud = _read(path, "PCD", lambda: PointCloud.from_path(path))
    data = np.atleast_1d(cloud.pc_data)
    if len(data) != cloud.metadata.points:
        raise InputError(f"{path}: cut short: {len(data)} of {cloud.metadata.points} points; copy or export it again")
    return points_of_fields({name: data[name] for name in data.dtype.names}, path)


def _read_ply(path: Path) -> np.ndarray:
    from plyfile import PlyData

    data = _read(path, "PLY", lambda: PlyData.read(str(path))["vertex"].data)
    return points_of_fields({name: data[name] for name in data.dtype.names}, path)


def _read(path: Path, kind: str, read: Callable):
    try:
        return read()
    except Exception as error:  # a damaged file breaks the readers in a dozen ways, each with another exception
        reason = " ".join((str(error) or type(error).__name__).split())
        raise InputError(f"{path}: not a whole {kind} file ({reason}); copy or export it again") from error


READERS: dict[str, Callable[[Path], np.ndarray]] = {".npy": _read_npy, ".pcd": _read_pcd, ".ply": _read_ply}
KINDS = (".bin", *READERS)
LIBRARIES = {".pcd": "pypcd4", ".ply": "plyfile"}
