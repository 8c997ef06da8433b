"""The demo from end to end, on streets and a grid of toy size."""

import re
import shutil

import numpy as np
import pytest

from kdmos import demo
from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.synthetic.lidar import SensorSettings
from kdmos.synth import SynthSettings, synthesize

TOY = SensorSettings(beams=((2.0, -22.0, 12),), columns=120, vehicle=None)
STREETS = SynthSettings(TOY, seed=3, sequences=2, scans=10)
CONFIG = """
data: {train: ["01"], valid: ["00"], workers: 0}
student: {grid: {bins: [16, 16, 4]}, motion: {grid: {rows: 60, columns: 60}}}
distill: {teacher: toy, gamma: 0.3}
optimizer: {lr: 0.01}
epochs: 1
batch_size: 2
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder, config, real-like sequence and result of one run with two seeds."""
    folder = tmp_path_factory.mktemp("demo")
    config = folder / "toy.yaml"
    config.write_text(CONFIG)
    synthesize(folder / "other", SynthSettings(TOY, seed=4, sequences=1, scans=9), workers=1)
    real = folder / "other" / "sequences" / "00"
    return folder, config, real, demo.run_demo(folder / "run", real, 2, str(config), STREETS)


def test_every_method_is_scored_on_the_same_points(ran):
    held_out, on_real = ran[-1]
    points = {run["total"]["points"] for runs in held_out.scores.values() for run in runs}
    assert len(points) == 1 and points.pop() > 1000
    assert {name: len(runs) for name, runs in held_out.scores.items()} == {
        demo.RULE: 1, demo.TEACHER: 1, demo.ALONE: 2, demo.DISTILLED: 2,
    }  # fmt: skip
    assert set(on_real.scores) == {demo.RULE, demo.ALONE, demo.DISTILLED}


def test_students_of_a_pair_begin_alike_and_end_apart(ran):
    from kdmos.checkpoint import load

    weights = [load(ran[0] / "run" / name / "last.safetensors")[0] for name in ("alone_0", "distilled_0", "alone_1")]
    assert any((weights[0][key] != weights[1][key]).any() for key in weights[0])
    headers = [load(ran[0] / "run" / name / "last.safetensors")[1] for name in ("alone_1", "distilled_1")]
    assert [header["seed"] for header in headers] == [1, 1] and headers[0]["step"] == headers[1]["step"]


def test_the_report_shows_all_of_it(ran):
    page = (ran[0] / "run" / "report.html").read_text()
    for text in (demo.RULE, demo.TEACHER, demo.ALONE, demo.DISTILLED, "seed 1", "Zero-shot on 00", "2\N{EN DASH}5 m/s"):
        assert text in page
    assert page.count("data:image/png") >= 6 and "<svg" in page and not re.search(r"https?://", page)


def test_a_second_run_trains_and_makes_nothing(ran, monkeypatch, capsys):
    folder, config, real, first = ran
    monkeypatch.setattr(demo, "fit", lambda *_, **__: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*.label")}
    second = demo.run_demo(folder / "run", real, 2, str(config), STREETS)
    assert "0 of them made now" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for before_, now in zip(first, second):
        assert before_.scores == now.scores


def test_an_unlabelled_sequence_is_drawn(ran):
    folder, config, real, _ = ran
    bare = folder / "bare"
    shutil.copytree(real, bare, ignore=shutil.ignore_patterns("labels"))
    _, on_real = demo.run_demo(folder / "run", bare, 2, str(config), STREETS)
    assert on_real.scores == {} and [len(picture.panels) for picture in on_real.pictures] == [1, 1]
    page = (folder / "run" / "report.html").read_text()
    assert "Zero-shot on bare" in page and "no labels to score against" in page


def test_recall_by_speed_counts_every_moving_point(ran):
    folder = ran[0] / "run"
    (sequence,) = find_sequences(folder / "data", ["00"])
    found, total = demo.recall_by_speed(sequence, folder / "rule" / "held_out")
    labels = np.concatenate([sequence.read_labels(frame, None) for frame in sequence.frames]) & 0xFFFF
    assert total.sum() == (labels > 250).sum() and (found <= total).all()


def test_a_missing_real_folder_is_one_clear_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--real", "nowhere"])
    assert stopped.value.code == 2 and "nowhere" in capsys.readouterr().err
