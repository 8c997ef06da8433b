"""The stream as a robot uses it: the labels of the offline run, late by the look-ahead, whatever comes in."""

import gc
import re
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmos.data.labels import to_raw
from kdmos.data.profile import SensorProfile
from kdmos.data.semantic_kitti import Sequence, find_sequences
from kdmos.data.synthetic.lidar import load_sensor
from kdmos.errors import InputError
from kdmos.inference import prepared
from kdmos.models import Rule, build_student, load_model, load_student, save_model
from kdmos.odometry import Odometry
from kdmos.predict import predict_sequence
from kdmos.settings import MotionSettings, PolarGrid
from kdmos.stream import BackgroundStream, MosStream
from kdmos.synth import SynthSettings, synthesize

GRID = PolarGrid(bins=(48, 32, 8))
FORMS = [MotionSettings(lookahead=lookahead) for lookahead in range(8)] + [MotionSettings("causal")]


@pytest.fixture(scope="module")
def sequence(tmp_path_factory, write_sequence) -> Sequence:
    """The goldens' 14 synthetic scans."""
    (found,) = find_sequences(write_sequence(tmp_path_factory.mktemp("stream") / "00"))
    return found


def student(motion: MotionSettings | None = None):
    torch.manual_seed(0)
    return build_student(grid=GRID, motion=motion).eval()


def push_all(stream: MosStream, sequence: Sequence, stamps: bool = False) -> list:
    results = [
        stream.push(sequence.read_points(frame), pose, 0.1 * frame if stamps else None)
        for frame, pose in zip(sequence.frames, sequence.poses())
    ]
    return [result for result in results if result is not None]


def assert_as_offline(results: list, model, sequence: Sequence) -> None:
    """Labels and probabilities bit by bit those that `predict` writes."""
    assert [result.scan_id for result in results] == list(range(len(sequence.frames)))
    for result, (frame, offline) in zip(results, predict_sequence(model, sequence), strict=True):
        labels = to_raw(offline.predicted, model.classes, 2, model.moving)
        assert result.labels.dtype == np.uint32 and np.array_equal(result.labels, labels), frame
        assert result.moving_probability.dtype == np.float32
        assert np.array_equal(result.moving_probability, offline.moving_probability), frame


@pytest.mark.parametrize("motion", FORMS, ids=lambda motion: f"{motion.form}-{motion.lookahead}")
def test_the_stream_says_what_predict_writes(sequence, motion, one_thread):
    model = prepared(student(motion))
    stream, scans = MosStream(model), len(sequence.frames)
    results = push_all(stream, sequence)
    assert len(results) == scans - motion.lookahead == scans - stream.lookahead
    assert {result.late_by for result in results} == {motion.lookahead}
    results += stream.flush()
    assert [result.late_by for result in results[scans - motion.lookahead :]] == list(range(motion.lookahead))[::-1]
    assert_as_offline(results, model, sequence)
    assert not any(result.notes for result in results)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_shipped_student_on_real_scans(realdata, precision):
    (drive,) = find_sequences(realdata("kitti-raw-0005-a"))
    drive = Sequence(drive.name, drive.folder, drive.frames[:10])
    stream = MosStream("synthetic", precision=precision)
    assert "synthetic-now answers at once" in stream.about
    assert MosStream(Path("synthetic")).about == stream.about
    results = push_all(stream, drive) + stream.flush()
    assert_as_offline(results, prepared(load_model("synthetic"), precision), drive)


def test_a_second_sequence_after_flush_or_reset(sequence, one_thread):
    model = prepared(student())
    stream = MosStream(model)
    push_all(stream, sequence)
    stream.flush()
    stream.push(sequence.read_points(3), np.eye(4))
    stream.reset()  # in the middle of one
    results = push_all(stream, sequence, stamps=True)
    assert [result.stamp for result in results] == [0.1 * frame for frame in sequence.frames[:7]]
    assert_as_offline(results + stream.flush(), model, sequence)


def test_the_rule_and_a_checkpoint_file(sequence, tmp_path, one_thread):
    stream = MosStream("rule")
    assert_as_offline(push_all(stream, sequence) + stream.flush(), Rule().eval(), sequence)
    save_model(tmp_path / "student.safetensors", student())
    stream = MosStream(tmp_path / "student.safetensors", classes=4)
    offline = prepared(load_student(tmp_path / "student.safetensors"))
    results = push_all(stream, sequence) + stream.flush()
    for result, (_, expected) in zip(results, predict_sequence(offline, sequence)):
        assert np.array_equal(result.labels, to_raw(expected.predicted, offline.classes, 4))


def test_another_look_ahead_or_form_is_refused(tmp_path):
    save_model(tmp_path / "student.safetensors", student(MotionSettings(lookahead=2)))
    assert MosStream(tmp_path / "student.safetensors", lookahead=2, form="published").lookahead == 2
    with pytest.raises(InputError, match="look-ahead of 2 scans, not 0"):
        MosStream(tmp_path / "student.safetensors", lookahead=0)
    with pytest.raises(InputError, match="trained with form published, not causal"):
        MosStream(tmp_path / "student.safetensors", form="causal")
    with pytest.raises(InputError, match="trained with look-ahead 7, not 3"):
        MosStream(student(), lookahead=3)
    with pytest.raises(InputError, match="--precision int8"):
        MosStream("rule", precision="int8")
    with pytest.raises(InputError, match="written classes"):
        MosStream("rule", classes=3)


# --- what a sensor sends


def now(motion=None) -> MosStream:
    """A stream that answers at once."""
    return MosStream(student(motion or MotionSettings(lookahead=0)))


def drawn(n: int = 500, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    low, high = np.array([-30, -30, -1.7, 0]), np.array([30, 30, 1, 1])
    points = low + (high - low) * random.random((n, 4))
    points[: 3 * n // 4, 2] = -1.73  # a road
    return points.astype(np.float32)


UNUSABLE = {
    "five columns": (np.zeros((50, 5), np.float32), r"expected points \[n, 4\] = x, y, z, remission, got \[50, 5\]"),
    "no remission": (np.zeros((50, 3), np.float32), r"got \[50, 3\]"),
    "flat": (np.zeros(200, np.float32), r"got \[200\]"),
    "empty": (np.zeros((0, 4), np.float32), "the scan is empty"),
    "nothing finite": (np.full((50, 4), np.nan, np.float32), "none of its 50 points can be used"),
    "remission in bytes": (drawn() * [1, 1, 1, 255], "4th column runs from .* expected remission"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_scan_that_cannot_be_used_is_answered_and_the_stream_goes_on(sequence, kind, one_thread):
    points, reason = UNUSABLE[kind]
    model = prepared(student())
    stream, poses = MosStream(model), sequence.poses()
    results = []
    for frame, pose in zip(sequence.frames, poses):
        results.append(stream.push(points if frame == 5 else sequence.read_points(frame), pose))
    results = [result for result in results if result] + stream.flush()
    (note,) = results[5].notes
    assert re.search(reason, note)
    assert len(results[5].labels) == len(points) == len(results[5].moving_probability)
    assert (results[5].labels == 9).all() and not results[5].moving_probability.any()

    class Lost(Sequence):
        def read_points(self, frame):
            if frame == 5:
                raise InputError("lost")
            return super().read_points(frame)

    offline = predict_sequence(model, Lost(sequence.name, sequence.folder, sequence.frames))
    for result, (frame, expected) in zip(results, offline):
        if frame != 5:
            assert np.array_equal(result.moving_probability, expected.moving_probability), frame


def test_single_points_that_are_not_finite(sequence, one_thread):
    points = sequence.read_points(0).copy()
    clean = now().push(points[2:], np.eye(4))
    points[0, 3], points[1, 0] = np.nan, np.inf
    result = now().push(points, np.eye(4))
    assert result.notes == (f"2 of its {len(points)} points are not finite and are labelled 9",)
    assert (result.labels[:2] == 9).all() and not result.moving_probability[:2].any()
    assert np.array_equal(result.moving_probability[2:], clean.moving_probability)


def test_late_and_repeated_scans_take_no_part(sequence, one_thread):
    stream, results = now(), []
    for frame, pose in zip(sequence.frames, sequence.poses()):
        results.append(stream.push(sequence.read_points(frame), pose, 10 + 0.1 * frame))
        if frame == 4:
            repeated = stream.push(drawn(), pose, 10 + 0.1 * frame)
            late = stream.push(drawn(70), pose, 9.5)
    assert "repeats that of the scan before it" in repeated.notes[0] and repeated.late_by == 0
    assert late.notes == ("the stamp 9.500 s is 0.900 s before the last one: the scan takes no part",)
    assert len(late.labels) == 70 and (late.labels == 9).all()
    assert [result.scan_id for result in results] == [0, 1, 2, 3, 4, *range(7, 16)]
    assert not any(result.notes for result in results)
    plain = push_all(now(), sequence)
    assert all(np.array_equal(a.moving_probability, b.moving_probability) for a, b in zip(results, plain))


def test_late_scans_do_not_make_the_others_later(sequence, one_thread):
    stream = MosStream(student(MotionSettings(lookahead=3)))
    for frame, pose in zip(sequence.frames, sequence.poses()):
        result = stream.push(sequence.read_points(frame), pose, 0.1 * frame)
        if frame >= 3:
            assert result.late_by == 3 + 2 * 3 and result.scan_id == 3 * (frame - 3)
        assert stream.push(drawn(), pose, 0.1 * frame).late_by == 0
        assert stream.push(drawn(), pose, 0.0).late_by == 0


@pytest.mark.parametrize("before, after", [([], 0.0), ([1e9], 100.8)], ids=["set back", "one stamp far ahead"])
def test_a_clock_that_was_set_does_not_silence_the_stream(one_thread, before, after):
    stream = now()
    stamps = [100 + 0.1 * i for i in range(8)] + before + [after + 0.1 * i for i in range(7)]
    results = [stream.push(drawn(), np.eye(4), stamp) for stamp in stamps]
    *late, back, second, last = results[-7:]
    assert all("takes no part" in result.notes[0] for result in late) and len(late) == 4
    assert "clock seems to have been set back" in back.notes[0] and not second.notes and not last.notes
    assert back.moving_probability.any() and last.moving_probability.any()
    jumbled = [stream.push(drawn(), np.eye(4), stamp).notes[0] for stamp in (0.4, 0.2, 0.3, 0.1, 0.2, 0.1, 0.3, 0.2)]
    assert all("takes no part" in note for note in jumbled)


def test_gaps_and_stamps_that_are_no_time(one_thread):
    stream = now()
    stamps = [0.1 * i for i in range(8)] + [1.1, 1.2, float("nan"), 1.3]
    notes = [stream.push(drawn(), np.eye(4), stamp).notes for stamp in stamps]
    assert notes[8] == ("0.400 s since the scan before it, where 0.100 s are usual",)
    assert notes[10] == ("the stamp nan is taken as unknown",)
    assert not any(notes[:8]) and not notes[9] and not notes[11]


def test_a_pose_jump_begins_anew(sequence, one_thread):
    model, poses = student(MotionSettings(lookahead=3)), sequence.poses().copy()
    poses[6:, 0, 3] += 100
    stream, results = MosStream(model), []
    for frame, pose in zip(sequence.frames, poses):
        result = stream.push(sequence.read_points(frame), pose)
        assert (result is None) == (frame < 3)  # still one result a scan
        results += [result] if result else []
    results += stream.flush()
    assert [result.scan_id for result in results] == list(range(14))
    (note,) = results[6].notes
    assert note.startswith("the pose jumps by 10") and not any(r.notes for i, r in enumerate(results) if i != 6)
    before, after = MosStream(model), MosStream(model)
    parts = [(before, range(6)), (after, range(6, 14))]
    expected = []
    for part, frames in parts:
        found = [part.push(sequence.read_points(frame), poses[frame]) for frame in frames]
        expected += [result for result in found if result] + part.flush()
    for result, alone in zip(results, expected, strict=True):
        assert np.array_equal(result.moving_probability, alone.moving_probability)


def test_a_jump_offline_begins_anew_too(sequence, one_thread):
    class Jumping(Sequence):
        def poses(self):
            poses = super().poses().copy()
            poses[6:, 0, 3] += 100
            return poses

    jumping, model = Jumping(sequence.name, sequence.folder, sequence.frames), prepared(student())
    stream = MosStream(model)
    results = push_all(stream, jumping) + stream.flush()
    with pytest.warns(UserWarning, match="00/000006: the pose jumps by 10"):
        assert_as_offline(results, model, jumping)


def test_poses_that_cannot_be_used(one_thread):
    stream = now()
    assert not stream.push(drawn(), np.eye(4)).notes
    for pose, reason in [
        (None, "it has no pose"),
        (np.full((4, 4), np.nan), "finite numbers"),
        (np.eye(3), "but 3x3"),
        (np.diag([2.0, 2, 2, 1]), "not a rigid transform"),
        (np.eye(4)[[0, 1, 2, 2]], "not a rigid transform"),
    ]:
        result = stream.push(drawn(), pose)
        assert reason in result.notes[0] and (result.labels == 9).all() and len(result.labels) == 500
    far = np.eye(4)
    far[0, 3] = 90  # six scans since the last pose, 20 m each at most
    assert not stream.push(drawn(), far).notes
    assert not stream.push(drawn(), torch.eye(4) + torch.tensor(far - np.eye(4))).notes


def test_poses_of_three_rows_are_those_of_four(sequence, one_thread):
    model = student(MotionSettings(lookahead=0))
    four, three, mixed = MosStream(model), MosStream(model), MosStream(model)
    for frame, pose in zip(sequence.frames, sequence.poses()):
        points = sequence.read_points(frame)
        expected = four.push(points, pose)
        for found in (three.push(points, pose[:3]), mixed.push(points, pose[: 3 + frame % 2])):
            assert found.pose.shape == (4, 4) and np.array_equal(found.moving_probability, expected.moving_probability)


def test_the_callers_arrays_are_copied(sequence, one_thread):
    kept, reused = MosStream(student()), MosStream(student())
    points, pose = np.empty((0, 4), np.float32), np.eye(4)
    buffer = np.empty((max(len(sequence.read_points(frame)) for frame in sequence.frames), 4), np.float32)
    results = []
    for frame, given in zip(sequence.frames, sequence.poses()):
        points = buffer[: len(sequence.read_points(frame))]
        points[:], pose[:] = sequence.read_points(frame), given
        results.append(reused.push(points, pose))
    results = [result for result in results if result] + reused.flush()
    for result, expected in zip(results, push_all(kept, sequence) + kept.flush(), strict=True):
        assert np.array_equal(result.moving_probability, expected.moving_probability)
        assert np.array_equal(result.pose, expected.pose)


def test_tensors_and_doubles_are_taken_too(sequence, one_thread):
    points = sequence.read_points(0)
    expected = now().push(points, np.eye(4)).moving_probability
    packed = np.ndarray(points.shape, np.float32, bytearray(18 * len(points)), strides=(18, 4))  # as in ROS messages
    packed[:] = points
    for form in (
        packed,
        np.frombuffer(points.tobytes(), np.float32).reshape(points.shape),  # read-only
        points[::-1].copy()[::-1],
        torch.from_numpy(points),
        points.astype(np.float64),
        points[::1].astype(">f4"),
        np.asfortranarray(points),
    ):
        assert np.array_equal(now().push(form, np.eye(4)).moving_probability, expected)


def test_memory_stays_flat(one_thread):
    stream, seen = MosStream(student(MotionSettings(lookahead=2)), smoothing=5), []
    scans = [drawn(2000, seed) for seed in range(8)]
    for i in range(300):
        stream.push(scans[i % 8], np.eye(4), 0.1 * i)
        if i in (100, 299):
            gc.collect()
            tensors = sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)
            seen.append((tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    assert seen[1][0] == seen[0][0]  # nothing is kept ...
    assert seen[1][1] - seen[0][1] < 4096  # ... and the peak moves by less than 4 MiB, 64 of these scans


def test_odometry_where_no_pose_is_given(tmp_path, one_thread):
    pytest.importorskip("kiss_icp")
    synthesize(tmp_path, SynthSettings(load_sensor("small"), seed=1, sequences=1, scans=6))
    (street,) = find_sequences(tmp_path)
    stream, odometry = now(), Odometry()
    for frame in street.frames:
        points = street.read_points(frame)
        result = stream.push(points, stamp=0.1 * frame)
        assert not result.notes and np.array_equal(result.pose, odometry.push(points, 0.1 * frame))
    assert np.linalg.norm(result.pose[:3, 3]) > 1  # it drove
    result = stream.push(points, np.eye(4), 0.6)
    assert result.notes == ("its pose is not used, because the scans before it came without",)
    assert stream.push(drawn()[:0]).pose is None


def test_a_sensor_profile(sequence, tmp_path, one_thread):
    """A sensor 0.5 m higher, scaled remission, half of the view: as the same points given ready-made."""
    (tmp_path / "sensor.yaml").write_text("{height: 2.23, remission_scale: 100, field_of_view: [-90, 90]}")
    model = student(MotionSettings(lookahead=0))
    plain, profiled = MosStream(model), MosStream(model, sensor=tmp_path / "sensor.yaml")
    for frame, pose in zip(sequence.frames, sequence.poses()):
        points = sequence.read_points(frame)
        ahead = np.abs(np.arctan2(points[:, 1], points[:, 0])) <= np.pi / 2
        given = points * np.array([1, 1, 1, 100], np.float32) - np.array([0, 0, 0.5, 0], np.float32)
        result, expected = profiled.push(given, pose), plain.push(points[ahead], pose)
        assert not result.notes and np.array_equal(result.pose, pose)
        assert not result.moving_probability[~ahead].any() and (result.labels[~ahead] == 9).all()
        # the shift back and forth costs the last digits of z: a point on a border may change its cell
        close = np.isclose(result.moving_probability[ahead], expected.moving_probability, atol=1e-3)
        assert close.mean() > 0.99
    behind = given[given[:, 0] < -1]
    assert profiled.push(behind, pose).notes == (f"none of its {len(behind)} points can be used: it is left out",)
    assert "expected remission" in MosStream(model, sensor=SensorProfile(height=2.0)).push(given, pose).notes[0]


def test_a_first_scan_unlike_the_training_is_noted(one_thread):
    points = drawn(5000) * [1, 1, 1, 0.01]
    points[:, 2] += 1.2  # a sensor at knee height, without remission to speak of
    stream = now()
    first, second = (stream.push(points, np.eye(4)) for _ in range(2))
    assert not second.notes and len(first.notes) == 1
    assert "the ground seems to lie 0.5 m below" in first.notes[0] and "the remission hardly exceeds" in first.notes[0]


def test_timed(one_thread):
    stream = MosStream(student(MotionSettings(lookahead=0)), timed=True)
    result = stream.push(drawn(), np.eye(4))
    assert set(result.seconds) == {"input", "odometry", "residual", "network", "labels"}
    assert all(0 <= seconds < 60 for seconds in result.seconds.values())
    assert now().push(drawn(), np.eye(4)).seconds is None


# --- two threads


def test_results_in_another_thread(sequence, one_thread):
    model = prepared(student())
    background, results = BackgroundStream(MosStream(model), drop=False), []
    consumer = threading.Thread(target=lambda: results.extend(background.results()))
    consumer.start()
    for frame, pose in zip(sequence.frames, sequence.poses()):
        points = sequence.read_points(frame)
        background.put(points, pose, 0.1 * frame)
        points[:] = 0  # the sensor's buffer is used again
    background.close()
    consumer.join(60)
    assert_as_offline(results, model, sequence)
    again = threading.Thread(target=lambda: results.extend(background.results()), daemon=True)
    again.start()
    again.join(10)
    assert not again.is_alive() and len(results) == len(sequence.frames)  # nobody waits for what is over
    with pytest.raises(RuntimeError, match="takes no more scans"):
        background.put(drawn())


def test_a_busy_stream_skips_the_oldest(monkeypatch, one_thread):
    stream, started, go_on = now(), threading.Event(), threading.Event()
    push = stream.push

    def slow(*scan):
        started.set()
        assert go_on.wait(60)
        return push(*scan)

    monkeypatch.setattr(stream, "push", slow)
    background = BackgroundStream(stream, waiting=2)
    background.put(drawn(10), np.eye(4))
    assert started.wait(60)
    for n in range(11, 16):
        background.put(drawn(n), np.eye(4))
    go_on.set()
    background.close()
    results = list(background.results())
    assert [(len(result.labels), result.scan_id) for result in results] == [(10, 0), (14, 4), (15, 5)]
    assert results[1].notes == ("3 scans before it were skipped",)


def test_what_ends_the_thread_reaches_the_results(monkeypatch):
    stream = now()

    def broken(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(stream, "push", broken)
    background = BackgroundStream(stream)
    background.put(drawn())
    for _ in range(2):
        with pytest.raises(MemoryError):
            list(background.results())
    with pytest.raises(RuntimeError):
        background.put(drawn())


# --- smoothing; the filter itself: test_smoothing.py


def test_a_smoothed_stream(sequence, one_thread):
    plain, smooth = now(), MosStream(student(MotionSettings(lookahead=0)), smoothing=4, classes=4)
    for frame, pose in zip(sequence.frames, sequence.poses()):
        points = sequence.read_points(frame)
        a, b = plain.push(points, pose), smooth.push(points, pose)
        assert np.array_equal(b.labels == 251, b.moving_probability > 0.5)
    assert not np.allclose(a.moving_probability, b.moving_probability)
