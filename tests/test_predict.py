"""Prediction as a user runs it: one label per point comes back, bad scans are listed, an interrupted run goes on."""

import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from kdmos import predict
from kdmos.data.poses import read_poses
from kdmos.data.profile import SensorProfile, differences
from kdmos.data.semantic_kitti import find_sequences
from kdmos.errors import InputError
from kdmos.inference import WayOut, prepared
from kdmos.models import Student, build_student, load_student, save_model
from kdmos.motion import motion_channels
from kdmos.predictions import predicted_sources
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
    fast = prepared(student)  # as predict runs it: its logits round otherwise, which half precision may show
    for frame, points, residual in zip(sequence.frames, scans, residuals):
        with torch.no_grad():
            (logits,) = student.point_logits([points], [residual])
        raw = np.array([9, 9, 250, 251])[logits.argmax(1)]
        np.testing.assert_array_equal(labels(output, frame), raw)
        path = output / "sequences" / "00" / "predictions" / f"{frame:06d}.score"
        found = fast(points, torch.tensor([0, len(points)]), residual).point_logits
        torch.testing.assert_close(found, logits)
        _, probability = WayOut().decide(found, 3, np.arange(4))
        np.testing.assert_array_equal(np.fromfile(path, np.float16), probability.astype(np.float16))
        np.testing.assert_allclose(probability, found.softmax(1)[:, 3], rtol=1e-5, atol=1e-7)
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


def test_missing_calibration_and_checkpoints(data, checkpoint, tmp_path, capsys):
    assert run(data, "--checkpoint", tmp_path / "none.pt") == 2
    assert "no such checkpoint" in capsys.readouterr().err
    (data / "calib.txt").unlink()
    assert run(data, "--checkpoint", checkpoint) == 2
    assert "calib.txt" in capsys.readouterr().err


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


# ---- any input


def scans_of(data):
    (sequence,) = find_sequences(data)
    return [sequence.read_points(frame) for frame in sequence.frames]


def same_labels(output, others, name, other_name="00", frames=10):
    for frame in range(frames):
        np.testing.assert_array_equal(labels(output, frame, name), labels(others, frame, other_name))


@pytest.fixture(scope="module")
def expected(tmp_path_factory, write_sequence):
    """Predictions of the sequence folder."""
    folder = tmp_path_factory.mktemp("expected")
    data, checkpoint = write_sequence(folder / "00", frames=10), student_file(folder / "student.safetensors")
    assert run(data, "--checkpoint", checkpoint, "--output", folder / "out", "--scores") == 0
    return folder / "out"


@pytest.mark.parametrize("kind", ["ros1", "sqlite3", "mcap"])
def test_a_bag_gives_the_labels_of_the_folder(data, checkpoint, expected, tmp_path, bags, kind):
    pytest.importorskip("rosbags")
    path = tmp_path / ("drive.bag" if kind == "ros1" else "drive")
    clouds = [bags.xyzi(points, stamp=10 + 0.1 * i) for i, points in enumerate(scans_of(data))]
    bags.write(path, clouds, kind)
    poses = ["--poses", data / "poses.txt", "--calib", data / "calib.txt"]
    assert run(path, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--scores", *poses) == 0
    same_labels(tmp_path / "out", expected, "drive")
    manifest = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert manifest["topic"] == "/points" and len(manifest["poses"]) == 32 + 5 + 32
    # what is missing is made again, the rest is left alone
    folder = tmp_path / "out" / "sequences" / "drive" / "predictions"
    (folder / "000004.label").unlink()
    kept = (folder / "000005.label").stat().st_mtime_ns
    assert run(path, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--scores", *poses) == 0
    same_labels(tmp_path / "out", expected, "drive")
    assert (folder / "000005.label").stat().st_mtime_ns == kept
    assert run(path, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--scores") == 2  # with other poses


def test_predictions_of_a_topic_are_shown_with_its_scans(data, tmp_path, bags):
    pytest.importorskip("rosbags")
    clouds = [bags.xyzi(points, stamp=10 + 0.1 * i) for i, points in enumerate(scans_of(data))]
    path, out = tmp_path / "drive.bag", tmp_path / "out"
    bags.write(path, clouds, "ros1", topics=("/front", "/roof"))
    poses = ["--poses", data / "poses.txt", "--calib", data / "calib.txt"]
    assert run(path, "--checkpoint", "rule", "--output", out, "--topic", "/roof", *poses) == 0
    for topic in (None, "/roof"):
        (source,) = predicted_sources(path, None, out, topic)
        assert "/roof" in source.where(0)
    with pytest.raises(InputError, match=r"--topic /front: .*out holds predictions of /roof"):
        predicted_sources(path, None, out, "/front")


def test_a_folder_of_files_with_poses_beside_them(data, checkpoint, expected, tmp_path):
    folder = tmp_path / "mine" / "scans"
    folder.mkdir(parents=True)
    for i, points in enumerate(scans_of(data)):
        np.save(folder / f"scan{i}.npy", points)
    lidar = read_poses(data / "poses.txt", data / "calib.txt")
    rows = "".join(" ".join(f"{value:.17g}" for value in pose[:3].ravel()) + "\n" for pose in lidar)
    (folder.parent / "poses.txt").write_text(rows)
    assert run(folder, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 0
    same_labels(tmp_path / "out", expected, "scans")
    shutil.copy(data / "poses.txt", folder)  # nearer, and of a camera
    shutil.copy(data / "calib.txt", folder)
    assert run(folder, "--checkpoint", checkpoint, "--output", tmp_path / "again") == 0
    same_labels(tmp_path / "again", expected, "scans")


def test_given_poses_are_kept_for_what_comes_after(data, tmp_path, capsys):
    """A folder of scans that has none of its own: its map, its trajectory, the rule."""
    folder, out = tmp_path / "scans", tmp_path / "out"
    folder.mkdir()
    for frame, points in enumerate(scans_of(data)):
        np.save(folder / f"{frame}.npy", points)
    poses = ["--poses", data / "poses.txt", "--calib", data / "calib.txt"]
    assert run(folder, "--checkpoint", "rule", "--output", out, *poses) == 0
    (source,) = predicted_sources(folder, None, out)
    (camera,) = find_sequences(data)
    given = camera.poses()
    np.testing.assert_allclose(source.poses(), source.poses()[0] @ given, atol=1e-12)
    (out / "sequences" / "scans" / "predictions" / "000003.label").unlink()
    assert run(folder, "--checkpoint", "rule", "--output", out, *poses) == 0  # they are ours
    (out / "predict.json").unlink()
    shutil.rmtree(out / "sequences" / "scans" / "predictions")
    assert run(folder, "--checkpoint", "rule", "--output", out, *poses) == 2
    assert "there already, and not by kdmos predict" in capsys.readouterr().err


def test_stamped_poses(data, checkpoint, tmp_path, capsys):
    """The poses of every other scan, in TUM's format: those between them are interpolated."""
    np.savetxt(data / "times.txt", np.arange(10) * 0.1 + 5)
    rows = [f"{5 + 0.2 * i} {i} 0 0 0 0 0 1" for i in range(6)]
    (tmp_path / "tum.txt").write_text("# stamp tx ty tz qx qy qz qw\n" + "\n".join(rows))
    straight = "".join(f"1 0 0 {0.5 * i} 0 1 0 0 0 0 1 0\n" for i in range(10))
    (tmp_path / "kitti.txt").write_text(straight)
    assert run(data, "--checkpoint", "rule", "--output", tmp_path / "a", "--poses", tmp_path / "tum.txt") == 0
    assert run(data, "--checkpoint", "rule", "--output", tmp_path / "b", "--poses", tmp_path / "kitti.txt") == 0
    same_labels(tmp_path / "a", tmp_path / "b", "00")
    (tmp_path / "tum.txt").write_text("\n".join(rows[:3]))
    assert run(data, "--checkpoint", "rule", "--output", tmp_path / "c", "--poses", tmp_path / "tum.txt") == 2
    assert "0.500 s outside; check that both have the same clock" in capsys.readouterr().err


def test_odometry_where_there_are_no_poses(data, checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("kiss_icp")
    assert run(data, "--checkpoint", "rule", "--output", tmp_path / "own") == 0
    poses = data / "poses.txt"
    poses.unlink()
    assert run(data, "--checkpoint", "rule", "--output", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    kept = tmp_path / "out" / "sequences" / "00" / "poses.txt"
    assert f"00: poses from the scans themselves, by odometry (KISS-ICP); kept in {kept}" in printed
    assert len(kept.read_text().splitlines()) == 10
    first = [labels(tmp_path / "out", frame) for frame in range(10)]

    # The same command goes on with the poses it has ...
    (tmp_path / "out" / "sequences" / "00" / "predictions" / "000003.label").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(predict, "odometry_poses", lambda *_: pytest.fail("computed again"))
        assert run(data, "--checkpoint", "rule", "--output", tmp_path / "out") == 0
    # ... and makes the same ones anew.
    kept.unlink()
    shutil.rmtree(tmp_path / "out" / "sequences" / "00" / "predictions")
    assert run(data, "--checkpoint", "rule", "--output", tmp_path / "out") == 0
    for frame in range(10):
        np.testing.assert_array_equal(labels(tmp_path / "out", frame), first[frame])

    # Poses that are there are another way of making predictions.
    shutil.copy(kept, poses)
    assert run(data, "--checkpoint", "rule", "--output", tmp_path / "out") == 2
    assert "holds predictions with another poses" in capsys.readouterr().err
    assert run(data, "--checkpoint", "rule", "--output", tmp_path / "forced", "--odometry") == 0
    same_labels(tmp_path / "forced", tmp_path / "out", "00")


def test_odometry_without_its_library(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kiss_icp.config.parser", None)
    (data / "poses.txt").unlink()
    assert run(data, "--checkpoint", "rule", "--output", tmp_path / "out") == 2
    assert (
        "odometry needs kiss-icp: pip install 'kdmos[odometry]', or give poses of your own" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_poses_of_others_are_not_overwritten(data, tmp_path, capsys):
    """As where the predictions go into the data set itself."""
    pytest.importorskip("kiss_icp")
    root = tmp_path / "root"
    shutil.move(data, root / "sequences" / "00")
    before = (root / "sequences" / "00" / "poses.txt").read_bytes()
    assert run(root, "--checkpoint", "rule", "--output", root, "--odometry") == 2
    assert "there already, and not by kdmos predict; choose another --output" in capsys.readouterr().err
    assert (root / "sequences" / "00" / "poses.txt").read_bytes() == before
    assert not (root / "predict.json").exists()
    assert run(root, "--checkpoint", "rule", "--output", root) == 0  # with the poses that are there


def test_a_sensor_of_another_scale_and_view(data, checkpoint, tmp_path, capsys):
    """Scans of another scale give the labels of the scans as they were; what is outside is 9, in its place."""
    scans = scans_of(data)
    view = tmp_path / "view.yaml"
    view.write_text("field_of_view: [-90, 90]\nrange: [2, 60]\n")
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "expected", "--sensor", view) == 0
    assert "% of the points lie outside range or field of view and were labelled 9" in capsys.readouterr().out
    for frame, points in enumerate(scans):  # a power of two: exact in float32
        (points * np.array([1, 1, 1, 256], np.float32)).tofile(data / "velodyne" / f"{frame:06d}.bin")
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 1  # every scan is listed
    capsys.readouterr()
    view.write_text("field_of_view: [-90, 90]\nrange: [2, 60]\nremission_scale: 256\n")
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "out2", "--sensor", view) == 0
    same_labels(tmp_path / "out2", tmp_path / "expected", "00")
    for frame, points in enumerate(scans):
        written = labels(tmp_path / "out2", frame)
        distance = np.linalg.norm(points[:, :3], axis=1)
        outside = (points[:, 0] < 0) | (distance < 2) | (distance > 60)
        assert len(written) == len(points) and outside.any() and (written[outside] == 9).all()
    manifest = json.loads((tmp_path / "out2" / "predict.json").read_text())
    assert manifest["sensor"] == {"range": [2, 60], "field_of_view": [-90, 90], "remission_scale": 256}
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "out2") == 2
    assert "with another sensor" in capsys.readouterr().err
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "out2", "--sensor", view) == 0


def test_a_lower_sensor_gives_the_labels_of_the_usual_one(data, checkpoint, expected, tmp_path):
    for frame, points in enumerate(scans_of(data)):
        (points + np.array([0, 0, 1.13, 0], np.float32)).tofile(data / "velodyne" / f"{frame:06d}.bin")
    poses = read_poses(data / "poses.txt", data / "calib.txt")
    poses[:, :3, 3] -= 1.13 * poses[:, :3, 2]  # of the sensor as it is mounted now
    rows = (" ".join(f"{value:.17g}" for value in pose[:3].ravel()) for pose in poses)
    (tmp_path / "poses.txt").write_text("\n".join(rows))
    (tmp_path / "low.yaml").write_text("height: 0.6")
    arguments = [data, "--checkpoint", checkpoint, "--poses", tmp_path / "poses.txt"]
    assert run(*arguments, "--output", tmp_path / "out", "--sensor", tmp_path / "low.yaml") == 0
    with pytest.warns(UserWarning, match="the ground seems to lie 0.[456] m below"):
        assert run(*arguments, "--output", tmp_path / "without") == 0
    total = differ = differ_without = 0
    for frame in range(10):
        want = labels(expected, frame)
        total += len(want)
        differ += np.count_nonzero(labels(tmp_path / "out", frame) != want)
        differ_without += np.count_nonzero(labels(tmp_path / "without", frame) != want)
    assert differ < 1e-3 * total  # z is rounded twice more, which moves single points into the next cell
    assert differ_without > 10 * differ


def test_no_point_in_view_is_no_error(data, checkpoint, tmp_path):
    (tmp_path / "far.yaml").write_text("range: [500, 600]")
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--sensor", tmp_path / "far.yaml") == 0
    for frame, points in enumerate(scans_of(data)):
        assert (labels(tmp_path / "out", frame) == 9).all() and len(labels(tmp_path / "out", frame)) == len(points)


def test_a_scale_of_remission_is_asked_for_once(data, checkpoint, tmp_path, bags, capsys):
    clouds = [bags.xyzi(points * np.array([1, 1, 1, 255], np.float32)) for points in scans_of(data)]
    path = bags.write(tmp_path / "drive.bag", clouds)
    poses = ["--poses", data / "poses.txt", "--calib", data / "calib.txt"]
    assert run(path, "--checkpoint", checkpoint, "--output", tmp_path / "out", *poses) == 2
    error = capsys.readouterr().err
    assert "message 0 of /points: the remission runs from " in error
    assert "write 'remission_scale: 255' (the likely full scale) into a --sensor file" in error
    assert not (tmp_path / "out").exists()
    # the rule looks at no remission
    assert run(path, "--checkpoint", "rule", "--output", tmp_path / "rule", *poses) == 0


def test_what_differs_from_training_is_one_warning(data, checkpoint, tmp_path, recwarn):
    folder = tmp_path / "low"
    folder.mkdir()
    for i, points in enumerate(scans_of(data)):
        np.save(folder / f"{i}.npy", points[:, :3] + [0, 0, 1.2])
    poses = ["--poses", data / "poses.txt", "--calib", data / "calib.txt"]
    assert run(folder, "--checkpoint", checkpoint, "--output", tmp_path / "out", *poses) == 0
    (said,) = [str(w.message) for w in recwarn if "was trained on" in str(w.message)]
    assert said.startswith(f"low: other than what {checkpoint} was trained on: the ground seems to lie 0.")
    assert "the remission is 0 everywhere" in said


@pytest.mark.parametrize("name", ["kitti-raw-0005-a", "kitti-odometry-00", "semantickitti-single-000964"])
def test_no_false_alarm_on_real_scans(realdata, name):
    sensor = load_student("synthetic").header["sensor"]
    (sequence,) = find_sequences(realdata(name))
    for frame in sequence.frames:
        assert differences(SensorProfile().apply(sequence.read_points(frame))[0], sensor) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--poses", "nowhere.txt"], "nowhere.txt: the poses file does not exist"),
        (["--poses", "nowhere.txt", "--odometry"], "--poses and --odometry exclude each other"),
        (["--calib", "calib.txt"], "--calib says what the poses of --poses are of"),
        (["--sensor", "nowhere.yaml"], "--sensor nowhere.yaml: cannot be read"),
        (["--topic", "/points"], "is no bag"),
    ],
)
def test_options_that_do_not_fit_are_one_line(data, checkpoint, tmp_path, capsys, change, message):
    assert run(data, "--checkpoint", checkpoint, "--output", tmp_path / "out", *change) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_poses_belong_to_one_sequence(data, checkpoint, tmp_path, capsys):
    root = tmp_path / "root"
    for name in ("00", "01"):
        shutil.copytree(data, root / "sequences" / name)
    arguments = [root, "--checkpoint", "rule", "--output", tmp_path / "out", "--poses", data / "poses.txt"]
    assert run(*arguments) == 2
    assert "belong to one sequence; choose it with --sequences" in capsys.readouterr().err
    assert run(*arguments, "--calib", data / "calib.txt", "--sequences", "01") == 0
    assert run(root, "--checkpoint", "rule", "--output", tmp_path / "own", "--sequences", "01") == 0
    same_labels(tmp_path / "out", tmp_path / "own", "01", "01")
