"""A sensor's profile: what the network gets of a scan, from a worked table, and what the YAML may hold."""

import numpy as np
import pytest

from kdmos.data.profile import SensorProfile, load_profile
from kdmos.errors import InputError

POINTS = np.array(
    [
        [10, 0, -1, 100],  # ahead
        [0, 10, 0, 255],  # left
        [-10, 0, 0, 0],  # behind
        [0, -10, 0, 51],  # right
        [0.5, 0, 0, 1],  # near
        [90, 0, 0, 1],  # far
        [1, 0, 5, 1],  # high up
        [np.nan, 0, 0, 1],
        [1, 1, 1, np.inf],
    ],
    np.float32,
)


@pytest.mark.parametrize(
    ("profile", "kept"),
    [
        (SensorProfile(), [0, 1, 2, 3, 4, 5, 6]),
        (SensorProfile(range=(1, 80)), [0, 1, 2, 3, 6]),
        (SensorProfile(range=(0, 80)), [0, 1, 2, 3, 4, 6]),
        (SensorProfile(field_of_view=(-60, 60)), [0, 4, 5, 6]),
        (SensorProfile(field_of_view=(-180, 180)), [0, 1, 2, 3, 4, 5, 6]),
        (SensorProfile(field_of_view=(0, 360)), [0, 1, 2, 3, 4, 5, 6]),
        (SensorProfile(field_of_view=(90, 270)), [1, 2, 3]),  # both bounds belong to it
        (SensorProfile(field_of_view=(-270, -90)), [1, 2, 3]),  # the same half
        (SensorProfile(elevation=(-3, 30)), [1, 2, 3, 4, 5]),
        (SensorProfile(range=(1, 80), field_of_view=(-60, 60), elevation=(-10, 30)), [0]),
    ],
)
def test_points_outside_are_left_out_in_order(profile, kept):
    points, mask = profile.apply(POINTS)
    np.testing.assert_array_equal(np.nonzero(mask)[0], kept)
    np.testing.assert_array_equal(points, POINTS[kept])
    assert points.dtype == np.float32


def test_ground_and_remission_become_the_students():
    points, kept = SensorProfile(height=0.73, remission_scale=255).apply(POINTS[:2])
    assert kept.all()
    # float32 arithmetic rounds once per operation
    np.testing.assert_allclose(points, [[10, 0, -2, 100 / 255], [0, 10, -1, 1]], rtol=1e-6)


def test_nothing_to_do_copies_nothing():
    points = POINTS[:7].copy()
    assert np.shares_memory(SensorProfile().apply(points)[0], points)


def test_any_float_type_and_no_remission():
    points, kept = SensorProfile(remission_scale=255).apply(np.array([[1e300, 0, 0], [1, 2, 3]]))
    np.testing.assert_array_equal(kept, [False, True])
    np.testing.assert_array_equal(points, np.array([[1, 2, 3, 0]], np.float32))
    assert SensorProfile(range=(1, 2)).apply(np.zeros((0, 4)))[0].shape == (0, 4)
    with pytest.raises(ValueError, match=r"expected points \[n, 4\], got \[3, 2\]"):
        SensorProfile().apply(np.zeros((3, 2)))


def test_moved_points_and_moved_poses_meet_in_the_same_world():
    profile = SensorProfile(height=0.6)
    tilt = np.radians(20)
    pose = np.eye(4)
    pose[:3, :3] = [[np.cos(tilt), 0, np.sin(tilt)], [0, 1, 0], [-np.sin(tilt), 0, np.cos(tilt)]]
    pose[:3, 3] = [4, 5, 6]
    moved, _ = profile.apply(POINTS[:4])
    world = profile.apply_to_pose(pose) @ np.c_[moved[:, :3], np.ones(4)].T
    np.testing.assert_allclose(world, pose @ np.c_[POINTS[:4, :3], np.ones(4)].T, atol=1e-5)  # points are float32
    assert profile.apply_to_pose(np.stack([pose] * 3)).shape == (3, 4, 4)


def test_yaml_states_what_differs(tmp_path):
    path = tmp_path / "sensor.yaml"
    path.write_text("height: 0.6\nrange: [0.5, 80]\nfield_of_view: [-120, 120]\nremission_scale: 255\n")
    profile = load_profile(path)
    assert profile == SensorProfile(0.6, (0.5, 80.0), (-120.0, 120.0), None, 255.0)
    assert profile.changes() == {
        "height": 0.6,
        "range": (0.5, 80.0),
        "field_of_view": (-120.0, 120.0),
        "remission_scale": 255.0,
    }
    path.write_text("")
    assert load_profile(path) == SensorProfile()
    assert load_profile(path).changes() == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hieght: 2", "hieght: .*; the keys are height, range, field_of_view, elevation, remission_scale"),
        ("height: -1", "height: expected a finite number above 0, got -1"),
        ("height: .nan", "height: expected a finite number above 0"),
        ("remission_scale: 0", "remission_scale: expected a finite number above 0"),
        ("range: [5, 1]", "range: expected two finite numbers, the lower one first"),
        ("range: [0, .inf]", "range: expected two finite numbers"),
        ("range: [-1, 5]", "range: expected distances >= 0"),
        ("range: 5", "range"),
        ("field_of_view: [-200, 200]", "at most 360 degrees"),
        ("elevation: [a, 3]", "elevation"),
        ("[1, 2]", "the keys are"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_yaml_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "sensor.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_profile(path)
    assert str(path) in str(error.value)


def test_no_yaml_at_all(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_profile(tmp_path / "none.yaml")
