"""`kdmos suite`: fixed parts with seeds of their own; data, predictions and scores that go on where they stopped."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmos import suite, synth
from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.synthetic.lidar import SensorSettings
from kdmos.data.synthetic.suite import (
    ALL,
    FIRST_RESERVED_SEED,
    SUITE_VERSION,
    SUITES,
    TWIN_OFFSET,
    Part,
    suite_parts,
)
from kdmos.errors import InputError
from kdmos.evaluate import Tally, evaluate_predictions
from kdmos.models import build_student, load_model, save_model
from kdmos.settings import PolarGrid
from kdmos.synth import SynthSettings

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = SensorSettings(beams=((2.0, -22.0, 16),), columns=256, height=1.2, vehicle=None)
PARTS = [
    Part("streets", "streets", "Tiny streets.", SynthSettings(TINY, 5, sequences=2, scans=9), lead=0),
    Part(
        "sensors", "raw", "Tiny streets as they were measured.", SynthSettings(TINY, 7, 2, 9, compensate=False), lead=0
    ),
]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("student") / "mine.safetensors"
    save_model(path, build_student(grid=PolarGrid(bins=(32, 32, 8))).eval(), seed=3)
    return path


@pytest.fixture(scope="module")
def ran(tmp_path_factory, student):
    output = tmp_path_factory.mktemp("suite") / "out"
    return output, suite.run_suite(output, PARTS, ["rule", student], workers=1)


@pytest.fixture
def copied(ran, tmp_path):
    """The run in another place, of which its predictions know."""
    output = tmp_path / "out"
    shutil.copytree(ran[0], output)
    for manifest in output.rglob("predict.json"):
        manifest.write_text(manifest.read_text().replace(str(ran[0]), str(output)))
    return output


def labels(output):
    return {path.relative_to(output): path.read_bytes() for path in output.rglob("*.label")}


def exit_code(command, *argv):
    with pytest.raises(SystemExit) as stopped:
        command.main([str(argument) for argument in argv])
    return stopped.value.code


def test_parts_are_what_they_say():
    sizes = {name: [(p.settings.sequences, p.settings.scans) for p in suite_parts(name)] for name in SUITES}
    assert sizes == {"streets": [(24, 40)], "scenes": [(6, 30)] * 11, "sensors": [(4, 30)] * 7}
    assert {part.lead for part in suite_parts()} == {7}
    parts = {part.name: part.settings for part in suite_parts()}
    assert len(parts) == 19 and list(parts) == [part.name for name in SUITES for part in suite_parts(name)]
    scenes = {name: settings.scene for name, settings in parts.items()}
    for name in ("parked", "queue", "ego_stands", "slow", "stop_and_go", "overtaking", "truck_close", "crossing"):
        assert scenes.pop(name) == name
    assert (scenes.pop("parked_raw"), scenes.pop("nothing")) == ("parked", "nothing") and set(scenes.values()) == {
        "street"
    }
    assert [name for name, settings in parts.items() if not settings.compensate] == ["parked_raw"]
    assert [(name, s.drift, s.jitter) for name, s in parts.items() if s.drift or s.jitter] == [("odometry", 1.0, 1.0)]
    beams = {name: len(s.sensor.elevations_of_blocks()) for name, s in parts.items()}
    assert {name: n for name, n in beams.items() if n != 64} == {"beams_16": 16, "beams_32": 32, "beams_128": 128}
    assert {name: s.sensor.height for name, s in parts.items() if s.sensor.height != 1.73} == {"low": 0.6, "high": 2.8}
    assert parts["front"].sensor.field_of_view == (-60, 60) and not parts["no_remission"].sensor.has_remission


def test_docs_list_every_part():
    text = (Path(__file__).parents[1] / "docs" / "suite.md").read_text()
    for part in suite_parts():
        size = f"{part.settings.sequences} x {part.settings.scans}"
        assert f"| {part.suite}, `{part.name}` | {size} | {part.tests} |\n" in text


def test_seeds_are_reserved_and_the_twin_shares_none():
    parts, twins = suite_parts(), suite_parts(twin=True)
    seeds, others = [part.settings.seed for part in parts], [part.settings.seed for part in twins]
    assert not set(seeds) & set(others) and min(seeds) == FIRST_RESERVED_SEED
    assert others == [seed + TWIN_OFFSET for seed in seeds]
    assert all(part.is_twin for part in twins) and not any(part.is_twin for part in parts)
    for part, twin in zip(parts, twins):
        same = [getattr(part.settings, f.name) == getattr(twin.settings, f.name) for f in fields(SynthSettings)]
        assert part[:3] == twin[:3] and same.count(False) == 1


def test_scores_are_those_of_evaluate(ran):
    output, results = ran
    assert next(iter(results)) == "rule" and re.fullmatch("mine-[0-9a-f]{8}", list(results)[1])
    for name, result in results.items():
        assert json.loads((output / "results" / f"{name}.json").read_text()) == json.loads(json.dumps(result))
        for part in PARTS:
            folder = output / "predictions" / name / part.suite / part.name
            report = evaluate_predictions(output / part.suite / part.name, folder)
            scored = result["suites"][part.suite]["parts"][part.name]
            false = scored["total"].pop("false_points_per_scan")
            assert scored["sequences"] == report["sequences"] and scored["total"] == report["total"]
            scored["total"]["false_points_per_scan"] = false
            assert report["made_with"]["sensor"] == {"height": 1.2}
            known = [row["moving_iou"] for row in report["sequences"].values() if row["moving_points"]]
            mean = scored["mean"]
            assert mean["moving_iou"] == pytest.approx(np.mean(known))
            assert mean["low"] <= mean["moving_iou"] <= mean["high"]
            assert (mean["sequences"], mean["left_out"], scored["tests"]) == (len(known), 2 - len(known), part.tests)


def test_scans_without_a_whole_window_do_not_count(ran, tmp_path):
    part, predictions = PARTS[0]._replace(lead=3), ran[0] / "predictions" / "rule" / "streets" / "streets"
    assert part.scored == {3, 4, 5}
    tallies = suite.count_part(part, ran[0], predictions)
    points = [sequence.num_points(f) for sequence in find_sequences(part.folder(ran[0])) for f in (3, 4, 5)]
    assert sum(tally.objects.scans for tally in tallies.values()) == 6
    assert sum(tally.tables.sum() for tally in tallies.values()) == sum(points)
    assert re.search("scan [345]:", suite.worst_scan(part, ran[0], predictions, tmp_path).caption)


def test_scans_that_do_not_count_are_not_predicted(ran, tmp_path):
    part, rule = PARTS[0]._replace(lead=3), load_model("rule")
    shutil.copytree(part.folder(ran[0]), part.folder(tmp_path))
    folder = suite.predict_part(part, tmp_path, suite.Competitor("rule", "rule", rule), torch.device("cpu"))
    whole = ran[0] / "predictions" / "rule" / "streets" / "streets"
    expected = {path: content for path, content in labels(whole).items() if int(path.stem) in part.scored}
    assert labels(folder) == expected and len(expected) == 6


def test_results_say_what_they_are_of(ran, student):
    result = ran[1][list(ran[1])[1]]
    assert (result["suite_version"], result["synth_version"], result["twin"]) == (SUITE_VERSION, synth.VERSION, False)
    about = result["checkpoint"]
    assert (about["checkpoint"], about["lookahead"], about["precision"]) == (str(student), 7, "float32")
    assert about["header"]["seed"] == 3 and about["fingerprint"].startswith(list(ran[1])[1].removeprefix("mine-"))
    assert result["parts"]["sensors/raw"]["seed"] == 7


def test_page_and_table_have_all_of_it(ran, capsys):
    output, results = ran
    page = (output / suite.PAGE).read_text()
    for text in (*results, "all of sensors", "raw", "Tiny streets as they were measured.", "points wrong"):
        assert text in page
    assert page.count("data:image/png") == 3 * len(PARTS) and not re.search(r"https?://", page)
    suite.print_table(results, suite.Console(width=suite.FILE_WIDTH))
    out = capsys.readouterr().out
    for name, result in results.items():
        shares = (
            100 * result["suites"]["sensors"]["parts"]["raw"]["mean"][key] for key in ("moving_iou", "low", "high")
        )
        assert name in out and "{:.1f} ({:.1f}-{:.1f})".format(*shares) in out
    assert re.search(
        r"^ *streets .*\n *sensors .*\n   +raw ", out, re.MULTILINE
    )  # a part of its suite's name has no row


def test_goes_on_after_a_kill(ran, student, copied):
    whole, (_, name) = labels(copied), ran[1]
    data, predicted = copied / "sensors" / "raw", copied / "predictions" / name / "sensors" / "raw"
    (data / "sequences" / "01" / "labels" / "000008.label").unlink()
    (data / "sequences" / "01" / "poses.txt").unlink()
    shutil.rmtree(predicted / "sequences" / "01")
    (predicted / "sequences" / "00" / "predictions" / "000004.label").unlink()
    shutil.rmtree(copied / "results")
    kept = predicted / "sequences" / "00" / "predictions" / "000005.label"
    before = kept.stat().st_mtime_ns
    assert suite.run_suite(copied, PARTS, ["rule", student], workers=1) == ran[1]
    assert labels(copied) == whole and kept.stat().st_mtime_ns == before


def test_more_data_beside_a_part_changes_no_score(ran, copied):
    settings = SynthSettings(**{**vars(PARTS[0].settings), "sequences": 3})
    synth.synthesize(copied / "streets" / "streets", settings, workers=1)
    results = suite.run_suite(copied, PARTS[:1], ["rule"], workers=1)
    assert results["rule"]["suites"] == {"streets": ran[1]["rule"]["suites"]["streets"]}


def test_where_nothing_moves_there_is_no_iou_but_false_points():
    moving, still = Tally(), Tally()
    for tally, table in ((moving, {(1, 1): 80, (1, 3): 5, (3, 3): 15}), (still, {(1, 1): 98, (2, 3): 2, (0, 3): 7})):
        tally.objects.scans = 2
        for place, count in table.items():
            tally.tables[(0, *place)] = count
    both = suite.summary([moving, still])
    assert both["mean"] == {"moving_iou": 0.75, "low": 0.75, "high": 0.75, "sequences": 1, "left_out": 1}
    assert both["total"]["moving_precision"] == 15 / 22 and both["total"]["false_points_per_scan"] == 7 / 4
    nothing = suite.summary([still])
    assert nothing["mean"] == {"moving_iou": None, "low": None, "high": None, "sequences": 0, "left_out": 1}
    assert nothing["total"]["false_points_per_scan"] == 1 and suite._cells(nothing)[:2] == ("-", "-")


def test_the_worst_scan_is_drawn(ran, tmp_path):
    part, predictions = PARTS[0], ran[0] / "predictions" / "rule" / "streets" / "streets"
    wrong = {}
    for sequence in find_sequences(part.folder(ran[0]), part.sequences):
        for frame in sequence.frames:
            truth = sequence.read_labels(frame, None) & 0xFFFF
            predicted = np.fromfile(sequence.prediction_path(predictions, frame), "<u4")
            wrong[sequence.name, frame] = np.count_nonzero(((truth > 250) != (predicted == 251)) & (truth > 1))
    (name, frame), most = max(wrong.items(), key=lambda item: item[1])
    caption = suite.worst_scan(part, ran[0], predictions, tmp_path).caption
    assert caption.startswith(f"streets, sequence {name}, scan {frame}:") and f"{most:,} points wrong" in caption


def test_two_files_of_a_name_are_told_apart(student, tmp_path):
    other = tmp_path / "mine.safetensors"
    torch.manual_seed(1)
    save_model(other, build_student(grid=PolarGrid(bins=(32, 32, 8))).eval())
    found = suite.competitors([student, other, student, "rule"], "float32", torch.device("cpu"))
    assert len({one.name for one in found}) == 3 and found[2].name == "rule"


def test_command(monkeypatch, copied, capsys):
    asked = {}
    monkeypatch.setattr(suite, "suite_parts", lambda name, twin: asked.update(name=name, twin=twin) or PARTS[:1])
    arguments = (copied, "--checkpoint", "rule", "--suite", "streets", "--twin", "--workers", 1, "--device", "cpu")
    assert exit_code(suite, *arguments, "--json") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["rule"] and asked == {"name": "streets", "twin": True}
    assert exit_code(suite, *arguments) == 0
    out = capsys.readouterr().out
    assert "Mean moving IoU" in out and "suite.html" in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["out", "--suite", "roads"], "--suite roads: one of streets, scenes, sensors, all"),
        (["out", "--checkpoint", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["out", "--precision", "int8"], "int8"),
        (["out", "--scans", "3"], "--scans"),
    ],
)
def test_wrong_flags(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(suite, *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kdmos suite: ") and err.count("\n") == 1 and says in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--seed", FIRST_RESERVED_SEED], "no training may see"),
        (["--seed", FIRST_RESERVED_SEED + TWIN_OFFSET], "no training may see"),
        (["--suite", "roads"], "one of streets, scenes, sensors, all"),
        (["--suite", "streets", "--scans", 3, "--seed", 0], "leave out --scans, --seed"),
        (["--twin"], "--suite"),
    ],
)
def test_synth_keeps_the_suite_apart(argv, says, tmp_path, capsys):
    assert exit_code(synth, tmp_path / "data", *argv) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_synth_makes_a_suite_alone(monkeypatch, tmp_path, capsys):
    parts = [Part(*part[:3], SynthSettings(TINY, number, 1, 2)) for number, part in enumerate(PARTS)]
    monkeypatch.setattr(synth, "suite_parts", lambda name, twin: parts if (name, twin) == (ALL, True) else [])
    assert exit_code(synth, tmp_path, "--suite", ALL, "--twin", "--workers", 1) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'sensors' / 'raw'}: 1 sequences of 2 scans, 2 of them made now" in out
    assert [part.folder(tmp_path).is_dir() for part in PARTS] == [True, True]


def test_another_version_of_the_data_is_refused(ran):
    other = Part(*PARTS[0][:3], SynthSettings(TINY, 6, sequences=2, scans=9))
    with pytest.raises(InputError, match="another seed"):
        suite.run_suite(ran[0], [other], ["rule"], workers=1)


def test_the_rule_is_a_model_like_any_other():
    assert suite.Competitor("rule", "rule", load_model("rule")).facts()["lookahead"] == 7
