"""Caching a teacher as a user does: the store holds its logits, an interrupted run goes on, what is wrong is said."""

import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kdmos import teach, train
from kdmos.config import load_config
from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.teacher_logits import TeacherLogits
from kdmos.inference import ScanLogits, prepared, sequence_logits
from kdmos.losses import DISTILLATION
from kdmos.models import build_student, load_student, save_model
from kdmos.motion import motion_channels
from kdmos.settings import MotionSettings, PolarGrid

GRID = PolarGrid(bins=(24, 16, 4))
FRAMES = 10


@pytest.fixture
def data(tmp_path, write_sequence):
    return write_sequence(tmp_path / "00", frames=FRAMES)


def student_file(path, seed=0, **settings):
    torch.manual_seed(seed)
    save_model(path, build_student(grid=GRID, **settings).eval())
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return student_file(tmp_path / "teacher.safetensors")


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        teach.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_sequence):
    """A sequence, a teacher and the whole store, made once."""
    folder = tmp_path_factory.mktemp("made")
    write_sequence(folder / "00", frames=FRAMES)
    student_file(folder / "teacher.safetensors")
    assert run(folder / "00", "--checkpoint", folder / "teacher.safetensors", "--output", folder / "logits") == 0
    return folder


@pytest.fixture
def cached(made, tmp_path, data, checkpoint):
    """A whole store; its command, to be run again; and what its files hold."""
    shutil.copytree(made / "logits", tmp_path / "logits")
    command = [data, "--checkpoint", checkpoint, "--output", tmp_path / "logits"]
    return Cached(find_sequences(data)[0], command, TeacherLogits(tmp_path / "logits", "kdmos"))


def content(path):
    """Header and logits of a file; its bytes may differ, for safetensors orders the header at will."""
    with safe_open(path, framework="np") as file:
        return file.metadata(), file.get_tensor("logits").tobytes()


class Cached:
    def __init__(self, sequence, command, store):
        self.sequence, self.command, self.store = sequence, command, store
        self.before = {frame: self.path(frame).read_bytes() for frame in sequence.frames}
        self.content = {frame: content(self.path(frame)) for frame in sequence.frames}
        self.times = {frame: self.path(frame).stat().st_mtime_ns for frame in sequence.frames}

    def path(self, frame):
        return self.store.path(self.sequence.scan(frame))

    def rewritten(self):
        """Frames whose file is not the one of the first run."""
        return [frame for frame, time in self.times.items() if self.path(frame).stat().st_mtime_ns != time]

    def whole(self):
        """Whether each file holds what it held."""
        return self.content == {frame: content(self.path(frame)) for frame in self.content}


# --- what is stored


@pytest.mark.parametrize("motion", [MotionSettings(), MotionSettings(lookahead=2), MotionSettings("causal")])
def test_the_store_holds_the_logits_of_the_student_on_the_whole_sequence(data, tmp_path, motion):
    checkpoint = student_file(tmp_path / "teacher.safetensors", motion=motion)
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "logits", "--name", "mine") == 0
    (sequence,) = find_sequences(data)
    scans = [torch.from_numpy(sequence.read_points(frame)) for frame in sequence.frames]
    residuals = motion_channels(scans, sequence.poses(), 8, motion.lookahead, motion.form)
    student, store = prepared(load_student(checkpoint)), TeacherLogits(tmp_path / "logits", "mine")
    for frame, points, residual in zip(sequence.frames, scans, residuals):
        logits = student(points, torch.tensor([0, len(points)]), residual).point_logits
        found = store.read(sequence.scan(frame), sequence.points_path(frame), len(points), 4)
        np.testing.assert_array_equal(found, logits.numpy().astype(np.float16))


def test_every_file_says_which_teacher_it_is_from(cached, checkpoint):
    header = cached.store.verify(cached.sequence.scan(4), cached.sequence.points_path(4))
    assert header["teacher"] == "kdmos"
    settings = header["settings"]
    assert settings.pop("window")
    assert settings == teach.teacher_settings(load_student(checkpoint), checkpoint)
    assert settings["model"] == "kdmos" and settings["classes"][settings["moving"]] == "moving"
    assert settings["grid"]["bins"] == [24, 16, 4]
    assert (settings["motion"]["form"], settings["motion"]["lookahead"]) == ("published", 7)


def test_non_finite_points_get_zeros_and_are_counted(data, checkpoint, tmp_path):
    path = data / "velodyne" / "000008.bin"
    points = np.fromfile(path, np.float32).reshape(-1, 4)
    points[10:13, 1] = np.nan
    points.tofile(path)
    with pytest.warns(UserWarning, match="3 non-finite points got logits of 0"):
        assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "logits") == 0
    (sequence,) = find_sequences(data)
    logits = TeacherLogits(tmp_path / "logits", "kdmos").read(sequence.scan(8), path, len(points), 4)
    assert (logits[10:13] == 0).all()
    assert (np.delete(logits, range(10, 13), 0) != 0).any(1).all()


@pytest.mark.parametrize("name", ["rule", "two"])
def test_two_classes_are_cached_and_the_losses_for_them_named(data, tmp_path, name):
    checkpoint = "rule" if name == "rule" else student_file(tmp_path / "two.safetensors", num_classes=2)
    with pytest.warns(UserWarning, match="of the losses, kd and ofa can learn from it"):
        assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "logits", "--name", name) == 0
    (sequence,) = find_sequences(data)
    path = sequence.points_path(0)
    store = TeacherLogits(tmp_path / "logits", name)
    logits = torch.from_numpy(store.read(sequence.scan(0), path, len(sequence.read_points(0)), 2)).float()
    learn = []
    for loss, kind in DISTILLATION.items():
        try:
            assert kind(ignore_index=-100)(logits, logits, torch.ones(len(logits), dtype=torch.int64)).isfinite()
            learn.append(loss)
        except ValueError:
            pass
    assert learn == ["kd", "ofa"]


def test_the_rule_is_named_so(data, tmp_path):
    assert run(data, "--checkpoint", "rule", "--output", tmp_path / "logits") == 0
    assert len(list((tmp_path / "logits" / "rule" / "00").iterdir())) == FRAMES


# --- going on


def test_what_is_there_is_not_computed_again(cached, capsys, monkeypatch):
    monkeypatch.setattr(teach, "sequence_logits", None)  # would raise
    assert run(*cached.command) == 0
    assert "0 scans computed, 10 were there" in capsys.readouterr().out
    assert cached.rewritten() == []


def test_missing_damaged_and_foreign_files_are_computed_again(cached, capsys):
    damaged = bytearray(cached.before[5])
    damaged[-3] ^= 1
    cached.path(3).unlink()
    cached.path(4).write_bytes(cached.before[4][:-10])
    cached.path(5).write_bytes(damaged)
    cached.path(6).write_bytes(cached.before[7])
    cached.path(7).write_bytes(b"")
    with pytest.warns(
        UserWarning, match=r"4 of the files there do not fit .*: .*000004\.safetensors: cut short"
    ) as said:
        assert run(*cached.command) == 0
    assert "cache the teacher's logits again" not in str(said[0].message)  # that is what is being done
    assert "5 scans computed, 5 were there" in capsys.readouterr().out
    assert cached.rewritten() == [3, 4, 5, 6, 7]
    assert cached.whole()
    assert run(*cached.command, "--verify") == 0


KILLED = """
import os, signal, sys
from kdmos import checkpoint, teach

replace, left = os.replace, [4]

def dies(*arguments):
    left[0] -= 1
    if left[0] == 0:  # the fourth file is written, but not yet under its name
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)

checkpoint.os.replace = dies
teach.main()
"""


def test_killed_and_started_again(data, checkpoint, tmp_path, cached, capsys):
    command = [data, "--checkpoint", checkpoint, "--output", tmp_path / "killed"]
    process = [sys.executable, "-c", KILLED, *map(str, command)]
    dead = subprocess.run(process, capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert len(list((tmp_path / "killed" / "kdmos" / "00").glob("*.safetensors"))) == 3
    assert run(*command, "--verify") == 1
    capsys.readouterr()
    assert run(*command) == 0
    assert "7 scans computed, 3 were there" in capsys.readouterr().out
    assert run(*command, "--verify") == 0
    for frame, before in cached.content.items():
        assert content(tmp_path / "killed" / "kdmos" / "00" / f"{frame:06d}.safetensors") == before


def test_other_poses_and_a_longer_recording_are_noticed(cached, data, write_sequence, tmp_path, capsys):
    rows = (data / "poses.txt").read_text().splitlines()
    numbers = rows[9].split()
    rows[9] = " ".join([*numbers[:3], str(float(numbers[3]) + 0.5), *numbers[4:]])
    (data / "poses.txt").write_text("\n".join(rows))
    assert run(*cached.command, "--verify") == 1
    faults = capsys.readouterr().out.splitlines()
    assert len(faults) == 9  # scans 2..9 look at scan 9; the last line is the summary
    assert all("logits from other poses or neighbouring scans" in fault for fault in faults[:-1])
    with pytest.warns(UserWarning, match="8 of the files there do not fit"):
        assert run(*cached.command) == 0
    assert cached.rewritten() == list(range(2, 10))
    longer = write_sequence(tmp_path / "longer" / "00", frames=12)
    (longer / "poses.txt").write_text("\n".join(rows))
    with pytest.warns(UserWarning, match="7 of the files there do not fit"):  # whose look-ahead had ended early
        assert run(longer, *cached.command[1:]) == 0
    assert "9 scans computed, 3 were there" in capsys.readouterr().out


@pytest.mark.parametrize("motion", [MotionSettings(), MotionSettings(lookahead=2), MotionSettings("causal")])
def test_a_part_of_a_sequence_is_that_part_of_the_whole(write_sequence, tmp_path, motion):
    (sequence,) = find_sequences(write_sequence(tmp_path / "00", frames=14))
    torch.manual_seed(0)
    student = build_student(grid=GRID, motion=motion).eval()
    whole = dict(sequence_logits(student, sequence))
    for wanted in ({0}, {9}, {2, 12}, set()):
        part = list(sequence_logits(student, sequence, skip=frozenset(sequence.frames) - wanted))
        assert [frame for frame, _ in part] == list(sequence.frames)
        assert {frame for frame, scan in part if isinstance(scan, ScanLogits)} == wanted
        assert all(torch.equal(scan.logits, whole[frame].logits) for frame, scan in part if frame in wanted)


# --- what is refused, what is listed


def test_another_teacher_under_the_same_name_is_refused(cached, data, tmp_path, monkeypatch, capsys):
    other = student_file(tmp_path / "other.safetensors", seed=1)
    cached.path(2).unlink()  # there would be something to do
    monkeypatch.setattr(teach, "sequence_logits", None)  # would raise
    command = [data, "--checkpoint", other, "--output", tmp_path / "logits"]
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert "holds logits of another teacher (with another checkpoint); choose another --name" in error
    assert len(error.splitlines()) == 1
    assert run(*cached.command, "--lookahead", 3, "--force") == 2
    assert "(with another motion)" in capsys.readouterr().err
    assert run(*command, "--verify") == 1
    out = capsys.readouterr().out
    assert out.count("logits of another teacher (with another checkpoint)") == 9
    monkeypatch.undo()
    assert run(*command, "--name", "other") == 0
    cached.path(2).write_bytes(cached.before[2])
    assert cached.whole()


def test_another_teacher_of_another_sequence_or_a_renamed_folder_is_refused_too(
    cached, write_sequence, tmp_path, capsys
):
    second = write_sequence(tmp_path / "01", frames=2)
    other = student_file(tmp_path / "other.safetensors", seed=1)
    assert run(second, "--checkpoint", other, "--output", tmp_path / "logits") == 2
    assert "choose another --name" in capsys.readouterr().err
    (tmp_path / "logits" / "kdmos").rename(tmp_path / "logits" / "renamed")
    assert run(*cached.command, "--name", "renamed") == 2
    assert "holds logits of a teacher named 'kdmos'" in capsys.readouterr().err


def test_verify_finds_what_is_wrong_and_changes_nothing(cached, data, capsys):
    command = [data, "--output", cached.store.root, "--verify"]
    for arguments in ([*cached.command, "--verify"], [*command, "--name", "kdmos"]):
        assert run(*arguments) == 0
        assert "10 of 10 scans have sound logits" in capsys.readouterr().out
    cached.path(3).unlink()
    cached.path(4).write_bytes(cached.before[4][:-10])
    points = np.fromfile(data / "velodyne" / "000006.bin", np.float32)
    points[0] += 1
    points.tofile(data / "velodyne" / "000006.bin")
    for arguments in ([*cached.command, "--verify"], [*command, "--name", "kdmos"]):
        assert run(*arguments) == 1
        *faults, summary = capsys.readouterr().out.splitlines()
        for fault, part in zip(faults, ("000003.safetensors: no logits", "cut short", "logits of another scan")):
            assert part in fault
        assert len(faults) == 3
        assert summary.startswith("7 of 10 scans have sound logits in ") and "3 missing or wrong" in summary
    assert not cached.path(3).exists()
    assert cached.path(4).read_bytes() == cached.before[4][:-10]


def test_verify_without_a_checkpoint_wants_one_teacher(cached, capsys):
    scan, path = cached.sequence.scan(5), cached.sequence.points_path(5)
    logits = cached.store.read(scan, path, len(cached.sequence.read_points(5)), 4)
    cached.store.write(scan, path, logits, {"weights": "v1"})
    assert run(cached.command[0], "--output", cached.store.root, "--name", "kdmos", "--verify") == 1
    fault, _ = capsys.readouterr().out.splitlines()
    assert "000005.safetensors: logits of another teacher" in fault


def test_a_bad_scan_is_listed_and_the_rest_goes_on(data, checkpoint, tmp_path, capsys):
    good = (data / "velodyne" / "000004.bin").read_bytes()
    (data / "velodyne" / "000004.bin").write_bytes(b"short")
    command = [data, "--checkpoint", checkpoint, "--output", tmp_path / "logits"]
    for computed in (9, 0):
        assert run(*command) == 1
        captured = capsys.readouterr()
        assert f"{computed} scans computed, {9 - computed} were there" in captured.out
        assert "no logits: 00/000004: " in captured.err and "truncated" in captured.err
    assert run(*command, "--verify") == 1
    (data / "velodyne" / "000004.bin").write_bytes(good)  # repaired: its neighbours saw it empty
    with pytest.warns(UserWarning, match="9 of the files there do not fit"):
        assert run(*command) == 0
    assert run(*command, "--verify") == 0


def test_logits_that_are_not_finite_stop_the_run(data, tmp_path, capsys):
    torch.manual_seed(0)
    student = build_student(grid=GRID).eval()
    with torch.no_grad():
        next(student.parameters()).fill_(torch.nan)
    save_model(tmp_path / "broken.safetensors", student)
    assert run(data, "--checkpoint", tmp_path / "broken.safetensors", "--output", tmp_path / "logits") == 2
    assert "not finite in float16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--name", "a/b"], "--name 'a/b': expected the name of one folder"),
        (["--name", ".."], "--name '..'"),
        (["--name", ""], "--name ''"),
        (["--lookahead", "0"], "was trained with a look-ahead of 7 scans, not 0"),
        (["--device", "nonsense"], "--device nonsense: not usable"),
        (["--sequences", "55"], "no sequence 55"),
        (["--split", "train", "--sequences", "00"], "exclude each other"),
        (["--checkpoint", "none.pt"], "no such checkpoint"),
    ],
)
def test_what_cannot_be_done_is_one_line(data, checkpoint, tmp_path, capsys, change, message):
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "logits", *change) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_checkpoint_or_poses_that_are_missing(data, checkpoint, capsys):
    for arguments in ([data], [data, "--name", "mine"], [data, "--verify"]):
        assert run(*arguments) == 2
        assert "--checkpoint is missing" in capsys.readouterr().err
    (data / "poses.txt").unlink()
    assert run(data, "--checkpoint", checkpoint) == 2
    assert "poses.txt" in capsys.readouterr().err


def test_a_full_disk_keeps_what_is_written(data, checkpoint, tmp_path, monkeypatch, capsys):
    write, written = TeacherLogits.write, []

    def full(self, scan, *arguments):
        if len(written) == 3:
            monkeypatch.setattr("kdmos.checkpoint.os.replace", no_space)
        written.append(scan)
        return write(self, scan, *arguments)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TeacherLogits, "write", full)
    command = [data, "--checkpoint", checkpoint, "--output", tmp_path / "logits"]
    assert run(*command) == 2
    assert "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(*command) == 0
    assert "7 scans computed, 3 were there" in capsys.readouterr().out


# --- learning from it


def test_a_student_learns_from_the_cached_teacher(cached, data, tmp_path, capsys):
    settings = [f"data.root={data}", "student.grid.bins=[24,16,4]", "data.workers=0", "batch_size=5", "epochs=1"]
    settings += [f"distill.logits={tmp_path / 'logits'}", f"output={tmp_path / 'run'}"]
    module = train.fit(load_config(None, [*settings, "distill.teacher=kdmos"]))
    assert module.trainer.callback_metrics["train/distillation"] > 0
    with pytest.raises(SystemExit):  # a teacher that is not there: the message is the command that makes it
        train.main([*settings, f"output={tmp_path / 'other'}", "distill.teacher=mine"])
    error = capsys.readouterr().err
    assert f"cache them: kdmos teach {data} --checkpoint FILE --output {tmp_path / 'logits'} --name mine" in error
