"""What moves through a street: the traffic that comes by, and acts that are hard to tell from standing things."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kdmos.data.synthetic import shapes
from kdmos.data.synthetic.ground import Ground, Path, turn
from kdmos.data.synthetic.raycast import Solid
from kdmos.data.synthetic.scenes import Span, StreetSettings
from kdmos.data.synthetic.things import SIGHT, Footprints, Thing

Generator = np.random.Generator
STEP = 0.02  # seconds between the known positions of what moves
MARGIN = 1.0  # seconds that they are known for before the first and after the last scan
MOVING_WINDOW = 0.5  # seconds before and after a scan over which what moves must have moved ...
MOVING_DISTANCE = 0.15  # ... this far, metres, to be labelled moving then
EGO_RADIUS = 1.3  # metres, of the circles that the vehicle covers
BRAKING = 2.5  # m/s^2, as hard as anything brakes or speeds up
ROOM = 0.2  # metres between the circles of two
EGO_CLEARANCE = 1.15  # metres, of its circles to what stands
CLEARANCE = 0.9  # of the circles of a mover, which are wider than what they cover, to what stands


@dataclass
class Mover:
    """What moves: its solids at a phase of its gait, and where it is at each `STEP`.

    standing, moving: raw ids. stride: metres a radian of phase takes. circles: radius and offsets along x of the
    circles that it covers.
    """

    kind: str
    solids: Callable[[float], list[Solid]]
    standing: int
    moving: int
    stride: float
    radius: float
    offsets: tuple[float, ...]
    xy: np.ndarray  # [T, 2]
    yaw: np.ndarray  # [T]
    travelled: np.ndarray  # [T]
    shade: float = 1.0
    instance: int = 0

    def circles(self, every: int) -> np.ndarray:
        """Centres of its circles [T / every, n, 2]."""
        return _circles(self.xy[::every], self.yaw[::every], self.offsets)


class Kind(NamedTuple):
    """Solids, raw ids at rest and moving, metres a radian of its gait, radius and offsets of its circles, m/s."""

    make: Callable
    standing: int
    moving: int
    stride: float
    radius: float
    offsets: tuple[float, ...]
    speed: Span


FASTEST = 14.0  # m/s, of all kinds
STOPPERS = ("car", "slow car", "van", "person")
KINDS = {
    "car": Kind(shapes.car, 10, 252, np.inf, 1.05, (-1.4, 0.0, 1.4), (5.0, 14.0)),
    "slow car": Kind(shapes.car, 10, 252, np.inf, 1.05, (-1.4, 0.0, 1.4), (0.6, 2.0)),
    "van": Kind(shapes.van, 20, 259, np.inf, 1.15, (-1.8, 0.0, 1.8), (5.0, 13.0)),
    "truck": Kind(shapes.truck, 18, 258, np.inf, 1.4, (-3.2, -1.6, 0.0, 1.6, 3.2), (5.0, 12.0)),
    "bus": Kind(shapes.bus, 13, 257, np.inf, 1.4, (-4.4, -2.2, 0.0, 2.2, 4.4), (5.0, 12.0)),
    "cyclist": Kind(shapes.cyclist, 31, 253, 0.9, 0.6, (-0.5, 0.5), (2.2, 7.0)),
    "motorcyclist": Kind(shapes.motorcyclist, 32, 255, np.inf, 0.6, (-0.5, 0.5), (1.5, 14.0)),
    "person": Kind(shapes.person, 30, 254, 0.24, 0.4, (0.0,), (0.6, 1.9)),
}
RATES = {  # how many a sequence of ten scans' length meets, and for how many each second more
    "car": (4.0, 1.0), "slow car": (0.3, 0.06), "van": (0.8, 0.2), "truck": (0.25, 0.06), "bus": (0.12, 0.04),
    "cyclist": (2.0, 0.5), "motorcyclist": (0.9, 0.2), "person": (6.0, 1.2),
}  # fmt: skip


@dataclass
class Traffic:
    """What the movers of a street have to know: where they may go, what stands, and what the vehicle does.

    ego_xy [T, 2], ego_yaw [T], ego_speed [T]: at each `STEP` from -`MARGIN` on. duration: seconds.
    """

    ground: Ground
    things: list[Thing]
    ego_xy: np.ndarray
    ego_yaw: np.ndarray
    ego_speed: np.ndarray
    duration: float
    settings: StreetSettings

    @property
    def steps(self) -> int:
        return len(self.ego_yaw)

    @property
    def reach(self) -> float:
        """Metres that a path is known for around the vehicle: also far from it, for all the time."""
        return 110.0 + FASTEST * max(self.duration - 10.0, 0.0)

    def step(self, time: float) -> int:
        return round((time + MARGIN) / STEP)

    def lane(self, offset: float, forwards: bool) -> Path:
        """Along the main road, `offset` metres to the left of its middle, passing the vehicle."""
        road, middle = self.ground.roads[0], self.ego_xy[self.steps // 2, 0]
        reach = self.reach + np.abs(self.ego_xy[:, 0] - middle).max()
        line = road.point(np.arange(middle - reach, middle + reach, 1.0), offset)
        return Path(line if forwards else line[::-1])


def ego_circles(xy: np.ndarray, yaw: np.ndarray, every: int) -> np.ndarray:
    """Centres [T / every, 3, 2] of the circles that the vehicle with the sensor covers."""
    return _circles(xy[::every], yaw[::every], (-1.4, 0.0, 1.4))


def populate(traffic: Traffic, rng: Generator) -> list[Mover]:
    """Movers that meet the vehicle some time and run into nobody: first the street's acts, then who comes by."""
    settings, space = traffic.settings, _Space(traffic)
    for name, chance in settings.acts:
        if rng.random() < chance:
            for _ in range(3):  # where the first try finds no room
                if sum([space.admit(mover) for mover in ACTS[name](traffic, rng)]):
                    break
    busy = rng.uniform(*settings.traffic)
    for kind, (at_once, a_second) in RATES.items():
        if settings.kinds is None or kind in settings.kinds:
            for _ in range(rng.poisson(busy * (at_once + a_second * max(traffic.duration - 1.0, 0)))):
                for _ in range(4):  # a few tries to find a free way
                    mover = _passer_by(traffic, kind, rng)
                    if mover is not None and space.admit(mover):
                        break
    return space.movers


class _Space:
    """Who is where: admits movers that run into nobody."""

    EVERY = round(0.1 / STEP)

    def __init__(self, traffic: Traffic) -> None:
        self.ego_xy = traffic.ego_xy[:: self.EVERY]
        self.taken = [(ego_circles(traffic.ego_xy, traffic.ego_yaw, self.EVERY), EGO_RADIUS)]
        self.footprints, self.movers = Footprints(traffic.things), []

    def admit(self, mover: Mover) -> bool:
        own = mover.circles(self.EVERY)
        out_of_sight = np.linalg.norm(mover.xy[:: self.EVERY] - self.ego_xy, axis=1) > SIGHT
        own[out_of_sight] = np.nan  # there it may run into what it likes
        if any(_gap(own, other) <= mover.radius + radius + ROOM for other, radius in self.taken):
            return False
        if len(self.footprints.touched(own[::2], CLEARANCE * mover.radius)):
            return False
        self.taken.append((own, mover.radius))
        self.movers.append(mover)
        return True


def _gap(own: np.ndarray, other: np.ndarray) -> float:
    """Smallest distance between the circles' centres [T, n, 2] of two movers over time, where both are known."""
    known = ~np.isnan(own[:, 0, 0] + other[:, 0, 0])
    distance = np.linalg.norm(own[known, :, None] - other[known, None], axis=3)
    return float(distance.min(initial=np.inf))


def _circles(xy: np.ndarray, yaw: np.ndarray, offsets: tuple[float, ...]) -> np.ndarray:
    """[T, n, 2]: centres `offsets` metres along the heading from [T, 2]."""
    heading = np.stack([np.cos(yaw), np.sin(yaw)], 1)
    return xy[:, None] + np.asarray(offsets)[None, :, None] * heading[:, None]


def with_stop(target: np.ndarray, rng: Generator) -> np.ndarray:
    """Speeds [T] with a stop of some seconds somewhere."""
    first = rng.integers(0, len(target))
    target = target.copy()
    target[first : first + round(rng.uniform(0.8, 4.0) / STEP)] = 0
    return target


def reachable(target: np.ndarray) -> np.ndarray:
    """Speeds that follow their target with at most `BRAKING`."""
    speeds, change = [float(target[0])], BRAKING * STEP
    for wanted in target[1:].tolist():
        speeds.append(speeds[-1] + min(max(wanted - speeds[-1], -change), change))
    return np.array(speeds)


def _mover(kind: str, path: Path, step: int, place: float, target: np.ndarray, rng: Generator) -> Mover | None:
    """A mover of a kind that is at `place` metres of its path at a step and has target speeds [T]; None where the
    path is too short."""
    make, standing, moving, stride, radius, offsets, _ = KINDS[kind]
    speeds = reachable(target)
    travelled = np.concatenate([[0], np.cumsum(speeds[1:] + speeds[:-1]) / 2 * STEP])
    s = place + travelled - travelled[step]
    if s[0] < 1.0 or s[-1] > path.s[-1] - 1.0:
        return None
    xy, yaw = path.at(s)
    solids = make(rng)
    gait = solids if callable(solids) else lambda _: solids
    return Mover(kind, gait, standing, moving, stride, radius, offsets, xy, yaw, travelled, rng.uniform(0.5, 1.4))


def _passer_by(traffic: Traffic, kind: str, rng: Generator) -> Mover | None:
    """One mover on a path of its kind, near the vehicle at some time."""
    settings, time = traffic.settings, rng.uniform(0, traffic.duration)
    step = traffic.step(time)
    ego = traffic.ego_xy[step]
    path = _path(traffic.ground, kind, ego, traffic.reach, rng)
    meeting = path.nearest(ego) + (rng.uniform(-15, 20) if kind == "person" else rng.uniform(-25, 40))
    target = np.full(traffic.steps, rng.uniform(*(settings.pace or KINDS[kind].speed)))
    if kind in STOPPERS and rng.random() < settings.stops:
        target = with_stop(target, rng)
    return _mover(kind, path, step, meeting, target, rng)


# --- acts


def _queue(traffic: Traffic, rng: Generator) -> list[Mover]:
    """Vehicles that stand one behind another: for good, until they start one after the other, or as they arrive."""
    road, forwards = traffic.ground.roads[0], rng.random() < 0.4
    path = traffic.lane((-0.5 if forwards else 0.5) * road.lane + rng.uniform(-0.3, 0.3), forwards)
    step = traffic.step(rng.uniform(0, traffic.duration))
    how = rng.choice(["stands", "starts", "arrives"], p=[0.5, 0.25, 0.25])
    place = path.nearest(traffic.ego_xy[step]) + rng.uniform(0, 35)
    turning_point = rng.uniform(0, 0.7) * traffic.duration  # when the first one starts or has arrived
    speed = rng.uniform(2.0, 7.0)  # of all of them, or they would run into each other
    found, time = [], np.arange(traffic.steps) * STEP - MARGIN
    for number in range(rng.integers(2, 9)):
        kind = str(rng.choice(["car", "van", "truck", "bus", "motorcyclist"], p=[0.6, 0.2, 0.08, 0.06, 0.06]))
        half = _half_length(kind)
        place -= half
        wait = turning_point + number * rng.uniform(0.7, 1.6)
        if how == "starts":
            mover = _mover(kind, path, 0, place, np.where(time < wait, 0.0, speed), rng)
        elif how == "arrives":
            brakes = 0.3 * traffic.duration + wait - speed / BRAKING
            mover = _mover(kind, path, traffic.steps - 1, place, np.where(time < brakes, speed, 0.0), rng)
        else:
            mover = _mover(kind, path, 0, place, np.zeros(traffic.steps), rng)
        found += [] if mover is None else [mover]
        place -= half + rng.uniform(0.8, 4.0)
    return found


def _overtaking(traffic: Traffic, rng: Generator) -> list[Mover]:
    """Some go the vehicle's way, faster beside it on the left or slower on the right."""
    road, found = traffic.ground.roads[0], []
    for _ in range(rng.integers(1, 4)):
        step = traffic.step(rng.uniform(0.1, 0.9) * traffic.duration)
        pace = traffic.ego_speed[step]
        if rng.random() < 0.6 or pace < 1.5:
            kind = str(rng.choice(["car", "van", "motorcyclist", "truck"], p=[0.55, 0.2, 0.15, 0.1]))
            offset, speed = road.lane * rng.uniform(0.3, 0.6), pace + rng.uniform(0.5, 6.0)
        else:
            kind = str(rng.choice(["cyclist", "slow car", "motorcyclist"], p=[0.7, 0.15, 0.15]))
            offset, speed = -road.lane + rng.uniform(-0.2, 0.6), max(pace - rng.uniform(0.5, 5.0), 0.7)
        path = traffic.lane(offset, forwards=True)
        place = path.nearest(traffic.ego_xy[step]) + rng.uniform(-6, 6)
        mover = _mover(kind, path, step, place, np.full(traffic.steps, min(speed, FASTEST)), rng)
        found += [] if mover is None else [mover]
    return found


def _truck(traffic: Traffic, rng: Generator) -> list[Mover]:
    """A truck or bus close beside the vehicle: against it, along with it, or waiting there."""
    road, found = traffic.ground.roads[0], []
    for _ in range(rng.integers(1, 3)):
        step, forwards = traffic.step(rng.uniform(0.2, 0.8) * traffic.duration), rng.random() < 0.5
        kind = str(rng.choice(["truck", "bus"]))
        offset = road.lane * rng.uniform(0.4, 0.65)
        speed = max(traffic.ego_speed[step] + rng.uniform(-1.5, 2.5), 0.0) if forwards else rng.uniform(0.0, 9.0)
        target = np.full(traffic.steps, speed)
        if rng.random() < 0.3:
            target = with_stop(target, rng)
        path = traffic.lane(offset, forwards)
        mover = _mover(kind, path, step, path.nearest(traffic.ego_xy[step]) + rng.uniform(-4, 8), target, rng)
        found += [] if mover is None else [mover]
    return found


def _crossing(traffic: Traffic, rng: Generator) -> list[Mover]:
    """Persons, and a cyclist now and then, who cross the road some metres ahead, from behind what is parked."""
    road, found = traffic.ground.roads[0], []
    for _ in range(rng.integers(1, 4)):
        step = traffic.step(rng.uniform(0.2, 0.9) * traffic.duration)
        kind = "person" if rng.random() < 0.85 else "cyclist"
        x, offset = traffic.ego_xy[step, 0] + rng.uniform(4.0, 20.0), (road.half + 30.0) * rng.choice([-1, 1])
        path = Path(road.point(x, np.linspace(offset, -offset, 60)))
        speed = rng.uniform(0.8, 3.0)
        place = path.nearest(road.point(x, 0.0)) + rng.uniform(-road.half - 0.5, road.half)
        target = np.full(traffic.steps, speed)
        mover = _mover(kind, path, step, place, with_stop(target, rng) if rng.random() < 0.3 else target, rng)
        found += [] if mover is None else [mover]
    return found


def _half_length(kind: str) -> float:
    _, _, _, _, radius, offsets, _ = KINDS[kind]
    return radius + max(offsets)


ACTS = {"queue": _queue, "overtaking": _overtaking, "truck": _truck, "crossing": _crossing}


# --- who comes by


def _path(ground: Ground, kind: str, ego: np.ndarray, reach: float, rng: Generator) -> Path:
    """A path of a kind's, passing the vehicle's place [2] at some time and known for `reach` metres around it."""
    road = ground.roads[rng.choice(len(ground.roads)) if rng.random() < 0.3 else 0]
    way = np.arange(-reach, reach, 1.0) + (ego[1] if road.along_y else ego[0])
    forwards = rng.random() < 0.5
    if kind == "person" and rng.random() < 0.35:  # across the road
        s = (ego[1] if road.along_y else ego[0]) + rng.uniform(-10, 30)
        offset = (road.half + 0.5 * ground.sidewalk) * (1 if forwards else -1)
        come, go = rng.choice([-1, 1], 2)
        before = road.point(s + come * np.arange(reach - 50.0, 0.0, -1.0), offset)
        across = np.stack([road.point(s, o) for o in np.linspace(offset, -offset, 12)])
        return Path(np.concatenate([before, across, road.point(s + go * np.arange(1.0, reach - 50.0), -offset)]))
    if kind == "person":
        offset = rng.choice([-1, 1]) * (road.half + rng.uniform(0.3, max(ground.sidewalk - 0.3, 0.4)))
    elif kind in ("cyclist", "motorcyclist") and rng.random() < 0.6:
        offset = (-1 if forwards else 1) * (road.lane - rng.uniform(0.4, 0.9))
    else:
        offset = (-0.5 if forwards else 0.5) * road.lane + rng.uniform(-0.2, 0.2)
    line = road.point(way, offset)
    if kind != "person" and len(ground.roads) > 1 and rng.random() < 0.15:  # into a side road, or out of one
        other = ground.roads[rng.integers(1, len(ground.roads))] if not road.along_y else ground.roads[0]
        centre = other.x0 if other.along_y else 0.0
        if not road.along_y:
            out = rng.random() < 0.5
            side = other.point(np.arange(0.0, reach - 20.0) * (1 if out else -1), -1.4 if out else 1.4)
            upto = line if forwards else line[::-1]
            if way[0] + 15 < centre < way[-1] - 15:
                return Path(turn(upto, side, 7.0))
    return Path(line if forwards else line[::-1])
