"""Every kind of input gives the same scans; what cannot be read says so, once, with the next step."""

import shutil
import sys

import numpy as np
import pytest

from kdmos.data.bags import BagScans, points_of_message
from kdmos.data.source import WithPoses
from kdmos.data.sources import open_sources
from kdmos.errors import InputError

pytest.importorskip("rosbags")
PlyData, PlyElement = (getattr(pytest.importorskip("plyfile"), name) for name in ("PlyData", "PlyElement"))
Encoding, PointCloud = (getattr(pytest.importorskip("pypcd4"), name) for name in ("Encoding", "PointCloud"))
SCANS, KINDS = 4, ("ros1", "sqlite3", "mcap")


def some_points(n=60, seed=0):
    rng = np.random.default_rng(seed)
    points = np.c_[rng.normal(size=(n, 3)) * [20, 15, 1], rng.random(n)].astype(np.float32)
    points[3, 1] = np.nan  # single ones stay in
    return points


SCAN_POINTS = [some_points(60 + i, i) for i in range(SCANS)]


def write_scan(path, points):
    """One scan in the format of its suffix."""
    if path.suffix == ".bin":
        points.astype(np.float32).tofile(path)
    elif path.suffix == ".npy":
        np.save(path, points)
    elif path.suffix == ".pcd":
        PointCloud.from_points(points, ("x", "y", "z", "intensity"), (np.float32,) * 4).save(path, Encoding.BINARY)
    else:
        table = np.zeros(len(points), [(name, "f4") for name in ("x", "y", "z", "intensity")])
        for i, name in enumerate(table.dtype.names):
            table[name] = points[:, i]
        PlyData([PlyElement.describe(table, "vertex")]).write(str(path))
    return path


def write_folder(folder, suffix=".npy", names=None, scans=SCAN_POINTS):
    folder.mkdir(parents=True)
    for i, points in enumerate(scans):
        write_scan(folder / f"{names[i] if names else f'{i:06d}'}{suffix}", points)
    return folder


def only(path, **options):
    (source,) = open_sources(path, **options)
    return source


def check_scans(source, scans=SCAN_POINTS):
    assert len(source.frames) == len(scans)
    for frame, points in zip(source.frames, scans):
        found = source.read_points(frame)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, points)


# ---- folders of files


@pytest.mark.parametrize("suffix", [".bin", ".npy", ".pcd", ".ply"])
def test_folders_of_files(tmp_path, suffix):
    source = only(write_folder(tmp_path / "drive", suffix))
    check_scans(source)
    assert source.name == "drive" and source.frames == (0, 1, 2, 3)
    assert not source.has_poses and source.stamps() is None
    assert source.where(2) == str(tmp_path / "drive" / f"000002{suffix}")
    assert source.num_points(1) == (61 if suffix == ".bin" else None)
    assert source.prediction_path("out", 2).as_posix() == "out/sequences/drive/predictions/000002.label"


@pytest.mark.parametrize(
    ("names", "frames"),
    [
        (["7", "9", "12", "100"], (7, 9, 12, 100)),
        (["0000000005", "0000000006", "0000000007", "0000000009"], (5, 6, 7, 9)),
        (["scan1", "scan2", "scan9", "scan10"], (0, 1, 2, 3)),
        (["9", "10", "a1", "b1"], (0, 1, 2, 3)),
        (["1", "01", "2", "3"], (0, 1, 2, 3)),  # 1 and 01 are one number
        (["20240101120000", "20240101120001", "20240101120002", "20240101120003"], (0, 1, 2, 3)),  # no frame numbers
    ],
)
def test_order_is_natural_and_numbers_are_frame_numbers(tmp_path, names, frames):
    source = only(write_folder(tmp_path / "drive", names=names))
    assert source.frames == frames
    assert {path.stem for path in source.files} == set(names)
    if names[0] != "1":
        check_scans(source)


@pytest.mark.parametrize(
    ("names", "stamps"),
    [
        ([f"169193655{i}946849179" for i in range(4)], [1691936550.946849179 + i for i in range(4)]),
        ([f"169193655{i}.5" for i in range(4)], [1691936550.5 + i for i in range(4)]),
        ([f"169193655{i}500" for i in range(4)], [1691936550.5 + i for i in range(4)]),
        ([f"169193655{i}500000" for i in range(4)], [1691936550.5 + i for i in range(4)]),
    ],
)
def test_names_that_are_times_are_stamps_and_no_frame_numbers(tmp_path, names, stamps):
    source = only(write_folder(tmp_path / "drive", names=names))
    assert source.frames == (0, 1, 2, 3)
    np.testing.assert_allclose(source.stamps(), stamps, rtol=0, atol=1e-6)  # float64 holds 2e-7 s of such numbers


def test_times_of_any_number_of_digits_are_in_their_order(tmp_path):
    names = [f"1691936550.{fraction}" for fraction in ("05", "1", "25", "5")]
    source = only(write_folder(tmp_path / "drive", names=names))
    check_scans(source)
    np.testing.assert_allclose(source.stamps() - 1691936550, [0.05, 0.1, 0.25, 0.5], rtol=0, atol=1e-6)  # as above


def test_poses_in_the_folder_come_before_those_beside_it(tmp_path):
    folder, rows = write_folder(tmp_path / "drive"), "1 0 0 {} 0 1 0 0 0 0 1 0\n" * SCANS
    (tmp_path / "poses.txt").write_text(rows.format(*[5] * SCANS))
    (tmp_path / "calib.txt").write_text("Tr: 1 0 0 0 0 1 0 0 0 0 1 2\n")
    assert only(folder).has_poses
    np.testing.assert_array_equal(only(folder).poses()[:, :3, 3], [[5, 0, 2]] * SCANS)
    (folder / "poses.txt").write_text(rows.format(*range(SCANS)))  # the LiDAR's: no calib.txt lies there
    np.testing.assert_array_equal(only(folder).poses()[:, :3, 3], [[i, 0, 0] for i in range(SCANS)])


def test_poses_from_elsewhere_change_nothing_else(tmp_path):
    names = [f"169193655{i}.5" for i in range(SCANS)]
    source = only(write_folder(tmp_path / "drive", ".bin", names))
    posed = WithPoses(source, np.zeros((SCANS, 4, 4)))
    check_scans(posed)
    assert posed.has_poses and not posed.poses().any() and not posed.has_labels
    assert (posed.name, posed.frames, posed.width) == (source.name, source.frames, source.width)
    assert posed.where(2) == source.where(2) and posed.num_points(2) == 62
    np.testing.assert_array_equal(posed.stamps(), source.stamps())


def test_velodyne_itself_is_its_sequence(tmp_path):
    write_folder(tmp_path / "08" / "velodyne", ".bin")
    for path in (tmp_path / "08", tmp_path / "08" / "velodyne"):
        assert only(path).name == "08"


def test_one_file_stands_for_its_folder(tmp_path):
    folder = write_folder(tmp_path / "drive", ".pcd")
    with pytest.warns(UserWarning, match="one scan tells nothing of motion"):
        check_scans(only(folder / "000002.pcd"))
    write_folder(tmp_path / "08" / "velodyne", ".bin")
    with pytest.warns(UserWarning, match="one scan"):
        assert only(tmp_path / "08" / "velodyne" / "000001.bin").name == "08"


def test_leftovers_and_other_files_are_no_scans(tmp_path):
    folder = write_folder(tmp_path / "drive")
    (folder / "._000000.npy").write_bytes(b"left by a copying tool")
    (folder / "notes.txt").write_text("sunny")
    check_scans(only(folder))


@pytest.mark.parametrize("encoding", list(Encoding)[:3])
def test_every_encoding_of_pcd(tmp_path, encoding):
    (tmp_path / "drive").mkdir()
    points = SCAN_POINTS[0][np.isfinite(SCAN_POINTS[0]).all(1)]
    cloud = PointCloud.from_points(points, ("x", "y", "z", "intensity"), (np.float32,) * 4)
    cloud.save(tmp_path / "drive" / "a.pcd", encoding)
    found = only(tmp_path / "drive").read_points(0)
    # written as decimals of so many digits
    np.testing.assert_allclose(found, points, rtol=1e-6 if encoding == Encoding.ASCII else 0, atol=1e-6)


def test_fields_by_name_in_any_order_and_type(tmp_path):
    folder = tmp_path / "drive"
    folder.mkdir()
    points = SCAN_POINTS[0]
    columns = [points[:, 2], np.arange(60), points[:, 0], (points[:, 3] * 255).round(), points[:, 1]]
    kinds = (np.float64, np.uint32, np.float64, np.uint8, np.float64)
    PointCloud.from_points(tuple(columns), ("z", "ring", "x", "Reflectivity", "y"), kinds).save(folder / "a.pcd")
    found = only(folder).read_points(0)
    np.testing.assert_array_equal(found[:, :3], points[:, :3])
    np.testing.assert_array_equal(found[:, 3], (points[:, 3] * 255).round())

    table = np.zeros(60, [("scalar_Intensity", "f4"), ("x", "f8"), ("y", "f8"), ("z", "f8")])
    for name, i in (("x", 0), ("y", 1), ("z", 2), ("scalar_Intensity", 3)):
        table[name] = points[:, i]
    for suffix in (".ply", ".npy"):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        if suffix == ".npy":
            np.save(folder / "a.npy", table)
        else:
            PlyData([PlyElement.describe(table, "vertex")], text=False).write(str(folder / "a.ply"))
        np.testing.assert_array_equal(only(folder).read_points(0), points)


def test_organised_arrays_come_row_by_row(tmp_path):
    folder = tmp_path / "drive"
    folder.mkdir()
    table = np.zeros((6, 10), [("x", "f4"), ("y", "f4"), ("z", "f4"), ("intensity", "f4")])
    for i, name in enumerate(table.dtype.names):
        table[name] = SCAN_POINTS[0][:, i].reshape(6, 10)
    np.save(folder / "a.npy", table)
    np.save(folder / "b.npy", table[0, 0])
    source = only(folder)
    np.testing.assert_array_equal(source.read_points(0), SCAN_POINTS[0])
    np.testing.assert_array_equal(source.read_points(1), SCAN_POINTS[0][:1])


def test_a_pcd_of_one_point(tmp_path):
    (tmp_path / "drive").mkdir()
    cloud = PointCloud.from_points(SCAN_POINTS[0][:1], ("x", "y", "z", "intensity"), (np.float32,) * 4)
    cloud.save(tmp_path / "drive" / "a.pcd", Encoding.ASCII)
    np.testing.assert_allclose(only(tmp_path / "drive").read_points(0), SCAN_POINTS[0][:1], rtol=1e-6)  # as above


def test_values_beyond_float32_are_infinite_without_a_word(tmp_path, recwarn):
    folder = tmp_path / "drive"
    folder.mkdir()
    np.save(folder / "a.npy", [[1e300, 0, 0], [1, 2, 3]])
    np.save(folder / "b.npy", np.array([(1e300, 0, 0), (1, 2, 3)], [("x", "f8"), ("y", "f8"), ("z", "f8")]))
    for frame in (0, 1):
        np.testing.assert_array_equal(only(folder).read_points(frame), [[np.inf, 0, 0, 0], [1, 2, 3, 0]])
    assert not recwarn.list


def test_remission_may_be_missing(tmp_path):
    points = SCAN_POINTS[0]
    folder = tmp_path / "drive"
    folder.mkdir()
    np.save(folder / "a.npy", points[:, :3].astype(np.float64))
    found = only(folder).read_points(0)
    np.testing.assert_array_equal(found[:, :3], points[:, :3])
    assert (found[:, 3] == 0).all()


def test_bin_files_of_another_remission_scale_need_it(tmp_path):
    scaled = [points * np.array([1, 1, 1, 255], np.float32) for points in SCAN_POINTS]
    folder = write_folder(tmp_path / "drive", ".bin", scans=scaled)
    with pytest.raises(InputError, match=r"another remission scale.*likely 255.*remission_scale in a --sensor file"):
        only(folder).read_points(0)
    check_scans(only(folder, remission_scale=255), scaled)
    shutil.move(folder, tmp_path / "08" / "velodyne")
    check_scans(only(tmp_path / "08", remission_scale=255), scaled)


# ---- what is wrong with files


def write_bad(path, what):
    points = SCAN_POINTS[0]
    if what == "five columns":
        np.save(path, np.c_[points, points[:, 0]])
    elif what == "objects":
        np.save(path, np.array([{"x": 1}], dtype=object), allow_pickle=True)
    elif what == "archive":
        with open(path, "wb") as file:
            np.savez(file, points)
    elif what == "x of three":
        np.save(path, np.zeros(5, [("x", "f4", 3), ("y", "f4"), ("z", "f4")]))
    elif what == "remission of two":
        np.save(path, np.zeros(5, [("x", "f4"), ("y", "f4"), ("z", "f4"), ("intensity", "f4", 2)]))
    elif what == "remission in a list":
        table = np.zeros(5, [("x", "f4"), ("y", "f4"), ("z", "f4"), ("intensity", object)])
        table["intensity"] = [[1.0]] * 5
        PlyData([PlyElement.describe(table, "vertex", val_types={"intensity": "f4"})]).write(str(path))
    elif what == "text":
        np.save(path, np.array([["a", "b", "c"]]))
    elif what == "empty":
        write_scan(path, points[:0])
    elif what == "nothing finite":
        write_scan(path, np.full((5, 4), np.nan, np.float32))
    elif what == "no z":
        PointCloud.from_points(points[:, :2], ("x", "y"), (np.float32,) * 2).save(path)
    elif what == "integers":
        PointCloud.from_points(np.zeros((5, 3), np.int16), ("x", "y", "z"), (np.int16,) * 3).save(path)
    elif what == "no vertices":
        PlyData([PlyElement.describe(np.zeros(3, [("a", "f4")]), "other")]).write(str(path))
    else:
        whole = write_scan(path, points).read_bytes()
        cut = {"cut": len(whole) // 2 + 1, "cut between points": len(whole) - 32, "header only": 40, "zero bytes": 0}
        path.write_bytes(whole[: cut[what]])


@pytest.mark.parametrize(
    ("suffix", "what", "message"),
    [
        (".npy", "five columns", r"expected an array \[n, 4\].*got \[60, 5\] of float32"),
        (".npy", "objects", "not a whole NumPy file.*pickle"),
        (".npy", "text", r"expected an array \[n, 4\]"),
        (".npy", "archive", "not a whole NumPy file"),
        (".npy", "x of three", r"expected float fields x, y and z; the fields are x \(float32\[3\]\), y \(float32\)"),
        (".npy", "remission of two", r"one number a point in intensity; .* intensity \(float32\[2\]\)"),
        (".ply", "remission in a list", r"one number a point in intensity; .* intensity \(object\)"),
        (".npy", "empty", "the scan is empty"),
        (".npy", "nothing finite", "none of the 5 points is finite"),
        (".npy", "cut", "not a whole NumPy file"),
        (".npy", "zero bytes", "not a whole NumPy file"),
        (".pcd", "cut", "not a whole PCD file"),
        (".pcd", "cut between points", "cut short: 58 of 60 points"),
        (".pcd", "header only", "not a whole PCD file"),
        (".pcd", "zero bytes", "not a whole PCD file"),
        (".pcd", "empty", "the scan is empty"),
        (".pcd", "no z", r"expected float fields x, y and z; the fields are x \(float32\), y \(float32\)"),
        (".pcd", "integers", "expected float fields x, y and z"),
        (".ply", "cut", "not a whole PLY file"),
        (".ply", "cut between points", "not a whole PLY file"),
        (".ply", "zero bytes", "not a whole PLY file"),
        (".ply", "no vertices", "not a whole PLY file"),
        (".bin", "cut", "truncated"),
        (".bin", "zero bytes", "the scan is empty"),
    ],
)
def test_a_bad_scan_is_one_error_and_the_others_can_be_read(tmp_path, suffix, what, message):
    folder = write_folder(tmp_path / "drive", suffix)
    write_bad(folder / f"000001{suffix}", what)
    source = only(folder)
    with pytest.raises(InputError, match=message) as error:
        source.read_points(1)
    assert str(folder / f"000001{suffix}") in str(error.value)
    np.testing.assert_array_equal(source.read_points(2), SCAN_POINTS[2])


def test_what_is_no_source(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing to read here; expected scans"):
        open_sources(tmp_path / "empty")
    with pytest.raises(InputError, match="does not exist"):
        open_sources(tmp_path / "nowhere")
    with pytest.raises(InputError, match="does not exist"):
        open_sources(tmp_path / "nowhere.bag")
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"neither a bag \(.bag, .mcap, .db3\) nor a scan"):
        open_sources(tmp_path / "empty" / "a.txt")
    folder = write_folder(tmp_path / "drive")
    with pytest.raises(InputError, match="none to choose by --sequences"):
        open_sources(folder, names=["00"])
    with pytest.raises(InputError, match=r"--topic /points: .* is no bag"):
        open_sources(folder, topic="/points")
    write_scan(folder / "a.pcd", SCAN_POINTS[0])
    with pytest.raises(InputError, match=r"holds \.npy and \.pcd files"):
        open_sources(folder)


# ---- bags


@pytest.fixture(scope="module", params=KINDS)
def bag(request, tmp_path_factory, bags):
    folder = tmp_path_factory.mktemp(request.param)
    clouds = [bags.xyzi(points, stamp=100 + 0.1 * i) for i, points in enumerate(SCAN_POINTS)]
    return bags.write(folder / ("drive.bag" if request.param == "ros1" else "drive"), clouds, request.param)


def test_bags(bag):
    source = only(bag)
    check_scans(source)
    assert source.name == "drive" and source.frames == (0, 1, 2, 3) and source.topic == "/points"
    np.testing.assert_allclose(source.stamps(), [100, 100.1, 100.2, 100.3], rtol=0, atol=1e-7)
    assert source.where(2) == f"{bag}: message 2 of /points"
    assert source.num_points(0) is None
    for frame in (3, 0, 2, 2, 1):  # forth and back
        np.testing.assert_array_equal(source.read_points(frame), SCAN_POINTS[frame])
    check_scans(only(bag, topic="/points"))


def test_a_bag_begins_again_for_earlier_scans_alone(bag, monkeypatch):
    source, begun = only(bag), []
    monkeypatch.setattr(BagScans, "_restart", lambda self, begin=BagScans._restart: (begun.append(0), begin(self)))
    for frame in (0, 1, 1, 3, 3):
        source.read_points(frame)
    assert not begun
    source.read_points(2)
    assert len(begun) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_topic_without_a_message(tmp_path, bags, kind):
    path = bags.write(tmp_path / "drive.bag", [], kind)
    with pytest.raises(InputError, match=r"drive\.bag: /points holds no message"):
        open_sources(path)


def test_the_file_within_a_ros_2_bag(tmp_path, bags):
    clouds = [bags.xyzi(points) for points in SCAN_POINTS]
    for kind, suffix in (("sqlite3", ".db3"), ("mcap", ".mcap")):
        folder = bags.write(tmp_path / kind, clouds, kind)
        (file,) = folder.glob(f"*{suffix}")
        shutil.move(file, tmp_path / f"alone{suffix}")
        source = only(tmp_path / f"alone{suffix}")
        check_scans(source)
        assert source.name == "alone"


def test_the_topic_is_chosen_or_asked_for(tmp_path, bags):
    clouds = [bags.xyzi(points) for points in SCAN_POINTS]
    path = bags.write(tmp_path / "two.bag", clouds, topics=("/front", "/rear"))
    with pytest.raises(
        InputError, match=r"2 topics of PointCloud2, choose one with --topic; the bag holds /front "
    ) as e:
        open_sources(path)
    assert "/rear (sensor_msgs/msg/PointCloud2, 4 messages), /rosout (std_msgs/msg/String, 4 messages)" in str(e.value)
    check_scans(only(path, topic="/rear"))
    with pytest.raises(InputError, match="no topic /left; the bag holds /front"):
        open_sources(path, topic="/left")
    with pytest.raises(InputError, match="--topic /rosout is of another type"):
        open_sources(path, topic="/rosout")
    path = bags.write(tmp_path / "none.bag", clouds, topics=())
    with pytest.raises(InputError, match=r"no topic of PointCloud2; the bag holds /rosout \(std_msgs/msg/String, 4"):
        open_sources(path)
    with pytest.raises(InputError, match=r"two\.bag; name the bag itself"):
        open_sources(tmp_path)


def test_the_time_of_the_recording_where_the_header_has_none(tmp_path, bags):
    clouds = [bags.xyzi(points, stamp=0.0) for points in SCAN_POINTS]
    source = only(bags.write(tmp_path / "drive.bag", clouds, recorded=[50.0, 50.1, 50.2, 50.3]))
    np.testing.assert_allclose(source.stamps(), [50.0, 50.1, 50.2, 50.3], atol=1e-7)
    check_scans(source)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_message_is_one_error_and_the_others_can_be_read(tmp_path, bags, kind):
    clouds = [bags.xyzi(points, stamp=1.0 + i) for i, points in enumerate(SCAN_POINTS)]
    clouds[1] = b"\x00\x01\x00\x00garbage"
    clouds[2].data = clouds[2].data[:100]
    source = only(bags.write(tmp_path / "drive.bag", clouds, kind, recorded=[1.0, 2.0, 3.0, 4.0]))
    assert source.name == ("drive" if kind == "ros1" else "drive.bag")  # a folder may be called so too
    with pytest.raises(InputError, match="message 1 of /points: not a whole message"):
        source.read_points(1)
    with pytest.raises(InputError, match="message 2 of /points: has 100 bytes, expected 1 rows of 62 points of 20"):
        source.read_points(2)
    np.testing.assert_array_equal(source.read_points(3), SCAN_POINTS[3])
    np.testing.assert_array_equal(source.read_points(0), SCAN_POINTS[0])
    np.testing.assert_allclose(source.stamps(), [1, 2, 3, 4], atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_bag(tmp_path, bags, kind):
    scans = [some_points(5000, seed) for seed in range(4)]
    path = bags.write(tmp_path / "whole.bag", [bags.xyzi(points) for points in scans], kind)
    file = path if kind == "ros1" else next(f for f in path.iterdir() if f.suffix in (".db3", ".mcap"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    source = None
    with pytest.raises(InputError) as error:
        source = only(path)
        for frame in source.frames:
            source.read_points(frame)
    assert "cannot be read" in str(error.value) or "the bag ends after" in str(error.value)
    file.write_bytes(b"not a bag at all")
    with pytest.raises(InputError, match="cannot be read as a bag"):
        open_sources(path)


def test_missing_libraries_are_named_with_their_extra(tmp_path, bags, monkeypatch):
    bag = bags.write(tmp_path / "drive.bag", [bags.xyzi(SCAN_POINTS[0])])
    folders = {suffix: write_folder(tmp_path / suffix[1:], suffix) for suffix in (".pcd", ".ply")}
    for library in ("rosbags.highlevel", "pypcd4", "plyfile"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=r"reading bags needs rosbags: pip install 'kdmos\[bags\]'"):
        open_sources(bag)
    for suffix, library in ((".pcd", "pypcd4"), (".ply", "plyfile")):
        with pytest.raises(InputError, match=rf"needs {library}: pip install 'kdmos\[files\]'"):
            open_sources(folders[suffix])


# ---- PointCloud2


def test_organised_padded_and_big_endian_clouds(bags):
    points = SCAN_POINTS[0]
    columns = dict(zip("xyz", points[:, :3].T)) | {"intensity": points[:, 3]}
    for options in (
        {},
        {"padding": 3},
        {"height": 6},
        {"height": 6, "row_padding": 7, "padding": 1},
        {"big_endian": True},
        {"big_endian": True, "height": 4, "row_padding": 2},
    ):
        np.testing.assert_array_equal(points_of_message(bags.cloud(columns, **options), "here"), points)
    message = bags.cloud(columns, height=6, row_padding=7)
    message.data = message.data[:-7]  # some drivers leave the last padding out
    np.testing.assert_array_equal(points_of_message(message, "here"), points)
    message = bags.cloud(columns)
    message.row_step = 0
    np.testing.assert_array_equal(points_of_message(message, "here"), points)


@pytest.mark.parametrize("kind", ["u1", "i2", "u2", "i4", "u4", "f4", "f8"])
def test_remission_of_every_type(bags, kind):
    points = SCAN_POINTS[0].astype(np.float64)
    values = np.arange(60).astype(kind)
    for name in ("remission", "intensity", "reflectivity", "Intensity"):
        columns = {"x": points[:, 0], "ring": np.zeros(60, "u2"), name: values, "y": points[:, 1], "z": points[:, 2]}
        found = points_of_message(bags.cloud(columns), "here")
        np.testing.assert_array_equal(found, np.c_[points[:, :3], np.arange(60)].astype(np.float32))
    both = dict(zip("xyz", points[:, :3].T)) | {"reflectivity": np.ones(60, "u1"), "intensity": values}
    np.testing.assert_array_equal(points_of_message(bags.cloud(both), "here")[:, 3], np.arange(60))


def test_messages_that_contradict_themselves(bags):
    columns = dict(zip("xyz", SCAN_POINTS[0][:, :3].T))

    def refused(match, **changes):
        message = bags.cloud(columns)
        vars(message).update(changes)
        with pytest.raises(InputError, match=match):
            points_of_message(message, "here")

    refused("was cut short", width=61, row_step=0)
    refused("was cut short", row_step=3)
    refused("was cut short", height=2**31)
    refused("field z has type 7 at 8 of 9 bytes", point_step=9)
    refused("expected float fields x, y and z; the fields are none", fields=[])
    message = bags.cloud(columns)
    message.fields[0].datatype = 9
    with pytest.raises(InputError, match="field x has type 9"):
        points_of_message(message, "here")
    assert points_of_message(bags.cloud({name: column[:0] for name, column in columns.items()}), "here").shape == (0, 4)
