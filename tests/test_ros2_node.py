"""The example node in docs/, on stand-ins for ROS: clouds go in, the same clouds come back with a field `moving`."""

import importlib.util
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from kdmos.data.bags import points_of_message
from kdmos.data.semantic_kitti import find_sequences
from kdmos.models import Rule
from kdmos.predict import predict_sequence

NODE = Path(__file__).parents[1] / "docs" / "ros2_node.py"


class Message(SimpleNamespace):
    FLOAT32 = 7


class Node:
    """What the example uses of rclpy's node."""

    given: ClassVar[dict] = {}

    def __init__(self, name: str) -> None:
        self.published, self.warnings, self.said, self.callbacks = [], [], [], {}

    def declare_parameter(self, name, default):
        return SimpleNamespace(value=self.given.get(name, default))

    def create_publisher(self, kind, topic, qos):
        return SimpleNamespace(publish=lambda message: self.published.append(message))

    def create_subscription(self, kind, topic, callback, qos):
        self.callbacks[topic] = callback

    def get_logger(self):
        return SimpleNamespace(warning=self.warnings.append, info=self.said.append)


class Buffer:
    """TF that knows the poses of some stamps."""

    poses: ClassVar[dict] = {}

    def lookup_transform(self, target, source, stamp, timeout):
        assert (target, source) == ("odom", "lidar")
        if stamp not in self.poses:
            raise TransformException(f"no transform at {stamp}")
        x, y, z = self.poses[stamp]
        return SimpleNamespace(
            transform=SimpleNamespace(
                translation=SimpleNamespace(x=x, y=y, z=z), rotation=SimpleNamespace(x=0.0, y=0.0, z=0.0, w=1.0)
            )
        )


class TransformException(Exception):
    pass


@pytest.fixture
def example(monkeypatch):
    """The module, with ROS stood in for."""
    stand_ins = {
        "rclpy": {},
        "rclpy.node": {"Node": Node},
        "rclpy.duration": {"Duration": SimpleNamespace},
        "rclpy.qos": {"qos_profile_sensor_data": None},
        "rclpy.time": {"Time": SimpleNamespace(from_msg=lambda stamp: stamp.sec + stamp.nanosec * 1e-9)},
        "sensor_msgs": {},
        "sensor_msgs.msg": {"PointCloud2": Message, "PointField": Message},
        "tf2_ros": {
            "Buffer": Buffer,
            "TransformException": TransformException,
            "TransformListener": lambda *_, **__: None,
        },
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("ros2_node", NODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cloud(points: np.ndarray, frame: int) -> Message:
    """A message of x, y, z, intensity, with two bytes of padding a point and three a row."""
    step = 18
    data = np.zeros((1, step * len(points) + 3), np.uint8)
    data[0, :-3].reshape(-1, step)[:, :16] = points.view(np.uint8).reshape(-1, 16)
    fields = [Message(name=n, offset=4 * i, datatype=7, count=1) for i, n in enumerate(("x", "y", "z", "intensity"))]
    stamp = SimpleNamespace(sec=frame, nanosec=0)
    return Message(
        header=SimpleNamespace(stamp=stamp, frame_id="lidar"),
        height=1,
        width=len(points),
        fields=fields,
        is_bigendian=False,
        point_step=step,
        row_step=data.shape[1],
        data=data.tobytes(),
        is_dense=True,
    )


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.01)


def test_clouds_come_back_with_a_field(example, monkeypatch, tmp_path, write_sequence, one_thread):
    (sequence,) = find_sequences(write_sequence(tmp_path / "00"))
    poses = sequence.poses()
    poses[:, :3, :3] = np.eye(3)  # the stand-in's TF does not turn
    monkeypatch.setattr(Buffer, "poses", {float(f): poses[f, :3, 3] for f in sequence.frames if f != 4})
    monkeypatch.setattr(Node, "given", {"checkpoint": "rule", "fixed_frame": "odom"})
    node = example.MovingPoints()
    for frame in sequence.frames:
        node.callbacks["points"](cloud(sequence.read_points(frame), frame))
        wait_for(lambda: not node.stream._scans)  # a machine that is fast enough
    broken = cloud(sequence.read_points(0), 99)
    broken.fields = broken.fields[1:]
    node.callbacks["points"](broken)
    node.stream.close()
    wait_for(lambda: len(node.published) == 13)
    assert node.said == ["rule: answers after 7 more scans"]
    assert any("no transform at 4" in text for text in node.warnings)
    assert any("x" in text for text in node.warnings[-1:])

    class Known(type(sequence)):
        def poses(self):
            return poses[list(self.frames)]

    frames = tuple(frame for frame in sequence.frames if frame != 4)
    offline = predict_sequence(Rule().eval(), Known(sequence.name, sequence.folder, frames))
    for message, (frame, expected) in zip(node.published, offline, strict=True):
        assert message.header.stamp.sec == frame and message.point_step == 22
        assert np.array_equal(points_of_message(message, "it"), sequence.read_points(frame))
        rows = np.frombuffer(message.data, np.uint8).reshape(-1, 22)
        moving = np.ascontiguousarray(rows[:, 18:]).view("<f4")[:, 0]
        assert message.fields[-1].name == "moving" and message.fields[-1].offset == 18
        assert np.array_equal(moving, expected.moving_probability)
    assert threading.active_count() < 20


def test_a_repeated_stamp_takes_no_other_cloud_with_it(example, monkeypatch, tmp_path, write_sequence, one_thread):
    """Its scan is answered at once, before those that wait for their look-ahead."""
    (sequence,) = find_sequences(write_sequence(tmp_path / "00"))
    monkeypatch.setattr(Buffer, "poses", {float(frame): (0, 0, 0) for frame in sequence.frames})
    monkeypatch.setattr(Node, "given", {"checkpoint": "rule", "fixed_frame": "odom"})
    node = example.MovingPoints()
    for frame in [0, 1, 2, 2, 3, 4]:
        node.callbacks["points"](cloud(sequence.read_points(frame), frame))
        wait_for(lambda: not node.stream._scans)
    node.stream.close()
    wait_for(lambda: len(node.published) == 6)
    assert [message.header.stamp.sec for message in node.published] == [2, 0, 1, 2, 3, 4]
    assert not node.clouds


def test_rows_whose_size_or_end_is_missing(example):
    for change in ({"row_step": 0}, {"data": b"\0" * (6 * 18)}):
        message = cloud(np.ones((6, 4), np.float32), 0)
        message.__dict__.update(change)
        joined = example.with_field(message, "moving", np.arange(6, dtype=np.float32))
        assert len(joined.data) == 6 * 22


def test_rows_that_are_padded_and_big_endian(example):
    message = cloud(np.ones((6, 4), np.float32), 0)
    message.is_bigendian = True
    joined = example.with_field(message, "moving", np.arange(6, dtype=np.float32))
    rows = np.frombuffer(joined.data, np.uint8).reshape(6, 22)
    assert np.ascontiguousarray(rows[:, 18:]).view(">f4")[:, 0].tolist() == list(range(6))
    assert joined.row_step == 6 * 22 and len(joined.data) == joined.row_step
