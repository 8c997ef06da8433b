"""`kdmos view` as a user runs it: pictures, films, a map and rerun recordings, and what cannot be shown."""

import shutil
import sys
import weakref

import numpy as np
import pytest

from kdmos import picture, predict, view
from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.source import WithPoses
from kdmos.errors import InputError
from kdmos.models import load_model
from kdmos.motion import motion_channels
from kdmos.predictions import MOVING, UNLABELED
from kdmos.settings import MotionSettings

image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

FRAMES = 12


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        view.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_sequence):
    """A sequence with labels, poses and times, and what the rule predicts for it."""
    root = tmp_path_factory.mktemp("view")
    write_sequence(root / "00", frames=FRAMES)
    (root / "00" / "times.txt").write_text("".join(f"{0.1 * i:.2f}\n" for i in range(FRAMES)))
    with pytest.raises(SystemExit):
        predict.main([str(root / "00"), "--checkpoint", "rule", "--output", str(root / "out")])
    return root


@pytest.fixture
def data(made, tmp_path):
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data" / "00"


@pytest.fixture
def predictions(data):
    return data.parent / "out"


def colours(path) -> set[str]:
    with image.open(path) as opened:
        pixels = np.unique(np.asarray(opened.convert("RGB")).reshape(-1, 3), axis=0)
    return {"#" + bytes(pixel).hex() for pixel in pixels}


def width(path) -> int:
    with image.open(path) as opened:
        return opened.size[0]


def test_a_picture_of_each_frame_shows_truth_prediction_and_errors(data, predictions, tmp_path, capsys):
    folder = tmp_path / "pictures"
    assert run(data, predictions, "--frames", "4:7", "--pictures", folder, "--size", 200) == 0
    assert capsys.readouterr().out == f"{folder}: 3 scans\n"
    assert sorted(path.name for path in folder.iterdir()) == [f"00_{frame:06d}.png" for frame in (4, 5, 6)]
    three = folder / "00_000004.png"
    assert {picture.MOVING, picture.HIT} <= colours(three)
    assert run(data, predictions, "--frames", "4", "--pictures", folder, "--size", 200, "--panels", "errors") == 0
    assert width(three) < 250 and picture.MOVING not in colours(three) and picture.HIT in colours(three)


def test_without_truth_the_prediction_alone_is_shown(data, predictions, tmp_path):
    shutil.rmtree(data / "labels")
    assert run(data, predictions, "--frames", "5:6", "--pictures", tmp_path, "--size", 200) == 0
    path = tmp_path / "00_000005.png"
    assert width(path) == 200 + 2 * 12
    assert picture.MOVING in colours(path) and not {picture.HIT, picture.MISSED} & colours(path)


def test_without_predictions_and_poses_the_truth_then_the_points(data, tmp_path):
    (data / "poses.txt").unlink()
    path = tmp_path / "00_000005.png"
    assert run(data, "--frames", "5", "--pictures", tmp_path, "--size", 200) == 0
    assert width(path) == 200 + 2 * 12
    assert picture.MOVING in colours(path) and picture.TRAJECTORY not in colours(path)
    shutil.rmtree(data / "labels")
    assert run(data, "--frames", "5", "--pictures", tmp_path, "--size", 200) == 0
    assert picture.MOVING not in colours(path)


def test_predicting_on_the_way_is_the_same_as_reading(data, predictions, tmp_path):
    asked = ["--frames", "5:8", "--size", 150, "--pictures"]
    assert run(data, predictions, *asked, tmp_path / "read") == 0
    assert run(data, "--checkpoint", "rule", *asked, tmp_path / "live") == 0
    for frame in (5, 6, 7):
        name = f"00_{frame:06d}.png"
        assert (tmp_path / "read" / name).read_bytes() == (tmp_path / "live" / name).read_bytes()


@pytest.mark.parametrize("motion", [MotionSettings(), MotionSettings("causal")])
def test_channels_of_some_frames_are_those_of_the_whole_sequence(data, motion):
    (source,) = find_sequences(data)
    scans = [source.read_points(frame) for frame in source.frames]
    whole = motion_channels(scans, source.poses(), form=motion.form)
    assert any(channels.any() for channels in whole[3:9])
    drive = view.Drive(source, source.frames[3:9], source.poses())
    for shown in view.shown_scans(drive, labels=True, motion=motion):
        np.testing.assert_array_equal(shown.residual, whole[shown.index])
        panels = view.panels_of(shown, ("residual", "channels"), motion)
        assert len(panels) == 9
        for k in range(8):
            marked = sum(marks.mask.astype(int) for marks in panels[f"channel_{k}"].marks)
            np.testing.assert_array_equal(marked, whole[shown.index][:, k] != 0)


class Noting(WithPoses):
    """Notes the frames that are read, and whether their points are still held by anyone."""

    def __init__(self, source):
        super().__init__(source, source.poses())
        self.read, self.held = [], []

    def read_points(self, frame):
        points = super().read_points(frame)
        self.read.append(frame)
        self.held.append(weakref.ref(points))
        return points


def test_each_scan_is_read_once_and_forward(data):
    (data / "velodyne" / "000005.bin").write_bytes(b"short")
    source = Noting(find_sequences(data)[0])
    drive = view.Drive(source, source.frames[2:9], source.poses())
    asked = {"model": load_model("rule"), "motion": MotionSettings()}
    found = [getattr(shown, "frame", None) for shown in view.shown_scans(drive, labels=True, **asked)]
    assert found == [2, 3, 4, None, 6, 7, 8]
    assert source.read == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_what_was_shown_is_forgotten(data):
    source = Noting(find_sequences(data)[0])
    for shown in view.shown_scans(view.Drive(source, source.frames, source.poses()), labels=True):
        assert [held() is not None for held in source.held] == [False] * shown.index + [True]


def test_a_picture_of_the_channels(data, tmp_path):
    assert run(data, "--frames", "6", "--panels", "channels", "--size", 120, "--pictures", tmp_path) == 0
    path = tmp_path / "00_000006.png"
    assert width(path) == 4 * (120 + 12) + 12
    assert {colour for *_, colour in picture.RESIDUALS} & colours(path) and picture.MOVING not in colours(path)


def test_films(data, predictions, tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    asked = [data, predictions, "--frames", "2:7", "--panels", "errors", "--size", 151]
    assert run(*asked, "--film", tmp_path / "new" / "a.gif", "--fps", 5) == 0
    with image.open(tmp_path / "new" / "a.gif") as film:
        assert film.n_frames == 5 and film.info["duration"] == 200 and "loop" in film.info
    assert run(*asked, "--film", tmp_path / "a.mp4") == 0
    with imageio.get_reader(tmp_path / "a.mp4") as film:
        frames = [frame for frame in film]  # list() asks for its length, which is endless
        assert film.get_meta_data()["fps"] == 10
    assert len(frames) == 5 and frames[0].shape == (260, 176, 3)  # even, as H.264 needs
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["a.mp4"]


def test_a_film_that_fails_leaves_nothing(data, predictions, tmp_path, capsys, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    calls = iter(range(3))

    def draw(*arguments):
        if next(calls) == 2:
            raise InputError("the disk is full")
        return picture.panels_picture(np.zeros((1, 3)), [picture.Panel("a", [])], "", size=100)

    monkeypatch.setattr(view, "draw", draw)
    (tmp_path / "films").mkdir()
    assert run(data, predictions, "--film", tmp_path / "films" / "a.mp4") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not list((tmp_path / "films").iterdir())


def test_a_map_of_a_drive_marks_what_moves(data, predictions, tmp_path):
    for moving, name in (([], "truth.png"), ([predictions], "predicted.png")):
        assert run(data, *moving, "--map", tmp_path / name, "--size", 150, "--extent", 30) == 0
        assert {picture.MOVING, picture.TRAJECTORY} <= colours(tmp_path / name)
    assert (tmp_path / "truth.png").read_bytes() != (tmp_path / "predicted.png").read_bytes()


# --- rerun


def recorded(path) -> dict:
    """Record batches of a recording by entity, in order of the frames, without the blueprint."""
    chunk = pytest.importorskip("rerun.chunk")
    batches = {}
    for part in chunk.RrdReader(str(path)).stream():
        batches.setdefault(part.entity_path, []).append(part.to_record_batch())
    return batches


def values(batches, column: str, timeline: str = "frame") -> dict[int, np.ndarray]:
    """{time: value} of a column."""
    found = {}
    for batch in batches:
        if column in batch.schema.names and timeline in batch.schema.names:
            times = batch.column(batch.schema.names.index(timeline)).cast("int64").to_pylist()
            found |= dict(zip(times, batch.column(batch.schema.names.index(column)).to_pylist()))
    return {time: np.array(found[time]) for time in sorted(found)}


def test_a_recording_holds_points_marks_trajectory_and_curves(data, predictions, tmp_path):
    pytest.importorskip("rerun")
    path = tmp_path / "new" / "a.rrd"
    assert run(data, predictions, "--frames", "3:9", "--save", path) == 0
    assert [file.name for file in path.parent.iterdir()] == ["a.rrd"]
    batches, (source,) = recorded(path), find_sequences(data)
    channels = [f"/world/lidar/channel_{k}" for k in range(8)]
    assert set(batches) >= {f"/world/lidar/{n}" for n in ("scan", "truth", "prediction", "errors", "residual")}
    assert set(batches) >= {"/world/trajectory", "/moving/truth", "/moving/prediction", "/iou", *channels}

    drive = view.Drive(source, source.frames[3:9], source.poses())
    shown = list(view.shown_scans(drive, True, predictions, motion=MotionSettings()))
    positions = values(batches["/world/lidar/scan"], "Points3D:positions")
    assert list(positions) == [3, 4, 5, 6, 7, 8]
    for scan in shown:
        np.testing.assert_array_equal(positions[scan.frame], scan.points[:, :3])
    counts = values(batches["/moving/truth"], "Scalars:scalars")
    assert [counts[scan.frame] for scan in shown] == [(scan.truth == MOVING).sum() for scan in shown]
    iou = values(batches["/iou"], "Scalars:scalars")
    assert iou == {scan.frame: scan.moving_iou for scan in shown if scan.moving_iou is not None} and len(iou) > 2
    for name, mask in (("truth", lambda scan: scan.truth == MOVING), ("prediction", lambda scan: scan.predicted)):
        marked = values(batches[f"/world/lidar/{name}"], "Points3D:positions")
        for scan in shown:
            expected = scan.points[mask(scan), :3]
            assert sorted(map(tuple, marked[scan.frame].reshape(-1, 3))) == sorted(map(tuple, expected))
    stamps = values(batches["/world/lidar/scan"], "Points3D:positions", "stamp")
    assert list(stamps) == [round(1e8 * frame) for frame in range(3, 9)]  # nanoseconds
    poses = values(batches["/world/lidar"], "Transform3D:translation")
    np.testing.assert_allclose(poses[8][0], source.poses()[8][:3, 3], atol=1e-5)  # float32 of some 10 m


def test_a_recording_of_points_alone(data, tmp_path):
    pytest.importorskip("rerun")
    (data / "poses.txt").unlink()
    (data / "times.txt").unlink()
    shutil.rmtree(data / "labels")
    assert run(data, "--frames", ":2", "--save", tmp_path / "a.rrd") == 0
    batches = recorded(tmp_path / "a.rrd")
    assert {entity for entity in batches if entity.startswith("/world/")} == {"/world/lidar/scan"}


def test_non_finite_points_are_not_logged(data, predictions, tmp_path):
    pytest.importorskip("rerun")
    file = data / "velodyne" / "000001.bin"
    points = np.fromfile(file, "<f4").reshape(-1, 4)
    points[:5, 0] = np.nan
    points.tofile(file)
    assert run(data, predictions, "--frames", "1", "--save", tmp_path / "a.rrd") == 0
    positions = values(recorded(tmp_path / "a.rrd")["/world/lidar/scan"], "Points3D:positions")
    np.testing.assert_array_equal(positions[1], points[5:, :3])


def test_the_viewer_opens_where_there_is_a_display(data, monkeypatch, capsys):
    rerun = pytest.importorskip("rerun")
    opened = []
    monkeypatch.setattr(rerun.RecordingStream, "spawn", lambda self: opened.append(self))
    monkeypatch.setenv("DISPLAY", ":0")
    assert run(data, "--frames", "0:2") == 0
    assert len(opened) == 1


def test_without_a_display_the_message_says_what_else_there_is(data, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert run(data) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(option in message for option in ("no display", "--save", "--pictures", "--film", "--map"))


# --- what cannot be shown


def test_bad_scans_and_missing_predictions_are_listed_and_the_rest_goes_on(data, predictions, tmp_path, capsys):
    (data / "velodyne" / "000005.bin").write_bytes(b"short")
    (predictions / "sequences" / "00" / "predictions" / "000007.label").unlink()
    asked = ["--frames", "4:9", "--size", 100, "--panels", "errors,residual", "--pictures", tmp_path / "pictures"]
    assert run(data, predictions, *asked) == 1
    captured = capsys.readouterr()
    assert "3 scans" in captured.out and captured.err.count("not shown:") == 2
    assert "not shown: 00/000005:" in captured.err and "000007.label: no prediction of this scan" in captured.err
    assert len(list((tmp_path / "pictures").iterdir())) == 3
    assert run(data, "--checkpoint", "rule", "--frames", "4:9", "--pictures", tmp_path / "live", "--size", 100) == 1
    assert "4 scans" in capsys.readouterr().out


def test_nothing_that_can_be_shown(data, tmp_path, capsys):
    (data / "velodyne" / "000003.bin").write_bytes(b"")
    assert run(data, "--frames", "3", "--film", tmp_path / "a.gif") == 2
    assert "no scan could be shown; 00/000003" in capsys.readouterr().err
    assert not (tmp_path / "a.gif").exists()


def test_a_scan_without_a_label_file_is_one_of_unlabeled_points(data):
    (data / "labels" / "000004.label").unlink()
    (source,) = find_sequences(data)
    (shown,) = view.shown_scans(view.Drive(source, (4,), None), labels=True)
    assert (shown.truth == UNLABELED).all() and shown.moving_iou is None


def test_moving_iou_of_a_scan():
    truth = np.array([MOVING, MOVING, 1, 1, UNLABELED], np.uint8)
    points = np.zeros((5, 4), np.float32)
    shown = view.Shown(0, 0, points, truth, np.array([True, False, True, False, True]), None)
    assert shown.moving_iou == 1 / 3  # one found, one missed, one false alarm; the last one has no truth
    assert view.Shown(0, 0, points, truth * 0 + 1, np.zeros(5, bool), None).moving_iou is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--film", "a.avi"], "expected a name that ends in .mp4 or .gif"),
        (["--save", "a.bin"], "expected a name that ends in .rrd"),
        (["--map", "a.jpg"], "expected a name that ends in .png"),
        (["--film", "a.gif", "--frames", "4-7"], "--frames '4-7': expected A:B"),
        (["--film", "a.gif", "--frames", "40:"], "--frames 40:: no scan has such a number; sequence 00 has 0 to 11"),
        (["--film", "a.gif", "--panels", "heat"], "no panel 'heat'; there are scan, truth"),
        (["--film", "a.gif", "--panels", "errors"], "--panels errors: needs predictions"),
        (["--map", "a.png", "--panels", "truth"], "needs one of them"),
        (["--film", "a.gif", "--extent", "0"], "--extent 0.0: expected metres, more than 0"),
        (["--film", "a.gif", "--extent", "inf"], "--extent inf: expected metres, more than 0"),
        (["--film", "a.gif", "--sequences", "01"], "no sequence 01; found 00"),
        (["nowhere", "--film", "a.gif"], "nowhere: no such folder; kdmos predict writes it"),
        (["OUT", "--film", "a.gif", "--checkpoint", "rule"], "exclude each other"),
        (["--film", "a.gif", "--checkpoint", "b.pt"], "b.pt: no such checkpoint file"),
    ],
)
def test_wrong_arguments_end_with_one_line(data, predictions, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(data, *(predictions if argument == "OUT" else argument for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path != data.parent]


def test_what_needs_poses_or_predictions_says_so(data, predictions, tmp_path, capsys):
    (data / "poses.txt").unlink()
    assert run(data, "--pictures", tmp_path / "a", "--panels", "residual") == 2
    assert "--panels residual: needs poses" in capsys.readouterr().err
    assert run(data, "--map", tmp_path / "a.png") == 2
    assert "needs poses" in capsys.readouterr().err
    assert run(data, "--checkpoint", "rule", "--pictures", tmp_path / "a") == 2
    assert "--checkpoint rule: needs poses" in capsys.readouterr().err
    shutil.rmtree(predictions / "sequences" / "00")
    assert run(data, predictions, "--pictures", tmp_path / "a") == 2
    assert "no .label file, so no prediction of sequence 00; kdmos predict writes them" in capsys.readouterr().err


def test_of_several_sequences_those_with_predictions_are_shown(made, tmp_path, capsys):
    root = tmp_path / "root"
    for name in ("00", "01"):
        shutil.copytree(made / "00", root / "sequences" / name)
    asked = ["--frames", "3", "--size", 100]
    assert run(root, made / "out", *asked, "--pictures", tmp_path / "a") == 0
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["00_000003.png"]
    assert run(root, *asked, "--pictures", tmp_path / "b") == 0
    assert len(list((tmp_path / "b").iterdir())) == 2
    assert run(root, made / "out", *asked, "--sequences", "00,01", "--pictures", tmp_path / "c") == 2
    assert "no prediction of sequence 01" in capsys.readouterr().err
    assert run(root, *asked, "--save", tmp_path / "a.rrd") == 2
    assert "name it with --sequences, one of 00, 01" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("rerun", ["--save", "a.rrd"], "the viewer needs rerun: pip install 'kdmos[view]'"),
        ("imageio_ffmpeg", ["--film", "a.mp4"], "films as .mp4 need imageio and imageio-ffmpeg: pip install"),
        ("matplotlib.figure", ["--film", "a.gif"], "pictures need matplotlib: pip install 'kdmos[view]'"),
    ],
)
def test_missing_libraries_are_named(data, tmp_path, monkeypatch, capsys, module, arguments, message):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    assert run(data, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_recording_that_cannot_be_written(data, tmp_path, capsys):
    pytest.importorskip("rerun")
    (tmp_path / "file").write_text("")
    assert run(data, "--save", tmp_path / "file" / "a.rrd") == 2
    assert "a.rrd" in capsys.readouterr().err


def test_real_scans(realdata, tmp_path):
    drive = realdata("kitti-raw-0005-a")
    assert run(drive, "--checkpoint", "rule", "--frames", "7", "--pictures", tmp_path) == 0
    path = tmp_path / "kitti-raw-0005-a_000007.png"
    assert {picture.MOVING, picture.HIT, picture.NO_TRUTH} <= colours(path)
    assert path.stat().st_size < 300_000


def test_a_sensor_is_described_for_the_model_and_the_channels(data, tmp_path, capsys):
    """The same drive from 1 m higher up, its remission out of 255: with the YAML what was seen before."""
    before, whole = tmp_path / "before", tmp_path / "whole"
    asked = ("--frames", "8", "--panels", "residual,prediction", "--size", "200", "--pictures")
    assert run(data, "--checkpoint", "rule", *asked, before) == 0
    for path in (data / "velodyne").iterdir():
        points = np.fromfile(path, np.float32).reshape(-1, 4) * np.float32([1, 1, 1, 255]) - np.float32([0, 0, 1, 0])
        points.tofile(path)
    (tmp_path / "high.yaml").write_text("height: 2.73\nremission_scale: 255\n")
    assert run(data, "--checkpoint", "rule", "--sensor", tmp_path / "high.yaml", *asked, whole) == 0
    assert {picture.MOVING} <= colours(before / "00_000008.png") & colours(whole / "00_000008.png")

    (sequence,) = find_sequences(data, remission_scale=255)
    drive = view.Drive(sequence, sequence.frames, sequence.poses())
    profile = view.SensorProfile(height=2.73, remission_scale=255, range=(5, 80))
    for shown in view.shown_scans(drive, False, model=load_model("rule"), motion=MotionSettings(), profile=profile):
        left_out = np.linalg.norm(shown.points[:, :3], axis=1) < 5
        assert left_out.any() and not shown.predicted[left_out].any() and not shown.residual[left_out].any()
        assert shown.predicted.any() or not 4 <= shown.frame < 8
    assert run(data, tmp_path, "--sensor", tmp_path / "high.yaml", "--map", tmp_path / "a.png") == 2
    assert "PREDICTIONS and --sensor exclude each other" in capsys.readouterr().err
