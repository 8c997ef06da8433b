"""ROS 1 bags, ROS 2 bags and MCAP files: the scans of one PointCloud2 topic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kdmos.data.files import points_of_fields, usable
from kdmos.data.source import ScanSource
from kdmos.errors import InputError

POINT_CLOUD = "sensor_msgs/msg/PointCloud2"
BAGS = (".bag", ".mcap", ".db3")
FIELD_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}  # of sensor_msgs/PointField


class BagScans(ScanSource):
    """Scans of a topic in the order of the recording; the frame number is the position, from 0.

    A bag is read forward; a request for an earlier frame begins again at its start.

    Args:
        path: .bag, .mcap or .db3 file, or the folder of a ROS 2 bag.
        topic: Of type PointCloud2; None: the only one.
    Raises: InputError if rosbags is missing, the bag cannot be read, or the topic is missing or not the only one.
    """

    def __init__(self, path: Path, topic: str | None = None) -> None:
        try:
            from rosbags.highlevel import AnyReader
            from rosbags.typesys import Stores, get_typestore
        except ImportError as error:
            raise InputError(f"{path}: reading bags needs rosbags: pip install 'kdmos[bags]'") from error
        self.path, self.name = path, path.stem if path.is_file() else path.name
        paths = [path]
        if path.is_dir() and path.suffix == ".bag":  # rosbags takes every path of that suffix for a ROS 1 bag
            paths = sorted(file for file in path.iterdir() if file.suffix in (".mcap", ".db3"))
        try:
            # Older ROS 2 bags do not hold the definitions of their messages; that of PointCloud2 never changed.
            self._reader = AnyReader(paths, default_typestore=get_typestore(Stores.ROS2_HUMBLE))
            self._reader.open()
        except Exception as error:  # a damaged bag breaks the reader in a dozen ways, each with another exception
            raise InputError(
                f"{path}: cannot be read as a bag ({_reason(error)}); copy it again, or reindex it (rosbag reindex, "
                "ros2 bag reindex, mcap recover)"
            ) from error
        self.topic = _chosen_topic(path, self._reader.topics, topic)
        self._connections = [c for c in self._reader.connections if c.topic == self.topic]
        self.frames = tuple(range(self._reader.topics[self.topic].msgcount))
        if not self.frames:
            raise InputError(f"{path}: {self.topic} holds no message")
        self._stamps: np.ndarray | None = None
        self._restart()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # of a bag that was never opened
            self._messages.close()  # a database is not closed while it is read
            self._reader.close()

    def _restart(self) -> None:
        self._messages: Iterator = self._reader.messages(self._connections)
        self._next = 0
        self._broken: str | None = None  # why there is nothing to read beyond `_next`

    def where(self, frame: int) -> str:
        return f"{self.path}: message {frame} of {self.topic}"

    def read_points(self, frame: int) -> np.ndarray:
        return usable(points_of_message(self._message(frame)[0], self.where(frame)), self.where(frame))

    def stamps(self) -> np.ndarray | None:
        """By the header, or the time of the recording where that says 0; a message that cannot be read has the latter.

        Reads the bag once.
        """
        if self._stamps is None:
            self._stamps = np.array([self._stamp(frame) for frame in self.frames])
        return self._stamps

    def _stamp(self, frame: int) -> float:
        try:
            message, recorded = self._message(frame)
        except InputError:
            return self._recorded * 1e-9
        stamp = message.header.stamp
        return (stamp.sec + stamp.nanosec * 1e-9) or recorded * 1e-9

    def _message(self, frame: int) -> tuple[object, int]:
        """A message and the time of its recording, nanoseconds."""
        if frame < self._next - 1:
            self._restart()
        while self._next <= frame and self._broken is None:
            try:
                self._connection, self._recorded, self._data = next(self._messages)
                self._next += 1
            except StopIteration:
                self._broken = f"the bag ends after {self._next} of {len(self.frames)} messages"
            except Exception as error:  # as in opening: a damaged bag has no exception of its own
                self._broken = f"the bag cannot be read beyond message {self._next - 1} ({_reason(error)})"
        if self._broken is not None:
            raise InputError(f"{self.where(frame)}: {self._broken}; copy the bag again")
        try:
            return self._reader.deserialize(self._data, self._connection.msgtype), self._recorded
        except Exception as error:  # nor has a damaged message
            raise InputError(f"{self.where(frame)}: not a whole message ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())


def _chosen_topic(path: Path, topics: dict, topic: str | None) -> str:
    clouds = [name for name, about in topics.items() if about.msgtype == POINT_CLOUD]
    if topic in clouds:
        return topic
    if topic is None and len(clouds) == 1:
        return clouds[0]
    there = ", ".join(f"{name} ({about.msgtype}, {about.msgcount} messages)" for name, about in sorted(topics.items()))
    if topic is None:
        what = f"{len(clouds)} topics of PointCloud2, choose one with --topic" if clouds else "no topic of PointCloud2"
    else:
        what = f"--topic {topic} is of another type than PointCloud2" if topic in topics else f"no topic {topic}"
    raise InputError(f"{path}: {what}; the bag holds {there or 'nothing'}")


def points_of_message(message, where: object) -> np.ndarray:
    """Points of a PointCloud2 message, row by row where it is organised.

    Args:
        message: With `fields`, `height`, `width`, `point_step`, `row_step`, `is_bigendian` and `data` (bytes or uint8).
        where: The scan, for messages.
    Returns: float32 [height * width, 4]; see `points_of_fields`.
    Raises: InputError if the message contradicts itself or lacks x, y or z.
    """
    data = np.frombuffer(message.data, np.uint8)
    height, width, step = message.height, message.width, message.point_step
    row = message.row_step or step * width  # 0 in messages of some drivers
    if row < step * width or len(data) < row * (height - 1) + step * width * (height > 0):
        raise InputError(
            f"{where}: has {len(data)} bytes, expected {height} rows of {width} points of {step} bytes; the message "
            "was cut short"
        )
    order, formats = ">" if message.is_bigendian else "<", {}
    for field in message.fields:
        kind = FIELD_TYPES.get(field.datatype)
        if kind is None or field.offset + int(kind[1]) > step:
            raise InputError(f"{where}: field {field.name} has type {field.datatype} at {field.offset} of {step} bytes")
        formats[field.name] = (order + kind, field.offset)
    dtype = np.dtype(
        {
            "names": list(formats),
            "formats": [kind for kind, _ in formats.values()],
            "offsets": [offset for _, offset in formats.values()],
            "itemsize": step,
        }
    )
    if row * height > len(data):  # the padding after the last row may be missing
        data = np.concatenate([data, np.zeros(row * height - len(data), np.uint8)])
    rows = data[: row * height].reshape(height, row)[:, : step * width]
    points = np.ascontiguousarray(rows).reshape(-1).view(dtype) if step else np.zeros(0, dtype)
    return points_of_fields({name: points[name] for name in formats}, where)
