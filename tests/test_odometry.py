"""Poses from scans alone: near the true ones, repeatable, and going on where a scan is lost."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdmos.data.files import find_files
from kdmos.data.profile import SensorProfile
from kdmos.data.semantic_kitti import MANIFEST, find_sequences
from kdmos.data.source import WithPoses
from kdmos.data.synthetic.lidar import SENSORS
from kdmos.data.synthetic.sequence import SyntheticSequence
from kdmos.export import MadeUpScans
from kdmos.inference import prepared
from kdmos.models import load_model
from kdmos.motion import motion_channels, moving_by_rule
from kdmos.odometry import Odometry, odometry_poses, poses_path, saved_poses, write_poses
from kdmos.predict import predict_sequence

pytest.importorskip("kiss_icp")
SCANS = 8


@pytest.fixture(scope="module")
def drive():
    """A drive around a bend: scans and true poses."""
    sequence = SyntheticSequence(7, 0, SCANS, SENSORS["small"])
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


def test_a_clock_that_jumps_moves_nothing(drive, poses):
    """One stamp far in the future: neither its scan nor the next one is looked for far ahead."""
    odometry = Odometry()
    for frame, (points, stamp) in enumerate(zip(drive[0], [100.0, 100.1, 100.2, 9e9, 9e9 + 0.1])):
        found = odometry.push(points, stamp=stamp)
        assert distance(found, poses[frame]) < 0.1


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


def moving(scans, poses):
    return [moving_by_rule(torch.from_numpy(channels)) for channels in motion_channels(scans, poses)]


def iou(some, others):
    return float(sum((a & b).sum() for a, b in zip(some, others)) / sum((a | b).sum() for a, b in zip(some, others)))


def test_a_real_drive_scan_by_scan(realdata):
    (sequence,) = find_sequences(realdata("kitti-odometry-00"))
    odometry, true = Odometry(), sequence.poses()
    poses = np.stack([odometry.push(sequence.read_points(frame)) for frame in sequence.frames])
    assert distance(poses, np.linalg.inv(true[0]) @ true).max() < 0.1


def test_what_moves_on_a_real_drive_hardly_depends_on_whose_poses(realdata):
    (sequence,) = find_sequences(realdata("kitti-raw-0005-a"))
    poses, true = odometry_poses(sequence), sequence.poses()
    assert distance(poses, np.linalg.inv(true[0]) @ true).max() < 0.1
    scans = [sequence.read_points(frame) for frame in sequence.frames]
    assert iou(moving(scans, poses), moving(scans, true)) >= 0.9


def test_the_rule_is_as_good_with_odometry_as_with_true_poses():
    """Not that it says the same: a centimetre of noise in true poses alone changes a third of what it calls moving."""
    sequence = SyntheticSequence(1, 0, 15, replace(SENSORS["hdl64"], columns=720))
    made = [sequence.scan(frame) for frame in range(15)]
    scans = [scan.points for scan in made]
    truth = [torch.from_numpy((scan.labels & 0xFFFF) > 250) for scan in made]
    odometry = Odometry()
    with_odometry = moving(scans, np.stack([odometry.push(points) for points in scans]))
    assert iou(with_odometry, truth) > 0.95 * iou(moving(scans, sequence.poses()), truth)


def test_what_a_student_calls_moving_hardly_depends_on_whose_poses():
    """Of a street with movers; a student does not hang on centimetres as the rule does."""
    drive, model = MadeUpScans(16), prepared(load_model("synthetic"))
    drive.drive = SyntheticSequence(0, 0, 16, replace(SENSORS["hdl64"], columns=720))
    with_odometry = WithPoses(drive, odometry_poses(drive))
    skip = frozenset(range(0, 16, 2))  # to be quick
    said = [
        [result.predicted == model.moving for _, result in predict_sequence(model, source, skip=skip) if result]
        for source in (drive, with_odometry)
    ]
    assert sum(moving.sum() for moving in said[0]) > 1000
    assert iou(*said) >= 0.9


# ---- poses of a whole source, kept beside the predictions


def test_a_scan_that_cannot_be_read_gets_the_last_motion(tmp_path, drive):
    folder = tmp_path / "drive"
    folder.mkdir()
    for frame, points in enumerate(drive[0]):
        np.save(folder / f"{frame}.npy", points)
    whole = odometry_poses(find_files(folder))
    (folder / "5.npy").write_bytes(b"cut")
    calls = []
    poses = odometry_poses(find_files(folder), advance=lambda: calls.append(0))
    assert len(calls) == SCANS
    np.testing.assert_array_equal(poses[:5], whole[:5])
    np.testing.assert_allclose(poses[5], whole[4] @ np.linalg.inv(whole[3]) @ whole[4], atol=1e-12)
    assert distance(poses, drive[1]).max() < 0.4


def test_missing_frame_numbers_lengthen_the_motion(tmp_path):
    sequence = SyntheticSequence(8, 0, 15, SENSORS["small"])
    frames = (*range(8), 14)  # the sensor drives 7 m over the gap
    for frame in frames:
        np.save(tmp_path / f"{frame}.npy", sequence.scan(frame).points)
    true = np.linalg.inv(sequence.poses()[0]) @ sequence.poses()[list(frames)]
    found = distance(odometry_poses(find_files(tmp_path)), true)
    # the sensor is thin, see above: what it is off after the gap it was off before
    assert found[:-1].max() < 1.0 and abs(found[-1] - found[-2]) < 0.2


def test_points_outside_the_profile_take_no_part(tmp_path, drive):
    rng = np.random.default_rng(0)
    vehicle = np.c_[rng.uniform(-1, 1, (20000, 3)), np.zeros(20000)].astype(np.float32)  # moves with the sensor
    for name, more in (("with", vehicle), ("without", vehicle[:0])):
        (tmp_path / name).mkdir()
        for frame, points in enumerate(drive[0][:5]):
            points = points[np.linalg.norm(points[:, :3], axis=1) > 2]
            np.save(tmp_path / name / f"{frame}.npy", np.concatenate([more, points]))
    with_it = odometry_poses(find_files(tmp_path / "with"), SensorProfile(range=(2, 100), height=1.0))
    np.testing.assert_array_equal(with_it, odometry_poses(find_files(tmp_path / "without")))


def test_written_poses_are_read_to_the_last_bit_by_those_they_belong_to(tmp_path, poses):
    source = SimpleNamespace(name="08", frames=tuple(range(SCANS)))
    write_poses(poses_path(tmp_path, "08"), poses)
    assert poses_path(tmp_path, "08") == tmp_path / "sequences" / "08" / "poses.txt"
    assert saved_poses(tmp_path, "data", source) is None  # nobody said whose they are
    about = {"source": str(Path("data").resolve()), "poses": "odometry"}
    (tmp_path / MANIFEST).write_text(json.dumps(about))
    np.testing.assert_array_equal(saved_poses(tmp_path, "data", source), poses)
    assert saved_poses(tmp_path, "other", source) is None
    assert saved_poses(tmp_path, "data", SimpleNamespace(name="09", frames=source.frames)) is None
    assert saved_poses(tmp_path, "data", SimpleNamespace(name="08", frames=(0, 1))) is None
    (tmp_path / MANIFEST).write_text(json.dumps({**about, "poses": "1234"}))  # of a file
    np.testing.assert_array_equal(saved_poses(tmp_path, "data", source), poses)
    (tmp_path / MANIFEST).write_text(json.dumps({"source": about["source"]}))  # the sequence's own
    assert saved_poses(tmp_path, "data", source) is None
