"""Scans, labels, poses and tracks of one drive through a synthetic street."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kdmos.data.synthetic.lidar import GHOST, MATERIALS, MIXED, Lidar, SensorSettings, Surface
from kdmos.data.synthetic.raycast import GROUND, Solids, cast
from kdmos.data.synthetic.street import make_street
from kdmos.errors import InputError

UNLABELED, OUTLIER = 0, 1  # raw ids
STREET, SENSOR, DRIFT, SCAN = range(4)  # what a stream of random numbers is for
MAX_INSTANCES = (1 << 16) - 1  # what 16 bits of a label can tell apart
_TABLE = np.array(list(MATERIALS.values()), np.float32)  # [materials, 3]


class Track(NamedTuple):
    """A mover at a scan: raw id, position (metres) and yaw (radians) in the frame of the first scan's pose, speed
    (m/s), and how many points it has."""

    frame: int
    instance: int
    kind: str
    label: int
    x: float
    y: float
    z: float
    yaw: float
    speed: float
    points: int


class SyntheticScan(NamedTuple):
    """points: float32 [n, 4], x, y, z in metres in the sensor's frame, remission 0..0.99; beam by beam from the top.
    labels: uint32 [n], SemanticKITTI's raw ids, instances in the high 16 bits."""

    points: np.ndarray
    labels: np.ndarray


class SyntheticSequence:
    """A drive through a street of its own; the same arguments give the same data, scan by scan in any order.

    Args:
        seed: Of a data set.
        number: Of the sequence in it: another street for each.
        num_scans: Length.
        sensor: The sensor.
        compensate: Points in the sensor's frame at the scan's time, as in KITTI odometry; False: each in the frame
            it was measured in, as in KITTI's raw recordings.
    Raises: InputError if the drive is so long that its things cannot be numbered.
    """

    def __init__(self, seed: int, number: int, num_scans: int, sensor: SensorSettings, compensate: bool = True) -> None:
        self.key, self.num_scans, self.sensor, self.compensate = (seed, number), num_scans, sensor, compensate
        self.period = 1 / sensor.rate
        self.street = make_street(self._rng(STREET), num_scans * self.period)
        self.lidar = Lidar(sensor, self._rng(SENSOR))
        things = self.street.things
        if len(things) + len(self.street.movers) > MAX_INSTANCES:
            raise InputError(f"{num_scans} scans: their street has more than {MAX_INSTANCES} things; make shorter ones")
        self.standing = Solids([thing.body for thing in things])
        parts = [(thing, solid) for thing in things for solid in thing.body.solids]
        self.standing_label = np.array([thing.label | thing.instance << 16 for thing, _ in parts], np.uint32)
        self.standing_surface = _surfaces([(thing.shade, solid) for thing, solid in parts])

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([*self.key, *purpose])

    def poses(self, drift: float = 0.0) -> np.ndarray:
        """Sensor pose of each scan in the frame of the first, float64 [num_scans, 4, 4].

        Args:
            drift: Errors as an odometry makes them, a random walk: 1 is a standard deviation of 1 cm and 0.05 degrees
                (a third of that in roll and pitch) after a metre; they grow with the square root of the way.
        """
        poses = self.street.ego_poses(np.arange(self.num_scans) * self.period, self.sensor.height)
        poses = np.linalg.inv(poses[0]) @ poses
        if not drift:
            return poses
        rng, drifted = self._rng(DRIFT), [poses[0]]
        for before, after in pairwise(poses):
            step = np.linalg.inv(before) @ after
            size = drift * np.sqrt(np.linalg.norm(step[:3, 3]))
            roll, pitch, yaw = rng.normal(0, np.radians(0.05), 3) * size * (1 / 3, 1 / 3, 1)
            u, _, v = np.linalg.svd(np.array([[1, -yaw, pitch], [yaw, 1, -roll], [-pitch, roll, 1]]))
            step[:3, :3], step[:3, 3] = step[:3, :3] @ (u @ v), step[:3, 3] + rng.normal(0, 0.01, 3) * size
            drifted.append(drifted[-1] @ step)
        return np.stack(drifted)

    def tracks(self, frame: int, labels: np.ndarray) -> list[Track]:
        """The movers at a frame whose labels are uint32 [n]."""
        bodies, raw_ids, speeds = self.street.moving_bodies(frame * self.period)
        counts = np.bincount(labels >> 16, minlength=1 << 16)
        world = np.linalg.inv(self.street.ego_poses(np.zeros(1), self.sensor.height)[0])
        turned = np.arctan2(world[1, 0], world[0, 0])
        return [
            Track(
                frame,
                m.instance,
                m.kind,
                raw,
                *(world @ [*body.position, 1])[:3],
                body.yaw + turned,
                speed,
                counts[m.instance],
            )
            for m, body, raw, speed in zip(self.street.movers, bodies, raw_ids, speeds)
        ]

    def scan(self, frame: int) -> SyntheticScan:
        """The scan of a frame number, 0..num_scans - 1."""
        time, street = frame * self.period, self.street
        poses = street.ego_poses(time + self.lidar.time, self.sensor.height)
        rays = self.lidar.rays(poses)
        bodies, movers_label, _ = street.moving_bodies(time)
        movers = Solids(bodies)
        hits = cast([self.standing, movers], street.ground, rays)

        # 1) What was hit: raw ids and surfaces of solids, standing ones first, and of the ground.
        owner = np.repeat(np.arange(len(bodies)), [len(body.solids) for body in bodies])
        shades = [(street.movers[i].shade, solid) for i, solid in zip(owner, movers.solids)]
        instances = np.array([mover.instance for mover in street.movers], np.uint32)
        labels = np.array(movers_label, np.uint32) | instances << np.uint32(16)
        solid_label = np.concatenate([self.standing_label, labels[owner]])
        surface = np.concatenate([self.standing_surface, _surfaces(shades)])
        label = np.zeros(hits.solid.shape, np.uint32)
        surfaces = np.zeros((*hits.solid.shape, 3), np.float32)
        rows, columns = np.nonzero(hits.solid >= 0)
        label[rows, columns] = solid_label[hits.solid[rows, columns]]
        surfaces[rows, columns] = surface[hits.solid[rows, columns]]
        rows, columns = np.nonzero(hits.solid == GROUND)
        place = rays.origin[columns] + rays.direction[:, rows, columns].T * hits.range[rows, columns, None]
        ground_label, material = street.ground.surface(place[:, 0], place[:, 1])
        label[rows, columns], surfaces[rows, columns] = ground_label, _TABLE[material]

        # 2) What the sensor makes of it.
        measured = self.lidar.measure(hits, Surface(*np.moveaxis(surfaces, 2, 0)), self._rng(SCAN, frame))
        label[measured.artefact == MIXED], label[measured.artefact == GHOST] = UNLABELED, OUTLIER
        rows, columns = np.nonzero(measured.range)
        distance = measured.range[rows, columns]
        if self.compensate:
            world = rays.origin[columns] + rays.direction[:, rows, columns].T * distance[:, None]
            pose = street.ego_poses(np.array([time]), self.sensor.height)[0]
            xyz = (world - pose[:3, 3]) @ pose[:3, :3]
        else:
            xyz = self.lidar.direction[:, rows, columns].T * distance[:, None]
        points = np.concatenate([xyz, measured.remission[rows, columns][:, None]], 1).astype(np.float32)
        return SyntheticScan(points, label[rows, columns])


def _surfaces(parts) -> np.ndarray:
    """Remission, roughness and loss of solids with their shades, float32 [S, 3]."""
    table = _TABLE[[solid.material for _, solid in parts]].reshape(-1, 3).copy()
    table[:, 0] *= [shade for shade, _ in parts]
    return table
