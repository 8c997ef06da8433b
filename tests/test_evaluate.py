"""Scores of predictions by hand, against the public evaluation, on real scans; and what a user can get wrong."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from kdmos import metrics, predict
from kdmos.data.labels import CLASSES, to_classes
from kdmos.data.semantic_kitti import find_sequences
from kdmos.errors import InputError
from kdmos.evaluate import evaluate_predictions, main, range_ring
from kdmos.motion import motion_channels, moving_by_rule

IDENTITY = "1 0 0 0 0 1 0 0 0 0 1 0"


def write(path, values, dtype):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.asarray(values, dtype).tofile(path)
    return path


def add_scan(root, sequence, frame, labels, predicted, distance=None):
    """One scan in `root`/data and its prediction in `root`/predicted; None leaves a file out."""
    distance = [5.0] * len(labels if labels is not None else predicted) if distance is None else distance
    points = np.zeros((len(distance), 4), np.float32)
    points[:, 0] = distance
    folder = root / "data" / "sequences" / sequence
    write(folder / "velodyne" / f"{frame:06d}.bin", points, np.float32)
    if labels is not None:
        write(folder / "labels" / f"{frame:06d}.label", labels, np.uint32)
    if predicted is not None:
        name = root / "predicted" / "sequences" / sequence / "predictions" / f"{frame:06d}.label"
        write(name, predicted, np.uint32)


@pytest.fixture
def tiny(tmp_path):
    """Two labelled and predicted sequences, one without predictions, one without labels."""
    add_scan(tmp_path, "00", 0, [40, 10, 252, 0, 252], [9, 251, 251, 251, 9], [5, 15, 25, 5, 25])
    add_scan(tmp_path, "00", 2, [252, 253], [251, 251], [35, 55])
    add_scan(tmp_path, "08", 7, [(9 << 16) | 254, 71], [251, 9])
    add_scan(tmp_path, "09", 0, [40], None)
    add_scan(tmp_path, "11", 0, None, [9])
    return tmp_path


def score(root, **options):
    return evaluate_predictions(root / "data", root / "predicted", **options)


def run_main(*arguments):
    """Exit code of the command."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code


@pytest.fixture(autouse=True)
def one_thread():
    """On a machine that is busy otherwise, torch's threads wait for each other far longer than these scans take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the numbers


def test_scores_by_hand(tiny):
    report = score(tiny)
    assert list(report["sequences"]) == ["00", "08"]
    found = report["sequences"]["00"]
    # Labelled points: static, movable, 4 moving; predicted moving: 3 of them and the movable one.
    assert (found["scans"], found["points"], found["moving_points"]) == (2, 6, 4)
    assert found["moving_iou"] == pytest.approx(3 / 5)
    assert found["moving_precision"] == pytest.approx(3 / 4)
    assert found["moving_recall"] == pytest.approx(3 / 4)
    assert found["static_iou"] == pytest.approx(1 / 3)
    assert report["sequences"]["08"]["moving_iou"] == 1
    assert report["total"]["moving_iou"] == pytest.approx(4 / 6)  # of summed counts, no mean of IoUs
    assert (report["total"]["scans"], report["total"]["points"]) == (3, 8)
    assert report["classes"] == ["static", "moving"]
    assert found["iou"] == {"static": found["static_iou"], "moving": found["moving_iou"]}
    assert "rule" not in report and report["pictures"] == []


def test_what_is_not_scored_is_said(tiny):
    add_scan(tiny, "00", 3, None, [9])
    report = score(tiny)
    assert report["left_out"]["09"].endswith("predicted/sequences/09/predictions: no predictions")
    assert report["left_out"]["11"].endswith("sequences/11/labels: no labels to score against")
    assert report["unlabelled_scans"] == {"00": 1}
    assert report["total"]["scans"] == 3


def test_scores_by_range(tiny):
    rings = score(tiny)["sequences"]["00"]["by_range"]
    assert [ring["metres"] for ring in rings] == [[0, 10], [10, 20], [20, 30], [30, 40], [40, 50], [50, None]]
    assert [ring["moving_points"] for ring in rings] == [0, 0, 2, 1, 0, 1]
    # The false alarm on an unlabeled point at 5 m does not count, the one on the parked car at 15 m does.
    assert [ring["moving_iou"] for ring in rings] == [None, 0, 0.5, 1, None, 1]


def test_rings_by_hand():
    x = [0, 9.99, 10, 49.9, 50, 1e30, np.nan, -np.inf]
    points = np.zeros((len(x), 4), np.float32)
    points[:, 0] = x
    assert range_ring(points).tolist() == [0, 0, 1, 4, 5, 5, 5, 5]
    assert range_ring(np.array([[6, 8, 99, 0]], np.float32)).tolist() == [1]  # height does not count


def test_movable_is_a_class_of_its_own_once_it_is_predicted(tmp_path):
    add_scan(tmp_path, "00", 0, [40, 40, 10, 10, 252], [9, 250, 250, 9, 251])
    add_scan(tmp_path, "01", 0, [40, 10], [9, 9])
    report = score(tmp_path)
    assert report["classes"] == ["static", "movable", "moving"]
    found = report["sequences"]["00"]
    assert found["iou"] == pytest.approx({"static": 1 / 3, "movable": 1 / 3, "moving": 1})
    assert found["static_iou"] == 1  # movable included
    assert report["sequences"]["01"]["iou"] == {"static": 0.5, "movable": 0, "moving": None}


def test_nan_points_are_scored_like_others(tmp_path):
    add_scan(tmp_path, "00", 0, [252, 252, 40], [251, 9, 9], [5, np.nan, 5])
    found = score(tmp_path)["total"]
    assert (found["moving_points"], found["moving_iou"]) == (2, 0.5)
    assert found["by_range"][-1]["moving_points"] == 1


def test_nothing_moves(tmp_path):
    add_scan(tmp_path, "00", 0, [40, 10], [9, 9])
    found = score(tmp_path)["total"]
    assert found["moving_iou"] is None and found["static_iou"] == 1


def test_equals_the_public_evaluation(tmp_path, golden):
    with np.load(golden("a6_eval.npz"), allow_pickle=False) as archive:
        arrays = dict(archive)
    cuts = np.cumsum(arrays["n"])[:-1]
    truth, predicted = (array.copy() for array in (arrays["raw_labels"], arrays["raw_preds"]))
    truth[truth & 0xFFFF == 250] = 0  # no id of SemanticKITTI's own labels; the public table has none for it
    for frame, (labels, guess) in enumerate(zip(np.split(truth, cuts), np.split(predicted, cuts))):
        add_scan(tmp_path, "08", frame, labels, guess)
    report = score(tmp_path, split="valid")
    assert "movable" in report["classes"]
    assert report["total"]["moving_iou"] == pytest.approx(arrays["api_iou"][2], rel=1e-12)

    predicted[predicted == 250] = 0  # as the public table reads it
    for frame, guess in enumerate(np.split(predicted, cuts)):
        add_scan(tmp_path, "08", frame, np.split(truth, cuts)[frame], guess)
    total = score(tmp_path)["total"]
    assert total["moving_iou"] == pytest.approx(arrays["api_iou"][2], rel=1e-12)
    assert total["static_iou"] == pytest.approx(arrays["api_iou"][1], rel=1e-12)


# --- objects, kinds of movers, the mean over sequences


@pytest.fixture
def objects(tmp_path):
    """Two sequences with poses: a car and a person with instances; a car without, and something false."""
    car, person = 1 << 16 | 252, 2 << 16 | 254
    labels = [car] * 10 + [person] * 12 + [40] * 10
    add_scan(tmp_path, "00", 0, labels, [251] * 5 + [9] * 22 + [251] * 5, [5] * 10 + [15] * 12 + [25] * 10)
    add_scan(tmp_path, "00", 1, [40] * 10, [9] * 10)
    add_scan(tmp_path, "01", 0, [252] * 10 + [40] * 10, [251] * 20, [5] * 10 + [25] * 10)
    for name in ("00", "01"):
        folder = tmp_path / "data/sequences" / name
        (folder / "poses.txt").write_text(f"{IDENTITY}\n" * 2)
        (folder / "calib.txt").write_text(f"Tr: {IDENTITY}\n")
    return tmp_path


def test_objects_and_kinds(objects):
    report = score(objects, rule=True)
    found, other = report["sequences"]["00"], report["sequences"]["01"]
    assert (found["objects"], found["object_recall"], found["false_objects_per_scan"]) == (2, 0.5, 0)
    assert found["by_kind"] == [
        {"kind": "car", "points": 10, "recall": 0.5, "objects": 1, "object_recall": 1},
        {"kind": "person", "points": 12, "recall": 0, "objects": 1, "object_recall": 0},
    ]
    assert (other["objects"], other["object_recall"], other["false_objects_per_scan"]) == (0, None, 1)
    total = report["total"]
    assert (total["objects"], total["object_recall"], total["false_objects_per_scan"]) == (2, 0.5, 1 / 3)
    assert [(row["points"], row["recall"]) for row in total["by_kind"]] == [(20, 15 / 20), (12, 0)]
    assert report["without_instances"] == ["01"]
    # So few scans have no whole residual channels: the rule finds nothing, right or wrong.
    rule = report["rule"]["total"]
    assert (rule["objects"], rule["object_recall"], rule["false_objects_per_scan"]) == (2, 0, 0)
    assert [(row["points"], row["recall"]) for row in rule["by_kind"]] == [(20, 0), (12, 0)]


def test_the_mean_over_sequences(objects):
    mean = score(objects, rule=True)["mean"]
    one, two = 5 / (22 + 5), 10 / 20  # and the interval of two values reaches from one to the other
    both = {"moving_iou": pytest.approx((one + two) / 2), "low": one, "high": two, "sequences": 2}
    assert mean == {**both, "left_out": 0}
    assert score(objects, sequences=["00"])["mean"] is None
    add_scan(objects, "02", 0, [40], [9])  # nothing moves in it
    assert score(objects)["mean"] == {**both, "left_out": 1}
    of_one = {"moving_iou": 0.5, "low": 0.5, "high": 0.5, "sequences": 1, "left_out": 1}
    assert score(objects, sequences=["01", "02"])["mean"] == of_one
    add_scan(objects, "03", 0, [40], [251])  # nor in this one, whatever is found in it
    nothing = {"moving_iou": None, "low": None, "high": None, "sequences": 0, "left_out": 2}
    assert score(objects, sequences=["02", "03"])["mean"] == nothing


def test_objects_in_words_and_on_the_page(objects, capsys):
    options = ["--rule", "--report", objects / "page.html"]
    assert run_main(objects / "data", objects / "predicted", *options) == 0
    out = re.sub(r"[^\S\n]*[│┃][^\S\n]*", "|", capsys.readouterr().out)
    for expected in (
        "sequence|of|objects|object recall, %|false objects a scan",
        "00|predictions|2|50.0|0.00",
        "01|predictions|0|-|1.00",
        "total|predictions|2|50.0|0.33",
        "total|rule|2|0.0|0.00",
        "car|predictions|20|75.0|1|100.0",
        "person|rule|12|0.0|1|0.0",
        "mean moving IoU of the sequences, % (95 % bootstrap interval): predictions 34.3 (18.5 to 50.0, n = 2); "
        "rule 0.0 (0.0 to 0.0, n = 2)\n",
        "note: the labels of 01 have no instances, so their objects are not told apart\n",
    ):
        assert expected in out
    page = (objects / "page.html").read_text()
    for expected in ("Mean moving IoU of the sequences", "predictions 34.3 (18.5 to 50.0", "01 have no instances"):
        assert expected in page
    assert "<dt>false objects a scan</dt><dd>0.33</dd>" in page and "Kinds of movers, %" in page

    assert run_main(objects / "data", objects / "predicted", "--sequences", "00") == 0
    out = capsys.readouterr().out
    assert "mean moving IoU" not in out and "instances" not in out


# --- which sequences


def test_asked_for_sequences(tiny):
    assert list(score(tiny, sequences=["08"])["sequences"]) == ["08"]
    assert list(score(tiny, split="valid")["sequences"]) == ["08"]
    with pytest.raises(InputError, match="09/predictions: no predictions"):
        score(tiny, sequences=["08", "09"])
    with pytest.raises(InputError, match="11/labels: no labels"):
        score(tiny, sequences=["11"])
    with pytest.raises(InputError, match="no sequence 01, 02"):
        score(tiny, split="train")
    with pytest.raises(InputError, match="exclude each other"):
        score(tiny, split="valid", sequences=["08"])
    with pytest.raises(InputError, match="split 'val': expected one of"):
        score(tiny, split="val")


def test_one_bare_sequence_folder(tiny):
    report = evaluate_predictions(tiny / "data" / "sequences" / "00", tiny / "predicted")
    assert list(report["sequences"]) == ["00"]


def test_nothing_to_score(tiny):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        evaluate_predictions(tiny / "data", tiny / "nowhere")
    (tiny / "empty").mkdir()
    with pytest.raises(InputError, match="empty/sequences/00/predictions: no predictions, nor of another labelled"):
        evaluate_predictions(tiny / "data", tiny / "empty")
    for labels in tiny.glob("data/sequences/*/labels"):
        shutil.rmtree(labels)
    with pytest.raises(InputError, match="nothing to score against"):
        score(tiny)


# --- files that do not fit


def test_a_labelled_scan_without_prediction(tiny):
    (tiny / "predicted/sequences/00/predictions/000002.label").unlink()
    with pytest.raises(
        InputError, match=r"000002\.label: no prediction for labelled scan 00/000002 \(1 of 2.*--allow-missing"
    ):
        score(tiny)


def test_labelled_scans_without_prediction_are_left_out_if_that_is_asked_for(tiny, capsys):
    assert score(tiny, allow_missing=True) == score(tiny)
    assert score(tiny)["missing_predictions"] == {}
    add_scan(tiny, "00", 3, None, [9])
    (tiny / "predicted/sequences/00/predictions/000002.label").unlink()
    report = score(tiny, allow_missing=True)
    assert report["missing_predictions"] == {"00": 1} and report["unlabelled_scans"] == {"00": 1}
    found = report["sequences"]["00"]
    assert (found["scans"], found["points"], found["moving_points"], found["moving_iou"]) == (1, 4, 2, 1 / 3)
    with pytest.raises(InputError, match="frame 2: no scored sequence has labels and a prediction for it"):
        score(tiny, allow_missing=True, pictures=tiny, frames=[2])
    assert run_main(tiny / "data", tiny / "predicted", "--allow-missing") == 0
    assert "not scored: 1 labelled scan of 00 that has no prediction\n" in capsys.readouterr().out


def test_a_sequence_of_which_no_scan_is_predicted_is_left_out(tiny):
    for path in (tiny / "predicted/sequences/00/predictions").iterdir():
        path.unlink()
    report = score(tiny, allow_missing=True)
    assert list(report["sequences"]) == ["08"] and report["missing_predictions"] == {}
    assert report["left_out"]["00"].endswith("00/predictions: no predictions")
    with pytest.raises(InputError, match="00/predictions: no predictions"):
        score(tiny, allow_missing=True, sequences=["00"])
    shutil.rmtree(tiny / "predicted/sequences/08")
    with pytest.raises(InputError, match="no predictions, nor of another"):
        score(tiny, allow_missing=True)


def test_a_prediction_of_another_length(tiny):
    path = write(tiny / "predicted/sequences/00/predictions/000002.label", [9, 9, 9], np.uint32)
    with pytest.raises(InputError, match=f"{path}: .* 3 labels, but its scan has 2 points"):
        score(tiny)
    path.write_bytes(b"12345")
    with pytest.raises(InputError, match=f"{path}: .*truncated"):
        score(tiny)


def test_an_unknown_id_in_a_prediction(tiny):
    path = write(tiny / "predicted/sequences/08/predictions/000007.label", [9, 3], np.uint32)
    with pytest.raises(InputError, match=rf"{path}: 1 of 2 labels have an unknown raw id \(3\)"):
        score(tiny)


def test_labels_without_their_scan(tiny):
    (tiny / "data/sequences/00/velodyne/000002.bin").unlink()
    with pytest.raises(InputError, match=r"000002\.bin: no such scan, but .*labels has labels"):
        score(tiny)


def test_the_report_says_what_the_predictions_were_made_with(tiny, capsys):
    assert score(tiny)["made_with"] is None  # another program's
    manifest = tiny / "predicted" / "predict.json"
    manifest.write_text('{"form": "published", "lookahead": 3}')
    assert score(tiny)["made_with"] == {"form": "published", "lookahead": 3}
    assert run_main(tiny / "data", tiny / "predicted") == 0
    assert "predictions: form published, lookahead 3" in capsys.readouterr().out
    for text in ("{", "[]"):
        manifest.write_text(text)
        with pytest.raises(InputError, match=r"predict\.json: not a JSON object"):
            score(tiny)


# --- the rule


def test_rule_needs_poses(tiny):
    with pytest.raises(InputError, match=r"poses\.txt: does not exist, and the rule needs poses"):
        score(tiny, rule=True)


def test_rule_sees_unlabelled_scans_and_scores_labelled_ones(tmp_path):
    # A post of 1 m stands 7.5 m ahead in scans 0-9 and 20 m ahead in scans 10-17.
    for frame in range(18):
        points = np.zeros((8, 4), np.float32)
        points[:, 0], points[:, 2] = 7.5 if frame < 10 else 20, np.linspace(-1, 0, 8)
        add_scan(tmp_path, "00", frame, [252] * 8 if frame in (9, 10) else None, [251] * 8)
        write(tmp_path / "data/sequences/00/velodyne" / f"{frame:06d}.bin", points, np.float32)
    folder = tmp_path / "data/sequences/00"
    (folder / "poses.txt").write_text(f"{IDENTITY}\n" * 18)
    (folder / "calib.txt").write_text(f"Tr: {IDENTITY}\n")

    scans = [np.fromfile(path, np.float32).reshape(-1, 4) for path in sorted(folder.glob("velodyne/*"))]
    channels = motion_channels(scans, np.tile(np.eye(4), (18, 1, 1)))
    moves = [moving_by_rule(torch.from_numpy(of_scan)).sum().item() for of_scan in channels]
    assert moves[9] + moves[10] > 0
    rule = score(tmp_path, rule=True)["rule"]
    assert rule["motion"] == {"form": "published", "num_channels": 8, "lookahead": 7}
    assert (rule["total"]["scans"], rule["total"]["moving_points"]) == (2, 16)
    assert rule["total"]["moving_recall"] == (moves[9] + moves[10]) / 16


def test_the_rule_takes_a_broken_scan_as_empty_as_predict_does(tmp_path, write_sequence):
    folder = write_sequence(tmp_path / "data" / "sequences" / "00")
    (folder / "velodyne/000004.bin").write_bytes(b"12345")
    output = tmp_path / "predicted"
    with pytest.raises(SystemExit) as exit:
        predict.main([str(folder), "--checkpoint", "rule", "--output", str(output)])
    assert exit.value.code == 1
    with pytest.raises(InputError, match="--allow-missing"):
        score(tmp_path)
    report = score(tmp_path, allow_missing=True, rule=True)
    assert report["missing_predictions"] == {"00": 1} and report["total"]["scans"] == 13
    assert report["rule"]["total"] == report["total"] and report["total"]["moving_iou"] > 0


@pytest.fixture(scope="module")
def perfect(realdata, tmp_path_factory):
    """A real sequence and perfect predictions of it."""
    sequence = find_sequences(realdata("kitti-raw-0005-a"))[0]
    predicted = tmp_path_factory.mktemp("predicted")
    for frame in sequence.frames:
        moving = sequence.read_labels(frame, None) & 0xFFFF >= 251
        path = predicted / "sequences" / sequence.name / "predictions" / f"{frame:06d}.label"
        write(path, np.where(moving, 251, 9), np.uint32)
    return sequence, predicted


def test_real_scans_perfect_predictions_and_the_rule(perfect):
    sequence, predicted = perfect
    report = evaluate_predictions(sequence.folder, predicted, rule=True)
    total = report["total"]
    assert (total["scans"], total["moving_points"]) == (16, 28606)
    assert total["moving_iou"] == total["moving_precision"] == total["moving_recall"] == total["static_iou"] == 1
    assert (total["objects"], total["object_recall"], total["false_objects_per_scan"]) == (38, 1, 0)
    assert {row["kind"]: (row["points"], row["objects"]) for row in total["by_kind"]} == {
        "car": (14203, 16),
        "cyclist": (12758, 16),
        "person": (1645, 6),
    }

    # The rule as it is without streaming, scan by scan.
    scans = [sequence.read_points(frame) for frame in sequence.frames]
    tables = []
    for frame, channels in zip(sequence.frames, motion_channels(scans, sequence.poses())):
        truth = to_classes(sequence.read_labels(frame, None), CLASSES[3], sequence.labels_path(frame))
        moving = moving_by_rule(torch.from_numpy(channels)).numpy()
        tables.append(metrics.confusion(truth, np.where(moving, 2, 1), 3))
    rule = report["rule"]["total"]
    assert rule["moving_iou"] == metrics.moving_iou(sum(tables), 2)
    assert rule["moving_points"] == total["moving_points"]
    # Only scans 7 and 8 of the 16 have all eight channels; the outer ones have too few to be found at all.
    assert metrics.moving_iou(tables[7] + tables[8], 2) > 0.8
    assert 0.38 < rule["moving_iou"] < 0.41


# --- pictures


def test_pictures_of_the_fullest_scans_or_of_frames(tiny):
    pytest.importorskip("matplotlib")
    add_scan(tiny, "00", 4, [252, 252, 252, 40], [9, 9, 9, 9])
    report = score(tiny, pictures=tiny / "pictures")
    names = sorted(path.name for path in (tiny / "pictures").iterdir())
    assert names == ["00_000004.png", "08_000007.png"]
    assert report["pictures"] == [str(tiny / "pictures" / name) for name in names]
    report = score(tiny, pictures=tiny / "two", frames=[0, 2])
    assert [path.rsplit("/", 1)[1] for path in report["pictures"]] == ["00_000000.png", "00_000002.png"]


def test_frames_that_cannot_be_drawn(tiny):
    with pytest.raises(InputError, match="needs pictures"):
        score(tiny, frames=[0])
    with pytest.raises(InputError, match="frame 5: no scored sequence has labels and a prediction for it"):
        score(tiny, pictures=tiny, frames=[0, 5])


def test_missing_matplotlib_is_said_first(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write(tiny / "predicted/sequences/08/predictions/000007.label", [9, 3], np.uint32)  # an error found later
    with pytest.raises(InputError, match=r"pip install 'kdmos\[train\]'"):
        score(tiny, pictures=tiny / "pictures")


# --- the command


def test_json_and_nothing_else(tiny, capsys):
    assert run_main(tiny / "data", tiny / "predicted", "--json", "--sequences", "08, 00") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert list(report["sequences"]) == ["08", "00"] and err == ""
    assert report == evaluate_predictions(tiny / "data", tiny / "predicted", ["08", "00"])


def test_report_in_words(tiny, capsys):
    for name in ("00", "08"):
        folder = tiny / "data/sequences" / name
        (folder / "poses.txt").write_text(f"{IDENTITY}\n" * 8)
        (folder / "calib.txt").write_text(f"Tr: {IDENTITY}\n")
    assert run_main(tiny / "data", tiny / "predicted", "--rule") == 0
    out = capsys.readouterr().out
    assert re.search(r"total\W+predictions\W+3\W+8\W+5\W", out)  # scans, scored points, moving points
    for expected in ("60.0", "66.7", "total", "50+", "rule: at least half of the 8", "not scored: 11"):
        assert expected in out
    assert "movable" not in out and "nan" not in out

    write(tiny / "predicted/sequences/08/predictions/000007.label", [251, 250], np.uint32)
    assert run_main(tiny / "data", tiny / "predicted", "--rule") == 0
    assert "movable" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sequences", "08,"], "expected a list like 08,09"),
        (["--pictures", "x", "--frames", "1,b"], "'b' is not a frame number"),
        (["--sequences", "55"], "no sequence 55"),
        (["--frame", "1"], "No such option"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(tiny, capsys, options, message):
    assert run_main(tiny / "data", tiny / "predicted", *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and err.startswith("kdmos evaluate: ")


def test_as_a_module(tiny):
    command = [sys.executable, "-m", "kdmos.evaluate", str(tiny / "data"), str(tiny / "predicted")]
    done = subprocess.run([*command, "--split", "train"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("kdmos evaluate: ") and "Traceback" not in done.stderr


# --- data sets near SemanticKITTI, and predictions of another sensor or by odometry


def rule_predictions(data, output, *options):
    with pytest.raises(SystemExit) as stop:
        predict.main([str(part) for part in (data, "--checkpoint", "rule", "--output", output, *options)])
    return stop.value.code


@pytest.fixture
def helimos(tmp_path, write_sequence):
    """Two sensors, remission of 0..255, labels 0, 9, 251 of some scans, one list of frames for all sensors."""
    root = tmp_path / "data"
    for sensor in ("Velodyne", "Avia"):
        folder = write_sequence(root / "Deskewed_LiDAR" / sensor)
        for frame in range(14):
            points = np.fromfile(folder / "velodyne" / f"{frame:06d}.bin", np.float32).reshape(-1, 4)
            (points * np.array([1, 1, 1, 255], np.float32)).tofile(folder / "velodyne" / f"{frame:06d}.bin")
            path = folder / "labels" / f"{frame:06d}.label"
            classes = to_classes(np.fromfile(path, np.uint32), CLASSES[4], path)
            np.array([0, 9, 9, 251], np.uint32)[classes].tofile(path)
            if frame % 2:
                path.unlink()
    (root / "test.txt").write_text("4\n6\n8\n20\n")
    return root


def test_helimos_is_predicted_with_its_scale_and_scored_by_its_lists(helimos, tmp_path, capsys):
    output = tmp_path / "predicted"
    assert rule_predictions(helimos, output) == 1  # of another scale: every scan is listed
    shutil.rmtree(output)
    (tmp_path / "sensor.yaml").write_text("remission_scale: 255")
    assert rule_predictions(helimos, output, "--sensor", tmp_path / "sensor.yaml") == 0
    report = evaluate_predictions(helimos, output, split="test", rule=True)
    assert {name: found["scans"] for name, found in report["sequences"].items()} == {"Avia": 3, "Velodyne": 3}
    assert report["rule"]["total"] == report["total"] and report["total"]["moving_iou"] > 0
    assert report["unlabeled_is_static"] == []
    one = evaluate_predictions(helimos, output, ["Avia"], split="test")
    assert list(one["sequences"]) == ["Avia"]
    assert evaluate_predictions(helimos, output)["total"]["scans"] == 14  # all that have labels


def test_a_narrow_view_is_the_rules_too(helimos, tmp_path):
    (tmp_path / "sensor.yaml").write_text("remission_scale: 255\nheight: 2.0\nfield_of_view: [-90, 90]")
    assert rule_predictions(helimos, tmp_path / "predicted", "--sensor", tmp_path / "sensor.yaml") == 0
    report = evaluate_predictions(helimos, tmp_path / "predicted", rule=True)
    assert report["rule"]["total"] == report["total"]
    manifest = tmp_path / "predicted" / "predict.json"
    manifest.write_text(manifest.read_text().replace("field_of_view", "field"))
    with pytest.raises(InputError, match="the sensor noted beside the predictions is damaged"):
        evaluate_predictions(helimos, tmp_path / "predicted")


def test_poses_by_odometry_serve_the_rule(tmp_path, write_sequence):
    pytest.importorskip("kiss_icp")
    folder = write_sequence(tmp_path / "data" / "sequences" / "00")
    (folder / "poses.txt").unlink()
    assert rule_predictions(tmp_path / "data", tmp_path / "predicted") == 0
    report = score(tmp_path, rule=True)
    assert report["rule"]["total"] == report["total"]
    (tmp_path / "predicted" / "sequences" / "00" / "poses.txt").unlink()
    with pytest.raises(InputError, match="the rule needs poses"):
        score(tmp_path, rule=True)


def test_labels_that_know_no_static_points(tmp_path, capsys):
    """As those of Apollo: 0 is all that does not move. Where static points are known, 0 is unlabeled."""
    add_scan(tmp_path, "02", 0, [0, 0, 0, 251], [9, 251, 9, 251])
    add_scan(tmp_path, "03", 0, [0, 9, 251], [251, 9, 251])
    add_scan(tmp_path, "04", 0, [0, 0], [9, 251])  # nothing says what 0 is
    report = score(tmp_path)
    assert report["unlabeled_is_static"] == ["02"]
    assert report["sequences"]["02"]["points"] == 4
    assert report["sequences"]["02"]["moving_iou"] == pytest.approx(1 / 2)
    assert report["sequences"]["03"]["moving_iou"] == 1
    assert report["sequences"]["04"]["points"] == 0
    add_scan(tmp_path, "02", 1, [0] * 10 + [251] * 10, [251] * 20, [5] * 10 + [25] * 10)
    add_scan(tmp_path, "03", 1, [0] * 10 + [251] * 10, [251] * 20, [5] * 10 + [25] * 10)
    report = score(tmp_path)
    assert [report["sequences"][name]["false_objects_per_scan"] for name in ("02", "03", "04")] == [0.5, 0, 0]
    assert report["without_instances"] == ["02", "03"]
    assert run_main(tmp_path / "data", tmp_path / "predicted", "--report", tmp_path / "page.html") == 0
    assert "note: the labels of 02 are 0 and moving ones alone, so 0 counts as static" in capsys.readouterr().out
    assert "the labels of 02 are 0 and moving ones alone" in (tmp_path / "page.html").read_text()
