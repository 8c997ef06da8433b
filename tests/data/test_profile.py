"""A sensor's profile: what the network gets of a scan, from a worked table, and what the YAML may hold."""

import re
import subprocess
import sys

import numpy as np
import pytest

from kdmos.data.profile import SensorProfile, check_remission, differences, load_profile
from kdmos.data.synthetic.lidar import SENSORS
from kdmos.data.synthetic.sequence import SyntheticSequence
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


# ---- against what a student was trained on


def scan_on_the_ground(height=1.73, remission=0.99, reach=70.0, view=360.0):
    rng = np.random.default_rng(0)
    angle, distance = np.radians(rng.uniform(-view / 2, view / 2, 5000)), rng.uniform(2, reach, 5000)
    ground = rng.normal(-height, 0.03, 5000)
    values = rng.uniform(0, remission, 5000)
    return np.c_[distance * np.cos(angle), distance * np.sin(angle), ground, values].astype(np.float32)


@pytest.mark.parametrize(
    ("scan", "said"),
    [
        ({}, []),
        ({"height": 2.1}, []),
        (
            {"height": 0.6},
            [r"the ground seems to lie 0.[567] m below, in training 1.73 m \('height: 0.[567]'"],
        ),
        ({"height": 2.9}, ["the ground seems to lie (2.9|3.0|2.8) m below"]),
        ({"remission": 0}, ["the remission is 0 everywhere, in training it reached 0.99"]),
        ({"remission": 0.004}, ["the remission hardly exceeds 0.004, in training it reached 0.99"]),
        ({"reach": 200}, ["points reach 19[0-9] m, in training 80 m"]),
        ({"view": 120}, ["the scan covers 1[234]0 of 360 degrees"]),
        ({"height": 0.6, "remission": 0}, ["the ground", "the remission"]),
    ],
)
def test_what_lies_outside_training_is_named(scan, said):
    for sensor in (None, {"x": [-80, 80], "y": [-79, 79], "z": [-6.3, 3.2], "remission": [0, 0.99]}):
        found = differences(scan_on_the_ground(**scan), sensor)
        assert len(found) == len(said)
        for words, pattern in zip(found, said):
            assert re.match(pattern, words)
    assert differences(scan_on_the_ground(view=120), profile=SensorProfile(field_of_view=(-60, 60))) == []


def test_the_height_to_write_is_that_of_the_lidar():
    """Also after a wrong one has moved the scan."""
    scan = scan_on_the_ground(height=1.6)
    for height in (0.6, 2.6):
        profile = SensorProfile(height=height)
        (found,) = differences(profile.apply(scan)[0], profile=profile)
        assert re.search(r"'height: 1\.[567]'", found)
    (found,) = differences(scan_on_the_ground(height=-3), profile=SensorProfile())
    assert "is z up?" in found


def test_nothing_is_said_of_what_a_few_points_show():
    few = scan_on_the_ground(height=0.6)[:120]  # fewer than a hundred of them near
    assert differences(few) == []
    assert differences(scan_on_the_ground(view=120)[:900]) == []


def test_the_vehicle_itself_is_no_ground():
    scan = scan_on_the_ground()
    roof = np.tile(np.array([[0.5, 0.5, -0.3, 0.5]], np.float32), (3000, 1))
    assert differences(np.concatenate([scan, roof])) == []


def test_a_student_of_another_sensor_is_not_held_to_kittis():
    sensor = {"x": [0, 200], "y": [-200, 200], "z": [-1, 3], "remission": [0, 0.02]}
    scan = scan_on_the_ground(height=0.6, remission=0.01, reach=150)
    assert differences(scan, sensor) == []
    assert len(differences(scan)) == 3


def test_no_false_alarm_on_synthetic_scans():
    for seed in range(3):
        sequence = SyntheticSequence(seed, 0, 2, SENSORS["hdl64"])
        assert differences(sequence.scan(0).points) == []


def test_remission_of_another_scale_is_refused_with_a_guess():
    check_remission(scan_on_the_ground(), "here")
    check_remission(np.zeros((0, 4), np.float32), "here")
    few = scan_on_the_ground()
    few[:40, 3] = 100  # less than one in a hundred is noise
    check_remission(few, "here")
    for top, guess in ((90, 100), (250, 255), (3000, 4095), (60000, 65535), (1e6, "9[89]")):
        with pytest.raises(InputError, match=f"here: the remission runs from .*, expected 0..1; .*scale: {guess}"):
            check_remission(scan_on_the_ground(remission=top), "here")
    with pytest.raises(InputError, match="remission_scale: 65535"):  # divided by 255 already
        check_remission(scan_on_the_ground(remission=60000 / 255), "here", 255)
    with pytest.raises(InputError, match=r"the remission runs from -.*is that field the remission"):
        check_remission(-scan_on_the_ground(), "here")


def test_a_stream_needs_no_pydantic():
    """Which is for files alone: a robot's Python may lack it."""
    program = "import sys; sys.modules['pydantic'] = None; import kdmos.stream"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
