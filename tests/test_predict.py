"""Prediction as a user runs it: one label per point comes back, bad scans are listed, an interrupted run goes on."""

import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from kdmos import predict
from kdmos.data.semantic_kitti import find_sequences
from kdmos.errors import InputError
from kdmos.models import Student, build_student, load_student, save_model
from kdmos.motion import motion_channels
from kdmos.settings import MotionSettings, PolarGrid, StudentSettings

GRID = PolarGrid(bins=(48, 32, 8))


@pytest.fixture
def data(tmp_path, write_sequence):
    return write_sequence(tmp_path / "00", frames=10)


def student_file(path, motion=None, **settings):
    torch.manual_seed(0)
    student = build_student(grid=GRID, motion=motion, **settings).eval()
    save_model(path, student)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return student_file(tmp_path / "student.safetensors")


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        predict.main([str(argument) for argument in arguments])
    return stop.value.code


def labels(output, frame, name="00"):
    return np.fromfile(output / "sequences" / name / "predictions" / f"{frame:06d}.label", np.uint32)


@pytest.mark.parametrize("motion", [MotionSettings(), MotionSettings(lookahead=2), MotionSettings("causal")])
def test_labels_are_those_of_the_student_on_the_whole_sequence(data, tmp_path, motion):
    checkpoint = student_file(tmp_path / "student.safetensors", motion)
    output = tmp_path / "out"
    assert run(data, "--checkpoint", checkpoint, "--output", output, "--scores", "--classes", 4, "--zip") == 0
    (sequence,) = find_sequences(data)
    scans = [torch.from_numpy(sequence.read_points(frame)) for frame in sequence.frames]
    residuals = motion_channels(scans, sequence.poses(), 8, motion.lookahead, motion.form)
    student = load_student(checkpoint)
    for frame, points, residual in zip(sequence.frames, scans, residuals):
        with torch.no_grad():
            (logits,) = student.point_logits([points], [residual])
        raw = np.array([9, 9, 250, 251])[logits.argmax(1)]
        np.testing.assert_array_equal(labels(output, frame), raw)
        path = output / "sequences" / "00" / "predictions" / f"{frame:06d}.score"
        probability = logits.softmax(1)[:, 3].numpy().astype(np.float16)
        np.testing.assert_array_equal(np.fromfile(path, np.float16), probability)
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == [f"sequences/00/predictions/{frame:06d}.label" for frame in range(10)]


def test_an_interrupted_run_goes_on_and_other_predictions_are_not_mixed(data, checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    run(data, "--checkpoint", checkpoint, "--output", output)
    whole = [labels(output, frame) for frame in range(10)]
    folder = output / "sequences" / "00" / "predictions"
    for frame in (3, 4, 9):
        (folder / f"{frame:06d}.label").unlink()
    (folder / "000005.label").write_bytes(b"cut")
    kept = (folder / "000006.label").stat().st_mtime_ns
    assert run(data, "--checkpoint", checkpoint, "--output", output) == 0
    for frame in range(10):
        np.testing.assert_array_equal(labels(output, frame), whole[frame])
    assert (folder / "000006.label").stat().st_mtime_ns == kept
    other = student_file(tmp_path / "other.safetensors", name="motionbev")
    assert run(data, "--checkpoint", other, "--output", output) == 2
    assert "holds predictions with another checkpoint" in capsys.readouterr().err


def test_labels_of_unknown_origin_are_not_taken_for_ours(data, checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(data, "--checkpoint", "rule", "--output", output) == 0
    (output / "predict.json").write_text("[]")
    assert run(data, "--checkpoint", "rule", "--output", output) == 2
    assert "not a JSON object" in capsys.readouterr().err
    (output / "predict.json").unlink()
    assert run(data, "--checkpoint", checkpoint, "--output", output) == 2
    assert "do not say how they were made" in capsys.readouterr().err


def test_any_class_names_will_do_if_one_is_said_to_move(data, tmp_path):
    torch.manual_seed(0)
    student = Student(StudentSettings(classes=("mover", "still"), moving=0, grid=GRID)).eval()
    save_model(tmp_path / "student.safetensors", student)
    assert run(data, "--checkpoint", tmp_path / "student.safetensors", "--output", tmp_path / "out") == 0
    (sequence,) = find_sequences(data)
    scans = [torch.from_numpy(sequence.read_points(frame)) for frame in sequence.frames]
    with torch.no_grad():
        (logits,) = student.point_logits(scans[5:6], motion_channels(scans, sequence.poses())[5:6])
    np.testing.assert_array_equal(labels(tmp_path / "out", 5) == 251, (logits.argmax(1) == 0).numpy())


def test_a_bad_scan_is_listed_and_the_rest_goes_on(data, checkpoint, tmp_path, capsys):
    (data / "velodyne" / "000004.bin").write_bytes(b"short")
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "9 scans labelled" in captured.out
    assert "not labelled: 00/000004" in captured.err
    assert len(list((tmp_path / "out" / "sequences" / "00" / "predictions").iterdir())) == 9


def test_non_finite_points_are_labelled_9_and_counted(data, checkpoint, tmp_path):
    path = data / "velodyne" / "000008.bin"
    points = np.fromfile(path, np.float32).reshape(-1, 4)
    points[10:13, 1] = np.nan
    points.tofile(path)
    with pytest.warns(UserWarning, match="3 non-finite points were labelled 9"):
        assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 0
    written = labels(tmp_path / "out", 8)
    assert len(written) == len(points)
    assert (written[10:13] == 9).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--classes", "3"], "--classes 3"),
        (["--lookahead", "0"], "was trained with a look-ahead of 7 scans, not 0"),
        (["--lookahead", "9", "--force"], "lookahead must lie in 0..7"),
        (["--device", "nonsense"], "--device nonsense: not usable"),
        (["--sequences", "55"], "no sequence 55"),
        (["--split", "test", "--sequences", "11"], "exclude each other"),
        (["--bogus"], "No such option"),
    ],
)
def test_what_cannot_be_done_is_one_line(data, checkpoint, tmp_path, capsys, change, message):
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "out", *change) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_missing_poses_and_checkpoints(data, checkpoint, tmp_path, capsys):
    assert run(data, "--checkpoint", tmp_path / "none.pt") == 2
    assert "no such checkpoint" in capsys.readouterr().err
    (data / "poses.txt").unlink()
    assert run(data, "--checkpoint", checkpoint) == 2
    assert "poses.txt" in capsys.readouterr().err


def test_another_lookahead_can_be_forced(data, checkpoint, tmp_path, capsys):
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--lookahead", 0, "--force") == 0
    assert "look-ahead 0 scans" in capsys.readouterr().out


def test_the_rule_needs_no_weights(data, tmp_path):
    assert run(data, "--checkpoint", "rule", "--output", tmp_path / "out") == 0
    (sequence,) = find_sequences(data)
    channels = motion_channels([sequence.read_points(f) for f in sequence.frames], sequence.poses())
    for frame in sequence.frames:
        moving = (channels[frame] != 0).sum(1) >= 4
        np.testing.assert_array_equal(labels(tmp_path / "out", frame) == 251, moving)
    with pytest.raises(InputError, match="whole look-ahead"):
        load_student("rule", lookahead=3)


def test_a_full_disk_keeps_what_is_written(data, checkpoint, tmp_path, monkeypatch, capsys):
    write, calls = predict.write_atomic, []

    def full(path, content, **options):
        calls.append(path)
        if len(calls) > 4:
            raise InputError(f"{path}: cannot be written: No space left on device")
        write(path, content, **options)

    monkeypatch.setattr(predict, "write_atomic", full)
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 2
    assert "No space left" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "sequences" / "00" / "predictions").glob("*.label"))) == 3


@pytest.mark.parametrize("name", ["kitti-raw-0005-a", "kitti-odometry-00"])
def test_the_authors_weights_label_every_point_of_a_real_drive(name, realdata, golden, tmp_path):
    """The published four-class layout on the published grid; the golden's weights are random: only the form counts."""
    source = realdata(name)
    weights = golden("student_state_dict.pt")
    command = [sys.executable, "-m", "kdmos.predict", source, "--checkpoint", weights, "--output", tmp_path / "out"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sequence,) = find_sequences(source)
    for frame in sequence.frames:
        written = labels(tmp_path / "out", frame, name)
        assert len(written) == len(sequence.read_points(frame))
        assert set(np.unique(written)) <= {9, 251}


def test_odd_files_are_refused_or_taken(realdata, golden, tmp_path, capsys):
    """One folder of the odd files as scans: two of the four-column ones are labelled, the others listed."""
    folder = tmp_path / "odd" / "velodyne"
    folder.mkdir(parents=True)
    names = ["semantickitti-50pts", "kitti-fov-000008", "nuscenes-5col", "kitti-xyz-000000", "kitti-xyz-000001"]
    for frame, name in enumerate(names):
        shutil.copy(realdata(f"odd-formats/{name}.bin"), folder / f"{frame:06d}.bin")
    (folder.parent / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n" * len(names))
    (folder.parent / "calib.txt").write_text("Tr: 1 0 0 0 0 1 0 0 0 0 1 0\n")
    weights = student_file(tmp_path / "student.safetensors")
    assert run(folder.parent, "--checkpoint", weights, "--output", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "2 scans labelled" in captured.out
    listed = [line for line in captured.err.splitlines() if line.startswith("not labelled")]
    assert len(listed) == 3
    assert "likely has 5 columns" in listed[0]
    assert "likely has 3 columns" in listed[1] and "likely has 3 columns" in listed[2]
    assert len(labels(tmp_path / "out", 0, "odd")) == 50
    assert len(labels(tmp_path / "out", 1, "odd")) == 17238
