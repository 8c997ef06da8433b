"""LiDAR poses from files: KITTI's rows of 12 numbers, TUM's stamped quaternions; and poses between poses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdmos.data.source import ScanSource
from kdmos.errors import InputError, unreadable

# A rotation rounded to four digits leaves R R^T within 1e-3 of the identity, SuMa's poses (seven digits) within
# 1e-6. A scale error of 1 % leaves 2e-2, a row cut in the wrong place much more.
RIGID_TOLERANCE = 1e-2
# Quaternions rounded to two digits are off unit length by up to 1e-2; swapped columns by tenths at least.
UNIT_TOLERANCE = 1e-2
NANOSECONDS = 1e14  # a larger stamp is no time in seconds


class PoseFile(NamedTuple):
    """poses: float64 [M, 4, 4], a fixed frame from the LiDAR's. stamps: seconds, float64 [M], ascending; None in
    KITTI's format."""

    poses: np.ndarray
    stamps: np.ndarray | None


def poses_from_file(source: ScanSource, path: str | Path, calib: str | Path | None = None) -> np.ndarray:
    """LiDAR pose of each scan of a source from a file in KITTI's or TUM's format.

    KITTI: the rows belong to the scans in their order where there are as many, else row i to frame number i. TUM:
    where the source knows its stamps the poses are interpolated at them, else the rows belong to the scans in order.

    Args:
        source: Whose poses.
        path: Text; what it holds is told by its first row. See `read_pose_file`.
        calib: Text with a row `Tr:`, the frame of the poses (a camera, a body) from the LiDAR's; None: the poses are
            the LiDAR's.
    Returns: float64 [len(source.frames), 4, 4], one fixed frame from each scan's LiDAR frame.
    Raises: InputError naming the file if anything is wrong with it, a scan has no row, or its stamp lies outside the
        time of the poses by more than a scan.
    """
    poses, stamps = read_pose_file(path, calib)
    travelled = np.abs((np.linalg.inv(poses[:-1]) @ poses[1:])[:, :3, 3]).sum(0)  # along x, y, z
    if calib is None and travelled[2] > max(1.0, 2 * travelled[:2].max()):
        warnings.warn(
            f"{path}: the motion is along z, as in poses of a camera, but they are taken for the LiDAR's (x forward, z "
            "up); give the camera's calibration with --calib",
            stacklevel=2,
        )
    wanted = None if stamps is None else source.stamps()
    if wanted is not None:
        return _at(wanted, stamps, poses, source, path)
    if len(poses) == len(source.frames):
        return poses
    if stamps is None and source.frames[-1] < len(poses):
        if source.frames == tuple(range(len(source.frames))):
            warnings.warn(
                f"{path}: has {len(poses)} poses, and {source.name} {len(source.frames)} scans: the first ones are "
                "taken, which is wrong if scans before the last are missing",
                stacklevel=2,
            )
        return poses[list(source.frames)]
    rows = f"{len(poses)} poses, and {source.name} has {len(source.frames)} scans"
    if stamps is None:
        raise InputError(f"{path}: has {rows} up to frame {source.frames[-1]}; every scan needs its row")
    raise InputError(f"{path}: has {rows} whose times are not known; so every scan needs its row")


def read_pose_file(path: str | Path, calib: str | Path | None = None) -> PoseFile:
    """Poses in the format that the first row tells.

    Args:
        path: Text. KITTI: 12 numbers a row, 3 x 4 row by row. TUM: `stamp tx ty tz qx qy qz qw` a row, in any order;
            stamps in seconds or, beyond 1e14, nanoseconds; # begins a comment.
        calib: As for `poses_from_file`.
    Raises: InputError if a file is missing or a row is malformed or not rigid.
    """
    lines = read_text(path, "poses").rstrip().splitlines()
    first = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    if len(first.replace(",", " ").split()) == 8:
        poses, stamps = _read_tum(lines, path)
    elif len(first.split()) == 12:
        poses, stamps = _rigid(lines, path, "line {}"), None
    else:
        raise InputError(
            f"{path}: the first row has {len(first.split())} values between blanks; expected KITTI's 12 (3 x 4, row by "
            "row) or TUM's 8 (stamp tx ty tz qx qy qz qw)"
        )
    return PoseFile(poses if calib is None else poses @ read_calibration(calib), stamps)


def _read_tum(lines: list[str], path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        numbers = line.replace(",", " ").split()
        try:
            row = np.array([float(value) for value in numbers])
        except ValueError:
            row = np.zeros(0)
        if row.shape != (8,) or not np.isfinite(row).all():
            raise InputError(f"{path}: line {number} is not 8 finite numbers stamp tx ty tz qx qy qz qw: '{line[:60]}'")
        if abs(np.linalg.norm(row[4:]) - 1) > UNIT_TOLERANCE:
            raise InputError(
                f"{path}: line {number}: the quaternion has length {np.linalg.norm(row[4:]):.3g}, expected 1; the "
                "order is stamp tx ty tz qx qy qz qw"
            )
        rows.append(row)
    values = np.stack(rows)
    values = values[np.argsort(values[:, 0], kind="stable")]
    stamps = values[:, 0] * (1e-9 if values[0, 0] > NANOSECONDS else 1)
    same = np.nonzero(np.diff(stamps) <= 0)[0]
    if len(same):
        raise InputError(f"{path}: two rows have the stamp {values[same[0], 0]:.6f}; every pose needs its own time")
    return pose_matrices(values[:, 1:4], values[:, 4:]), stamps


def _at(wanted: np.ndarray, stamps: np.ndarray, poses: np.ndarray, source: ScanSource, path: str | Path) -> np.ndarray:
    """Poses at the stamps of the scans; up to one scan outside the first or last of them the motion goes on."""
    period = np.median(np.diff(wanted)) if len(wanted) > 1 else 0.0
    outside = np.maximum(stamps[0] - wanted, wanted - stamps[-1])
    if outside.max() > period * 1.01:  # stamps jitter
        i = outside.argmax()
        raise InputError(
            f"{path}: its poses are of {stamps[0]:.3f} to {stamps[-1]:.3f} s, but scan {source.scan(source.frames[i])} "
            f"is of {wanted[i]:.3f} s, {outside[i]:.3f} s outside; check that both have the same clock"
        )
    if len(poses) == 1:
        return np.repeat(poses, len(wanted), 0)
    after = np.searchsorted(stamps, wanted).clip(1, len(stamps) - 1)
    gap = stamps[after] - stamps[after - 1]
    if gap.max() > max(10 * period, 1.0):
        warnings.warn(
            f"{path}: has no pose for {gap.max():.3g} s around {wanted[gap.argmax()]:.3f} s; scans in between get one "
            "from the poses before and after",
            stacklevel=4,
        )
    return between(poses[after - 1], poses[after], (wanted - stamps[after - 1]) / gap)


def between(first: np.ndarray, second: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """Poses on the way from one to another: positions on a line, rotations at constant speed (slerp).

    Args:
        first, second: float64 [..., 4, 4], rigid.
        share: [...], 0 is `first` and 1 `second`; outside, the motion goes on.
    Returns: float64 [..., 4, 4].
    """
    share = np.asarray(share, np.float64)[..., None]
    a, b = _quaternion(first[..., :3, :3]), _quaternion(second[..., :3, :3])
    b = np.where((a * b).sum(-1, keepdims=True) < 0, -b, b)  # the shorter way round
    half = np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1))[..., None]
    angle = 2 * half  # between the quaternions, half the turn
    with np.errstate(invalid="ignore", divide="ignore"):
        curved = (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)
    quaternion = np.where(angle < 1e-9, (1 - share) * a + share * b, curved)
    return pose_matrices((1 - share) * first[..., :3, 3] + share * second[..., :3, 3], quaternion)


def pose_matrices(positions: np.ndarray, quaternions: np.ndarray) -> np.ndarray:
    """Poses of positions [..., 3] and quaternions [..., 4] = x, y, z, w of any length: float64 [..., 4, 4]."""
    quaternions = np.asarray(quaternions, np.float64)
    matrices = np.zeros((*quaternions.shape[:-1], 4, 4))
    matrices[..., :3, :3], matrices[..., :3, 3], matrices[..., 3, 3] = _rotation(quaternions), positions, 1
    return matrices


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    """Rotations [..., 3, 3] of quaternions [..., 4]."""
    x, y, z, w = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternions [..., 4] = x, y, z, w of rotations [..., 3, 3]."""
    r = rotation
    # Four times the products of each component with all of them: the row of the largest one is the most exact.
    diagonal = r[..., [0, 1, 2], [0, 1, 2]]
    trace = diagonal.sum(-1)
    products = np.empty((*r.shape[:-2], 4, 4))
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        products[..., i, i] = 1 + 2 * diagonal[..., i] - trace
        products[..., i, j] = products[..., j, i] = r[..., i, j] + r[..., j, i]
        products[..., i, 3] = products[..., 3, i] = r[..., k, j] - r[..., j, k]
    products[..., 3, 3] = 1 + trace
    largest = np.diagonal(products, axis1=-2, axis2=-1).argmax(-1)
    row = np.take_along_axis(products, largest[..., None, None], -2)[..., 0, :]
    return row / np.linalg.norm(row, axis=-1, keepdims=True)


def read_poses(poses_path: str | Path, calib_path: str | Path) -> np.ndarray:
    """LiDAR poses in the frame of scan 0, from camera poses and the calibration: inv(Tr) inv(P_0) P_i Tr.

    Args:
        poses_path: Text, row i = P_i, the pose of camera 0 in the world at frame number i: 3 x 4, row by row.
        calib_path: Text with a row `Tr:`, camera 0 from LiDAR, as 3 x 4.
    Returns: float64 [S, 4, 4], frame of LiDAR 0 from that of LiDAR i, for frame numbers 0..S-1, metres.
    Raises: InputError if a file or the row `Tr:` is missing, a row has not 12 finite numbers, or a matrix is not
        rigid.
    """
    lines = read_text(poses_path, "poses").rstrip().splitlines()
    if not lines:
        raise InputError(f"{poses_path}: holds no pose; expected one row of 12 numbers a scan")
    poses = _rigid(lines, poses_path, "line {}")
    camera_from_lidar = read_calibration(calib_path)
    return np.linalg.inv(camera_from_lidar) @ np.linalg.inv(poses[0]) @ poses @ camera_from_lidar


def pose_rows(poses: np.ndarray) -> str:
    """Poses [S, 4, 4] in KITTI's format, to the last digit: what is read back is what was written."""
    return "".join(" ".join(f"{value:.17g}" for value in pose[:3].ravel()) + "\n" for pose in poses)


def read_calibration(path: str | Path) -> np.ndarray:
    """The row `Tr:` of a calibration file, camera 0 from LiDAR, float64 [4, 4].

    Raises: InputError if the file or the row is missing, or the matrix is not rigid.
    """
    rows = [line.partition(":") for line in read_text(path, "calibration").splitlines()]
    found = [numbers for key, _, numbers in rows if key.strip() == "Tr"]
    if not found:
        keys = ", ".join(key.strip() for key, colon, _ in rows if colon) or "none"
        raise InputError(
            f"{path}: expected a row 'Tr:' (camera 0 from LiDAR, 12 numbers), found {keys}; for KITTI raw data write "
            "R0_rect * Tr_velo_to_cam under that name"
        )
    return _rigid(found[:1], path, "row 'Tr:'")[0]


def read_text(path: str | Path, what: str) -> str:
    """Content of a text file, a wrong character replaced. Raises: InputError naming it (`what`: "poses", ...)."""
    try:
        return Path(path).read_text(encoding="utf-8-sig", errors="replace")  # Windows may begin it with a mark
    except OSError as error:
        raise unreadable(path, what, error) from None


def rigid_fault(matrix: np.ndarray) -> str | None:
    """What keeps a matrix, 3 x 4 or 4 x 4, from being a rigid transform; None if nothing does."""
    if matrix.shape not in ((3, 4), (4, 4)) or not np.isfinite(matrix).all():
        return f"is not a matrix of 3 x 4 or 4 x 4 finite numbers, but {'x'.join(map(str, matrix.shape))}"
    rotation = matrix[:3, :3]
    error, determinant = np.abs(rotation @ rotation.T - np.eye(3)).max(), np.linalg.det(rotation)
    if error <= RIGID_TOLERANCE and determinant > 0 and np.array_equal(matrix[3:], np.eye(4)[3 : len(matrix)]):
        return None
    return (
        f"is not a rigid transform: R R^T is off the identity by {error:.2g} (allowed {RIGID_TOLERANCE:g}), det R is "
        f"{determinant:.3g} (expected 1)"
    )


def _rigid(rows: list[str], path: str | Path, where: str) -> np.ndarray:
    """Rows of 12 numbers as float64 [S, 4, 4]; `where` is what the message calls row {} (from 1)."""
    values = np.empty((len(rows), 12))
    for i, row in enumerate(rows):
        numbers = row.split()
        try:
            values[i] = [float(number) for number in numbers] if len(numbers) == 12 else np.nan
        except ValueError:
            values[i] = np.nan
        if not np.isfinite(values[i]).all():
            raise InputError(
                f"{path}: {where.format(i + 1)} is not 12 finite numbers (3 x 4, row by row) but {len(numbers)} "
                f"values '{row.strip()[:40]}...'; every scan needs its row"
            )
    values = values.reshape(-1, 3, 4)
    for i, fault in enumerate(map(rigid_fault, values)):
        if fault:
            raise InputError(f"{path}: {where.format(i + 1)} {fault}; check the scale and order of its numbers")
    matrices = np.tile(np.eye(4), (len(values), 1, 1))
    matrices[:, :3] = values
    return matrices
