"""The ground of a street: its roads, how high it lies and what it is made of; and lines to go along.

The world's z axis points up; the main road runs along x, side roads along y. Traffic keeps to the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdmos.data.synthetic.lidar import MATERIAL_INDEX as M
from kdmos.data.synthetic.lidar import MATERIALS

ROAD, PARKING, SIDEWALK, OTHER_GROUND, TERRAIN, MARKING = 40, 44, 48, 49, 72, 60  # raw ids of the ground


@dataclass(frozen=True)
class Road:
    """A centre line and its width.

    along_y: False: the main road, y = f(x); True: a side road at `x0`.
    half: from the centre to the curb, metres; `lane`: of one driving lane; the rest is for parking.
    """

    along_y: bool
    x0: float
    bend: tuple[float, float, float]  # metres, 1/metre, radians of the main road's sine
    half: float
    lane: float

    def point(self, s, offset=0.0) -> np.ndarray:
        """Positions [..., 2] at `s` along the road and `offset` to its left, metres."""
        s = np.asarray(s, np.float64)
        if self.along_y:
            return np.stack([self.x0 - offset + 0 * s, s], -1)
        amplitude, rate, phase = self.bend
        y, slope = amplitude * np.sin(rate * s + phase), amplitude * rate * np.cos(rate * s + phase)
        length = np.hypot(1, slope)
        return np.stack([s - offset * slope / length, y + offset / length], -1)

    def heading(self, s: float) -> float:
        if self.along_y:
            return np.pi / 2
        amplitude, rate, phase = self.bend
        return float(np.arctan(amplitude * rate * np.cos(rate * s + phase)))

    def outside(self, x, y) -> np.ndarray:
        """Distance from the road, negative on it; at most the true one."""
        if self.along_y:
            return np.abs(x - self.x0) - self.half
        amplitude, rate, phase = self.bend
        away = np.abs(y - amplitude * np.sin(rate * x + phase))
        return away / np.hypot(1, amplitude * rate) - self.half


@dataclass(frozen=True)
class Ground:
    """Height and surface of the ground; a `raycast.Terrain`."""

    roads: tuple[Road, ...]
    sidewalk: float  # metres wide
    paved: bool  # behind the sidewalk
    curb: float
    hills: np.ndarray  # [H, 4]: metres, 1/metre in x and y, radians
    fall: float = 0.03  # slope away from the main road's centre, over some eight metres
    shades: tuple[tuple[str, float], ...] = ()  # factors on the remission of materials; 1 of those not named

    @property
    def max_slope(self) -> float:
        return float(np.sum(self.hills[:, 0] * np.hypot(self.hills[:, 1], self.hills[:, 2]))) + self.fall + 1e-3

    def smooth_height(self, x, y) -> np.ndarray:
        main = self.roads[0]
        away = np.sqrt((main.outside(x, y) + main.half) ** 2 + 1) - 1  # round on top
        hills = sum(a * np.sin(kx * x + ky * y + p) for a, kx, ky, p in self.hills.tolist())
        return hills - self.fall * 8 * np.tanh(away / 8)

    def raised(self, x, y) -> np.ndarray:
        return np.minimum.reduce([road.outside(x, y) for road in self.roads])

    def height(self, x, y) -> np.ndarray:
        return self.smooth_height(x, y) + self.curb * (self.raised(x, y) > 0)

    def surface(self, x, y) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Raw id, material and factor on its remission at some places."""
        away = self.raised(x, y)
        main = self.roads[0]
        beyond = OTHER_GROUND if self.paved else TERRAIN
        on_main = main.outside(x, y)
        parking = (away == on_main) & (on_main > main.lane - main.half)
        label = np.select([away > self.sidewalk, away > 0, parking], [beyond, SIDEWALK, PARKING], ROAD)
        line = np.abs(on_main + main.half) < 0.07
        label[(away < -1) & line & (np.mod(x, 6.0) < 3.0)] = MARKING
        material = np.full(label.shape, M["asphalt"])
        material[label == MARKING] = M["marking"]
        material[(label == SIDEWALK) | (label == OTHER_GROUND)] = M["paving"]
        material[label == TERRAIN] = M["grass"]
        shade = np.ones(len(MATERIALS), np.float32)
        for name, factor in self.shades:
            shade[M[name]] = factor
        return label, material, shade[material]


class Path:
    """A line to go along, rounded at its corners."""

    def __init__(self, points: np.ndarray) -> None:
        length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        self.s = np.arange(0, length[-1], 0.5)
        self.xy = np.stack([np.interp(self.s, length, points[:, i]) for i in (0, 1)], 1)
        step = np.gradient(self.xy, axis=0)
        self.yaw = np.unwrap(np.arctan2(step[:, 1], step[:, 0]))

    def at(self, s) -> tuple[np.ndarray, np.ndarray]:
        """Positions [..., 2] and headings; beyond an end, that end."""
        xy = np.stack([np.interp(s, self.s, self.xy[:, i]) for i in (0, 1)], -1)
        return xy, np.interp(s, self.s, self.yaw)

    def nearest(self, xy) -> float:
        return float(self.s[np.linalg.norm(self.xy - xy, axis=1).argmin()])


def turn(before: np.ndarray, after: np.ndarray, radius: float) -> np.ndarray:
    """Two lines [n, 2] that cross, joined by a curve around their crossing."""
    distance = np.linalg.norm(before[:, None] - after[None], axis=2)
    i, j = np.unravel_index(distance.argmin(), distance.shape)
    crossing = (before[i] + after[j]) / 2
    first = before[: i + 1][np.linalg.norm(before[: i + 1] - crossing, axis=1) > radius]
    second = after[j:][np.linalg.norm(after[j:] - crossing, axis=1) > radius]
    u = np.linspace(0, 1, 12)[1:-1, None]
    curve = (1 - u) ** 2 * first[-1] + 2 * u * (1 - u) * crossing + u**2 * second[0]
    return np.concatenate([first, curve, second])
