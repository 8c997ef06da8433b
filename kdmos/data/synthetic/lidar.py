"""The sensor: when and where its beams look, and what it makes of what they meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError

from kdmos.data.synthetic.raycast import MISS, Body, Hits, Rays, Solids, box, cast
from kdmos.errors import InputError
from kdmos.settings import STRICT


class Material(NamedTuple):
    """remission: at normal incidence, 0..1. roughness: metres, standard deviation along the ray. lost: share of
    the pulses that do not come back (glass, black paint)."""

    remission: float
    roughness: float
    lost: float


MATERIALS = {
    "asphalt": Material(0.36, 0.006, 0.005),
    "marking": Material(0.65, 0.006, 0.005),
    "paving": Material(0.42, 0.008, 0.005),
    "grass": Material(0.50, 0.03, 0.02),
    "leaves": Material(0.46, 0.04, 0.05),
    "bark": Material(0.32, 0.02, 0.02),
    "plaster": Material(0.42, 0.01, 0.005),
    "wood": Material(0.34, 0.015, 0.02),
    "paint": Material(0.30, 0.01, 0.05),
    "glass": Material(0.08, 0.02, 0.35),
    "rubber": Material(0.10, 0.01, 0.10),
    "metal": Material(0.45, 0.01, 0.05),
    "sign": Material(0.95, 0.01, 0.02),
    "cloth": Material(0.30, 0.02, 0.03),
}
MATERIAL_INDEX = {name: i for i, name in enumerate(MATERIALS)}
MIXED, GHOST = 1, 2


@dataclass(frozen=True)
class SensorSettings:
    """A spinning LiDAR; the defaults are those of the HDL-64E on KITTI's car.

    beams: Blocks of beams evenly spaced in elevation: (first, last, count), degrees, from the top down.
    columns: Firings a turn.
    rate: Turns a second; a turn is a scan, whose time is that at which the sensor looks ahead.
    height: Of the sensor above the ground, metres.
    min_range, max_range: Metres.
    range_noise: Standard deviation of a range, metres.
    beam_bias: Standard deviation of the range errors that each beam always has, metres.
    beam_wobble: Standard deviation of what the elevations differ from the table, degrees.
    resolution: Step of the ranges, metres.
    dropout: Share of returns that get lost anyhow.
    reach: Range at which a surface of remission 0.1 at normal incidence comes back in half of the cases, metres.
    dark: Share of returns whose remission is 0 however strong their echo.
    mixed_pixels: Share of the returns at an edge that lie between its two sides.
    ghosts: Share of returns that are somewhere on the ray instead.
    vehicle: Two corners of the vehicle's roof in the sensor's frame, which hides what is behind; metres.
    """

    __pydantic_config__ = STRICT

    beams: tuple[tuple[float, float, int], ...] = ((2.2, -8.0, 32), (-8.5, -23.8, 32))
    columns: int = 2150
    rate: float = 10.0
    height: float = 1.73
    min_range: float = 1.5
    max_range: float = 80.0
    range_noise: float = 0.015
    beam_bias: float = 0.012
    beam_wobble: float = 0.05
    resolution: float = 0.002
    dropout: float = 0.005
    reach: float = 110.0
    dark: float = 0.05
    mixed_pixels: float = 0.15
    ghosts: float = 2e-4
    vehicle: tuple[tuple[float, float, float], tuple[float, float, float]] | None = field(
        default=((-1.84, -0.7, -1.12), (1.6, 0.65, -0.6))
    )

    def __post_init__(self) -> None:
        sizes = ("rate", "height", "min_range", "max_range", "range_noise", "beam_bias", "beam_wobble", "resolution")
        for name in (*sizes, "reach"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"sensor {name}: expected a finite number >= 0, got {getattr(self, name)}")
        steps = np.diff(self.elevations_of_blocks())
        if not all(-90 <= angle <= 90 for first, last, _ in self.beams for angle in (first, last)):
            raise ValueError(f"sensor beams: elevations lie in -90..90 degrees, got {self.beams}")
        if self.vehicle is not None and not np.less(*self.vehicle).all():
            raise ValueError(f"sensor vehicle: expected its lower and its upper corner, got {self.vehicle}")
        if not len(self.beams) or min(count for *_, count in self.beams) < 1 or (steps >= 0).any():
            raise ValueError(f"sensor beams: expected blocks (first, last, count) from the top down, got {self.beams}")
        if self.columns < 36 or self.rate < 1 or not self.min_range < self.max_range:
            raise ValueError("sensor: needs at least 36 columns, at least 1 turn a second and min_range < max_range")
        shares = {name: getattr(self, name) for name in ("dropout", "dark", "mixed_pixels", "ghosts")}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"sensor {name}: a share lies in 0..1, got {share}")

    def elevations_of_blocks(self) -> np.ndarray:
        """Elevation of each beam by the table, degrees [B]."""
        return np.concatenate([np.linspace(first, last, count) for first, last, count in self.beams])


SENSORS = {
    "hdl64": SensorSettings(),
    # A light sensor of an eighth of the points: 32 beams over the same field, of which few look into the sky.
    "small": SensorSettings(beams=((2.2, -23.8, 32),), columns=512),
}


def load_sensor(name: str | Path) -> SensorSettings:
    """A sensor by name ("hdl64", "small") or from a YAML that states what differs from `SensorSettings`.

    Raises: InputError naming the file and the key.
    """
    if str(name) in SENSORS:
        return SENSORS[str(name)]
    try:
        content = yaml.safe_load(Path(name).read_text())
        return TypeAdapter(SensorSettings).validate_python(content or {})
    except OSError as error:
        known = ", ".join(SENSORS)
        raise InputError(f"--sensor {name}: no such file, and the sensors by name are {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        known = ", ".join(SensorSettings.__dataclass_fields__)
        raise InputError(f"{name}: {place}: {first['msg']}; the keys of a sensor are {known}") from error


class Surface(NamedTuple):
    """Of what each ray met, float32 [B, A]; see `Material`."""

    remission: np.ndarray
    roughness: np.ndarray
    lost: np.ndarray


class Measured(NamedTuple):
    """Returns of one turn.

    range: float32 [B, A], metres, 0 where nothing came back.
    remission: float32 [B, A], 0..0.99.
    artefact: uint8 [B, A]: 0, `MIXED` (between the two sides of an edge) or `GHOST` (from nowhere).
    """

    range: np.ndarray
    remission: np.ndarray
    artefact: np.ndarray


class Lidar:
    """One sensor of a kind: its beams deviate from the table as its seed says."""

    def __init__(self, settings: SensorSettings, rng: np.random.Generator) -> None:
        self.settings = settings
        table = np.radians(settings.elevations_of_blocks())
        wobble = rng.normal(0, np.radians(settings.beam_wobble), len(table))
        self.elevation = np.sort(table + wobble)[::-1].copy()  # [B], falling
        self.bias = rng.normal(0, settings.beam_bias, len(table)).astype(np.float32)
        self.azimuth = (np.arange(settings.columns) / settings.columns - 0.5) * 2 * np.pi  # [A], rising
        self.time = self.azimuth / (2 * np.pi) / settings.rate  # 0 where it looks ahead
        cos = np.cos(self.elevation)[:, None]
        direction = [cos * np.cos(self.azimuth), cos * np.sin(self.azimuth)]
        self.direction = np.stack([*direction, np.broadcast_to(np.sin(self.elevation)[:, None], direction[0].shape)])
        self.direction = self.direction.astype(np.float32)  # [3, B, A], sensor frame
        self.hidden = self._hidden()

    def _hidden(self) -> np.ndarray:
        """Rays that the vehicle's own roof is in the way of, bool [B, A]."""
        shape = self.direction.shape[1:]
        if self.settings.vehicle is None:
            return np.zeros(shape, bool)
        still = np.zeros((shape[1], 3))
        rays = Rays(still, self.direction, still[:, 0], self.elevation, self.azimuth, 0.0, 10.0)
        return cast([Solids([Body([box(*self.settings.vehicle)], np.zeros(3))])], None, rays).solid != MISS

    def rays(self, poses: np.ndarray) -> Rays:
        """The rays of one turn; `poses` float64 [A, 4, 4] take the sensor to the world at `self.time`."""
        rotation = poses[:, :3, :3].astype(np.float32)
        x, y, z = self.direction
        world = np.stack([rotation[:, i, 0] * x + rotation[:, i, 1] * y + rotation[:, i, 2] * z for i in range(3)])
        yaw = np.unwrap(np.arctan2(poses[:, 1, 0], poses[:, 0, 0]))
        tilt = float(np.arccos(np.clip(poses[:, 2, 2].min(), -1, 1)))
        reach = self.settings.max_range
        return Rays(poses[:, :3, 3], world, self.time, self.elevation, self.azimuth + yaw, tilt, reach)

    def measure(self, hits: Hits, surface: Surface, rng: np.random.Generator) -> Measured:
        """What the sensor reports of what its rays met.

        Args:
            hits: Of one turn.
            surface: Of what was hit.
            rng: Noise.
        """
        settings, shape = self.settings, hits.range.shape
        remission, roughness, lost = surface
        distance = hits.range.copy()
        back = np.isfinite(distance) & ~self.hidden
        distance[~back] = 0
        artefact = np.zeros(shape, np.uint8)

        # 1) Pulses that come back: the echo of a Lambertian surface falls with the square of the range.
        with np.errstate(divide="ignore"):
            echo = remission * np.maximum(hits.cosine, 0.02) / 0.1 * (settings.reach / np.maximum(distance, 1)) ** 2
        chance = (1 - lost) * (1 - settings.dropout) * np.where(echo > 0, echo**2 / (1 + echo**2), 0)
        back &= rng.random(shape, np.float32) < chance

        # 2) A beam that meets an edge sees both sides.
        neighbour = np.roll(distance, 1, axis=1)
        gap = neighbour - distance
        edge = back & (neighbour > 0) & (np.abs(gap) > 0.3) & (np.abs(gap) < 5)
        rows, columns = np.nonzero(edge)
        mixed = rng.random(len(rows), np.float32) < settings.mixed_pixels
        rows, columns = rows[mixed], columns[mixed]
        distance[rows, columns] += gap[rows, columns] * rng.beta(0.5, 0.5, len(rows)).astype(np.float32)
        artefact[rows, columns] = MIXED

        # 3) Noise, and returns from nowhere.
        noise = rng.standard_normal(shape, np.float32) * np.hypot(settings.range_noise, roughness)
        distance += noise + self.bias[:, None]
        ghost = back & (rng.random(shape, np.float32) < settings.ghosts)
        distance[ghost] *= rng.uniform(0.3, 1.0, np.count_nonzero(ghost)).astype(np.float32)
        artefact[ghost] = GHOST
        if settings.resolution > 0:
            distance = np.round(distance / settings.resolution) * np.float32(settings.resolution)
        back &= (distance > settings.min_range) & (distance < settings.max_range)

        # 4) The remission as calibrated sensors give it: range taken out, incidence for the larger part; 0 where the
        # echo is faint, and for a few others.
        value = remission * (0.55 + 0.45 * hits.cosine) + rng.normal(0, 0.05, shape).astype(np.float32)
        value[rng.random(shape, np.float32) < 1 - (1 - settings.dark) / (1 + (10 / np.maximum(echo, 1e-6)) ** 2)] = 0
        value = np.round(np.clip(value, 0, 0.99) * 100) / 100

        return Measured(np.where(back, distance, 0), value.astype(np.float32), artefact)
