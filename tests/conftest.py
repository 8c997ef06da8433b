"""Data for the tests: goldens of the authors' code and real scans, which they do not own, and bags, which they make."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent
SHARED = Path(os.environ.get("KDMOS_SHARED", TESTS.parents[1] / "shared"))


def shared_file(relative: str) -> Path:
    """A file of the shared data, or skip; fail where CI says that it must be there."""
    path = SHARED / relative
    if not path.exists():
        message = f"{relative} is not under {SHARED} (set KDMOS_SHARED; the data's licence keeps it out of here)"
        if os.environ.get("KDMOS_REQUIRE_SHARED") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture(scope="session")
def golden():
    """golden("a1_residual.npz") -> path: from the slim set in tests/goldens, else from the shared data."""

    def find(name: str) -> Path:
        slim = TESTS / "goldens" / name
        return slim if slim.exists() else shared_file(f"goldens/{name}")

    return find


@pytest.fixture(scope="session")
def realdata():
    """realdata("kitti-raw-0005-a") -> path of a real sequence or file."""
    return lambda name: shared_file(f"realdata/{name}")


@pytest.fixture(scope="session")
def write_sequence(golden):
    """write_sequence(folder) -> folder: the goldens' synthetic sequence of 14 scans in SemanticKITTI's layout."""
    content = np.load(golden("a1_residual.npz"))
    ends = np.cumsum(content["n_points"])[:-1]
    scans, labels = np.split(content["scans"], ends), np.split(content["labels"], ends)

    def write(folder: Path, frames: int = 14) -> Path:
        for name, suffix, columns in (("velodyne", "bin", scans), ("labels", "label", labels)):
            (folder / name).mkdir(parents=True)
            for frame in range(frames):
                columns[frame].tofile(folder / name / f"{frame:06d}.{suffix}")
        (folder / "poses.txt").write_bytes(content["poses_txt"].tobytes())
        (folder / "calib.txt").write_bytes(content["calib_txt"].tobytes())
        return folder

    return write


@pytest.fixture(scope="session")
def stirred():
    """stirred(model) -> the model, its norms as if they had seen something and its 1x1 convolutions no longer small."""

    def stir(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                    module.running_mean.normal_(std=0.3)
                    module.running_var.uniform_(0.5, 2.0)
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.3)
                elif isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1):
                    module.weight.normal_(std=0.2)
        return model.eval()

    return stir


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """No test touches the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def one_thread():
    """torch on one thread: of many small steps, each would wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bags():
    """bags.cloud(...), bags.xyzi(points) -> what a PointCloud2 message holds; bags.write(path, clouds, kind)."""
    return SimpleNamespace(cloud=_cloud, xyzi=_xyzi, write=_write_bag)


FIELD_TYPES = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 8}


def _cloud(columns, height=1, padding=0, row_padding=0, big_endian=False, stamp=0.0):
    """What a PointCloud2 message holds.

    Args:
        columns: Arrays [n] by field name, in their own types.
        height: Rows of an organised cloud; divides n.
        padding: Bytes after each point.
        row_padding: Bytes after each row.
    """
    order = ">" if big_endian else "<"
    names, count = list(columns), len(next(iter(columns.values())))
    kinds = [f"{column.dtype.kind}{column.dtype.itemsize}" for column in columns.values()]
    packed = np.zeros(
        count, np.dtype([(name, order + kind) for name, kind in zip(names, kinds)] + [("", f"V{padding}")])
    )
    for name, column in columns.items():
        packed[name] = column
    step, width = packed.dtype.itemsize, count // height
    rows = np.zeros((height, step * width + row_padding), np.uint8)
    rows[:, : step * width] = packed.view(np.uint8).reshape(height, -1)
    fields = [
        SimpleNamespace(name=name, offset=packed.dtype.fields[name][1], datatype=FIELD_TYPES[kind], count=1)
        for name, kind in zip(names, kinds)
    ]
    return SimpleNamespace(
        height=height,
        width=width,
        fields=fields,
        is_bigendian=big_endian,
        point_step=step,
        row_step=rows.shape[1],
        data=rows.reshape(-1),
        stamp=stamp,
    )


def _xyzi(points, stamp=0.0):
    """A cloud as most drivers send it."""
    return _cloud(dict(zip(("x", "y", "z", "intensity"), np.asarray(points, np.float32).T)), padding=4, stamp=stamp)


def _write_bag(path, clouds, kind="ros1", topics=("/points",), recorded=None):
    """Write clouds on each topic, and a text beside them.

    Args:
        path: File (ros1) or folder (sqlite3, mcap) to make.
        clouds: As `bags.cloud` makes them; bytes are written as they are.
        kind: "ros1", "sqlite3" or "mcap".
        recorded: Seconds of the recording, per cloud; None: those of the stamps.
    """
    from rosbags.rosbag1 import Writer as Writer1
    from rosbags.rosbag2 import StoragePlugin
    from rosbags.rosbag2 import Writer as Writer2
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS1_NOETIC if kind == "ros1" else Stores.ROS2_HUMBLE)
    types = store.types
    serialize = store.serialize_ros1 if kind == "ros1" else store.serialize_cdr
    if kind == "ros1":
        writer = Writer1(path)
    else:
        plugin = {"sqlite3": StoragePlugin.SQLITE3, "mcap": StoragePlugin.MCAP}[kind]
        writer = Writer2(path, version=9, storage_plugin=plugin)
    cloud_type, text_type = "sensor_msgs/msg/PointCloud2", "std_msgs/msg/String"
    with writer:
        connections = [writer.add_connection(topic, cloud_type, typestore=store) for topic in topics]
        text = writer.add_connection("/rosout", text_type, typestore=store)
        for i, about in enumerate(clouds):
            stamp = recorded[i] if recorded is not None else getattr(about, "stamp", float(i))
            nanoseconds = round(stamp * 1e9)
            writer.write(text, nanoseconds, serialize(types[text_type]("between the scans"), text_type))
            raw = about if isinstance(about, bytes) else serialize(_message(types, about, kind), cloud_type)
            for connection in connections:
                writer.write(connection, nanoseconds, raw)
    return path


def _message(types, about, kind):
    stamp = types["builtin_interfaces/msg/Time"](int(about.stamp), round(about.stamp % 1 * 1e9))
    sequence = (0,) if kind == "ros1" else ()  # a header of ROS 1 counts
    header = types["std_msgs/msg/Header"](*sequence, stamp, "lidar")
    field = types["sensor_msgs/msg/PointField"]
    return types["sensor_msgs/msg/PointCloud2"](
        header=header,
        height=about.height,
        width=about.width,
        fields=[field(f.name, f.offset, f.datatype, f.count) for f in about.fields],
        is_bigendian=about.is_bigendian,
        point_step=about.point_step,
        row_step=about.row_step,
        data=about.data,
        is_dense=True,
    )
