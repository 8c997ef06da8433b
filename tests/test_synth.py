"""`kdmos synth`: SemanticKITTI's layout, resumed after a kill, the same bytes from any number of processes."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from kdmos.data.semantic_kitti import find_sequences, read_labels
from kdmos.data.synthetic.lidar import SensorSettings
from kdmos.errors import InputError
from kdmos.synth import MANIFEST, SynthSettings, main, synthesize

TINY = SensorSettings(beams=((2.0, -24.0, 8),), columns=90)
SETTINGS = SynthSettings(TINY, seed=1, sequences=2, scans=4, drift=0.5)


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("synth") / "data"
    assert synthesize(root, SETTINGS, workers=1) == 8
    return root


@pytest.fixture
def data(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


def exit_code(*argv):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in argv])
    return stopped.value.code


def test_layout_is_read_back(made):
    sequences = find_sequences(made)
    assert [sequence.name for sequence in sequences] == ["00", "01"]
    for number, sequence in enumerate(sequences):
        expected = SETTINGS.sequence(number)
        assert sequence.frames == (0, 1, 2, 3)
        np.testing.assert_allclose(sequence.poses(), expected.poses(0.5), atol=1e-6)
        for frame in range(4):
            scan = expected.scan(frame)
            np.testing.assert_array_equal(sequence.read_points(frame), scan.points)
            np.testing.assert_array_equal(sequence.read_labels(frame, len(scan.points)), scan.labels)
        times = [float(line) for line in (sequence.folder / "times.txt").read_text().split()]
        np.testing.assert_allclose(times, [0, 0.1, 0.2, 0.3])
    assert not [name for name in files(made) if name.endswith(".part")]


def test_tracks_fit_the_labels(made):
    for number in range(2):
        folder = made / "sequences" / f"{number:02d}"
        with open(folder / "tracks.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        movers = SETTINGS.sequence(number).street.movers
        assert len(rows) == 4 * len(movers)
        for row in rows:
            labels = read_labels(folder / "labels" / f"{int(row['frame']):06d}.label", None)
            own = labels[labels >> 16 == int(row["instance"])]
            assert len(own) == int(row["points"]) and set(own & 0xFFFF) <= {int(row["label"])}
            assert all(np.isfinite(float(row[name])) for name in ("x", "y", "z", "yaw", "speed"))
        moving = {int(row["instance"]) for row in rows if int(row["label"]) > 250}
        for path in (folder / "labels").iterdir():
            labels = read_labels(path, None)
            assert set(labels[(labels & 0xFFFF) > 250] >> 16) <= moving


def test_goes_on_after_a_kill(made, data):
    assert synthesize(data, SETTINGS, workers=1) == 0
    first, second = data / "sequences" / "00", data / "sequences" / "01"
    (first / "velodyne" / "000001.bin").write_bytes(b"\0" * 32)  # truncated
    (first / "labels" / "000003.label").unlink()
    for path in (second / "velodyne" / "000000.bin", second / "labels" / "000000.label"):
        path.write_bytes(b"")  # what a power cut leaves
    (second / "poses.txt").unlink()
    (second / "tracks.csv").unlink()
    assert synthesize(data, SETTINGS, workers=1) == 3
    assert files(data) == files(made)
    (second / "calib.txt").unlink()
    assert synthesize(data, SETTINGS, workers=1) == 0
    assert files(data) == files(made)


def test_two_processes_make_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    synthesize(tmp_path / "data", SETTINGS, workers=2)
    assert files(tmp_path / "data") == files(made)


def test_more_sequences_may_be_added(made, data):
    more = SynthSettings(TINY, seed=1, sequences=3, scans=4, drift=0.5)
    assert synthesize(data, more, workers=1) == 4
    old = {name: content for name, content in files(made).items() if name != MANIFEST}
    assert {name: files(data)[name] for name in old} == old


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"scans": 5},
        {"compensate": False},
        {"drift": 0.0},
        {"sensor": SensorSettings()},
        {"jitter": 1.0},
        {"scene": "queue"},
        {"sensor": None},
    ],
)
def test_another_data_set_is_refused(made, data, change):
    settings = SynthSettings(**{**vars(SETTINGS), **change})
    with pytest.raises(InputError, match=f"another {next(iter(change))}"):
        synthesize(data, settings, workers=1)
    assert files(data) == files(made)


def test_foreign_data_is_refused(data):
    (data / MANIFEST).write_text("[")
    with pytest.raises(InputError, match="damaged"):
        synthesize(data, SETTINGS, workers=1)
    (data / MANIFEST).unlink()
    before = files(data)
    with pytest.raises(InputError, match="did not make"):
        synthesize(data, SETTINGS, workers=1)
    assert files(data) == before


def test_command(tmp_path, capsys):
    sensor = tmp_path / "tiny.yaml"
    sensor.write_text("beams: [[2, -24, 8]]\ncolumns: 90\n")
    arguments = (tmp_path / "data", "--sequences", 1, "--scans", 2, "--sensor", sensor, "--seed", 5, "--raw")
    assert exit_code(*arguments, "--workers", 1) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'data'}: 1 sequences of 2 scans, 2 of them made now\n" and err == ""
    manifest = json.loads((tmp_path / "data" / MANIFEST).read_text())
    assert (manifest["seed"], manifest["compensate"], manifest["sensor"]["columns"]) == (5, False, 90)
    assert exit_code(*arguments, "--workers", 1) == 0
    assert "0 of them made now" in capsys.readouterr().out
    assert exit_code(*arguments, "--drift", 1) == 2  # the folder holds other settings


def test_a_drawn_data_set_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("kdmos.data.synthetic.sequence.draw_sensor", lambda rng: replace(TINY, height=2.5))
    arguments = ("--drawn", "--sequences", 1, "--scans", 1, "--workers", 1, "--scene", "nothing", "--jitter", 1)
    assert exit_code(tmp_path / "data", *arguments) == 0
    manifest = json.loads((tmp_path / "data" / MANIFEST).read_text())
    assert (manifest["sensor"], manifest["compensate"], manifest["scene"]) == (None, None, "nothing")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "output"),
        (["data", "--scan", "3"], "--scan"),
        (["data", "--scans", "0"], "--scans"),
        (["data", "--sequences", "many"], "--sequences"),
        (["data", "--sensor", "hdl128"], "hdl64, small"),
        (["data", "--scene", "motorway"], "--scene motorway: the scenes are street, sparse"),
        (["data", "--drawn", "--raw"], "--drawn: draws the sensor and compensated or raw itself"),
        (["data", "--drawn", "--sensor", "small"], "leave out --sensor and --raw"),
        (["data", "--jitter", "-1"], "--jitter"),
        (["data", "--drift", "-1"], "--drift"),
        (["data", "--drift", "nan"], "--drift"),
        (["data", "--seed", "-1"], "--seed"),
        (["data", "--workers", "0"], "--workers"),
    ],
)
def test_wrong_flags(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kdmos synth: ") and err.count("\n") == 1 and says in err
    assert list(tmp_path.iterdir()) == []


def test_output_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert exit_code(tmp_path / "file", "--sequences", 1, "--scans", 1, "--sensor", "small") == 2
    assert capsys.readouterr().err.count("\n") == 1
