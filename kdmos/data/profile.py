"""How a sensor differs from the one that the students know, and what its scans become for them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from kdmos.data.semantic_kitti import is_odd, likely_scale
from kdmos.errors import InputError
from kdmos.settings import STRICT

STUDENT_HEIGHT = 1.73  # metres above the ground: KITTI's sensor, which the students of SemanticKITTI know
# What the authors' weights were trained on, whose files say nothing about it: KITTI's sensor.
KITTI_SENSOR = {"x": (-80.0, 80.0), "y": (-80.0, 80.0), "z": (-7.0, 3.0), "remission": (0.0, 0.99)}
GROUND_TOLERANCE = 0.5  # metres; a slope or a kerb moves the ground seen in a scan by 0.2
_LIMITS = ("range", "field_of_view", "elevation")


@dataclass(frozen=True)
class SensorProfile:
    """A LiDAR as it is mounted; the defaults change nothing.

    height: Above the ground, metres. Scans are moved along z so that the ground lies where it lies for the students.
    range: Distance of the points that are used, (least, largest), metres; None: any.
    field_of_view: Azimuth of the points that are used, (from, to), degrees, counter-clockwise from straight ahead:
        (-60, 60) looks ahead, (120, 240) back; None: all round.
    elevation: Of the points that are used, (lowest, highest), degrees; None: any.
    remission_scale: What the stored remission is divided by to lie in 0..1, such as 255.
    """

    __pydantic_config__ = STRICT

    height: float = STUDENT_HEIGHT
    range: tuple[float, float] | None = None
    field_of_view: tuple[float, float] | None = None
    elevation: tuple[float, float] | None = None
    remission_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("height", "remission_scale"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {getattr(self, name)}")
        for name in _LIMITS:
            low, high = getattr(self, name) or (0.0, 1.0)
            if not (np.isfinite([low, high]).all() and low < high):
                raise ValueError(f"{name}: expected two finite numbers, the lower one first, got ({low}, {high})")
        if self.range is not None and self.range[0] < 0:
            raise ValueError(f"range: expected distances >= 0, got {self.range}")
        if self.field_of_view is not None and self.field_of_view[1] - self.field_of_view[0] > 360:
            raise ValueError(f"field_of_view: expected at most 360 degrees, got {self.field_of_view}")

    def apply(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the network gets of a scan, and which of its points these are.

        Args:
            points: [n, 3 or more], any float type: x, y, z (metres, LiDAR frame) and, where known, remission as
                the sensor gives it; without, it is 0.
        Returns: float32 [m, 4] = x, y, z, remission, in the order of the scan; kept bool [n] with m true entries:
            finite, and within range and field of view.
        Raises: ValueError for another shape.
        """
        points = np.asarray(points)
        if points.ndim != 2 or points.shape[1] < 3:
            raise ValueError(f"expected points [n, 4], got {list(points.shape)}")
        if points.shape[1] == 3:
            points = np.concatenate([points, np.zeros((len(points), 1), points.dtype)], 1)
        with np.errstate(over="ignore"):  # what does not fit into float32 is not finite
            points = points[:, :4].astype(np.float32, copy=False)
        kept = np.isfinite(points[:, 0])
        for column in (1, 2, 3):  # all(axis=1) over four columns is six times slower
            kept &= np.isfinite(points[:, column])
        if any(getattr(self, name) is not None for name in _LIMITS):
            kept &= self._within(points[:, :3])
        if not kept.all():
            points = points[kept]
        if self.remission_scale != 1 or self.height != STUDENT_HEIGHT:
            factor, lift = 1 / self.remission_scale, self.height - STUDENT_HEIGHT
            points = points * np.array([1, 1, 1, factor], np.float32) + np.array([0, 0, lift, 0], np.float32)
        return np.ascontiguousarray(points), kept

    def _within(self, xyz: np.ndarray) -> np.ndarray:
        """Which points lie in range and field of view, bool [n]; any for those that are not finite."""
        within = np.ones(len(xyz), bool)
        with np.errstate(invalid="ignore", over="ignore"):
            x, y, z = xyz.T
            if self.range is not None:
                distance = np.sqrt(x * x + y * y + z * z)
                within &= (distance >= self.range[0]) & (distance <= self.range[1])
            if self.field_of_view is not None:
                first, last = self.field_of_view
                within &= (np.degrees(np.arctan2(y, x)) - first) % 360 <= last - first
            if self.elevation is not None:
                angle = np.degrees(np.arctan2(z, np.hypot(x, y)))
                within &= (angle >= self.elevation[0]) & (angle <= self.elevation[1])
        return within

    def apply_to_pose(self, pose: np.ndarray) -> np.ndarray:
        """The pose that belongs to what `apply` makes of a scan.

        Args:
            pose: [..., 4, 4], any fixed frame from the LiDAR's.
        Returns: float64 [..., 4, 4], the same fixed frame from that of the moved points.
        """
        lidar_from_moved = np.eye(4)
        lidar_from_moved[2, 3] = STUDENT_HEIGHT - self.height
        return np.asarray(pose, np.float64) @ lidar_from_moved

    def changes(self) -> dict:
        """What differs from the defaults, JSON-able: the content of the YAML that would make it."""
        return {name: value for name, value in asdict(self).items() if value != asdict(SensorProfile())[name]}


def profile_of(manifest: dict | None) -> SensorProfile:
    """The profile that predictions were made with, by what `kdmos predict` noted beside them (None: nothing)."""
    from pydantic import TypeAdapter, ValidationError  # of what is read from files alone: a stream runs without it

    try:
        return TypeAdapter(SensorProfile).validate_python((manifest or {}).get("sensor", {}))
    except ValidationError as error:
        raise InputError(f"the sensor noted beside the predictions is damaged: {error.errors()[0]['msg']}") from error


def load_profile(path: str | Path) -> SensorProfile:
    """A sensor's profile from a YAML that states what differs from `SensorProfile`.

    Raises: InputError naming the file and the key.
    """
    from pydantic import TypeAdapter, ValidationError

    known = ", ".join(SensorProfile.__dataclass_fields__)
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"--sensor {path}: cannot be read ({error.strerror}); give a YAML with {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        return TypeAdapter(SensorProfile).validate_python({} if content is None else content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {f'{place}: ' if place else ''}{reason}; the keys are {known}") from error


def check_remission(points: np.ndarray, where: object, scale: float = 1.0) -> None:
    """Refuse remission on another scale than 0..1: it would be read as a brightness that no surface has.

    Args:
        points: [m, 4], as `SensorProfile.apply` returns them.
        where: The scan, for the message.
        scale: What it was divided by already.
    Raises: InputError that says what to write into the sensor's YAML.
    """
    remission = points[:, 3]
    if is_odd(remission):
        advice = "is that field the remission?"
        if np.quantile(remission, 0.01) >= 0:
            guess = likely_scale(remission * scale)
            advice = f"write 'remission_scale: {guess}' (the likely full scale) into a --sensor file"
        raise InputError(
            f"{where}: the remission runs from {remission.min():g} to {remission.max():g}, expected 0..1; {advice}"
        )


def differences(points: np.ndarray, sensor: dict | None = None, profile: SensorProfile = SensorProfile()) -> list[str]:
    """What of a scan lies far outside what a student was trained on, in words.

    Args:
        points: [m, 4], as `SensorProfile.apply` returns them.
        sensor: x, y, z, remission: (lowest, highest) in training, as a checkpoint's header has them under `sensor`;
            None: those of KITTI.
        profile: What made them so: what to write into it is said, and a view that it cuts is cut on purpose.
    """
    known = {**KITTI_SENSOR, **(sensor or {})}
    xy = np.hypot(points[:, 0], points[:, 1])
    found = []
    near = points[(xy > 3) & (xy < 15), 2]
    counts, edges = np.histogram(near, np.arange(-5, 5.1, 0.2))
    ground = edges[counts.argmax()] + 0.1  # most of the points near a sensor lie on it
    expected = -STUDENT_HEIGHT
    if known["z"][0] < expected and counts.sum() >= 100 and abs(ground - expected) > GROUND_TOLERANCE:
        lidar = profile.height - STUDENT_HEIGHT - ground  # the LiDAR above it, before the profile moved the scan
        advice = f"'height: {lidar:.1f}' in a sensor file" if lidar > 0 else "is z up?"
        found.append(f"the ground seems to lie {-ground:.1f} m below, in training {-expected:g} m ({advice})")
    top, trained = np.quantile(points[:, 3], 0.99), known["remission"][1]
    if top < 0.1 * trained:
        seems = "is 0 everywhere" if not points[:, 3].any() else f"hardly exceeds {top:.2g}"
        found.append(f"the remission {seems}, in training it reached {trained:.2g} (remission_scale in a sensor file)")
    reach, trained = np.quantile(xy, 0.99), max(known["x"][1], known["y"][1])
    if reach > 1.5 * trained:
        found.append(f"points reach {reach:.0f} m, in training {trained:.0f} m (range in a sensor file)")
    sectors = np.unique(np.degrees(np.arctan2(points[:, 1], points[:, 0])) // 10).size
    if profile.field_of_view is None and sectors < 27 and len(points) >= 1000 and min(known["x"][0], known["y"][0]) < 0:
        found.append(f"the scan covers {10 * sectors} of 360 degrees, in training all round")
    return found
