"""`kdmos clean`: what moves is gone, all else stays as it was; resumed, never over its input; one map of the rest."""

import json
import shutil
import sys

import numpy as np
import pytest

from kdmos import clean
from kdmos.clean import VoxelMap, clean_map, clean_scans, map_file
from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.source import ScanSource
from kdmos.errors import InputError
from kdmos.odometry import write_poses
from kdmos.predictions import predicted_moving, predicted_sources

FRAMES = 4
POINTS = 50


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        clean.main([str(argument) for argument in arguments])
    return stop.value.code


def write(folder, frames=FRAMES):
    """A sequence whose points are numbered by their remission, 1 m from each other; every 5th moves in truth."""
    for name in ("velodyne", "labels"):
        (folder / name).mkdir(parents=True)
    for frame in range(frames):
        x, middle = np.arange(POINTS) + 0.25, np.full(POINTS, 0.25)  # of voxels of 0.5 m
        points = np.stack([x, middle, middle, np.arange(POINTS) / POINTS], 1)
        points.astype("<f4").tofile(folder / "velodyne" / f"{frame:06d}.bin")
        labels = np.where(np.arange(POINTS) % 5 == 0, 252 + (7 << 16), 40 + frame % 2 * 4).astype("<u4")
        labels.tofile(folder / "labels" / f"{frame:06d}.label")
    # one metre ahead a scan, in camera coordinates
    rows = (f"1 0 0 0 0 1 0 0 0 0 1 {frame}\n" for frame in range(frames))
    (folder / "poses.txt").write_text("".join(rows))
    (folder / "calib.txt").write_text("P0: 1 0 0 0 0 1 0 0 0 0 1 0\nTr: 0 -1 0 0 0 0 -1 0 1 0 0 0\n")
    (folder / "times.txt").write_text("".join(f"{frame / 10}\n" for frame in range(frames)))
    return folder


def write_predictions(folder, name="00", frames=FRAMES):
    """Every 10th point is labelled as moving; its probability falls with the number of the point."""
    predictions = folder / "sequences" / name / "predictions"
    predictions.mkdir(parents=True)
    for frame in range(frames):
        np.where(np.arange(POINTS) % 10 == 0, 251, 9).astype("<u4").tofile(predictions / f"{frame:06d}.label")
        (1 - np.arange(POINTS) / POINTS).astype("<f2").tofile(predictions / f"{frame:06d}.score")
    (folder / "predict.json").write_text('{"checkpoint": "a", "lookahead": 7}')
    return folder


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data" / "00")


@pytest.fixture
def predictions(tmp_path):
    return write_predictions(tmp_path / "out")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "cleaned"


def cleaned(output, frame=0, name="00"):
    """Numbers of the points that are left."""
    (sequence,) = find_sequences(output, [name])
    return np.round(sequence.read_points(frame)[:, 3] * POINTS).astype(int)


# --- scans


def test_the_rest_stays_in_its_order_with_labels_poses_and_times(data, predictions, output, capsys):
    assert run(data, predictions, "--output", output) == 0
    assert f"4 scans without their moving points in {output}, 4 of them written now" in capsys.readouterr().out
    (before,), (after,) = find_sequences(data), find_sequences(output)
    assert after.frames == before.frames
    kept = np.arange(POINTS) % 10 != 0
    for frame in before.frames:
        np.testing.assert_array_equal(after.read_points(frame), before.read_points(frame)[kept])
        np.testing.assert_array_equal(after.read_labels(frame, 45), before.read_labels(frame, POINTS)[kept])
    for name in ("poses.txt", "calib.txt", "times.txt"):
        assert (after.folder / name).read_bytes() == (data / name).read_bytes()
    np.testing.assert_array_equal(after.poses(), before.poses())


def test_by_the_labels(data, output):
    assert run(data, "--truth", "--output", output) == 0
    np.testing.assert_array_equal(cleaned(output), [i for i in range(POINTS) if i % 5])


@pytest.mark.parametrize(("threshold", "first"), [(1, 1), (0.5, 26), (0.01, 50)])
def test_by_the_moving_probability(data, predictions, output, threshold, first, capsys):
    code = run(data, predictions, "--output", output, "--threshold", threshold)
    if first == POINTS:
        assert code == 1 and "all of its points move, nothing is left of it" in capsys.readouterr().err
    else:
        assert code == 0
        np.testing.assert_array_equal(cleaned(output), np.arange(first, POINTS))


def test_poses_beside_the_sequences_are_copied_too(tmp_path, predictions, output):
    """As KITTI odometry has them."""
    data = write(tmp_path / "kitti" / "sequences" / "00")
    (tmp_path / "kitti" / "poses").mkdir()
    poses = (data / "poses.txt").rename(tmp_path / "kitti" / "poses" / "00.txt")
    assert run(tmp_path / "kitti", predictions, "--output", output) == 0
    assert (output / "sequences" / "00" / "poses.txt").read_bytes() == poses.read_bytes()
    np.testing.assert_array_equal(find_sequences(output)[0].poses(), find_sequences(tmp_path / "kitti")[0].poses())


def test_without_labels_poses_and_times(data, predictions, output):
    shutil.rmtree(data / "labels")
    for name in ("poses.txt", "calib.txt", "times.txt"):
        (data / name).unlink()
    assert run(data, predictions, "--output", output) == 0
    (after,) = find_sequences(output)
    assert not after.has_labels and not after.has_poses and after.stamps() is None
    assert [path.name for path in after.folder.iterdir()] == ["velodyne"]


def test_goes_on_where_it_stopped(data, predictions, output, capsys):
    assert run(data, predictions, "--output", output) == 0
    folder = output / "sequences" / "00"
    first = (folder / "velodyne" / "000000.bin").stat().st_mtime_ns
    whole = {path: path.read_bytes() for path in folder.rglob("*.*")}
    (folder / "velodyne" / "000001.bin").unlink()
    (folder / "velodyne" / "000002.bin").write_bytes(b"")
    (folder / "labels" / "000003.label").write_bytes(b"short")
    assert run(data, predictions, "--output", output) == 0
    assert "3 of them written now" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == whole
    assert (folder / "velodyne" / "000000.bin").stat().st_mtime_ns == first


def test_what_was_made_otherwise_is_not_mixed(data, predictions, output, tmp_path, capsys):
    assert run(data, predictions, "--output", output) == 0

    def refused(*arguments, message):
        assert run(*arguments, "--output", output) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    refused(data, predictions, "--threshold", 0.5, message="was cleaned with another threshold")
    refused(data, "--truth", message="was cleaned with another predictions, made_with")
    refused(write(tmp_path / "b" / "00"), predictions, message="was cleaned with another source")
    (predictions / "predict.json").write_text('{"checkpoint": "b"}')  # predicted again by another student
    refused(data, predictions, message="was cleaned with another made_with")
    (output / "clean.json").write_text("[]")
    refused(data, predictions, message="clean.json: damaged")
    (output / "clean.json").unlink()
    refused(data, predictions, message="holds sequences that kdmos clean did not write")


def test_the_input_is_never_written_over(tmp_path, predictions, capsys):
    data = write(tmp_path / "data" / "sequences" / "00")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "linked" / "sequences").mkdir(parents=True)
    (tmp_path / "linked" / "sequences" / "00").symlink_to(data)
    for source, output in (
        (tmp_path / "data", tmp_path / "data"),
        (data, tmp_path / "data"),
        (data, data),
        (data, tmp_path / "link"),
        (data, tmp_path / "linked"),
        (data, predictions),
    ):
        assert run(source, predictions, "--output", output) == 2
        assert "is the input, which is never written over" in capsys.readouterr().err
    assert run(data, predictions, "--map", data / "map.npy") == 0  # a new file harms nothing
    assert run(data, predictions, "--map", data / "map.npy") == 2
    assert "exists and may be part of the input" in capsys.readouterr().err
    (data / "map.npy").unlink()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


def test_scans_without_a_prediction_are_listed_and_the_rest_goes_on(data, predictions, output, tmp_path, capsys):
    (predictions / "sequences" / "00" / "predictions" / "000001.label").unlink()
    (data / "velodyne" / "000002.bin").write_bytes(b"short")
    for arguments in (["--output", output], ["--map", tmp_path / "map.npy"]):
        assert run(data, predictions, *arguments) == 1
        captured = capsys.readouterr()
        assert "2 scans" in captured.out and captured.err.count("left out: ") == 2
        assert "left out: 00/000001:" in captured.err and "000001.label: no prediction of this scan" in captured.err
        assert "left out: 00/000002:" in captured.err
    assert len(list((output / "sequences" / "00" / "velodyne").iterdir())) == 2
    (predictions / "sequences" / "00" / "predictions" / "000003.label").write_bytes(b"1234")
    assert run(data, predictions, "--map", tmp_path / "map.npy") == 1
    assert "has 1 labels, but its scan has 50 points" in capsys.readouterr().err


def test_a_scan_without_labels_cannot_be_cleaned_by_them(data, output, capsys):
    (data / "labels" / "000001.label").unlink()
    assert run(data, "--truth", "--output", output) == 1
    assert "left out: 00/000001:" in capsys.readouterr().err


def test_without_any_label_there_is_no_truth(data, output, capsys):
    shutil.rmtree(data / "labels")
    assert run(data, "--truth", "--output", output) == 2
    assert "--truth: sequence 00 has no labels" in capsys.readouterr().err
    assert not output.exists()


def test_of_several_sequences_those_with_predictions(tmp_path, predictions, output, capsys):
    for name in ("00", "01"):
        write(tmp_path / "data" / "sequences" / name)
    data = tmp_path / "data"
    assert run(data, predictions, "--output", output) == 0
    assert [path.name for path in (output / "sequences").iterdir()] == ["00"]
    assert run(data, predictions, "--output", output, "--sequences", "01") == 2
    assert "no .label file, so no prediction of sequence 01; kdmos predict writes them" in capsys.readouterr().err
    write_predictions(predictions, "01")
    assert run(data, predictions, "--output", output) == 0
    assert "8 scans" in capsys.readouterr().out
    assert run(data, predictions, "--map", tmp_path / "map.npy") == 2
    assert "name it with --sequences, one of 00, 01" in capsys.readouterr().err


class Recording(ScanSource):
    """A source that is no folder: frames 2, 3 and 5, poses that begin elsewhere, stamps."""

    name, frames, has_poses = "drive", (2, 3, 5), True

    def read_points(self, frame):
        return np.array([[frame, 0, 0, 0.5], [0, 1, 0, 0.5]], np.float32)

    def poses(self):
        poses = np.tile(np.eye(4), (3, 1, 1))
        poses[:, 0, 3] = [100, 101, 103]
        return poses

    def stamps(self):
        return np.array([20.0, 20.1, 20.3])

    def where(self, frame):
        return f"bag/{frame}"


def write_recording_predictions(folder, recording, moving=1):
    for frame in recording.frames:
        path = recording.prediction_path(folder, frame)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.array([251 if moving == 0 else 9, 251 if moving == 1 else 9], "<u4").tofile(path)
    return folder


def test_other_sources_become_sequences(tmp_path, output):
    recording = Recording()
    folder = write_recording_predictions(tmp_path / "out", recording)
    assert clean_scans([recording], output, folder) == (3, 3, [])
    (after,) = find_sequences(output)
    assert after.frames == (2, 3, 5) and after.name == "drive"
    for frame in after.frames:
        np.testing.assert_array_equal(after.read_points(frame), [[frame, 0, 0, 0.5]])
    np.testing.assert_allclose(after.poses()[:, 0, 3], [0, 1, 3])
    np.testing.assert_allclose(after.stamps(), recording.stamps())
    assert len((after.folder / "poses.txt").read_text().splitlines()) == 6


# --- the map


def test_a_map_by_hand(tmp_path):
    """Points at x = frame of a sensor at 100, 101, 103: 102, 104, 108 in the world; the other one moves."""
    recording = Recording()
    folder = write_recording_predictions(tmp_path / "out", recording)
    assert clean_map(recording, tmp_path / "a.npy", predictions=folder) == (3, 3, [])
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), [[102, 0, 0, 0.5], [104, 0, 0, 0.5], [108, 0, 0, 0.5]])
    # at 1 m left of each sensor: 100, 101, 103
    folder = write_recording_predictions(tmp_path / "out2", recording, moving=0)
    assert clean_map(recording, tmp_path / "a.npy", 2.0, predictions=folder)[0] == 2
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), [[100, 1, 0, 0.5], [103, 1, 0, 0.5]])
    assert clean_map(recording, tmp_path / "a.npy", max_range=2.5, predictions=tmp_path / "out")[0] == 1


@pytest.mark.parametrize("suffix", [".npy", ".ply", ".pcd"])
def test_a_static_world_seen_from_a_moving_sensor_is_there_once(data, predictions, tmp_path, suffix):
    file = tmp_path / "new" / f"map{suffix}"
    assert run(data, predictions, "--map", file, "--voxel", 0.5) == 0
    # points 0..49 m ahead of sensors at 0..3, every 10th moving: what one scan lacks another has, but for the first
    expected = np.arange(1, POINTS + 3) + 0.25
    found = read_map(file)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(found[:, 1:3], 0.25, atol=1e-6)
    assert ((found[:, 3] >= 0) & (found[:, 3] < 1)).all() and len(np.unique(found[:, 3])) > 40


def read_map(file):
    if file.suffix == ".npy":
        return np.load(file)
    if file.suffix == ".ply":
        vertex = pytest.importorskip("plyfile").PlyData.read(file)["vertex"]
        return np.stack([vertex[name] for name in ("x", "y", "z", "intensity")], 1)
    cloud = pytest.importorskip("pypcd4").PointCloud.from_path(file)
    assert cloud.fields == ("x", "y", "z", "intensity")
    return cloud.numpy()


@pytest.mark.parametrize("side", [1, -1])
def test_maps_far_from_their_origin_are_in_float64(tmp_path, side):
    recording = Recording()
    far = Recording.poses(recording)
    far[:, :2, 3] += [side * 500_000, side * 5_000_000]  # as UTM
    recording.poses = lambda: far
    folder = write_recording_predictions(tmp_path / "out", recording)
    for suffix in (".npy", ".ply", ".pcd"):
        assert clean_map(recording, tmp_path / f"a{suffix}", predictions=folder)[0] == 3
        found = read_map(tmp_path / f"a{suffix}")
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found[:, :2], side * np.array([500_000, 5e6]) + [[102, 0], [104, 0], [108, 0]])


def test_a_map_is_the_same_however_often_it_is_merged(monkeypatch):
    rng = np.random.default_rng(0)
    scans = [rng.uniform(-3, 3, (400, 4)) for _ in range(10)]
    found = []
    for merge_every in (1, 700, 1_000_000):
        monkeypatch.setattr(clean, "MERGE_EVERY", merge_every)
        voxels = VoxelMap(0.5, np.zeros(3))
        for scan in scans:
            voxels.add(scan)
        found.append(voxels.points())
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    # by hand: of each voxel the first point that was added
    first = {}
    for point in np.concatenate(scans):
        first.setdefault(tuple(np.floor(point[:3] / 0.5)), tuple(point))
    assert {tuple(point) for point in found[0]} == set(first.values())


def test_what_a_map_holds_is_bounded_by_its_voxels(monkeypatch):
    monkeypatch.setattr(clean, "MERGE_EVERY", 1000)
    voxels, rng = VoxelMap(1.0, np.zeros(3)), np.random.default_rng(0)
    most = 0
    for _ in range(200):
        voxels.add(rng.uniform(0, 5, (100, 4)))  # 125 voxels
        most = max(most, len(voxels._points) + sum(len(points) for _, points in voxels._waiting))
    assert most <= 125 + 1000 + 100 and len(voxels.points()) == 125


def test_a_growing_map_is_sorted_now_and_then(monkeypatch):
    """Each time it has grown by half: thirteen times over 200 scans, after the first few."""
    monkeypatch.setattr(clean, "MERGE_EVERY", 1)
    merges, merge = [], VoxelMap._merge
    monkeypatch.setattr(VoxelMap, "_merge", lambda self: (merges.append(0), merge(self)))
    voxels = VoxelMap(1.0, np.zeros(3))
    for scan in range(200):
        voxels.add(np.arange(40.0).reshape(10, 4) + np.array([40 * scan, 0, 0, 0]))
    assert len(merges) < 20 and len(voxels.points()) == 2000


@pytest.mark.parametrize("side", [1, -1])
def test_a_point_too_far_out_loses_its_scan_alone(data, predictions, tmp_path, capsys, side):
    file = data / "velodyne" / "000002.bin"
    points = np.fromfile(file, "<f4").reshape(-1, 4)
    points[7, 0] = side * 1e7
    points[8, 1] = np.nan
    points.tofile(file)
    assert run(data, predictions, "--map", tmp_path / "a.npy") == 1
    error = capsys.readouterr().err
    assert "left out: 00/000002: a point lies more than 104,858 m from the start" in error and "--range" in error
    assert run(data, predictions, "--map", tmp_path / "a.npy", "--range", 60) == 0
    assert np.isfinite(np.load(tmp_path / "a.npy")).all()


def test_the_map_of_no_usable_scan(data, predictions, tmp_path, capsys):
    for file in (data / "velodyne").iterdir():
        file.write_bytes(b"")
    assert run(data, predictions, "--map", tmp_path / "a.npy") == 2
    assert "no scan of sequence 00 could be used; 00/000000" in capsys.readouterr().err
    assert not (tmp_path / "a.npy").exists()


def test_an_empty_map_is_a_file_all_the_same():
    for suffix in (".npy", ".ply", ".pcd"):
        assert map_file(np.zeros((0, 4), np.float32), suffix)


# --- what cannot be done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT"], "choose one of --output FOLDER, for scans, and --map FILE"),
        (["OUT", "--output", "a", "--map", "a.ply"], "choose one of --output FOLDER"),
        (["--output", "a"], "what moves is said by PREDICTIONS or, with --truth, by the labels"),
        (["OUT", "--truth", "--output", "a"], "give one of them"),
        (["--truth", "--threshold", "0.5", "--output", "a"], "--threshold is of predictions; --truth has none"),
        (["OUT", "--threshold", "1.5", "--output", "a"], "'--threshold'"),
        (["OUT", "--output", "a", "--voxel", "0.2"], "--voxel and --range are of a --map"),
        (["OUT", "--output", "a", "--range", "20"], "--voxel and --range are of a --map"),
        (["OUT", "--map", "a.las"], "expected a name that ends in .ply, .pcd, .npy"),
        (["OUT", "--map", "a.ply", "--range", "0"], "--range 0.0: expected metres, more than 0"),
        (["OUT", "--map", "a.ply", "--voxel", "inf"], "--voxel inf: expected metres, more than 0"),
        (["--truth", "--topic", "/a", "--output", "a"], "--topic /a: "),
        (["nowhere", "--output", "a"], "nowhere: no such folder; kdmos predict writes it"),
        (["OUT", "--output", "a", "--sequences", "07"], "no sequence 07; found 00"),
    ],
)
def test_wrong_arguments_end_with_one_line(data, predictions, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(data, *(predictions if argument == "OUT" else argument for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_scores_that_are_missing_or_of_another_length(data, predictions, output, capsys):
    (source,) = find_sequences(data)
    folder = predictions / "sequences" / "00" / "predictions"
    (folder / "000001.score").write_bytes(b"1234")
    with pytest.raises(InputError, match=r"000001\.score: has 2 scores, but its scan has 50 points"):
        predicted_moving(source, predictions, 1, POINTS, 0.5)
    for file in folder.glob("*.score"):
        file.unlink()
    assert run(data, predictions, "--output", output, "--threshold", 0.5) == 2
    assert "no .score file" in (error := capsys.readouterr().err) and "kdmos predict --scores writes them" in error
    assert [found.name for found in predicted_sources(data, None, predictions)] == [source.name]


def test_a_map_needs_poses(data, predictions, tmp_path, capsys):
    (data / "poses.txt").unlink()
    assert run(data, predictions, "--map", tmp_path / "a.npy") == 2
    assert "poses.txt" in capsys.readouterr().err


def test_any_input_with_the_poses_that_odometry_gave_it(tmp_path, capsys):
    """A folder of .npy scans, as kdmos predict leaves its predictions and poses."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for frame in range(3):
        points = np.array([[5.05, 0.05, 0.05, 0.5], [9.05, 0.05, 0.05, 0.5]], np.float32)
        np.save(scans / f"{frame}.npy", points - [frame, 0, 0, 0])  # the sensor drives 1 m a scan
        path = out / "sequences" / "scans" / "predictions" / f"{frame:06d}.label"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.array([9, 251], np.uint32).tofile(path)
    assert run(scans, out, "--map", tmp_path / "map.npy") == 2  # nobody knows the poses
    assert "poses" in capsys.readouterr().err
    (out / "predict.json").write_text(json.dumps({"source": str(scans), "poses": "odometry"}))
    poses = [np.eye(4) + frame * (np.eye(4, k=3) * [0, 0, 0, 1]) for frame in range(3)]
    write_poses(out / "sequences" / "scans" / "poses.txt", np.stack(poses))
    assert run(scans, out, "--map", tmp_path / "map.npy") == 0
    assert np.allclose(np.load(tmp_path / "map.npy"), [[5.05, 0.05, 0.05, 0.5]])
    assert run(scans, out, "--output", tmp_path / "clean") == 0
    (cleaned,) = find_sequences(tmp_path / "clean")
    assert np.allclose(cleaned.poses(), poses) and len(cleaned.read_points(2)) == 1


@pytest.mark.parametrize(("module", "suffix"), [("plyfile", ".ply"), ("pypcd4", ".pcd")])
def test_missing_libraries_are_named(data, predictions, tmp_path, monkeypatch, capsys, module, suffix):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(data, predictions, "--map", tmp_path / f"a{suffix}") == 2
    assert f"{suffix} files need {module}: pip install 'kdmos[files]'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(data, predictions, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(data, predictions, "--output", tmp_path / "file") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_what_it_was_made_from_is_noted(data, predictions, output):
    assert run(data, predictions, "--output", output, "--threshold", 0.5) == 0
    assert json.loads((output / "clean.json").read_text()) == {
        "source": str(data),
        "predictions": str(predictions),
        "made_with": {"checkpoint": "a", "lookahead": 7},
        "threshold": 0.5,
    }
