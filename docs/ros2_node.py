"""A ROS 2 node around `MosStream`: a PointCloud2 comes back with a field `moving`, the probability that a point moves.

    python ros2_node.py --ros-args -r points:=/velodyne_points -p sensor:=robot.yaml -p fixed_frame:=odom

Parameters: `checkpoint`, `device`, `precision` and `sensor` (the YAML of a sensor's profile) as for `MosStream`;
`fixed_frame`: poses are those of TF from this frame; empty: from odometry of kdmos. An example to start from: answers
come late by the look-ahead of the checkpoint, and scans are skipped where the machine is too slow (`BackgroundStream`).
"""

import threading

import numpy as np
import rclpy
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from rclpy.time import Time
from sensor_msgs.msg import PointCloud2, PointField
from tf2_ros import Buffer, TransformException, TransformListener

from kdmos.data.bags import points_of_message
from kdmos.data.poses import pose_matrices
from kdmos.errors import InputError
from kdmos.stream import BackgroundStream, MosStream

PATIENCE = Duration(seconds=0.1)  # for the transform of a scan that has just come


class MovingPoints(Node):
    def __init__(self) -> None:
        super().__init__("kdmos")
        defaults = {
            "checkpoint": "synthetic-now",
            "device": "auto",
            "precision": "float32",
            "sensor": "",
            "fixed_frame": "",
        }
        given = {name: self.declare_parameter(name, default).value for name, default in defaults.items()}
        self.fixed_frame, sensor = given.pop("fixed_frame"), given.pop("sensor")
        stream = MosStream(**given, sensor=sensor or None)
        self.get_logger().info(stream.about)
        self.stream, self.lookahead = BackgroundStream(stream), stream.lookahead
        self.clouds: dict[int, PointCloud2] = {}  # that wait for their result, by number
        self.count = 0
        self.transforms = Buffer()
        TransformListener(self.transforms, self, spin_thread=True)
        self.publisher = self.create_publisher(PointCloud2, "moving_points", qos_profile_sensor_data)
        self.create_subscription(PointCloud2, "points", self.take, qos_profile_sensor_data)
        threading.Thread(target=self.publish, daemon=True).start()

    def take(self, cloud: PointCloud2) -> None:
        """In the sensor's thread: never waits for the network."""
        try:
            points = points_of_message(cloud, f"scan {self.count}")
        except InputError as error:
            self.get_logger().warning(str(error))
            return
        pose = self.pose(cloud) if self.fixed_frame else None  # of odometry
        if self.fixed_frame and pose is None:
            return
        self.clouds[self.count] = cloud
        self.count += 1
        stamp = cloud.header.stamp.sec + cloud.header.stamp.nanosec * 1e-9
        self.stream.put(points, pose, stamp or None)  # 0: the driver does not fill it

    def pose(self, cloud: PointCloud2) -> np.ndarray | None:
        """Of the LiDAR in the fixed frame, None if TF does not know it."""
        frame, stamp = cloud.header.frame_id, Time.from_msg(cloud.header.stamp)
        try:
            found = self.transforms.lookup_transform(self.fixed_frame, frame, stamp, PATIENCE).transform
        except TransformException as error:
            self.get_logger().warning(str(error))
            return None
        t, q = found.translation, found.rotation
        return pose_matrices([t.x, t.y, t.z], [q.x, q.y, q.z, q.w])

    def publish(self) -> None:
        """In a thread of its own: each result joins the cloud it belongs to."""
        for result in self.stream.results():
            cloud = self.clouds.pop(result.scan_id)
            if result.late_by >= self.lookahead:  # in its turn: those before it that still wait were skipped
                for number in [number for number in list(self.clouds) if number < result.scan_id]:
                    del self.clouds[number]
            self.publisher.publish(with_field(cloud, "moving", result.moving_probability))
            for note in result.notes:
                self.get_logger().warning(f"scan {result.scan_id}: {note}")


def with_field(cloud: PointCloud2, name: str, values: np.ndarray) -> PointCloud2:
    """The cloud with another field, float32, one value a point."""
    height, width, step = cloud.height, cloud.width, cloud.point_step
    row = cloud.row_step or step * width  # 0 in messages of some drivers
    data = np.zeros(row * height, np.uint8)  # the padding after the last row may be missing
    given = np.frombuffer(cloud.data, np.uint8)[: len(data)]
    data[: len(given)] = given
    data = data.reshape(height, row)[:, : step * width].reshape(height * width, step)
    order = ">" if cloud.is_bigendian else "<"
    data = np.concatenate([data, values.astype(f"{order}f4").view(np.uint8).reshape(-1, 4)], 1)
    field = PointField(name=name, offset=step, datatype=PointField.FLOAT32, count=1)
    return PointCloud2(
        header=cloud.header,
        height=height,
        width=width,
        fields=[*cloud.fields, field],
        is_bigendian=cloud.is_bigendian,
        point_step=step + 4,
        row_step=(step + 4) * width,
        data=data.tobytes(),
        is_dense=cloud.is_dense,
    )


def main() -> None:
    rclpy.init()
    node = MovingPoints()
    try:
        rclpy.spin(node)
    finally:
        node.stream.close()
        node.destroy_node()


if __name__ == "__main__":
    main()
