"""LiDAR poses from the scans alone, by KISS-ICP (RA-L 2023)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kdmos.checkpoint import write_atomic
from kdmos.data.poses import between, pose_rows, read_pose_file
from kdmos.data.profile import SensorProfile
from kdmos.data.semantic_kitti import read_manifest
from kdmos.data.source import ScanSource
from kdmos.errors import InputError

MAX_RANGE = 100.0  # metres; beyond, a scan is too sparse to be registered
# Of the map, where nothing waits for the poses: on synthetic and real drives the steps come out a third more exact than
# with KISS-ICP's own metre, for three times the work. The rule, whose answer hangs on centimetres, gains most by it.
OFFLINE_VOXEL = 0.5
LONGEST_GAP = 100  # times the last step between stamps; beyond, a clock jumped and not the sensor


class Odometry:
    """The pose of each scan of a sequence that arrives scan by scan.

    What is kept is a map of the points within `MAX_RANGE`: it does not grow with the length of the sequence.

    Args:
        threads: With one, the same scans give the same poses to the last bit. 0: all cores; the last digits may then
            differ from run to run.
        voxel_size: Of the map, metres; smaller is more exact and slower.
    Raises: InputError if kiss-icp is not installed.
    """

    def __init__(self, threads: int = 1, voxel_size: float = 1.0) -> None:
        try:
            from kiss_icp.config.parser import load_config
            from kiss_icp.kiss_icp import KissICP
        except ImportError as error:
            raise InputError(
                "odometry needs kiss-icp: pip install 'kdmos[odometry]', or give poses of your own"
            ) from error
        config = load_config(None)
        config.data.max_range, config.data.min_range = MAX_RANGE, 0.0
        config.data.deskew = True  # no effect without the points' times
        config.mapping.voxel_size = voxel_size
        config.registration.max_num_threads = threads
        self._fresh = lambda: KissICP(config)
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next scan is the first of a sequence."""
        self._icp = self._fresh()
        self._started = False
        self._stamp: float | None = None  # of the last scan
        self._step: float | None = None  # of the stamps, over which the last motion was made

    def push(self, points: np.ndarray, stamp: float | None = None, times: np.ndarray | None = None) -> np.ndarray:
        """Take the next scan.

        Args:
            points: [n, >= 3], any float type: x, y, z in metres, LiDAR frame. Non-finite ones are left out. Without
                any (a scan that was lost) the last motion goes on: constant velocity.
            stamp: In seconds or any other unit; where both the last scan and this one have one, a gap between them
                lengthens the motion that the registration starts from.
            times: [n], when each point was measured, any unit, ascending. With them the scan is registered as if
                taken at its end; without, as if all points were measured at once.
        Returns: float64 [4, 4], LiDAR frame of the first scan from this one's.
        Raises: ValueError for another shape.
        """
        points = np.asarray(points)
        if points.ndim != 2 or points.shape[1] < 3:
            raise ValueError(f"expected points [n, >= 3], got {list(points.shape)}")
        xyz = np.ascontiguousarray(points[:, :3], np.float64)
        finite = (np.abs(xyz) < MAX_RANGE).all(1)  # false for NaN too; KISS-ICP drops what is beyond
        times = np.empty(0) if times is None else np.asarray(times, np.float64)[finite]
        motion = self._expected_motion(stamp)
        if finite.any():
            self._icp.last_delta = motion
            self._icp.register_frame(xyz[finite], times)
            self._started = True
        elif self._started:
            self._icp.last_pose = self._icp.last_pose @ motion
            self._icp.last_delta = motion
        return self._icp.last_pose.copy()

    def _expected_motion(self, stamp: float | None) -> np.ndarray:
        """The last motion, as long as the time since the last scan says; and the time is noted."""
        motion = self._icp.last_delta
        step = None if stamp is None or self._stamp is None else stamp - self._stamp
        self._stamp = stamp
        if step is None or step <= 0 or (self._step is not None and step > LONGEST_GAP * self._step):
            return motion
        if self._step not in (None, step):
            motion = between(np.eye(4), motion, step / self._step)
        self._step = step
        return motion


def odometry_poses(
    source: ScanSource,
    profile: SensorProfile | None = None,
    advance: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """LiDAR pose of each scan of a source in the frame of the first one, float64 [len(source.frames), 4, 4].

    A scan that cannot be read gets the last pose moved on by the last motion. Where frame numbers are missing, the
    motion is expected to have gone on as long.

    Args:
        source: Read once, in order.
        profile: Points outside its range and field of view, such as those on the vehicle itself, are left out; None:
            all are used.
        advance: Called after each scan.
    """
    odometry, profile, poses = Odometry(voxel_size=OFFLINE_VOXEL), profile or SensorProfile(), []
    for frame in source.frames:
        try:
            points = source.read_points(frame)
        except InputError:  # whoever needs the scan learns why
            points = np.zeros((0, 4), np.float32)
        poses.append(odometry.push(points[profile.apply(points)[1]], stamp=frame))
        advance()
    return np.stack(poses)


def poses_path(predictions: str | Path, name: str) -> Path:
    """Where poses that a sequence got by odometry, or from a file that is not its own, lie beside its predictions."""
    return Path(predictions) / "sequences" / name / "poses.txt"


def write_poses(path: Path, poses: np.ndarray) -> None:
    """Write LiDAR poses [S, 4, 4] in KITTI's format."""
    write_atomic(path, pose_rows(poses).encode())


def saved_poses(predictions: str | Path, data: str | Path, source: ScanSource) -> np.ndarray | None:
    """LiDAR poses [S, 4, 4] that `kdmos predict` used for a sequence; None if those were the sequence's own.

    Args:
        predictions: The folder that it wrote.
        data: The path of the scans, the same that it was given: poses of other data are not taken.
        source: The sequence.
    Raises: InputError if the files are damaged.
    """
    manifest, path = read_manifest(predictions) or {}, poses_path(predictions, source.name)
    ours = manifest.get("poses") and manifest.get("source") == str(Path(data).resolve())
    if not ours or not path.is_file():
        return None
    poses = read_pose_file(path).poses
    return poses if len(poses) == len(source.frames) else None
