"""Reading scans, labels, poses and sequences; every fault is one InputError that names file and reason."""

import pickle
import shutil

import numpy as np
import pytest

from kdmos.data.batch import ScanId
from kdmos.data.semantic_kitti import (
    ROAD_SPLITS,
    SPLITS,
    drop_static_scans,
    find_sequences,
    read_labels,
    read_points,
    read_poses,
    split_frames,
    split_sequences,
)
from kdmos.data.sources import open_sources
from kdmos.errors import InputError


def some_points(n=200, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.array([20, 15, 1], np.float32)
    return np.c_[rng.normal(size=(n, 3)) * scale, rng.random(n)].astype(np.float32)


def write(path, values):
    np.asarray(values).tofile(path)
    return path


def make_sequence(folder, frames=range(3), moving=None, width=6):
    """A sequence folder; `moving` gives the number of moving points (252) among the 20 of each scan."""
    (folder / "velodyne").mkdir(parents=True)
    (folder / "labels").mkdir()
    for i, frame in enumerate(frames):
        some_points(20, seed=frame).tofile(folder / "velodyne" / f"{frame:0{width}d}.bin")
        if moving is not None:
            raw = np.full(20, 40, np.uint32)
            raw[: moving[i]] = (5 << 16) | 252
            raw.tofile(folder / "labels" / f"{frame:0{width}d}.label")
    return folder


# ---- splits


def test_splits_are_semantic_kittis():
    assert split_sequences("train") == ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10")
    assert split_sequences("valid") == ("08",)
    assert split_sequences("test") == tuple(map(str, range(11, 22)))
    names = [name for split in (*SPLITS.values(), *ROAD_SPLITS.values()) for name in split]
    assert len(set(names)) == len(names) == 22 + 12


def test_kitti_road_is_an_option_and_warns_of_the_overlap(recwarn):
    assert split_sequences("train", kitti_road=True)[-6:] == ("30", "31", "32", "33", "34", "40")
    assert split_sequences("test", kitti_road=True) == SPLITS["test"]
    assert not recwarn.list
    with pytest.warns(UserWarning, match="41 .*overlaps SemanticKITTI test sequence 20"):
        assert split_sequences("valid", kitti_road=True) == ("08", "35", "36", "37", "38", "39", "41")


def test_kitti_roads_own_splits():
    assert split_sequences("road-train") == ("30", "31", "32", "33", "34", "40")
    with pytest.warns(UserWarning, match="41"):
        assert split_sequences("road-valid") == ("35", "36", "37", "38", "39", "41")
    with pytest.raises(InputError, match="expected one of train, valid, test, road-train, road-valid"):
        split_sequences("road-test")


def test_splits_of_the_scans_of_every_sequence(tmp_path):
    assert split_frames(tmp_path, "test") is None
    (tmp_path / "val.txt").write_text("3\n000012\n7\n")
    assert split_frames(tmp_path, "valid") == {3, 7, 12}
    for wrong in ("", "3\nseven\n"):
        (tmp_path / "val.txt").write_text(wrong)
        with pytest.raises(InputError, match=r"val.txt: expected the frame numbers of the split"):
            split_frames(tmp_path, "valid")


def test_unknown_split():
    with pytest.raises(InputError, match="split 'val': expected one of train, valid, test"):
        split_sequences("val")


# ---- points


def test_points_come_back_as_stored(tmp_path):
    points = some_points()
    found = read_points(write(tmp_path / "a.bin", points))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, points)
    assert read_points(write(tmp_path / "one.bin", points[:1])).shape == (1, 4)


@pytest.mark.parametrize("name, count", [("semantickitti-50pts.bin", 50), ("kitti-fov-000008.bin", 17238)])
def test_odd_but_valid_files(realdata, name, count):
    points = read_points(realdata("odd-formats") / name)
    assert points.shape == (count, 4) and points[:, 3].min() >= 0 and points[:, 3].max() < 1


@pytest.mark.parametrize("name, columns", [("nuscenes-5col", 5), ("kitti-xyz-000000", 3), ("kitti-xyz-000001", 3)])
def test_real_files_with_other_columns_are_refused_with_their_count(realdata, name, columns):
    path = realdata("odd-formats") / f"{name}.bin"
    with pytest.raises(InputError, match=rf"{name}\.bin: wrong number of columns: .* likely has {columns} columns"):
        read_points(path)


def test_column_count_of_made_files(tmp_path):
    points = some_points()
    ring = np.arange(len(points), dtype=np.float32) % 64
    cases = {
        "3": points[:, :3],
        "4 columns but another remission scale": points * [1, 1, 1, 255],
        "5": np.c_[points[:, :3], points[:, 3] * 255, ring],
        "6": np.c_[points, ring, 1e4 + ring],
    }
    for expected, values in cases.items():
        with pytest.raises(InputError, match=f"wrong number of columns: .* likely has {expected}"):
            read_points(write(tmp_path / "a.bin", values.astype(np.float32)))


def test_columns_alike_are_told_by_the_size_alone(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)  # 2000 bytes: not 3, not 6
    with pytest.raises(InputError, match="likely has 5 columns"):
        read_points(write(tmp_path / "a.bin", numbers))
    with pytest.raises(InputError, match="no count from 3 to 6 columns fits"):
        read_points(write(tmp_path / "a.bin", numbers.ravel()[: 4 * 98]))


@pytest.mark.parametrize("cut", [1, 4, 8, 12])
def test_truncated_scan(tmp_path, cut):
    path = tmp_path / "000007.bin"
    path.write_bytes(some_points().tobytes()[:-cut])
    with pytest.raises(InputError, match=rf"000007\.bin: the scan is truncated: .* got {3200 - cut} bytes"):
        read_points(path)


def test_truncated_scan_of_another_remission_scale(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes((some_points() * [1, 1, 1, 255]).astype(np.float32).tobytes()[:-4])
    with pytest.raises(InputError, match="likely has 4 columns and was cut short"):
        read_points(path)


def test_real_scan_cut_where_three_columns_would_fit(realdata, tmp_path):
    content = (realdata("kitti-odometry-00") / "velodyne/000000.bin").read_bytes()
    path = tmp_path / "a.bin"
    path.write_bytes(content[: 12 * 100_001])
    with pytest.raises(InputError, match="the scan is truncated"):
        read_points(path)


def test_less_than_one_point(tmp_path):
    with pytest.raises(InputError, match=r"truncated: .* got 12 bytes, 0\.75 points"):
        read_points(write(tmp_path / "a.bin", np.zeros(3, np.float32)))


def test_empty_missing_and_unreadable_scan(tmp_path):
    (tmp_path / "a.bin").touch()
    with pytest.raises(InputError, match=r"a\.bin: the scan is empty \(0 bytes\)"):
        read_points(tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"b\.bin: the scan file does not exist"):
        read_points(tmp_path / "b.bin")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_points(tmp_path)


def test_single_non_finite_points_stay(tmp_path):
    points = some_points()
    points[3, 0], points[7, 2], points[9, 3], points[11, 3] = np.nan, np.inf, np.nan, -np.inf
    points[5] = np.nan
    np.testing.assert_array_equal(read_points(write(tmp_path / "a.bin", points)), points)


def test_no_finite_point(tmp_path):
    points = some_points()
    points[:, 1] = np.nan
    with pytest.raises(InputError, match="none of the 200 points is finite"):
        read_points(write(tmp_path / "a.bin", points))


def test_remission_a_little_above_one_and_single_outliers_pass(tmp_path):
    points = some_points()
    points[:, 3] *= 2
    points[3, 3], points[4, 3] = -1, 300  # 1 % of 200
    assert len(read_points(write(tmp_path / "a.bin", points))) == 200
    points[5, 3] = -1
    with pytest.raises(InputError, match="4th column runs from -1 to 300"):
        read_points(write(tmp_path / "a.bin", points))


# ---- labels


def test_labels_keep_their_instance(tmp_path):
    raw = np.array([40, (9 << 16) | 252, 0], np.uint32)
    found = read_labels(write(tmp_path / "a.label", raw), 3)
    assert found.dtype == np.uint32
    np.testing.assert_array_equal(found, raw)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.label", None), raw)


def test_odd_labels(realdata):
    labels = read_labels(realdata("odd-formats/semantickitti-50pts.label"), 50)
    assert {0, 50, 70} <= set((labels & 0xFFFF).tolist())


def test_label_faults(tmp_path):
    path = write(tmp_path / "a.label", np.zeros(5, np.uint32))
    with pytest.raises(InputError, match=r"a\.label: the label file has 5 labels, but its scan has 6 points"):
        read_labels(path, 6)
    path.write_bytes(b"12345")
    with pytest.raises(InputError, match=r"a\.label: the label file is truncated: 5 bytes"):
        read_labels(path, 1)
    with pytest.raises(InputError, match=r"b\.label: the label file does not exist"):
        read_labels(tmp_path / "b.label", 6)


# ---- poses

# Camera x = right, y = down, z = forward: x_cam = -y, y_cam = -z, z_cam = x, shifted by (0.5, 0, 0).
CALIB = "P0: 1 0 0 0 0 1 0 0 0 0 1 0\nTr: 0 -1 0 0.5 0 0 -1 0 1 0 0 0\n"
IDENTITY = "1 0 0 0 0 1 0 0 0 0 1 0"


def pose_files(folder, poses, calib=CALIB):
    (folder / "poses.txt").write_text(poses)
    (folder / "calib.txt").write_text(calib)
    return folder / "poses.txt", folder / "calib.txt"


def test_poses_by_hand(tmp_path):
    # World rows start 7 m off and turned by 180 degrees about the camera's y; then 2 m forward, then a quarter
    # turn on the spot about the camera's y axis (down), from forward to right.
    start = "-1 0 0 7 0 1 0 0 0 0 -1 0"
    ahead = "-1 0 0 7 0 1 0 0 0 0 -1 -2"
    turned = "0 0 -1 7 0 1 0 0 1 0 0 0"
    poses = read_poses(*pose_files(tmp_path, f"{start}\n{ahead}\n{turned}\n\n"))
    assert poses.dtype == np.float64 and poses.shape == (3, 4, 4)
    np.testing.assert_allclose(poses[0], np.eye(4), atol=1e-12)
    np.testing.assert_allclose(poses[1], [[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], atol=1e-12)
    # The camera sits at y = 0.5 in the LiDAR's frame and stays; the LiDAR, 0.5 m right of it, swings behind it.
    np.testing.assert_allclose(poses[2], [[0, 1, 0, -0.5], [-1, 0, 0, 0.5], [0, 0, 1, 0], [0, 0, 0, 1]], atol=1e-12)


def test_poses_equal_the_authors(golden, tmp_path):
    with np.load(golden("a1_residual.npz")) as data:
        (tmp_path / "poses.txt").write_bytes(data["poses_txt"].tobytes())
        (tmp_path / "calib.txt").write_bytes(data["calib_txt"].tobytes())
        expected = data["velo_poses"]
    poses = read_poses(tmp_path / "poses.txt", tmp_path / "calib.txt")
    np.testing.assert_allclose(poses, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, count", [("kitti-odometry-00", 10), ("kitti-raw-0005-a", 16)])
def test_real_poses_pass_and_move_forward(realdata, name, count):
    (sequence,) = find_sequences(realdata(name))
    poses = sequence.poses()
    assert poses.shape == (count, 4, 4)
    assert (np.diff(poses[:, 0, 3]) > 0).all()  # both drives go along the LiDAR's x


@pytest.mark.parametrize(
    "row, match",
    [
        ("1 0 0 0 0 1 0 0 0 0 1", "line 2 is not 12 finite numbers .* 11 values"),
        (IDENTITY + " 0 0 0 1", "line 2 .* 16 values"),
        ("", "line 2 .* 0 values"),
        ("1 0 0 0 0 one 0 0 0 0 1 0", "line 2 is not 12 finite numbers"),
        ("1 0 0 nan 0 1 0 0 0 0 1 0", "line 2 is not 12 finite numbers"),
        ("1 0 0 0 0 1 0 inf 0 0 1 0", "line 2 is not 12 finite numbers"),
        ("1.01 0 0 0 0 1.01 0 0 0 0 1.01 0", r"line 2 is not a rigid transform: .* 0\.02 \(allowed 0\.01\)"),
        ("1 0 0 0 0 1 0 0 0 0 -1 0", "line 2 is not a rigid transform: .* det R is -1"),
        ("0 0 0 0 0 0 0 0 0 0 0 0", "line 2 is not a rigid transform"),
    ],
)
def test_pose_rows_that_cannot_be(tmp_path, row, match):
    with pytest.raises(InputError, match=r"poses\.txt: " + match):
        read_poses(*pose_files(tmp_path, f"{IDENTITY}\n{row}\n{IDENTITY}\n"))


def test_poses_rounded_to_four_digits_pass(tmp_path):
    c, s = np.cos(0.3), np.sin(0.3)
    poses = read_poses(*pose_files(tmp_path, f"{IDENTITY}\n{c:.4f} 0 {s:.4f} 1 0 1 0 0 {-s:.4f} 0 {c:.4f} 0"))
    assert len(poses) == 2


@pytest.mark.parametrize(
    "calib, match",
    [
        ("P0: 1 0 0 0\nTr_velo_to_cam: 1 0 0 0\n", "expected a row 'Tr:' .* found P0, Tr_velo_to_cam;"),
        ("", "expected a row 'Tr:' .* found none"),
        ("Tr: 1 0 0 0 0 1 0 0 0 0 1\n", "row 'Tr:' is not 12 finite numbers .* 11 values"),
        ("Tr: 2 0 0 0 0 2 0 0 0 0 2 0\n", "row 'Tr:' is not a rigid transform"),
    ],
)
def test_calibrations_that_cannot_be(tmp_path, calib, match):
    with pytest.raises(InputError, match=r"calib\.txt: " + match):
        read_poses(*pose_files(tmp_path, IDENTITY, calib))


def test_missing_and_empty_pose_files(tmp_path):
    poses, calib = pose_files(tmp_path, "\n")
    with pytest.raises(InputError, match=r"poses\.txt: holds no pose"):
        read_poses(poses, calib)
    poses.write_text(IDENTITY)
    with pytest.raises(InputError, match=r"no\.txt: the poses file does not exist"):
        read_poses(tmp_path / "no.txt", calib)
    with pytest.raises(InputError, match=r"no\.txt: the calibration file does not exist"):
        read_poses(poses, tmp_path / "no.txt")
    poses.write_bytes(b"\xff\xfe\x00" * 20)
    with pytest.raises(InputError, match="line 1 is not 12 finite numbers"):
        read_poses(poses, calib)


# ---- sequences


def test_data_root_sequences_folder_and_bare_folder(tmp_path, monkeypatch):
    for name in ("08", "00"):
        make_sequence(tmp_path / "sequences" / name)
    (tmp_path / "sequences" / "09" / "labels").mkdir(parents=True)  # no scans: not a sequence to read
    for root in (tmp_path, tmp_path / "sequences"):
        assert [s.name for s in find_sequences(root)] == ["00", "08"]
        assert [s.name for s in find_sequences(root, ["08", "00"])] == ["08", "00"]
    (bare,) = find_sequences(tmp_path / "sequences/08")
    assert (bare.name, bare.frames, bare.scan(2)) == ("08", (0, 1, 2), ScanId("08", 2))
    assert find_sequences(tmp_path / "sequences/08", ["08"]) == [bare]
    monkeypatch.chdir(tmp_path / "sequences/08")
    assert find_sequences(".") == [bare]


def test_name_of_a_linked_folder_is_the_links(tmp_path):
    make_sequence(tmp_path / "elsewhere")
    (tmp_path / "08").symlink_to(tmp_path / "elsewhere")
    assert find_sequences(tmp_path / "08")[0].name == "08"


def test_missing_sequences_are_named(tmp_path):
    make_sequence(tmp_path / "sequences/00")
    with pytest.raises(InputError, match="no sequence 08, 11; found 00"):
        find_sequences(tmp_path, ["00", "08", "11"])
    with pytest.raises(InputError, match="no sequence 08; found 00"):
        find_sequences(tmp_path / "sequences/00", ["08"])


def test_roots_that_cannot_be(tmp_path, realdata):
    with pytest.raises(InputError, match="nowhere: does not exist"):
        find_sequences(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: is not a folder"):
        find_sequences(tmp_path / "file")
    with pytest.raises(InputError, match="no sequence here; expected sequences/NN/velodyne"):
        find_sequences(tmp_path)
    with pytest.raises(InputError, match="bare scans go into a folder named velodyne"):
        find_sequences(realdata("odd-formats"))
    (tmp_path / "08/velodyne").mkdir(parents=True)
    with pytest.raises(InputError, match=r"velodyne: holds no scan \(\*\.bin\)"):
        find_sequences(tmp_path)


def test_frames_are_numbers_not_positions(tmp_path):
    folder = make_sequence(tmp_path / "08", frames=(12, 3, 7), moving=(1, 2, 3))
    (folder / "velodyne/._000003.bin").touch()
    (folder / "velodyne/notes.txt").touch()
    (sequence,) = find_sequences(folder)
    assert sequence.frames == (3, 7, 12)
    assert sequence.gaps == (4, 5, 6, 8, 9, 10, 11)
    np.testing.assert_array_equal(sequence.read_points(12), some_points(20, seed=12))
    assert np.count_nonzero(sequence.read_labels(12, 20) & 0xFFFF == 252) == 1


def test_file_names_keep_their_padding(tmp_path):
    (sequence,) = find_sequences(make_sequence(tmp_path / "raw", frames=(0, 11), moving=(0, 0), width=10))
    assert sequence.points_path(11).name == "0000000011.bin"
    assert sequence.labels_path(11).name == "0000000011.label"
    assert len(sequence.read_points(11)) == len(sequence.read_labels(11, 20)) == 20
    (sequence,) = find_sequences(make_sequence(tmp_path / "bare", frames=(8, 10), width=0))
    assert sequence.frames == (8, 10) and sequence.points_path(8).name == "8.bin"


@pytest.mark.parametrize("name", ["scan.bin", "00000a.bin", "-00001.bin", "000000 (1).bin"])
def test_scan_names_that_are_no_frame_number(tmp_path, name):
    folder = make_sequence(tmp_path / "08")
    shutil.copy(folder / "velodyne/000000.bin", folder / "velodyne" / name)
    with pytest.raises(InputError, match=r"velodyne/.*\.bin: expected a frame number as the name") as error:
        find_sequences(folder)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["7.bin", "0000007.bin"])
def test_scan_names_of_different_width(tmp_path, name):
    folder = make_sequence(tmp_path / "08")
    shutil.copy(folder / "velodyne/000000.bin", folder / "velodyne" / name)
    with pytest.raises(InputError, match=r"velodyne: .*\.bin and .*\.bin are padded differently") as error:
        find_sequences(folder)
    assert name in str(error.value)


def test_has_labels_and_poses(tmp_path):
    (sequence,) = find_sequences(make_sequence(tmp_path / "08"))
    assert not sequence.has_labels and not sequence.has_poses
    with pytest.raises(InputError, match=r"000001\.label: the label file does not exist"):
        sequence.read_labels(1, 20)
    with pytest.raises(InputError, match=r"poses\.txt: the poses file does not exist"):
        sequence.poses()
    write(tmp_path / "08/labels/000000.label", np.zeros(20, np.uint32))
    pose_files(tmp_path / "08", IDENTITY)
    assert sequence.has_labels and sequence.has_poses


def test_poses_belong_to_frame_numbers(tmp_path):
    folder = make_sequence(tmp_path / "08", frames=(1, 3))
    rows = [f"1 0 0 0 0 1 0 0 0 0 1 {z}" for z in range(4)]  # camera z = LiDAR x
    pose_files(folder, "\n".join(rows))
    (sequence,) = find_sequences(folder)
    np.testing.assert_allclose(sequence.poses()[:, 0, 3], [1, 3])
    sequence.poses()[:] = 0  # a copy: what one caller does to it, the next does not see
    (folder / "poses.txt").unlink()  # read once
    np.testing.assert_allclose(pickle.loads(pickle.dumps(sequence)).poses()[:, 0, 3], [1, 3])

    pose_files(folder, "\n".join(rows[:3]))
    (sequence,) = find_sequences(folder)
    with pytest.raises(InputError, match=r"poses\.txt: has 3 rows, but the scans go up to frame 3"):
        sequence.poses()


def test_a_single_real_scan_without_poses(realdata):
    (sequence,) = find_sequences(realdata("semantickitti-single-000964"))
    assert sequence.frames == (964,) and sequence.gaps == () and sequence.has_labels and not sequence.has_poses
    points = sequence.read_points(964)
    assert len(sequence.read_labels(964, len(points))) == 120485


# ---- drop_static_scans


def test_scans_with_moving_points_and_every_tenth_other(tmp_path):
    # frames 100..123; 103 has 11 moving points, 110 exactly 10, which is not more than 10
    moving = [0] * 24
    moving[3], moving[10] = 11, 10
    (sequence,) = find_sequences(make_sequence(tmp_path / "08", frames=range(100, 124), moving=moving))
    seen = []
    # the others are 100..102, 104..123: positions 0, 10, 20 of them are 100, 111, 121
    assert drop_static_scans(sequence, progress=lambda *step: seen.append(step)) == (100, 103, 111, 121)
    assert seen[0] == (1, 24) and seen[-1] == (24, 24)


def test_static_scans_need_good_labels(tmp_path):
    folder = make_sequence(tmp_path / "08", moving=(0, 0, 0))
    (sequence,) = find_sequences(folder)
    write(folder / "labels/000001.label", np.full(20, 300, np.uint32))
    with pytest.raises(InputError, match=r"000001\.label: 20 of 20 labels have an unknown raw id \(300\)"):
        drop_static_scans(sequence)
    (folder / "labels/000001.label").unlink()
    with pytest.raises(InputError, match=r"000001\.label: the label file does not exist"):
        drop_static_scans(sequence)


def test_list_file_in_both_forms(tmp_path):
    (sequence,) = find_sequences(make_sequence(tmp_path / "08", frames=range(5)))
    path = tmp_path / "train.txt"
    path.write_text("# scans\n\n08 000003 45\n00 000001 12\n  08/000001\n08/4 7 8\n08 3\n")
    assert drop_static_scans(sequence, path) == (1, 3, 4)
    path.write_text("08 000003\n08 000009\n08 000010\n")
    with pytest.warns(UserWarning, match="2 of its 3 scans of sequence 08 are not in"):
        assert drop_static_scans(sequence, str(path)) == (3,)


@pytest.mark.parametrize("line", ["08", "08 x", "08 12a", "08/velodyne/000001.bin", "000001.bin", "08,1"])
def test_malformed_list_lines(tmp_path, line):
    (sequence,) = find_sequences(make_sequence(tmp_path / "08"))
    path = tmp_path / "train.txt"
    path.write_text(f"08 1\n{line}\n")
    with pytest.raises(InputError, match=r"train\.txt: line 2 is '.*', expected 'SEQ FRAME'"):
        drop_static_scans(sequence, path)


def test_lists_that_name_nothing(tmp_path):
    (sequence,) = find_sequences(make_sequence(tmp_path / "08"))
    path = tmp_path / "train.txt"
    for text, count in (("", 0), ("00 000001\n", 0), ("08 000077\n", 1)):
        path.write_text(text)
        with pytest.raises(InputError, match=f"names {count} scans of sequence 08, none of them in"):
            drop_static_scans(sequence, path)
    with pytest.raises(InputError, match=r"no\.txt: the list file does not exist"):
        drop_static_scans(sequence, tmp_path / "no.txt")


# ---- data sets near SemanticKITTI


def test_kitti_odometry_has_the_poses_of_all_sequences_in_one_folder(tmp_path):
    folder = make_sequence(tmp_path / "sequences" / "05")
    (sequence,) = find_sequences(tmp_path)
    assert not sequence.has_poses
    (folder / "calib.txt").write_text("Tr: 1 0 0 0 0 1 0 0 0 0 1 0\n")
    (tmp_path / "poses").mkdir()
    (tmp_path / "poses" / "05.txt").write_text("".join(f"1 0 0 {i} 0 1 0 0 0 0 1 0\n" for i in range(3)))
    for root in (tmp_path, folder):
        (sequence,) = find_sequences(root)
        assert sequence.has_poses
        np.testing.assert_array_equal(sequence.poses()[:, 0, 3], [0, 1, 2])
    (folder / "poses.txt").write_text("".join(f"1 0 0 {2 * i} 0 1 0 0 0 0 1 0\n" for i in range(3)))
    np.testing.assert_array_equal(
        find_sequences(folder)[0].poses()[:, 0, 3], [0, 2, 4]
    )  # the sequence's own come first
    (folder / "poses.txt").unlink()
    (tmp_path / "poses" / "05.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n")
    with pytest.raises(InputError, match=r"05.txt: has 1 rows, but the scans go up to frame 2"):
        find_sequences(folder)[0].poses()


def test_helimos_names_its_sequences_by_sensor(tmp_path):
    for sensor in ("Velodyne", "Avia", "Aeva", "Ouster"):
        make_sequence(tmp_path / "KAIST05" / "Deskewed_LiDAR" / sensor)
    for root in (tmp_path / "KAIST05", tmp_path / "KAIST05" / "Deskewed_LiDAR"):
        assert [sequence.name for sequence in find_sequences(root)] == ["Aeva", "Avia", "Ouster", "Velodyne"]
        assert [sequence.name for sequence in open_sources(root, ["Avia"])] == ["Avia"]
