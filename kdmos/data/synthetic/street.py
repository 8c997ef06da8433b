"""A street: ground, what stands along it, who moves through it, and the vehicle that carries the sensor.

All of it follows from one random generator. Traffic keeps to the right. The world's z axis points up; the main road
runs along x, side roads along y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kdmos.data.synthetic import shapes
from kdmos.data.synthetic.lidar import MATERIAL_INDEX as M
from kdmos.data.synthetic.raycast import Body, Solid

Generator = np.random.Generator
STEP = 0.02  # seconds between the known positions of what moves
MARGIN = 1.0  # seconds that they are known for before the first and after the last scan
MOVING_WINDOW = 0.5  # seconds before and after a scan over which what moves must have moved ...
MOVING_DISTANCE = 0.15  # ... this far, metres, to be labelled moving then
ROAD, PARKING, SIDEWALK, OTHER_GROUND, TERRAIN, MARKING = 40, 44, 48, 49, 72, 60  # raw ids of the ground
STYLES = ("urban", "residential", "rural")
EGO = ("straight", "straight", "turn", "stand", "stop")  # what the vehicle does, as often as it is named
SIGHT = 110.0  # metres of street before and behind the vehicle
HEADROOM = 1.5  # metres: what hangs higher is in nobody's way
EGO_RADIUS = 1.3  # metres, of the circles that the vehicle covers
CLEARANCE = 0.9  # of the circles of a mover, which are wider than what they cover, to what stands


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

    @property
    def max_slope(self) -> float:
        return float(np.sum(self.hills[:, 0] * np.hypot(self.hills[:, 1], self.hills[:, 2]))) + self.fall + 1e-3

    def smooth_height(self, x, y) -> np.ndarray:
        main = self.roads[0]
        away = np.sqrt((main.outside(x, y) + main.half) ** 2 + 1) - 1  # round on top
        hills = sum(a * np.sin(kx * x + ky * y + p) for a, kx, ky, p in self.hills)
        return hills - self.fall * 8 * np.tanh(away / 8)

    def raised(self, x, y) -> np.ndarray:
        return np.minimum.reduce([road.outside(x, y) for road in self.roads])

    def height(self, x, y) -> np.ndarray:
        return self.smooth_height(x, y) + self.curb * (self.raised(x, y) > 0)

    def surface(self, x, y) -> tuple[np.ndarray, np.ndarray]:
        """Raw id and material at some places."""
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
        return label, material


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


@dataclass
class Thing:
    """What stands somewhere.

    label: raw id. shade: factor on the remission of its materials.
    """

    body: Body
    label: int
    shade: float = 1.0
    instance: int = 0


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
        xy, yaw = self.xy[::every, None], self.yaw[::every, None, None]
        along = np.asarray(self.offsets)[None, :, None]
        return xy + along * np.concatenate([np.cos(yaw), np.sin(yaw)], 2)


FASTEST = 14.0  # m/s, of all kinds
# kind: (solids, raw id at rest, moving, metres a radian, circle radius, circles, speed range)
KINDS = {
    "car": (shapes.car, 10, 252, np.inf, 1.05, (-1.4, 0.0, 1.4), (3.0, 14.0)),
    "slow car": (shapes.car, 10, 252, np.inf, 1.05, (-1.4, 0.0, 1.4), (0.6, 2.0)),
    "van": (shapes.van, 20, 259, np.inf, 1.15, (-1.8, 0.0, 1.8), (3.0, 13.0)),
    "truck": (shapes.truck, 18, 258, np.inf, 1.4, (-3.2, -1.6, 0.0, 1.6, 3.2), (3.0, 11.0)),
    "bus": (shapes.bus, 13, 257, np.inf, 1.4, (-4.4, -2.2, 0.0, 2.2, 4.4), (3.0, 11.0)),
    "cyclist": (shapes.cyclist, 31, 253, 0.9, 0.6, (-0.5, 0.5), (2.2, 7.0)),
    "motorcyclist": (shapes.motorcyclist, 32, 255, np.inf, 0.6, (-0.5, 0.5), (4.0, 14.0)),
    "person": (shapes.person, 30, 254, 0.24, 0.4, (0.0,), (0.6, 1.9)),
}
RATES = {  # how many a sequence of ten scans' length meets, and for how many each second more
    "car": (2.2, 0.5), "slow car": (0.7, 0.12), "van": (0.6, 0.15), "truck": (0.2, 0.06), "bus": (0.1, 0.04),
    "cyclist": (1.3, 0.3), "motorcyclist": (0.25, 0.06), "person": (4.0, 0.8),
}  # fmt: skip


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


def make_street(rng: Generator, duration: float) -> Street:
    """A street for a sequence of `duration` seconds."""
    steps = round((duration + 2 * MARGIN) / STEP) + 1
    style, manoeuvre = STYLES[rng.integers(len(STYLES))], EGO[rng.integers(len(EGO))]
    parking = 2.2 if style != "rural" and rng.random() < 0.75 else 0.3
    lane = rng.uniform(3.0, 4.6)
    speed = {"stand": 0.0, "turn": rng.uniform(2.5, 6.0)}.get(manoeuvre, rng.uniform(1.5, 14.0))
    length = speed * duration
    bend = (rng.uniform(0, 5.0), 2 * np.pi / rng.uniform(140, 300), rng.uniform(0, 2 * np.pi))
    main = Road(False, 0.0, bend, lane + parking, lane)
    crossings = _crossings(rng, length, manoeuvre)
    side_roads = [Road(True, x, (0, 0, 0), rng.uniform(2.8, 4.5), 2.8) for x in crossings]
    rates = 2 * np.pi / np.array([180.0, 90.0, 35.0])  # long slopes, and how a road sinks and rises
    toward, phase = rng.uniform(0, 2 * np.pi, (2, 3))
    heights = rng.uniform(0, 1, 3) * (0.6, 0.25, 0.12)
    hills = np.stack([heights, rates * np.cos(toward), rates * np.sin(toward), phase], 1)
    paved = style == "urban" or rng.random() < 0.2
    ground = Ground((main, *side_roads), rng.uniform(2.0, 5.0), bool(paved), rng.uniform(0.05, 0.16), hills)

    ego_path, ego_speed = _ego(ground, manoeuvre, speed, length, steps, rng)
    travelled = np.concatenate([[0], np.cumsum(ego_speed[1:] + ego_speed[:-1]) / 2 * STEP])
    ego_xy, ego_yaw = ego_path.at(ego_path.nearest(main.point(0.0, -lane / 2)) + travelled)
    things = _furnish(ground, style, parking, length, rng)
    sway = np.stack([np.array([0.01, 0.003, 0.003]) * rng.random(3), rng.uniform(4, 12, 3), rng.uniform(0, 6, 3)])
    mount = tuple(rng.normal(0, np.radians(0.8), 2))
    street = Street(ground, things, [], ego_xy, ego_yaw, sway, mount)
    street.things = _clear_way(street)
    _populate(street, duration, steps, rng)
    for instance, thing in enumerate([*street.things, *street.movers], 1):
        thing.instance = instance
    return street


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
        target = _with_stop(target, rng)
    return Path(line), _reachable(target)


def _with_stop(target: np.ndarray, rng: Generator) -> np.ndarray:
    first = rng.integers(0, len(target))
    target = target.copy()
    target[first : first + round(rng.uniform(0.8, 4.0) / STEP)] = 0
    return target


def _reachable(target: np.ndarray, most: float = 2.5) -> np.ndarray:
    """Speeds that follow their target with at most `most` m/s^2."""
    speeds, change = [float(target[0])], most * STEP
    for wanted in target[1:].tolist():
        speeds.append(speeds[-1] + min(max(wanted - speeds[-1], -change), change))
    return np.array(speeds)


@dataclass
class _Roadside:
    """One side of a road while things are put along it, from `start` to `end`, metres along the road."""

    ground: Ground
    road: Road
    side: int  # 1: left, -1: right
    start: float
    end: float
    rng: Generator
    things: list[Thing] = field(default_factory=list)

    def some_places(self, spacing: float) -> np.ndarray:
        """As many as there are on average every `spacing` metres."""
        return self.rng.uniform(self.start, self.end, self.rng.poisson((self.end - self.start) / spacing))

    def put(self, s: float, away: float, solids: list[Solid], label: int, room: float, turned: float = 0.0) -> None:
        """Place solids `away` metres from the curb, facing the road, unless another road is within `room`."""
        road = self.road
        xy = road.point(s, self.side * (road.half + away))
        others = [other.outside(*xy) for other in self.ground.roads if other is not road]
        if min(others, default=np.inf) < room:
            return
        z = float(self.ground.height(*(np.array([value]) for value in xy))[0])
        # Solids face the road when their y axis points to it: turned by half on the left side.
        yaw = road.heading(s) + (np.pi if self.side > 0 else 0) + turned
        self.things.append(Thing(Body(solids, np.array([*xy, z]), yaw), label, self.rng.uniform(0.5, 1.4)))


def _furnish(ground: Ground, style: str, parking: float, length: float, rng: Generator) -> list[Thing]:
    """What stands along the roads, row by row outwards from the curb."""
    things: list[Thing] = []
    front = ground.sidewalk + rng.uniform(0.5, 2.0) + {"urban": 0.0, "residential": 3.0, "rural": 8.0}[style]
    parked = rng.uniform(0.0, 0.6)
    for road in ground.roads:
        start, end = (-75.0, 75.0) if road.along_y else (-SIGHT, length + SIGHT)
        for side in (-1, 1):
            row = _Roadside(ground, road, side, start, end, rng, things)
            if parking > 1:
                _park(row, parked)
            _put_on_sidewalk(row)
            _plant(row, style, front)
            _fence_in(row, style)
            _build(row, style, front)
            _close_the_view(row, front)
    return things


def _park(row: _Roadside, share: float) -> None:
    """Cars and vans; `share` of the places are taken."""
    s, rng = row.start, row.rng
    while s < row.end:
        if rng.random() < share:
            make, label = (shapes.van, 20) if rng.random() < 0.15 else (shapes.car, 10)
            backwards, away = np.pi * (rng.random() < 0.1), -1.05 + rng.normal(0, 0.07)
            row.put(s, away, make(rng), label, 6.0, backwards + rng.normal(0, 0.03))
        s += rng.uniform(5.6, 7.5)


def _put_on_sidewalk(row: _Roadside) -> None:
    """Lamps, signs, clutter, people who stand, bicycles and motorcycles."""
    rng, sidewalk = row.rng, row.ground.sidewalk
    for s in np.arange(row.start, row.end, rng.uniform(18, 40)) + rng.uniform(0, 18):
        row.put(s, 0.5, shapes.lamp(rng), 80, 0.5)
    for s in row.some_places(30):
        pole, plate = shapes.sign(rng)
        turned = np.pi / 2 * rng.integers(2)
        row.put(s, 0.45, pole, 80, 0.3, turned)
        row.put(s, 0.45, plate, 81, 0.3, turned)
    for s in row.some_places(14):
        row.put(s, rng.uniform(0.4, sidewalk), shapes.clutter(rng), 99, 0.5, rng.normal(0, 0.3))
    for s in row.some_places(40):
        person = shapes.person(rng)(0.0)
        row.put(s, rng.uniform(0.5, sidewalk), person, 30, 0.5, rng.uniform(0, 6))
    for s in row.some_places(35):
        make, label = (shapes.bicycle, 11) if rng.random() < 0.7 else (shapes.motorcycle, 15)
        row.put(s, rng.uniform(0.4, 1.0), make(rng), label, 0.5, rng.normal(0, 0.4))


def _plant(row: _Roadside, style: str, front: float) -> None:
    """Trees on the sidewalk and behind the front line of the houses, and bushes."""
    rng = row.rng
    lines = [(0.8, 30.0), (front + 1.5, 14.0)] if style == "urban" else [(1.0, 22.0), (front + 2.0, 7.0)]
    for away, spacing in lines:
        for s in row.some_places(spacing):
            trunk, crown = shapes.tree(rng)
            place = away + rng.exponential(0.2 if away < 2 else 4.0)
            row.put(s, place, trunk, 71, 1.0)
            row.put(s, place, crown, 70, 1.0)
    for s in row.some_places(20 if style == "urban" else 6):
        row.put(s, row.ground.sidewalk + 0.6 + rng.exponential(3.0), shapes.bush(rng), 70, 1.5)


def _fence_in(row: _Roadside, style: str) -> None:
    """Walls, fences and hedges between the sidewalk and the gardens."""
    s, rng = row.start, row.rng
    while s < row.end:
        wide = rng.uniform(4.0, 16.0)
        if rng.random() < {"urban": 0.2, "residential": 0.75, "rural": 0.35}[style]:
            solids, label = shapes.barrier(wide, rng)
            row.put(s + wide / 2, row.ground.sidewalk + 0.4, solids, label, wide / 2)
        s += wide + rng.uniform(0, 3.0)


def _build(row: _Roadside, style: str, front: float) -> None:
    s, rng = row.start, row.rng
    while s < row.end:
        wide, depth = rng.uniform(8.0, 26.0), rng.uniform(8.0, 14.0)
        if rng.random() < {"urban": 0.95, "residential": 0.8, "rural": 0.25}[style]:
            away = front + rng.uniform(0, {"urban": 0.6, "residential": 3.0, "rural": 8.0}[style])
            row.put(s + wide / 2, away, shapes.building(wide, depth, rng), 50, max(wide / 2, depth))
        s += wide + rng.exponential({"urban": 1.5, "residential": 6.0, "rural": 12.0}[style])


def _close_the_view(row: _Roadside, front: float) -> None:
    """Houses and woods behind."""
    rng = row.rng
    for s in np.arange(row.start, row.end, 14.0):
        away, wide = front + rng.uniform(16, 45), rng.uniform(10, 24)
        if rng.random() < 0.45:
            row.put(s, away, shapes.building(wide, 10.0, rng), 50, 12.0)
        else:
            row.put(s, away, shapes.wood(wide, rng), 70, 8.0)


def _clear_way(street: Street) -> list[Thing]:
    """The things that stand neither in the vehicle's way nor reach far into a road."""
    footprints = Footprints(street.things)
    blocked = set(footprints.touched(_ego_as_mover(street).circles(round(0.1 / STEP)), EGO_RADIUS).tolist())
    corners = footprints.corners()
    on_road = (street.ground.raised(corners[..., 0], corners[..., 1]) < -0.5).any(1)
    for index in footprints.index[on_road]:
        if street.things[index].label not in (10, 20):
            blocked.add(int(index))
    return [thing for index, thing in enumerate(street.things) if index not in blocked]


def _ego_as_mover(street: Street) -> Mover:
    ego = street.ego_xy, street.ego_yaw, street.ego_yaw
    return Mover("ego", lambda _: [], 0, 0, np.inf, EGO_RADIUS, (-1.4, 0.0, 1.4), *ego)


def _populate(street: Street, duration: float, steps: int, rng: Generator) -> None:
    """Movers that meet the vehicle some time and run into nobody."""
    every = round(0.1 / STEP)
    ego = _ego_as_mover(street).circles(every)
    taken, footprints = [(ego, EGO_RADIUS + 0.5)], Footprints(street.things)
    busy = rng.uniform(0.4, 1.6)
    for kind, (at_once, a_second) in RATES.items():
        for _ in range(rng.poisson(busy * (at_once + a_second * max(duration - 1.0, 0)))):
            for _ in range(4):  # a few tries to find a free way
                mover = _mover(street, kind, duration, steps, rng)
                if mover is None:
                    continue
                own = mover.circles(every)
                out_of_sight = np.linalg.norm(mover.xy[::every] - street.ego_xy[::every], axis=1) > SIGHT
                own[out_of_sight] = np.nan  # there it may run into what it likes
                free = all(_gap(own, other) > mover.radius + radius for other, radius in taken)
                free = free and not len(footprints.touched(own[::2], CLEARANCE * mover.radius))
                if free:
                    taken.append((own, mover.radius))
                    street.movers.append(mover)
                    break


def _gap(own: np.ndarray, other: np.ndarray) -> float:
    """Smallest distance between the circles' centres [T, n, 2] of two movers over time, where both are known."""
    known = ~np.isnan(own[:, 0, 0] + other[:, 0, 0])
    distance = np.linalg.norm(own[known, :, None] - other[known, None], axis=3)
    return float(distance.min(initial=np.inf))


class Footprints:
    """Rectangles on the ground that things stand on, as arrays [S]."""

    def __init__(self, things: list[Thing]) -> None:
        rows = []
        for index, thing in enumerate(things):
            parts = [solid for solid in thing.body.solids if solid.low[2] < HEADROOM]
            if parts:
                low = [min(part.low[axis] for part in parts) for axis in (0, 1)]
                high = [max(part.high[axis] for part in parts) for axis in (0, 1)]
                rows.append((index, *thing.body.position[:2], thing.body.yaw, *low, *high))
        table = np.array(rows, np.float64).reshape(-1, 8)
        self.index, self.xy, self.low, self.high = table[:, 0].astype(int), table[:, 1:3], table[:, 4:6], table[:, 6:]
        self.cos, self.sin = np.cos(table[:, 3]), np.sin(table[:, 3])
        self.reach = np.linalg.norm(np.maximum(np.abs(self.low), np.abs(self.high)), axis=1)

    def corners(self) -> np.ndarray:
        """[S, 4, 2], in the world."""
        (x0, y0), (x1, y1) = self.low.T, self.high.T
        x, y = np.stack([x0, x1, x1, x0], 1), np.stack([y0, y0, y1, y1], 1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return self.xy[:, None] + np.stack([cos * x - sin * y, sin * x + cos * y], 2)

    def touched(self, circles: np.ndarray, radius: float) -> np.ndarray:
        """Indices of the things that circles [T, n, 2] of a mover come to."""
        found: set[int] = set()
        for part in np.array_split(circles, -(-len(circles) // 20)):
            places = part[~np.isnan(part[..., 0])]
            if not len(places):
                continue
            room = (self.reach + radius)[:, None]
            near = ((self.xy > places.min(0) - room) & (self.xy < places.max(0) + room)).all(1)
            away = places[:, None] - self.xy[near]  # [places, near, 2]
            x = self.cos[near] * away[..., 0] + self.sin[near] * away[..., 1]
            y = self.cos[near] * away[..., 1] - self.sin[near] * away[..., 0]
            gap_x = np.maximum(np.maximum(self.low[near, 0] - x, x - self.high[near, 0]), 0)
            gap_y = np.maximum(np.maximum(self.low[near, 1] - y, y - self.high[near, 1]), 0)
            found.update(self.index[near][(np.hypot(gap_x, gap_y) < radius).any(0)].tolist())
        return np.array(sorted(found), int)


def _mover(street: Street, kind: str, duration: float, steps: int, rng: Generator) -> Mover | None:
    """One mover on a path of its kind, near the vehicle at some time."""
    make, standing, moving, stride, radius, offsets, (slowest, fastest) = KINDS[kind]
    ground, time = street.ground, rng.uniform(0, duration)
    step = round((time + MARGIN) / STEP)
    ego = street.ego_xy[step]
    # Known for all the time, also far from the vehicle.
    path = _path(ground, kind, ego, 110.0 + FASTEST * max(duration - 10.0, 0.0), rng)
    meeting = path.nearest(ego) + (rng.uniform(-12, 12) if kind == "person" else rng.uniform(-25, 35))
    speed = rng.uniform(slowest, fastest)
    target = np.full(steps, speed)
    if kind in ("car", "slow car", "van", "person") and rng.random() < 0.3:
        target = _with_stop(target, rng)
    speeds = _reachable(target)
    travelled = np.concatenate([[0], np.cumsum(speeds[1:] + speeds[:-1]) / 2 * STEP])
    s = meeting + travelled - travelled[step]
    if s[0] < 1.0 or s[-1] > path.s[-1] - 1.0:
        return None
    xy, yaw = path.at(s)
    solids = make(rng)
    gait = solids if callable(solids) else lambda _: solids
    return Mover(kind, gait, standing, moving, stride, radius, offsets, xy, yaw, travelled, rng.uniform(0.5, 1.4))


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
