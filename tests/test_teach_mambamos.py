"""Caching MambaMOS, alone and shared among processes: each scan once, whatever was interrupted; and predicting."""

import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kdmos import predict, teach
from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.teacher_logits import TeacherLogits
from kdmos.inference import prepared, sequence_logits
from kdmos.models import build_student, build_teacher, load_teacher, save_model
from kdmos.models.teacher import Voting
from kdmos.settings import PolarGrid

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 9
SETTINGS = {
    "num_scans": 3,
    "voxel": 0.5,
    "encoder_depths": (1, 1),
    "encoder_channels": (8, 8),
    "decoder_depths": (1,),
    "decoder_channels": (8,),
}


@pytest.fixture(scope="session")
def write_small(write_sequence):
    """write_small(folder) -> folder: every 40th point of the first scans."""

    def write(folder, frames=FRAMES):
        write_sequence(folder, frames)
        for path in (folder / "velodyne").iterdir():
            np.fromfile(path, np.float32).reshape(-1, 4)[::40].tofile(path)
        shutil.rmtree(folder / "labels")
        return folder

    return write


def teacher_file(path, seed=0, **settings):
    torch.manual_seed(seed)
    save_model(path, build_teacher(**SETTINGS | settings).eval())
    return path


@pytest.fixture
def data(tmp_path, write_small):
    return write_small(tmp_path / "00")


@pytest.fixture
def checkpoint(tmp_path):
    return teacher_file(tmp_path / "teacher.safetensors")


def run(*arguments, command=teach) -> int:
    with pytest.raises(SystemExit) as stop:
        command.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory, write_small):
    """frame -> header and logits of an undisturbed run; each test's data and checkpoint are the same."""
    folder = tmp_path_factory.mktemp("whole")
    write_small(folder / "00")
    checkpoint = teacher_file(folder / "teacher.safetensors")
    assert run(folder / "00", "--checkpoint", checkpoint, "--output", folder / "logits") == 0
    return contents(folder / "logits")


def files(output, name="mambamos", sequence="00"):
    return {int(path.stem): path for path in sorted((output / name / sequence).glob("*.safetensors"))}


def contents(output, **where):
    """Header and logits of each file; its bytes may differ, for safetensors orders the header at will."""
    found = {}
    for frame, path in files(output, **where).items():
        with safe_open(path, framework="np") as file:
            found[frame] = (file.metadata(), file.get_tensor("logits").tobytes())
    return found


@pytest.fixture
def written(monkeypatch):
    """(sequence, frame) of each file as it is written, in this process."""
    scans, write = [], TeacherLogits.write

    def note(self, scan, *arguments):
        scans.append((scan.sequence, scan.frame))
        return write(self, scan, *arguments)

    monkeypatch.setattr(TeacherLogits, "write", note)
    return scans


@pytest.fixture
def as_process(monkeypatch):
    """as_process(rank, processes): the commands run as one of several, as torchrun says."""

    def process(rank, processes):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_RANK", str(rank))

    return process


# --- what is stored


def test_the_store_holds_the_logits_of_each_window(data, checkpoint, tmp_path, capsys):
    command = [data, "--checkpoint", checkpoint, "--output", tmp_path / "logits"]
    assert run(*command) == 0
    assert f"{FRAMES} scans computed, 0 were there" in capsys.readouterr().out
    assert run(*command, "--verify") == 0
    (sequence,) = find_sequences(data)
    scans = [torch.from_numpy(sequence.read_points(frame)) for frame in sequence.frames]
    poses, teacher = torch.from_numpy(sequence.poses()), load_teacher(checkpoint)
    store = TeacherLogits(tmp_path / "logits", "mambamos")
    for frame in sequence.frames:
        with torch.no_grad():
            logits = teacher.point_logits(scans[: frame + 1], poses[: frame + 1])
        found = store.read(sequence.scan(frame), sequence.points_path(frame), len(scans[frame]), 4)
        np.testing.assert_array_equal(found, logits.numpy().astype(np.float16))
        assert len(np.unique(found, axis=0)) > 10


def test_a_part_of_a_sequence_is_that_part_of_the_whole(data):
    (sequence,) = find_sequences(data)
    torch.manual_seed(0)
    teacher = build_teacher(**SETTINGS).eval()
    asked, answer = [], teacher.point_logits
    teacher.point_logits = lambda scans, poses: asked.append(len(scans)) or answer(scans, poses)
    expected = dict(sequence_logits(teacher, sequence))
    assert asked == [1, 2, *[3] * (FRAMES - 2)]
    for wanted in ({0}, {1, 2}, {8}, {3, 7}, set()):
        asked.clear()
        part = list(sequence_logits(teacher, sequence, skip=frozenset(sequence.frames) - wanted))
        assert [frame for frame, _ in part] == list(sequence.frames)
        assert {frame for frame, scan in part if scan is not None} == wanted
        assert all(torch.equal(scan.logits, expected[frame].logits) for frame, scan in part if scan is not None)
        assert len(asked) == len(wanted)  # no other is computed


def test_voting_is_that_of_the_options_and_is_written_down(data, checkpoint, tmp_path, capsys):
    (sequence,) = find_sequences(data)
    options = {
        "plain": ([], Voting()),
        "turns": (["--turns", 3], Voting(3)),
        "sums": (["--turns", 3, "--sum-turns"], Voting(3, total=True)),
        "newest": (["--turns", 3, "--newest-points"], Voting(3, newest=True)),
    }
    teacher, seen = load_teacher(checkpoint), []
    for name, (extra, voting) in options.items():
        command = [data, "--checkpoint", checkpoint, "--output", tmp_path / "logits"]
        assert run(*command, "--name", name, *extra) == 0
        header = TeacherLogits(tmp_path / "logits", name).verify(sequence.scan(4), sequence.points_path(4))
        assert header["settings"]["voting"] == {"turns": voting.turns, "total": voting.total, "newest": voting.newest}
        teacher.voting = voting
        skip = frozenset(sequence.frames) - {4}
        logits = dict(sequence_logits(teacher, sequence, skip=skip))[4].logits
        seen.append(contents(tmp_path / "logits", name=name)[4][1])
        assert seen[-1] == logits.numpy().astype(np.float16).tobytes()
    assert len(set(seen)) == len(seen)
    capsys.readouterr()
    assert run(*command, "--name", "plain", "--turns", 2) == 2
    assert "plain" in (error := capsys.readouterr().err) and "(with another voting)" in error


def test_headers_tell_precisions_apart(data, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kdmos.precision._cpu_computes_in", lambda dtype: True)
    command = [data, "--checkpoint", checkpoint, "--output", tmp_path / "logits"]
    assert run(*command, "--precision", "bfloat16") == 0
    (sequence,) = find_sequences(data)
    store = TeacherLogits(tmp_path / "logits", "mambamos")
    header = store.verify(sequence.scan(4), sequence.points_path(4))
    assert header["settings"].pop("window")
    model = prepared(load_teacher(checkpoint), "bfloat16")
    assert header["settings"] == teach.teacher_settings(model, checkpoint)
    assert header["settings"]["precision"] == "bfloat16"
    assert "precision" not in teach.teacher_settings(load_teacher(checkpoint), checkpoint)
    assert run(*command) == 2
    assert "(with another precision)" in capsys.readouterr().err
    assert run(*command, "--precision", "bfloat16") == 0
    assert "0 scans computed" in capsys.readouterr().out


# --- going on


KILLED = """
import os, signal, sys
from kdmos import checkpoint, teach

replace, left = os.replace, [5]

def dies(*arguments):
    left[0] -= 1
    if left[0] == 0:  # the fifth file is written, but not yet under its name
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)

checkpoint.os.replace = dies
teach.main()
"""


def test_killed_and_started_again(data, checkpoint, tmp_path, whole, written, capsys):
    output = tmp_path / "logits"
    command = [data, "--checkpoint", checkpoint, "--output", output]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = [sys.executable, "-c", KILLED, *map(str, command)]
    dead = subprocess.run(process, capture_output=True, text=True, env=environment)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    times = {frame: path.stat().st_mtime_ns for frame, path in files(output).items()}
    assert list(times) == [0, 1, 2, 3]
    assert run(*command) == 0
    assert "5 scans computed, 4 were there" in capsys.readouterr().out
    assert written == [("00", frame) for frame in (4, 5, 6, 7, 8)]
    assert all(files(output)[frame].stat().st_mtime_ns == time for frame, time in times.items())
    assert contents(output) == whole
    assert run(*command, "--verify") == 0


# --- shared among processes


class Frames:
    def __init__(self, *frames):
        self.frames = frames


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_are_runs_that_make_up_the_whole(processes):
    sequences = [Frames(*range(10)), Frames(), Frames(5), Frames(3, 4, 9, 20, 21)]
    shares = [teach.share_of(sequences, process, processes) for process in range(processes)]
    for i, sequence in enumerate(sequences):
        assert all(share[i][0] is sequence for share in shares)
        runs = [sorted(share[i][1]) for share in shares]
        assert [frame for run in runs for frame in run] == list(
            sequence.frames
        )  # one after another: no frame twice, none left out
        sizes = [len(run) for run in runs]
        assert max(sizes) - min(sizes) <= 1


def test_two_processes_at_once(data, checkpoint, tmp_path, whole):
    command = [data, "--checkpoint", checkpoint, "--output", tmp_path / "logits"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "kdmos.teach", *map(str, command)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "4 scans computed, 0 were there" in said[0][0] and "process 1 of 2" in said[0][0]
    assert "5 scans computed, 0 were there" in said[1][0] and "process 2 of 2" in said[1][0]
    assert contents(tmp_path / "logits") == whole
    assert run(*command, "--verify") == 0


@pytest.mark.filterwarnings("ignore:1 of the files there do not fit")
@pytest.mark.parametrize("processes", [2, 3])
def test_shares_after_a_part_was_computed(
    data, checkpoint, tmp_path, write_small, whole, written, as_process, capsys, processes
):
    """Two sequences, of which some scans are there, one damaged: the processes compute the others, each once."""
    write_small(tmp_path / "data" / "sequences" / "01", frames=4)
    shutil.move(data, tmp_path / "data" / "sequences" / "00")
    command = [tmp_path / "data", "--checkpoint", checkpoint, "--output", tmp_path / "logits"]
    as_process(1, 4)  # another number of processes had begun
    assert run(*command) == 0
    assert written == [("00", 2), ("00", 3), ("01", 1)]
    files(tmp_path / "logits")[3].write_bytes(b"cut")
    written.clear()
    capsys.readouterr()
    counts = []
    for process in reversed(range(processes)):
        as_process(process, processes)
        assert run(*command) == 0
        out = capsys.readouterr().out
        assert f"process {process + 1} of {processes}" in out
        counts.append([int(n) for n in re.search(r"(\d+) scans computed, (\d+) were there", out).groups()])
    assert [sum(column) for column in zip(*counts)] == [11, 2]
    assert len(written) == 11
    missing = {("00", frame) for frame in range(FRAMES) if frame != 2} | {("01", frame) for frame in (0, 2, 3)}
    assert set(written) == missing
    assert contents(tmp_path / "logits") == whole
    assert len(contents(tmp_path / "logits", sequence="01")) == 4
    written.clear()
    for process in range(processes):
        as_process(process, processes)
        assert run(*command, "--verify") == 0
        assert run(*command) == 0
    assert not written


def test_more_processes_than_scans(data, checkpoint, tmp_path, written, as_process, capsys):
    for process in range(12):
        as_process(process, 12)
        assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "logits") == 0
    assert sorted(written) == [("00", frame) for frame in range(FRAMES)]
    assert "0 scans computed, 0 were there" in capsys.readouterr().out


# --- what is refused, what is listed


@pytest.mark.parametrize("option", [["--turns", "2"], ["--sum-turns"], ["--newest-points"], ["--backend", "spconv"]])
def test_voting_is_not_for_students(data, tmp_path, capsys, option):
    save_model(tmp_path / "student.safetensors", build_student(grid=PolarGrid(bins=(16, 16, 2))))
    for student in (tmp_path / "student.safetensors", "rule"):
        assert run(data, "--checkpoint", student, "--output", tmp_path / "logits", *option) == 2
        error = capsys.readouterr().err
        assert f"--newest-points, --backend: of MambaMOS, and {student} is a student" in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "logits").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--turns", "0"], "--turns"),
        (["--lookahead", "2"], "a teacher, which reads no future scans, not 2"),
        (["--lookahead", "2", "--force"], "a teacher, which reads no future scans, not 2"),
        (["--precision", "int8"], "--precision int8: one of"),
    ],
)
def test_what_cannot_be_done_is_one_line(data, checkpoint, tmp_path, capsys, change, message):
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "logits", *change) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_another_teacher_under_the_same_name_is_refused(data, checkpoint, tmp_path, capsys):
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "logits") == 0
    other = teacher_file(tmp_path / "other.safetensors", voxel=0.4)
    assert run(data, "--checkpoint", other, "--output", tmp_path / "logits") == 2
    assert "(with another checkpoint, voxel)" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:2 of the files there do not fit")  # the two that saw it empty
@pytest.mark.parametrize("bad", ["short", "far"])
def test_scans_that_cannot_be_used_are_listed_and_the_rest_goes_on(data, checkpoint, tmp_path, capsys, bad):
    """One that cannot be read is lost alone; a point 6000 km away is in the windows of two more."""
    path = data / "velodyne" / "000004.bin"
    good = path.read_bytes()
    if bad == "short":
        path.write_bytes(good[:-3])
    else:
        points = np.frombuffer(good, np.float32).reshape(-1, 4).copy()
        points[7, 0] = 6e6
        points.tofile(path)
    lost = [4] if bad == "short" else [4, 5, 6]
    command = [data, "--checkpoint", checkpoint, "--output", tmp_path / "logits"]
    for computed in (FRAMES - len(lost), 0):
        assert run(*command) == 1
        captured = capsys.readouterr()
        assert f"{computed} scans computed, {FRAMES - len(lost) - computed} were there" in captured.out
        assert re.findall(r"no logits: 00/(\d+): .*\.bin", captured.err) == [f"{frame:06d}" for frame in lost]
    path.write_bytes(good)
    run(*command)
    assert run(*command, "--verify") == 0


# --- predicting


def test_a_teacher_predicts(data, checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(data, "--checkpoint", checkpoint, "--output", output, "--classes", 4, "--scores", command=predict) == 0
    said = capsys.readouterr().out
    assert f"{FRAMES} scans labelled" in said and "windows of 3 scans, look-ahead 0 scans" in said
    (sequence,) = find_sequences(data)
    teacher = load_teacher(checkpoint)
    for frame, scan in sequence_logits(teacher, sequence):
        path = output / "sequences" / "00" / "predictions" / f"{frame:06d}.label"
        expected = np.array([9, 9, 250, 251])[scan.logits.argmax(1)]
        np.testing.assert_array_equal(np.fromfile(path, np.uint32), expected)
        probability = scan.logits.softmax(1)[:, 3].numpy().astype(np.float16)
        np.testing.assert_array_equal(np.fromfile(path.with_suffix(".score"), np.float16), probability)
