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
    the pulses that do not come back (glass, black paint). gloss: share of the remission that a mirror-like lobe has,
    which only comes back where the ray meets the surface squarely."""

    remission: float
    roughness: float
    lost: float
    gloss: float = 0.0


MATERIALS = {
    "asphalt": Material(0.41, 0.003, 0.001),
    "marking": Material(0.65, 0.003, 0.001),
    "paving": Material(0.45, 0.004, 0.001),
    "grass": Material(0.54, 0.015, 0.004),
    "leaves": Material(0.50, 0.02, 0.01),
    "bark": Material(0.32, 0.01, 0.004),
    "plaster": Material(0.46, 0.004, 0.001),
    "wood": Material(0.37, 0.006, 0.002),
    "paint": Material(0.38, 0.004, 0.004, 0.45),
    "glass": Material(0.08, 0.01, 0.15, 0.5),
    "rubber": Material(0.10, 0.005, 0.01),
    "metal": Material(0.45, 0.005, 0.005, 0.3),
    "sign": Material(0.95, 0.004, 0.002),
    "cloth": Material(0.30, 0.01, 0.004),
}
MATERIAL_INDEX = {name: i for i, name in enumerate(MATERIALS)}
MIXED, GHOST = 1, 2
FAINT = 3.0  # times the weakest echo that comes back: below, its remission is reported as 0


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
    beam_gain: Standard deviation of the logarithm of what each beam makes of an echo.
    dark: Share of the surfaces whose remission is 0 however strong their echo.
    faintest: Remissions below this one are reported as 0.
    remission_gain, remission_gamma: The sensor reports gain * remission ** gamma.
    has_remission: False: it reports 0 for all.
    field_of_view: Azimuths at which it measures, (from, to), degrees, counter-clockwise from straight ahead.
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
    range_noise: float = 0.007
    beam_bias: float = 0.012
    beam_wobble: float = 0.05
    resolution: float = 0.002
    dropout: float = 0.001
    reach: float = 110.0
    beam_gain: float = 0.3
    dark: float = 0.05
    faintest: float = 0.06
    remission_gain: float = 1.0
    remission_gamma: float = 1.0
    has_remission: bool = True
    field_of_view: tuple[float, float] = (-180.0, 180.0)
    mixed_pixels: float = 0.15
    ghosts: float = 2e-4
    vehicle: tuple[tuple[float, float, float], tuple[float, float, float]] | None = field(
        default=((-1.84, -0.7, -1.12), (1.6, 0.65, -0.6))
    )

    def __post_init__(self) -> None:
        sizes = ("rate", "height", "min_range", "max_range", "range_noise", "beam_bias", "beam_wobble", "resolution")
        for name in (*sizes, "reach", "beam_gain", "remission_gain", "remission_gamma"):
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
        shares = {name: getattr(self, name) for name in ("dropout", "dark", "faintest", "mixed_pixels", "ghosts")}
        low, high = self.field_of_view
        if not -180 <= low < high <= 180:
            raise ValueError(f"sensor field_of_view: expected -180 <= from < to <= 180 degrees, got {low} to {high}")
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


def _strong(echo: np.ndarray, enough: float) -> np.ndarray:
    """Chance that an echo is enough, from 0 to 1 within a factor of two."""
    x = np.minimum(echo / enough, 10.0) ** 8
    return x / (1 + x)


def draw_sensor(rng: np.random.Generator) -> SensorSettings:
    """A sensor as cars and robots carry one, for data that no single sensor is to be learnt from.

    Half of them are HDL-64E, each with its own height, noise and remission; the others have 32 to 128 beams over
    another field of view.
    """
    fine = rng.random() < 0.5
    if fine:
        top, middle, bottom = 2.2 + rng.normal(0, 0.3), -8.2 + rng.normal(0, 0.3), -23.8 + rng.normal(0, 0.8)
        beams, columns = ((top, middle + 0.2, 32), (middle - 0.3, bottom, 32)), int(rng.integers(1900, 2200))
    else:
        count, top, bottom = int(rng.choice([32, 40, 64, 128])), rng.uniform(1.0, 16.0), rng.uniform(-30.0, -16.0)
        # Many sensors look closest at the horizon.
        part = count // 4
        rest = count - 2 * part
        beams = (
            ((top, 0.0, part), (-0.3, -8.0, rest), (-8.5, bottom, part))
            if rng.random() < 0.5
            else ((top, bottom, count),)
        )
        columns = int(rng.choice([900, 1024, 1800, 2048] if count < 128 else [900, 1024]))
    height = rng.uniform(1.6, 2.1) if rng.random() < 0.6 else rng.uniform(0.8, 2.9)
    usual = SensorSettings()
    return SensorSettings(
        beams=beams,
        columns=columns,
        height=height,
        max_range=rng.uniform(70.0, 120.0),
        range_noise=rng.uniform(0.003, 0.02),
        beam_bias=rng.uniform(0.0, 0.02),
        beam_gain=rng.uniform(0.0, 0.5),
        reach=rng.uniform(80.0, 180.0),
        dark=rng.uniform(0.0, 0.15),
        faintest=rng.uniform(0.0, 0.15),
        remission_gain=float(np.exp2(rng.uniform(-1.0, 0.7))),
        remission_gamma=float(np.exp2(rng.uniform(-0.7, 0.7))),
        has_remission=bool(rng.random() < 0.9),
        mixed_pixels=rng.uniform(0.0, 0.25),
        vehicle=usual.vehicle if abs(height - usual.height) < 0.3 else None,
    )


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
    gloss: np.ndarray


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
        self.gain = np.exp(rng.normal(0, settings.beam_gain, len(table))).astype(np.float32)
        self.dark_key = int(rng.integers(1 << 31))
        self.azimuth = (np.arange(settings.columns) / settings.columns - 0.5) * 2 * np.pi  # [A], rising
        self.time = self.azimuth / (2 * np.pi) / settings.rate  # 0 where it looks ahead
        cos = np.cos(self.elevation)[:, None]
        direction = [cos * np.cos(self.azimuth), cos * np.sin(self.azimuth)]
        self.direction = np.stack([*direction, np.broadcast_to(np.sin(self.elevation)[:, None], direction[0].shape)])
        self.direction = self.direction.astype(np.float32)  # [3, B, A], sensor frame
        self.hidden = self._hidden()

    def _hidden(self) -> np.ndarray:
        """Rays outside the field of view, or that the vehicle's own roof is in the way of, bool [B, A]."""
        shape = self.direction.shape[1:]
        low, high = np.radians(self.settings.field_of_view)
        unseen = np.broadcast_to((self.azimuth < low) | (self.azimuth > high), shape)
        if self.settings.vehicle is None:
            return unseen
        still = np.zeros((shape[1], 3))
        rays = Rays(still, self.direction, still[:, 0], self.elevation, self.azimuth, 0.0, 10.0)
        return unseen | (cast([Solids([Body([box(*self.settings.vehicle)], np.zeros(3))])], None, rays).solid != MISS)

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
        remission, roughness, lost, gloss = surface
        distance = hits.range.copy()
        back = np.isfinite(distance) & ~self.hidden
        distance[~back] = 0
        artefact = np.zeros(shape, np.uint8)

        # 1) Pulses that come back: the echo of a Lambertian surface falls with the square of the range. A surface is in
        # reach of a beam or not; few rays at the border are undecided.
        with np.errstate(divide="ignore"):
            echo = remission * np.maximum(hits.cosine, 0.02) / 0.1 * (settings.reach / np.maximum(distance, 1)) ** 2
        echo *= self.gain[:, None]
        back &= rng.random(shape, np.float32) < (1 - lost) * (1 - settings.dropout) * _strong(echo, 1)

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
        # echo is faint, and for a few others. A glossy surface gives back twice as much squarely, and little aslant.
        lobe = (1 - gloss) * (0.55 + 0.45 * hits.cosine) + gloss * 2 * hits.cosine**6
        value = settings.remission_gain * np.maximum(remission * lobe, 0) ** settings.remission_gamma
        faint = value < settings.faintest
        value += 0.2 * np.minimum(value, 0.25) * rng.standard_normal(shape, np.float32)
        value[faint] = 0
        value[rng.random(shape, np.float32) > _strong(echo, FAINT)] = 0
        # the same solids in every scan; 1 more for the ground, at the index -1 or -2
        dark = np.random.default_rng(self.dark_key).random(hits.solid.max() + 3) < settings.dark
        dark[-2:] = False
        value[dark[hits.solid]] = 0
        value = np.round(np.clip(value, 0, 0.99) * 100) / 100
        if not settings.has_remission:
            value[:] = 0

        return Measured(np.where(back, distance, 0), value.astype(np.float32), artefact)
