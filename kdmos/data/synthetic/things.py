"""What stands along a street, row by row from the parked vehicles to the edge of the wood, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kdmos.data.synthetic import shapes
from kdmos.data.synthetic.ground import Ground, Road
from kdmos.data.synthetic.raycast import Body, Solid
from kdmos.data.synthetic.scenes import Span, StreetSettings

Generator = np.random.Generator
SIGHT = 110.0  # metres of street before and behind the vehicle
HEADROOM = 1.5  # metres: what hangs higher is in nobody's way


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


@dataclass(frozen=True)
class Parking:
    """How vehicles are parked.

    share: Of the places that are taken. large: Of those, by vans, trucks and trailers.
    middle, curb: Metres from the lane's edge to the middle of the vehicles and to the curb.
    turned: Radians to the road. every: Metres from place to place.
    """

    share: float
    large: float
    middle: float
    curb: float
    turned: float = 0.0
    every: Span = (5.6, 7.5)


def furnish(
    ground: Ground, style: str, settings: StreetSettings, parking: Parking | None, length: float, rng: Generator
) -> list[Thing]:
    """What stands along the roads, row by row outwards from the curb.

    Args:
        ground: With its roads.
        style: urban, residential or rural.
        settings: Of the street.
        parking: Of vehicles, along all roads; None: nobody may park here.
        length: Of the vehicle's way, metres.
        rng: Randomness.
    """
    things: list[Thing] = []
    front = ground.sidewalk + rng.uniform(0.5, 2.0) + {"urban": 0.0, "residential": 3.0, "rural": 8.0}[style]
    clutter = rng.uniform(*settings.clutter)
    for road in ground.roads:
        start, end = (-75.0, 75.0) if road.along_y else (-SIGHT, length + SIGHT)
        for side in (-1, 1):
            row = _Roadside(ground, road, side, start, end, rng, things)
            if parking is not None:
                _park(row, parking)
            _put_on_sidewalk(row)
            if clutter:
                _scatter(row, clutter, front)
            _plant(row, style, front)
            _fence_in(row, style)
            _build(row, style, front)
            _close_the_view(row, front)
    return things + _strays(ground, rng.uniform(*settings.strays), length, things, rng)


LARGE = {  # solids, raw id; as often as named
    "van": (shapes.van, 20), "minibus": (shapes.van, 20), "delivery": (shapes.van, 20), "truck": (shapes.truck, 18),
    "trailer": (shapes.trailer, 20), "camper": (shapes.van, 20), "motorcycle": (shapes.motorcycle, 15),
}  # fmt: skip
VEHICLES = {10, 13, 15, 18, 20}  # raw ids of what may stand on a road


def _park(row: _Roadside, parking: Parking) -> None:
    """Cars and larger vehicles, some of them hardly straight; on a side road always along it."""
    s, rng = row.start, row.rng
    turned, away, every = parking.turned, parking.middle - parking.curb, parking.every
    if row.road.along_y:
        turned, away, every = 0.0, -1.05, Parking.every
    while s < row.end:
        if rng.random() < parking.share:
            large = list(LARGE.values())[rng.integers(len(LARGE))]
            make, label = large if rng.random() < parking.large else (shapes.car, 10)
            longer = 4.0 if make is shapes.truck else 0.0
            if not (longer and turned):
                backwards, yaw = np.pi * (rng.random() < 0.2), turned + rng.normal(0, 0.04)
                row.put(s + longer / 2, away + rng.normal(0, 0.1), make(rng), label, 6.0, yaw + backwards)
                s += longer
        s += rng.uniform(*every)


def _strays(ground: Ground, each: float, length: float, things: list[Thing], rng: Generator) -> list[Thing]:
    """Vehicles that stand where none is expected, half of them along the road; `each` 50 m."""
    road, found = ground.roads[0], []
    for s in rng.uniform(-SIGHT, length + SIGHT, rng.poisson(each * (length + 2 * SIGHT) / 50)):
        make, label = list(LARGE.values())[rng.integers(len(LARGE))] if rng.random() < 0.4 else (shapes.car, 10)
        xy = road.point(s, rng.choice([-1, 1]) * rng.uniform(0.6 * road.lane, road.half + 6.0))
        yaw = road.heading(s) + rng.choice([0, np.pi]) + rng.normal(0, 0.06)
        if rng.random() < 0.5:
            yaw = rng.uniform(0, 2 * np.pi)
        z = float(ground.height(*(np.array([value]) for value in xy))[0])
        stray = Thing(Body(make(rng), np.array([*xy, z]), yaw), label, rng.uniform(0.5, 1.4))
        half = max(part.high[0] for part in stray.body.solids)
        along = np.arange(0.6 - half, half, 0.8)[:, None] * [np.cos(yaw), np.sin(yaw)]
        if not len(Footprints([*things, *found]).touched((xy + along)[None], 1.1)):
            found.append(stray)
    return found


def _scatter(row: _Roadside, clutter: float, front: float) -> None:
    """What is thin or sparse: saplings, tall grass, rows of posts; on the sidewalk and in front of the houses."""
    rng, sidewalk = row.rng, row.ground.sidewalk
    for make, label, spacing in ((shapes.sapling, 70, 9.0), (shapes.weeds, 70, 8.0), (shapes.posts, 80, 45.0)):
        for s in row.some_places(spacing / clutter):
            away = rng.uniform(0.3, max(front, sidewalk + 1.0)) if make is not shapes.posts else rng.uniform(0.2, 0.6)
            row.put(s, away, make(rng), label, 0.8, rng.normal(0, 0.2))


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
