"""A street with all that one sequence sees: ground, what stands, what moves, and the vehicle with the sensor.

All of it follows from one random generator and `StreetSettings`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kdmos.data.synthetic.ground import Ground, Path, Road, turn
from kdmos.data.synthetic.raycast import Body
from kdmos.data.synthetic.scenes import StreetSettings
from kdmos.data.synthetic.things import SIGHT, VEHICLES, Footprints, Parking, Thing, furnish
from kdmos.data.synthetic.traffic import (
    EGO_CLEARANCE,
    MARGIN,
    MOVING_DISTANCE,
    MOVING_WINDOW,
    STEP,
    Mover,
    Traffic,
    ego_circles,
    populate,
    reachable,
    with_stop,
)

Generator = np.random.Generator


@dataclass
class Street:
    """Everything that one sequence sees.

    things: What stands. movers: What moves. Ego: `ego_xy`, `ego_yaw` at each `STEP` from -`MARGIN` on.
    """

    ground: Ground
    things: list[Thing]
    movers: list[Mover]
    ego_xy: np.ndarray
    ego_yaw: np.ndarray
    sway: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))  # of z, pitch, roll: size, 1/s, phase
    mount: tuple[float, float] = (0.0, 0.0)  # radians of pitch and roll between sensor and vehicle

    def ego_poses(self, time: np.ndarray, height: float) -> np.ndarray:
        """Sensor poses float64 [n, 4, 4] in the world, at some times, seconds; `height` above the road."""
        at = (time + MARGIN) / STEP
        index = np.arange(len(self.ego_yaw))
        x, y = (np.interp(at, index, self.ego_xy[:, i]) for i in (0, 1))
        yaw = np.interp(at, index, self.ego_yaw)
        size, rate, phase = self.sway
        z_off, pitch_off, roll_off = size[:, None] * np.sin(rate[:, None] * time + phase[:, None])
        cos, sin, ground = np.cos(yaw), np.sin(yaw), self.ground.smooth_height
        pitch = -np.arctan((ground(x + cos, y + sin) - ground(x - cos, y - sin)) / 2) + pitch_off + self.mount[0]
        roll = np.arctan((ground(x - sin, y + cos) - ground(x + sin, y - cos)) / 2) + roll_off + self.mount[1]
        cp, sp, cr, sr = np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
        poses = np.tile(np.eye(4), (len(yaw), 1, 1))
        poses[:, 0, :3] = np.stack([cos * cp, cos * sp * sr - sin * cr, cos * sp * cr + sin * sr], 1)
        poses[:, 1, :3] = np.stack([sin * cp, sin * sp * sr + cos * cr, sin * sp * cr - cos * sr], 1)
        poses[:, 2, :3] = np.stack([-sp, cp * sr, cp * cr], 1)
        poses[:, :3, 3] = np.stack([x, y, ground(x, y) + height + z_off], 1)
        return poses

    def moving_bodies(self, time: float) -> tuple[list[Body], list[int], np.ndarray]:
        """The movers as bodies at a time, their raw ids, and their speeds in m/s."""
        bodies, labels, speeds = [], [], []
        for mover in self.movers:
            at = (time + MARGIN) / STEP
            index = np.arange(len(mover.yaw))

            def interpolate(values, at=at, index=index):
                return np.interp(at, index, values)

            xy = np.array([interpolate(mover.xy[:, i]) for i in (0, 1)])
            half = round(0.05 / STEP)
            low, high = max(int(at) - half, 0), min(int(at) + half + 1, len(index) - 1)
            velocity = (mover.xy[high] - mover.xy[low]) / ((high - low) * STEP)
            far = round(MOVING_WINDOW / STEP)
            around = mover.xy[max(int(at) - far, 0) : int(at) + far + 1]
            moves = np.linalg.norm(around[-1] - around[0]) > MOVING_DISTANCE
            z = self.ground.height(*(np.array([value]) for value in xy))[0]
            solids = mover.solids(interpolate(mover.travelled) / mover.stride)
            bodies.append(Body(solids, np.array([*xy, z]), interpolate(mover.yaw), np.array([*velocity, 0.0])))
            labels.append(mover.moving if moves else mover.standing)
            speeds.append(float(np.linalg.norm(velocity)))
        return bodies, labels, np.array(speeds)


# --- making one


def make_street(rng: Generator, duration: float, settings: StreetSettings | None = None) -> Street:
    """A street for a sequence of `duration` seconds."""
    settings = settings or StreetSettings()
    steps = round((duration + 2 * MARGIN) / STEP) + 1
    style, manoeuvre = _one_of(settings.styles, rng), _one_of(settings.ego, rng)
    lane = rng.uniform(*settings.lane)
    parking = _parking(settings, lane, rng) if style != "rural" and rng.random() < settings.parking else None
    speed = {"stand": 0.0, "turn": rng.uniform(2.5, 6.0)}.get(manoeuvre, rng.uniform(*settings.speed))
    length = speed * duration
    bend = (rng.uniform(0, 5.0), 2 * np.pi / rng.uniform(140, 300), rng.uniform(0, 2 * np.pi))
    main = Road(False, 0.0, bend, lane + (0.3 if parking is None else parking.curb), lane)
    crossings = _crossings(rng, length, manoeuvre)
    side_roads = [Road(True, x, (0, 0, 0), rng.uniform(2.8, 4.5), 2.8) for x in crossings]
    rates = 2 * np.pi / np.array([180.0, 90.0, 35.0])  # long slopes, and how a road sinks and rises
    toward, phase = rng.uniform(0, 2 * np.pi, (2, 3))
    heights = rng.uniform(0, 1, 3) * (0.6, 0.25, 0.12)
    hills = np.stack([heights, rates * np.cos(toward), rates * np.sin(toward), phase], 1)
    paved = style == "urban" or rng.random() < 0.2
    curb = rng.uniform(0.05, 0.16) if rng.random() < 0.75 else rng.uniform(0.0, 0.03)
    # No two streets have the same asphalt: what a vehicle stands on must not tell whether it is parked.
    shades = tuple((name, float(np.exp(rng.normal(0, 0.3)))) for name in ("asphalt", "paving", "grass"))
    ground = Ground((main, *side_roads), rng.uniform(2.0, 5.0), bool(paved), curb, hills, shades=shades)

    ego_path, ego_speed = _ego(ground, manoeuvre, speed, length, steps, rng)
    travelled = np.concatenate([[0], np.cumsum(ego_speed[1:] + ego_speed[:-1]) / 2 * STEP])
    ego_xy, ego_yaw = ego_path.at(ego_path.nearest(main.point(0.0, -lane / 2)) + travelled)
    things = furnish(ground, style, settings, parking, length, rng)
    sway = np.stack([np.array([0.01, 0.003, 0.003]) * rng.random(3), rng.uniform(4, 12, 3), rng.uniform(0, 6, 3)])
    mount = tuple(rng.normal(0, np.radians(0.8), 2))
    things = _clear_way(things, ground, ego_xy, ego_yaw)
    movers = populate(Traffic(ground, things, ego_xy, ego_yaw, ego_speed, duration, settings), rng)
    for instance, thing in enumerate([*things, *movers], 1):
        thing.instance = instance
    return Street(ground, things, movers, ego_xy, ego_yaw, sway, mount)


def _one_of(names: tuple[str, ...], rng: Generator) -> str:
    return names[rng.integers(len(names))]


def _parking(settings: StreetSettings, lane: float, rng: Generator) -> Parking:
    """Three streets in four have it along the road, some of them half on the sidewalk; the others across."""
    share, large = rng.uniform(*settings.parked), rng.uniform(*settings.large)
    if settings.aside is not None:
        middle = rng.uniform(*settings.aside) - lane / 2
        return Parking(share, large, middle, max(middle + 1.1, 0.3))
    how = rng.random()
    if how < 0.55:
        return Parking(share, large, rng.uniform(0.9, 1.3), 2.2)
    if how < 0.75:
        return Parking(share, large, rng.uniform(0.7, 1.3), rng.uniform(0.3, 1.2))
    angle = np.radians(90.0 if rng.random() < 0.6 else rng.uniform(45.0, 70.0)) * rng.choice([-1, 1])
    return Parking(share, 0.5 * large, 2.5, 5.0, angle, (2.4, 3.6))


def _crossings(rng: Generator, length: float, manoeuvre: str) -> list[float]:
    """Where side roads cross, metres along the main road."""
    found = [max(0.45 * length, 8.0) + 6.0] if manoeuvre == "turn" else []
    for x in np.arange(-SIGHT, length + SIGHT, 45.0) + rng.uniform(0, 45):
        if rng.random() < 0.35 and all(abs(x - other) > 35 for other in found):
            found.append(float(x))
    return found


def _ego(ground: Ground, manoeuvre: str, speed: float, length: float, steps: int, rng: Generator):
    """The vehicle's path and its speed at each step."""
    main, ahead = ground.roads[0], np.arange(-SIGHT, length + SIGHT, 1.0)
    line = main.point(ahead, -main.lane / 2 + rng.uniform(-0.3, 0.3))
    if manoeuvre == "turn":
        side, way = ground.roads[1], np.arange(0.0, length + SIGHT, 1.0)
        left = rng.random() < 0.5
        after = side.point(way if left else -way, -1.4 if left else 1.4)
        line = turn(line, after, 8.5 if left else 6.0)
    wave = 1 + 0.12 * np.sin(np.linspace(0, rng.uniform(1, 6), steps) + rng.uniform(0, 6))
    target = speed * wave
    if manoeuvre == "stop":
        target = with_stop(target, rng)
    return Path(line), reachable(target)


def _clear_way(things: list[Thing], ground: Ground, ego_xy: np.ndarray, ego_yaw: np.ndarray) -> list[Thing]:
    """The things that stand neither in the vehicle's way nor reach far into a road."""
    footprints = Footprints(things)
    blocked = set(footprints.touched(ego_circles(ego_xy, ego_yaw, round(0.1 / STEP)), EGO_CLEARANCE).tolist())
    corners = footprints.corners()
    on_road = (ground.raised(corners[..., 0], corners[..., 1]) < -0.5).any(1)
    blocked.update(int(index) for index in footprints.index[on_road] if things[index].label not in VEHICLES)
    return [thing for index, thing in enumerate(things) if index not in blocked]
