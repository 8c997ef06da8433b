"""What every kind of input offers: scans under frame numbers, with poses and stamps where they are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from kdmos.data.batch import ScanId
from kdmos.errors import InputError


class ScanSource(ABC):
    """Scans in the order of their frame numbers, wherever they are from.

    A kind of input derives from it, sets the attributes and says how a scan is read.

    name: What its scans are called by, e.g. "08".
    frames: Frame numbers, ascending; gaps may occur.
    width: Digits of a file name, zero-padded.
    has_poses: Whether `poses` can be read.
    has_labels: Whether there is any label; then it also has `labels_path(frame)` and `read_labels(frame, num_points)`.
    """

    name: str
    frames: tuple[int, ...]
    width: int = 6
    has_poses: bool = False
    has_labels: bool = False

    @abstractmethod
    def read_points(self, frame: int) -> np.ndarray:
        """Points of a frame, float32 [n, 4] = x, y, z (metres, LiDAR frame), remission; n >= 1.

        They come as stored: with non-finite ones, and with the sensor's scale of remission, see `SensorProfile.apply`.

        Raises: InputError if they cannot be read; the next frame may be read all the same.
        """

    def poses(self) -> np.ndarray:
        """LiDAR pose of each frame in one fixed frame, float64 [len(frames), 4, 4].

        Raises: InputError if they are missing or wrong.
        """
        raise InputError(f"{self.where(self.frames[0])}: comes without poses; kdmos predict finds them by odometry")

    @abstractmethod
    def where(self, frame: int) -> str:
        """The scan as messages name it: its file, or its place in one."""

    def num_points(self, frame: int) -> int | None:
        """Points of a frame, None where only reading it would tell."""
        return None

    def stamps(self) -> np.ndarray | None:
        """Time of each frame, seconds, float64 [len(frames)]; None where it is not known."""
        return None

    def scan(self, frame: int) -> ScanId:
        return ScanId(self.name, frame)

    def prediction_path(self, predictions: str | Path, frame: int) -> Path:
        """Where the label file of a frame lies below a folder of predictions: the benchmark server's layout."""
        return Path(predictions) / "sequences" / self.name / "predictions" / f"{frame:0{self.width}d}.label"

    @property
    def gaps(self) -> tuple[int, ...]:
        """Frame numbers missing between the first and the last one."""
        return tuple(sorted(set(range(self.frames[0], self.frames[-1])) - set(self.frames)))


class WithPoses(ScanSource):
    """A source whose poses come from elsewhere, float64 [len(frames), 4, 4]."""

    has_poses = True

    def __init__(self, source: ScanSource, poses: np.ndarray) -> None:
        self.source, self.name, self.frames, self.width = source, source.name, source.frames, source.width
        self._poses = poses
        self.has_labels = source.has_labels
        if self.has_labels:
            self.labels_path, self.read_labels = source.labels_path, source.read_labels

    def poses(self) -> np.ndarray:
        return self._poses

    def read_points(self, frame: int) -> np.ndarray:
        return self.source.read_points(frame)

    def where(self, frame: int) -> str:
        return self.source.where(frame)

    def num_points(self, frame: int) -> int | None:
        return self.source.num_points(frame)

    def stamps(self) -> np.ndarray | None:
        return self.source.stamps()
