"""Scans, labels, poses and tracks of one drive through a synthetic street."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kdmos.data.profile import STUDENT_HEIGHT
from kdmos.data.synthetic.lidar import GHOST, MATERIALS, MIXED, Lidar, SensorSettings, Surface, draw_sensor
from kdmos.data.synthetic.raycast import GROUND, Solids, cast
from kdmos.data.synthetic.scenes import StreetSettings
from kdmos.data.synthetic.street import make_street
from kdmos.errors import InputError

UNLABELED, OUTLIER = 0, 1  # raw ids
STREET, SENSOR, DRIFT, SCAN, KIND, JITTER = range(6)  # what a stream of random numbers is for
MAX_INSTANCES = (1 << 16) - 1  # what 16 bits of a label can tell apart
_TABLE = np.array(list(MATERIALS.values()), np.float32)  # [materials, 4]


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
        sensor: The sensor; None: drawn, see `draw_sensor`. Points and poses are then those of a frame at the height
            that the students know, above or below the sensor.
        compensate: Points in the sensor's frame at the scan's time, as in KITTI odometry; False: each in the frame
            it was measured in, as in KITTI's raw recordings; None: drawn.
        street: What the street is drawn from.
    Raises: InputError if the drive is so long that its things cannot be numbered.
    """

    def __init__(
        self,
        seed: int,
        number: int,
        num_scans: int,
        sensor: SensorSettings | None,
        compensate: bool | None = True,
        street: StreetSettings | None = None,
    ) -> None:
        self.key, self.num_scans = (seed, number), num_scans
        draw = self._rng(KIND)
        drawn = draw_sensor(draw)
        self.sensor = drawn if sensor is None else sensor
        self.lift = drawn.height - STUDENT_HEIGHT if sensor is None else 0.0
        self.compensate = draw.random() < 0.5 if compensate is None else compensate
        self.errors = draw.random() if sensor is None else 1.0  # factor on those of the poses
        self.period = 1 / self.sensor.rate
        self.street = make_street(self._rng(STREET), num_scans * self.period, street)
        self.lidar = Lidar(self.sensor, self._rng(SENSOR))
        things = self.street.things
        if len(things) + len(self.street.movers) > MAX_INSTANCES:
            raise InputError(f"{num_scans} scans: their street has more than {MAX_INSTANCES} things; make shorter ones")
        self.standing = Solids([thing.body for thing in things])
        parts = [(thing, solid) for thing in things for solid in thing.body.solids]
        self.standing_label = np.array([thing.label | thing.instance << 16 for thing, _ in parts], np.uint32)
        self.standing_surface = _surfaces([(thing.shade, solid) for thing, solid in parts])

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([*self.key, *purpose])

    def _frames(self, time: np.ndarray) -> np.ndarray:
        """The frame of the points at some times, in the world: the sensor's, or one on its axis at another height."""
        poses = self.street.ego_poses(time, self.sensor.height)
        if self.lift:
            poses[:, :3, 3] -= self.lift * poses[:, :3, 2]
        return poses

    def poses(self, drift: float = 0.0, jitter: float = 0.0) -> np.ndarray:
        """Pose of each scan in the frame of the first, float64 [num_scans, 4, 4], with errors as an odometry makes.

        With a drawn sensor, the errors get a factor of 0 to 1 that is drawn, too.

        Args:
            drift: A random walk: 1 is a standard deviation of 1 cm and 0.05 degrees (a third of that in roll and
                pitch) after a metre; they grow with the square root of the way.
            jitter: Each pose is off by itself, too: 1 is 1 cm and 0.05 degrees about each axis.
        """
        drift, jitter = drift * self.errors, jitter * self.errors
        poses = self._frames(np.arange(self.num_scans) * self.period)
        poses = np.linalg.inv(poses[0]) @ poses
        if drift:
            rng, drifted = self._rng(DRIFT), [poses[0]]
            for before, after in pairwise(poses):
                step = np.linalg.inv(before) @ after
                size = drift * np.sqrt(np.linalg.norm(step[:3, 3]))
                turned = rng.normal(0, np.radians(0.05), 3) * size * (1 / 3, 1 / 3, 1)
                drifted.append(drifted[-1] @ step @ _slight(turned, rng.normal(0, 0.01, 3) * size))
            poses = np.stack(drifted)
        if jitter:
            rng = self._rng(JITTER)
            angles, shifts = rng.normal(0, np.radians(0.05), (len(poses), 3)), rng.normal(0, 0.01, (len(poses), 3))
            poses = poses @ np.stack([_slight(jitter * angle, jitter * shift) for angle, shift in zip(angles, shifts)])
        return poses

    def tracks(self, frame: int, labels: np.ndarray) -> list[Track]:
        """The movers at a frame whose labels are uint32 [n]."""
        bodies, raw_ids, speeds = self.street.moving_bodies(frame * self.period)
        counts = np.bincount(labels >> 16, minlength=1 << 16)
        world = np.linalg.inv(self._frames(np.zeros(1))[0])
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
        surfaces = np.zeros((*hits.solid.shape, _TABLE.shape[1]), np.float32)
        rows, columns = np.nonzero(hits.solid >= 0)
        label[rows, columns] = solid_label[hits.solid[rows, columns]]
        surfaces[rows, columns] = surface[hits.solid[rows, columns]]
        rows, columns = np.nonzero(hits.solid == GROUND)
        place = rays.origin[columns] + rays.direction[:, rows, columns].T * hits.range[rows, columns, None]
        label[rows, columns], material, shade = street.ground.surface(place[:, 0], place[:, 1])
        surfaces[rows, columns] = _TABLE[material]
        surfaces[rows, columns, 0] *= shade

        # 2) What the sensor makes of it.
        measured = self.lidar.measure(hits, Surface(*np.moveaxis(surfaces, 2, 0)), self._rng(SCAN, frame))
        label[measured.artefact == MIXED], label[measured.artefact == GHOST] = UNLABELED, OUTLIER
        rows, columns = np.nonzero(measured.range)
        distance = measured.range[rows, columns]
        if self.compensate:
            world = rays.origin[columns] + rays.direction[:, rows, columns].T * distance[:, None]
            pose = self._frames(np.array([time]))[0]
            xyz = (world - pose[:3, 3]) @ pose[:3, :3]
        else:
            xyz = self.lidar.direction[:, rows, columns].T * distance[:, None] + (0, 0, self.lift)
        points = np.concatenate([xyz, measured.remission[rows, columns][:, None]], 1).astype(np.float32)
        return SyntheticScan(points, label[rows, columns])


def _slight(angles: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """[4, 4]: a turn by small angles about x, y and z, radians, and a shift."""
    roll, pitch, yaw = angles
    u, _, v = np.linalg.svd(np.array([[1, -yaw, pitch], [yaw, 1, -roll], [-pitch, roll, 1]]))
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = u @ v, shift
    return pose


def _surfaces(parts) -> np.ndarray:
    """What `Surface` holds of solids with the shades of their bodies, float32 [S, 4]."""
    table = _TABLE[[solid.material for _, solid in parts]].reshape(-1, _TABLE.shape[1]).copy()
    table[:, 0] *= [shade * solid.shade for shade, solid in parts]
    return table
