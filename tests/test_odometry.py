"""Poses from scans alone: near the true ones, repeatable, and going on where a scan is lost."""

import numpy as np
import pytest

from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.synthetic.lidar import SENSORS
from kdmos.data.synthetic.sequence import SyntheticSequence
from kdmos.odometry import Odometry

pytest.importorskip("kiss_icp")
SCANS = 8


@pytest.fixture(scope="module")
def drive():
    """A drive around a bend: scans and true poses."""
    sequence = SyntheticSequence(1, 0, SCANS, SENSORS["small"])
    return [sequence.scan(frame).points for frame in range(SCANS)], sequence.poses()


@pytest.fixture(scope="module")
def poses(drive):
    odometry = Odometry()
    return np.stack([odometry.push(points) for points in drive[0]])


def distance(poses, true):
    return np.linalg.norm(poses[..., :3, 3] - true[..., :3, 3], axis=-1)


def test_poses_are_near_the_true_ones(drive, poses):
    true = drive[1]
    assert np.linalg.norm(true[-1, :3, 3]) > 2
    assert poses.dtype == np.float64 and poses.shape == (SCANS, 4, 4)
    np.testing.assert_array_equal(poses[0], np.eye(4))
    # a thin sensor, 32 beams and 512 columns, in voxels of a metre: decimetres; real drives below are held to 0.1 m
    assert distance(poses, true).max() < 0.4


def test_the_same_scans_give_the_same_bits_after_a_reset_too(drive, poses):
    odometry = Odometry()
    for _ in range(2):
        again = np.stack([odometry.push(points) for points in drive[0]])
        np.testing.assert_array_equal(again, poses)
        odometry.reset()


def test_dtype_and_further_columns_do_not_matter_and_non_finite_points_are_left_out(drive, poses):
    odometry = Odometry()
    for points, pose in zip(drive[0][:4], poses):
        bad = np.full((50, 3), np.nan)
        bad[::2] = [np.inf, 1e300, 0]
        np.testing.assert_array_equal(odometry.push(np.concatenate([bad, points[:, :3].astype(np.float64)])), pose)


def test_a_lost_scan_goes_on_with_the_last_motion(drive, poses):
    odometry = Odometry()
    empty = np.zeros((0, 4), np.float32)
    np.testing.assert_array_equal(odometry.push(empty), np.eye(4))  # before the first scan nothing moves
    for points in drive[0][:4]:
        odometry.push(points)
    motion = np.linalg.inv(poses[2]) @ poses[3]
    lost = odometry.push(empty)
    np.testing.assert_allclose(lost, poses[3] @ motion, atol=1e-12)
    np.testing.assert_allclose(odometry.push(empty), lost @ motion, atol=1e-12)
    assert distance(odometry.push(drive[0][6]), drive[1][6]) < 0.4


def test_stamps_lengthen_the_motion_over_a_gap(drive, poses):
    odometry = Odometry()
    for frame, points in enumerate(drive[0][:4]):
        np.testing.assert_allclose(odometry.push(points, stamp=100 + 0.1 * frame), poses[frame], atol=1e-6)
    motion = np.linalg.inv(poses[2]) @ poses[3]
    after = odometry.push(np.zeros((0, 4)), stamp=100.5)  # 0.2 s later
    # positions go on along a line, not along the bend: 2 cm beside it
    np.testing.assert_allclose(after, poses[3] @ motion @ motion, atol=0.03)
    # and a scan after a normal period goes on at the same speed
    np.testing.assert_allclose(odometry.push(np.zeros((0, 4)), stamp=100.6), after @ motion, atol=0.03)


def test_times_of_the_points_undo_the_motion_within_a_scan():
    """Scans measured while driving, each point in the frame of its own time."""
    sequence = SyntheticSequence(1, 0, SCANS, SENSORS["small"], compensate=False)
    true, odometry, plain = sequence.poses(), Odometry(), Odometry()
    for frame in range(SCANS):
        points = sequence.scan(frame).points
        times = np.arctan2(points[:, 1], points[:, 0])  # the sensor turns once, the azimuth rising
        with_times, without = odometry.push(points, times=times), plain.push(points)
    assert not np.array_equal(with_times, without)
    assert distance(with_times, true[-1]) < 0.5  # the pose is that at the end of the turn, half a scan later


def test_what_is_no_scan():
    with pytest.raises(ValueError, match=r"expected points \[n, >= 3\], got \[5, 2\]"):
        Odometry().push(np.zeros((5, 2)))


@pytest.mark.parametrize("name", ["kitti-odometry-00", "kitti-raw-0005-a"])
def test_real_drives(realdata, name):
    (sequence,) = find_sequences(realdata(name))
    odometry, true = Odometry(), sequence.poses()
    poses = np.stack([odometry.push(sequence.read_points(frame)) for frame in sequence.frames])
    assert distance(poses, np.linalg.inv(true[0]) @ true).max() < 0.1
