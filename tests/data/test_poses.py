"""Poses from files of both formats: matched to scans by row, number or time; and poses between poses."""

from types import SimpleNamespace

import numpy as np
import pytest

from kdmos.data.batch import ScanId
from kdmos.data.poses import between, pose_rows, poses_from_file, read_pose_file
from kdmos.errors import InputError

TURN = np.radians(90)
QUARTER = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # a turn to the left


def pose(x=0.0, y=0.0, z=0.0, rotation=None):
    out = np.eye(4)
    out[:3, 3] = x, y, z
    if rotation is not None:
        out[:3, :3] = rotation
    return out


def yaw(angle):
    return [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]


def source(frames=(0, 1, 2), stamps=None):
    stamps = None if stamps is None else np.array(stamps, float)
    return SimpleNamespace(name="a", frames=tuple(frames), stamps=lambda: stamps, scan=lambda f: ScanId("a", f))


def write(path, *lines):
    path.write_text("\n".join(lines))
    return path


def kitti(*poses):
    return [" ".join(repr(float(value)) for value in one[:3].ravel()) for one in poses]


# ---- KITTI's format


def test_rows_are_lidar_poses_or_those_of_a_camera(tmp_path):
    rows = [pose(i, 2 * i, 0, yaw(0.1 * i)) for i in range(3)]
    path = write(tmp_path / "poses.txt", *kitti(*rows))
    np.testing.assert_allclose(poses_from_file(source(), path), rows, atol=1e-12)
    camera_from_lidar = pose(0, -0.1, -0.3, [[0, -1, 0], [0, 0, -1], [1, 0, 0]])
    (row,) = kitti(camera_from_lidar)
    calib = write(tmp_path / "calib.txt", "P0: 1 2 3", f"Tr: {row}")
    np.testing.assert_allclose(poses_from_file(source(), path, calib), rows @ camera_from_lidar, atol=1e-12)


def test_poses_of_a_camera_without_its_calibration_are_said(tmp_path, recwarn):
    ahead = [pose(0, 0, 1.5 * i) for i in range(3)]
    calib = write(tmp_path / "calib.txt", f"Tr: {kitti(pose(rotation=[[0, -1, 0], [0, 0, -1], [1, 0, 0]]))[0]}")
    poses_from_file(source(), write(tmp_path / "lidar.txt", *kitti(*(pose(i) for i in range(3)))))
    poses_from_file(source(), write(tmp_path / "camera.txt", *kitti(*ahead)), calib)
    upwards = write(tmp_path / "upwards.txt", f"Tr: {kitti(pose())[0]}")  # who gives a calibration knows
    poses_from_file(source(), tmp_path / "camera.txt", upwards)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the motion is along z, as in poses of a camera.*--calib"):
        poses_from_file(source(), tmp_path / "camera.txt")


def test_a_mark_at_the_start_is_no_number(tmp_path):
    path = tmp_path / "poses.txt"
    for row in (*kitti(pose(3)), "0 3 0 0 0 0 0 1"):
        path.write_text(row, encoding="utf-8-sig")
        np.testing.assert_array_equal(read_pose_file(path).poses, [pose(3)])


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path):
    poses = [pose(1 / 3, 5e6 + 0.1, -1e-9, yaw(0.1 * i)) for i in range(4)]
    np.testing.assert_array_equal(read_pose_file(write(tmp_path / "poses.txt", pose_rows(poses))).poses, poses)


def test_rows_belong_to_scans_in_order_or_by_number(tmp_path):
    path = write(tmp_path / "poses.txt", *kitti(*[pose(i) for i in range(5)]))

    def x(frames):
        return poses_from_file(source(frames), path)[:, 0, 3].tolist()

    assert x(range(5)) == [0, 1, 2, 3, 4]
    assert x((7, 8, 9, 20, 30)) == [0, 1, 2, 3, 4]  # as many rows as scans
    assert x((1, 3)) == [1, 3]  # row i is frame number i
    with pytest.raises(InputError, match="has 5 poses, and a has 2 scans up to frame 5; every scan needs its row"):
        x((1, 5))


# ---- TUM's format


def test_stamped_poses_are_interpolated(tmp_path):
    s = np.sin(TURN / 2)
    path = write(
        tmp_path / "tum.txt",
        "# a comment",
        f"12.0 4 2 0 0 0 {s} {s}",  # in any order
        "10.0 0 0 0 0 0 0 1",
        "",
        f"11.0 2 0 0 0 0 {s} {s}",
    )
    found = poses_from_file(source(range(5), [10, 10.5, 11, 11.25, 12]), path)
    expected = [pose(), pose(1, 0, 0, yaw(TURN / 2)), pose(2, 0, 0, QUARTER), pose(2.5, 0.5, 0, QUARTER)]
    np.testing.assert_allclose(found, [*expected, pose(4, 2, 0, QUARTER)], atol=1e-12)
    # without times of the scans, row by row in the order of time
    np.testing.assert_allclose(poses_from_file(source(range(3)), path)[:, 0, 3], [0, 2, 4])
    with pytest.raises(InputError, match="3 poses, and a has 4 scans whose times are not known"):
        poses_from_file(source(range(4)), path)


def test_up_to_a_scan_outside_the_motion_goes_on(tmp_path):
    path = write(tmp_path / "tum.txt", *(f"{10 + 0.1 * i:.1f} {i} 0 0 0 0 0 1" for i in range(4)))
    found = poses_from_file(source(range(6), 9.9 + 0.1 * np.arange(6)), path)
    np.testing.assert_allclose(found[:, 0, 3], [-1, 0, 1, 2, 3, 4], atol=1e-9)
    with pytest.raises(InputError, match=r"of 10.000 to 10.300 s, but scan a/000006 is of 10.500 s, 0.200 s outside"):
        poses_from_file(source(range(7), 9.9 + 0.1 * np.arange(7)), path)
    with pytest.raises(InputError, match=r"scan a/000002 is of 10.440 s, 0.140 s outside"):
        poses_from_file(source(range(3), [10.24, 10.34, 10.44]), path)
    with pytest.raises(InputError, match=r"scan a/000000 is of 0.000 s, 10.000 s outside; check that both"):
        poses_from_file(source(range(3), [0, 0.1, 0.2]), path)


def test_a_gap_in_the_poses_is_said(tmp_path, recwarn):
    path = write(tmp_path / "tum.txt", "0 0 0 0 0 0 0 1", "0.9 9 0 0 0 0 0 1")  # a pose a second, as of a receiver
    poses_from_file(source(range(90), np.arange(90) * 0.01), path)
    assert not recwarn.list
    path = write(tmp_path / "tum.txt", "0 0 0 0 0 0 0 1", "0.1 1 0 0 0 0 0 1", "5 50 0 0 0 0 0 1")
    with pytest.warns(UserWarning, match="has no pose for 4.9 s around"):
        poses_from_file(source(range(30), np.arange(30) * 0.1), path)


def test_stamps_in_nanoseconds_and_commas(tmp_path):
    path = write(tmp_path / "tum.csv", "1691936557000000000, 0,0,0, 0,0,0,1", "1691936558000000000, 2,0,0, 0,0,0,1")
    assert read_pose_file(path).stamps.tolist() == [1691936557, 1691936558]
    found = poses_from_file(source(range(2), [1691936557.25, 1691936557.75]), path)
    np.testing.assert_allclose(found[:, 0, 3], [0.5, 1.5], atol=1e-6)  # float64 holds 2e-7 s of such numbers


def test_poses_of_a_body_in_tums_format(tmp_path):
    path = write(tmp_path / "tum.txt", "0 0 0 0 0 0 0 1", "1 1 0 0 0 0 0.70710678 0.70710678")
    body_from_lidar = pose(0.5, 0, 1.2)
    calib = write(tmp_path / "calib.txt", f"Tr: {kitti(body_from_lidar)[0]}")
    found = poses_from_file(source(range(2)), path, calib)
    np.testing.assert_allclose(found[1], pose(1, 0, 0, QUARTER) @ body_from_lidar, atol=1e-7)  # of the file's digits


def test_one_pose_is_one_place(tmp_path):
    path = write(tmp_path / "tum.txt", "3 1 2 3 0 0 0 1")
    np.testing.assert_array_equal(poses_from_file(source((0,), [3]), path), [pose(1, 2, 3)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([""], "the first row has 0 values between blanks; expected KITTI's 12 .* or TUM's 8"),
        (["1 2 3"], "the first row has 3 values"),
        (
            ["0 0 0 0 0 0 0 2"],
            r"line 1: the quaternion has length 2, expected 1; the order is stamp tx ty tz qx qy qz qw",
        ),
        (["0 0 0 0 0 0 0 1", "1 5 5 5 1 0 0 0.3"], "line 2: the quaternion has length 1.04"),
        (["0 0 0 0 0 0 0 1", "1 0 0 0 0 0 1"], "line 2 is not 8 finite numbers"),
        (["0 0 0 0 0 0 0 1", "1 x 0 0 0 0 0 1"], "line 2 is not 8 finite numbers"),
        (["0 0 0 0 0 0 0 1", "nan 0 0 0 0 0 0 1"], "line 2 is not 8 finite numbers"),
        (["0 0 0 0 0 0 0 1", "0 1 0 0 0 0 0 1"], "two rows have the stamp 0"),
        (["1 0 0 0 0 1 0 0 0 0 1 0", "1 0 0"], "line 2 is not 12 finite numbers"),
        (["2 0 0 0 0 2 0 0 0 0 2 0"], "line 1 is not a rigid transform"),
    ],
)
def test_what_is_no_pose(tmp_path, rows, message):
    path = write(tmp_path / "poses.txt", *rows)
    with pytest.raises(InputError, match=message) as error:
        read_pose_file(path)
    assert str(path) in str(error.value)


def test_quaternions_off_unit_length_by_rounding_are_normalised(tmp_path):
    path = write(tmp_path / "tum.txt", "0 0 0 0 0 0 0.707 0.707")
    np.testing.assert_allclose(read_pose_file(path).poses[0], pose(rotation=QUARTER), atol=1e-15)


# ---- between


def test_between_goes_the_shorter_way_at_constant_speed():
    first, second = pose(1, 0, 0, yaw(np.radians(170))), pose(3, 0, 0, yaw(np.radians(-170)))  # 20 degrees on
    found = between(first, second, np.array([0, 0.25, 0.5, 1, 2]))
    np.testing.assert_allclose(found[:, 0, 3], [1, 1.5, 2, 3, 5])
    angles = np.degrees(np.arctan2(found[:, 1, 0], found[:, 0, 0])) % 360
    np.testing.assert_allclose(angles, [170, 175, 180, 190, 210])
    np.testing.assert_array_equal(found[:, 3], np.tile([0, 0, 0, 1], (5, 1)))


def test_between_goes_the_shorter_way_where_the_largest_component_changes():
    """The quaternions of -80 and -100 degrees, as rotations give them, have opposite signs."""
    found = between(pose(rotation=yaw(np.radians(-80))), pose(rotation=yaw(np.radians(-100))), 0.5)
    np.testing.assert_allclose(found, pose(rotation=yaw(np.radians(-90))), atol=1e-15)


def test_between_holds_for_any_rotation():
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(500, 3, 3))
    rotations = np.linalg.qr(axes)[0]
    rotations[np.linalg.det(rotations) < 0] *= -1
    # half turns about each axis, where the signs of a quaternion are least certain
    rotations[:3] = [np.diag(d) for d in ([1, -1, -1], [-1, 1, -1], [-1, -1, 1])]
    poses = np.tile(np.eye(4), (500, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotations, rng.normal(size=(500, 3))
    np.testing.assert_allclose(between(poses[:-1], poses[1:], 0.0), poses[:-1], atol=1e-12)
    np.testing.assert_allclose(between(poses[:-1], poses[1:], 1.0), poses[1:], atol=1e-12)
    half = between(poses[:-1], poses[1:], 0.5)[:, :3, :3]
    step = np.linalg.inv(rotations[:-1]) @ half
    np.testing.assert_allclose(rotations[:-1] @ step @ step, rotations[1:], atol=1e-9)  # two halves are the whole


def test_between_equal_poses_stands_still():
    there = pose(1, 2, 3, QUARTER)
    np.testing.assert_allclose(between(there, there, 0.3), there, atol=1e-15)
