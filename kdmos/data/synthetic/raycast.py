"""Exact ray casting of a spinning sensor against solids and terrain.

Solids are convex polyhedra and ellipsoids. Rays lie on a grid of beams x columns, so a solid is only tested against
the window of that grid which its bounding box can cover: casting costs what the solids cover on the sensor's
sphere, not rays times solids. Foliage and fences are porous: fixed cells of space, chosen by a hash of their position,
are filled, so that the same leaf is hit from scan to scan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

LEAF = 0.25  # metres, edge of the cells of porous ellipsoids
LATH = 0.12  # metres, of porous polyhedra
MISS = -1  # index of what a ray hit: nothing
GROUND = -2
MAX_DESCENT = 40  # steps of a ray down to the ground ...
CLOSE_TO_GROUND = 0.02  # ... until this many metres above it
MAX_STEPS = 24  # cells that a ray looks through in one porous ellipsoid


@dataclass(frozen=True)
class Solid:
    """A convex polyhedron or an ellipsoid in the frame of its body, which has z up.

    planes: float64 [P, 4], a row n_x, n_y, n_z, d: the inside is n . x <= d, n of unit length. None for an ellipsoid.
    unit: float64 [3, 4], takes a point (x, y, z, 1) to the unit ball. None for a polyhedron.
    low, high: corners of a box around it, metres.
    material: what it is made of, an index that the sensor understands.
    fill: share of filled cells, 1 is opaque.
    shade: factor on the remission of its material.
    """

    planes: np.ndarray | None
    unit: np.ndarray | None
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    material: int = 0
    fill: float = 1.0
    shade: float = 1.0


def polyhedron(planes, low, high, material: int = 0, fill: float = 1.0) -> Solid:
    """A convex polyhedron from planes [P, 4] of any length, inside n . x <= d, and a box around it."""
    planes = np.asarray(planes, np.float64)
    return Solid(planes / np.linalg.norm(planes[:, :3], axis=1, keepdims=True), None, low, high, material, fill)


def box(low, high, material: int = 0, fill: float = 1.0) -> Solid:
    """An axis-parallel box."""
    axes = np.eye(3)
    planes = [[*axis, top] for axis, top in zip(axes, high)] + [[*-axis, -bottom] for axis, bottom in zip(axes, low)]
    return polyhedron(planes, tuple(low), tuple(high), material, fill)


def frustum(bottom, top, z, material: int = 0, fill: float = 1.0) -> Solid:
    """A block whose lower and upper face are rectangles (x0, x1, y0, y1), at heights z = (z0, z1)."""
    (z0, z1), rise = z, z[1] - z[0]
    planes = [[0, 0, -1, -z0], [0, 0, 1, z1]]
    for i, sign in ((0, -1), (1, 1)):
        lean_x, lean_y = (top[i] - bottom[i]) / rise, (top[2 + i] - bottom[2 + i]) / rise
        planes.append([sign, 0, -sign * lean_x, sign * (bottom[i] - lean_x * z0)])
        planes.append([0, sign, -sign * lean_y, sign * (bottom[2 + i] - lean_y * z0)])
    x0, y0 = min(bottom[0], top[0]), min(bottom[2], top[2])
    x1, y1 = max(bottom[1], top[1]), max(bottom[3], top[3])
    return polyhedron(planes, (x0, y0, z0), (x1, y1, z1), material, fill)


def prism(radius: float, z, centre=(0.0, 0.0), sides: int = 8, material: int = 0) -> Solid:
    """An upright prism with `sides` faces around a circle: a pole or a trunk."""
    angle = np.arange(sides) * 2 * np.pi / sides
    normals = np.stack([np.cos(angle), np.sin(angle)], 1)
    planes = [[*n, 0, radius + n @ np.asarray(centre)] for n in normals] + [[0, 0, 1, z[1]], [0, 0, -1, -z[0]]]
    reach = radius / np.cos(np.pi / sides)
    low, high = np.asarray(centre) - reach, np.asarray(centre) + reach
    return polyhedron(planes, (*low, z[0]), (*high, z[1]), material)


def ellipsoid(centre, radii, axes=None, material: int = 0, fill: float = 1.0) -> Solid:
    """An ellipsoid; `axes` holds its principal directions as columns, by default those of the body."""
    axes = np.eye(3) if axes is None else np.asarray(axes, np.float64)
    centre, radii = np.asarray(centre, np.float64), np.asarray(radii, np.float64)
    linear = axes.T / radii[:, None]
    reach = np.sqrt(((axes * radii) ** 2).sum(1))
    unit = np.concatenate([linear, -(linear @ centre)[:, None]], 1)
    return Solid(None, unit, tuple(centre - reach), tuple(centre + reach), material, fill)


def limb(start, end, radius: float, material: int = 0) -> Solid:
    """A long ellipsoid between two points."""
    start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
    along = (end - start) / np.linalg.norm(end - start)
    side = np.cross(along, [0.0, 1.0, 0.0])
    if np.linalg.norm(side) < 1e-6:
        side = np.array([1.0, 0.0, 0.0])
    side /= np.linalg.norm(side)
    axes = np.stack([along, side, np.cross(along, side)], 1)
    return ellipsoid((start + end) / 2, (np.linalg.norm(end - start) / 2, radius, radius), axes, material)


@dataclass
class Body:
    """Solids that move as one.

    position: of the body's frame in the world, metres, at time 0 of the scan.
    yaw: radians; the body's x axis points there.
    velocity: m/s in the world, taken as constant while the scan lasts.
    """

    solids: list[Solid]
    position: np.ndarray
    yaw: float = 0.0
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(3))


class Terrain(Protocol):
    """Ground as a height field: a smooth surface, and `curb` above it wherever `raised` is positive."""

    curb: float
    max_slope: float

    def smooth_height(self, x: np.ndarray, y: np.ndarray) -> np.ndarray: ...

    def raised(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance in metres, at most the true one, positive on the raised side."""
        ...


class Rays(NamedTuple):
    """One turn of the sensor, beams from top to bottom.

    origin: float64 [A, 3], world, where the sensor is when column a fires.
    direction: float32 [3, B, A], world, unit vectors.
    time: float64 [A], seconds from the scan's time.
    elevation: float64 [B], radians, of the beams in the sensor's frame, falling.
    azimuth: float64 [A], radians, of the columns in the world, rising.
    tilt: radians, largest angle between the sensor's and the world's z axis.
    max_range: metres.
    """

    origin: np.ndarray
    direction: np.ndarray
    time: np.ndarray
    elevation: np.ndarray
    azimuth: np.ndarray
    tilt: float
    max_range: float


class Hits(NamedTuple):
    """What each ray met first.

    range: float32 [B, A], metres, inf where nothing.
    solid: int32 [B, A], index into the solids of all bodies in order, `GROUND` or `MISS`.
    cosine: float32 [B, A], of the angle of incidence.
    """

    range: np.ndarray
    solid: np.ndarray
    cosine: np.ndarray


class Solids:
    """The solids of some bodies in the world, with all that culling needs as arrays [S]."""

    def __init__(self, bodies: list[Body]) -> None:
        parts = [(body, solid) for body in bodies for solid in body.solids]
        self.solids = [solid for _, solid in parts]
        rows = [(*body.position, body.yaw, *body.velocity, *solid.low, *solid.high) for body, solid in parts]
        table = np.array(rows, np.float64).reshape(-1, 13)
        self.position, self.yaw, self.velocity = table[:, :3], table[:, 3], table[:, 4:7]
        self.low, self.high = table[:, 7:10], table[:, 10:13]
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        zero, one = np.zeros_like(cos), np.ones_like(cos)
        rotation = [[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]]
        self.rotation = np.array(rotation).transpose(2, 0, 1) if len(parts) else np.zeros((0, 3, 3))

    def __len__(self) -> int:
        return len(self.solids)

    def windows(self, rays: Rays) -> tuple[np.ndarray, ...]:
        """Solid, first and last + 1 row, first and last + 1 column of all windows worth testing, near ones first."""
        cos, sin = self.rotation[:, 0, 0], self.rotation[:, 1, 0]
        farthest = np.zeros(len(self))
        left, right = np.full(len(self), -np.inf), np.full(len(self), np.inf)  # azimuths relative to the middle
        seen_from, middle = [], None
        # The sensor travels less than two metres in a turn: its path is straight enough from one to the next of these.
        for column in (0, len(rays.time) // 2, -1):
            away = rays.origin[column] - self.position - self.velocity * rays.time[column]
            x = cos * away[:, 0] + sin * away[:, 1]  # in the body's frame
            y = cos * away[:, 1] - sin * away[:, 0]
            seen_from.append((x, y, away[:, 2]))
            corner_x = np.stack([self.low[:, 0], self.low[:, 0], self.high[:, 0], self.high[:, 0]], 1) - x[:, None]
            corner_y = np.stack([self.low[:, 1], self.high[:, 1], self.low[:, 1], self.high[:, 1]], 1) - y[:, None]
            farthest = np.maximum(farthest, np.hypot(corner_x, corner_y).max(1))
            if middle is None:
                middle = np.arctan2(corner_y.mean(1), corner_x.mean(1)) + self.yaw
            angle = np.arctan2(corner_y, corner_x) + (self.yaw - middle)[:, None]
            angle = (angle + np.pi) % (2 * np.pi) - np.pi
            left, right = np.maximum(left, angle.max(1)), np.minimum(right, angle.min(1))
        # On its way it may come nearer than at either end, but not nearer than the box around its way is.
        first, last = np.min(seen_from, 0), np.max(seen_from, 0)  # [3, S]
        gap_x, gap_y, _ = np.maximum(np.maximum(self.low.T - last, first - self.high.T), 0)
        nearest, inside = np.hypot(gap_x, gap_y), (gap_x == 0) & (gap_y == 0)
        bottom, top = self.low[:, 2] - last[2], self.high[:, 2] - first[2]

        near = np.maximum(nearest, 1e-3)
        highest = np.arctan2(top, np.where(top > 0, near, farthest)) + rays.tilt
        lowest = np.arctan2(bottom, np.where(bottom < 0, near, farthest)) - rays.tilt
        row0 = np.searchsorted(-rays.elevation, -highest)
        row1 = np.searchsorted(-rays.elevation, -lowest, side="right")
        # A tilted sensor turns steep rays out of their column's azimuth. With pitch p, roll r and elevation e, the
        # cross product of both directions on the ground is at most cos(e) (sin p sin r + |cos p - cos r| / 2) +
        # sin(e) sqrt(sin^2 p + sin^2 r), over the length of what is left of the ray there.
        last_row = len(rays.elevation) - 1
        edges = rays.elevation[np.clip([row0, row1 - 1], 0, last_row)]
        steepest = np.abs(edges).max(0)
        rest = np.maximum(np.cos(np.minimum(steepest + rays.tilt, np.pi / 2)), 1e-9)
        aside = (rays.tilt**2 + np.sin(steepest) * rays.tilt) / rest
        margin = np.arcsin(np.minimum(aside, 1))
        # A convex footprint spans less than half a turn from outside; more means that the sensor passes it closely.
        wide = inside | (left - right > np.pi) | (aside >= 1)
        left, right = np.where(wide, np.pi, left + margin), np.where(wide, -np.pi, right - margin)

        pieces = []
        for turn in (-2 * np.pi, 0.0, 2 * np.pi):
            base = (middle - rays.azimuth[0]) % (2 * np.pi) + rays.azimuth[0] + turn
            column0 = np.searchsorted(rays.azimuth, base + right)
            column1 = np.searchsorted(rays.azimuth, base + left, side="right")
            keep = np.flatnonzero((nearest < rays.max_range) & (row0 < row1) & (column0 < column1))
            pieces.append(np.stack([nearest[keep], keep, row0[keep], row1[keep], column0[keep], column1[keep]]))
        found = np.concatenate(pieces, 1)
        found = found[:, np.argsort(found[0], kind="stable")]
        return found[0], *found[1:].astype(np.int64)


def cast(solids: list[Solids], terrain: Terrain | None, rays: Rays) -> Hits:
    """First hit of every ray.

    Args:
        solids: Groups, e.g. the standing and the moving ones; solids are numbered through them.
        terrain: The ground, or None.
        rays: One turn.
    """
    shape = rays.direction.shape[1:]
    hits = Hits(np.full(shape, np.inf, np.float32), np.full(shape, MISS, np.int32), np.zeros(shape, np.float32))
    if terrain is not None:
        cast_terrain(terrain, rays, hits)
    first = 0
    for group in solids:
        for nearest, index, r0, r1, c0, c1 in zip(*group.windows(rays)):
            window = (slice(r0, r1), slice(c0, c1))
            if nearest < hits.range[window].max():
                _cast_solid(group, index, first + index, rays, hits, window)
        first += len(group)
    hits.range[hits.range > rays.max_range] = np.inf
    hits.solid[np.isinf(hits.range)] = MISS
    return hits


def _cast_solid(group: Solids, index: int, number: int, rays: Rays, hits: Hits, window) -> None:
    solid, rotation, columns = group.solids[index], group.rotation[index], window[1]
    direction = [axis[window] for axis in rays.direction]
    # A body that moves is at rest where the rays start the other way.
    origin = rays.origin[columns] - group.position[index] - group.velocity[index] * rays.time[columns, None]
    nearer = hits.range[window]
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.planes is not None:
            start, cosine, met = _polyhedron(solid.planes, rotation, origin, direction)
        else:
            start, end, cosine, met = _ellipsoid(solid.unit, rotation, origin, direction)
    met &= start < nearer
    if solid.fill < 1 and met.any():
        rows, cols = np.nonzero(met)
        way = np.stack([axis[rows, cols] for axis in direction], 1).astype(np.float64)
        from_ = origin[cols]  # cells move with the body
        if solid.planes is not None:
            met[rows, cols] = _filled(from_ + start[rows, cols, None] * way, LATH, solid.fill)
        else:
            steps = start[rows, cols] + (np.arange(MAX_STEPS)[:, None] + 0.5) * LEAF
            places = from_ + steps[..., None] * way
            leaf = _filled(places, LEAF, solid.fill) & (steps < end[rows, cols])
            start[rows, cols] = steps[leaf.argmax(0), np.arange(len(rows))]
            met[rows, cols] = leaf.any(0)
            met &= start < nearer
    nearer[met] = start[met]
    hits.solid[window][met] = number
    hits.cosine[window][met] = cosine[met]


def _polyhedron(planes, rotation, origin, direction):
    """Where rays enter: distance, cosine of incidence and whether they do, [rows, columns]."""
    normals = planes[:, :3] @ rotation.T
    room = planes[:, 3] - origin @ normals.T  # [columns, P], positive on the inner side
    enter = np.zeros(direction[0].shape, np.float32)
    leave = np.full(direction[0].shape, np.inf, np.float32)
    cosine = np.zeros(direction[0].shape, np.float32)
    for (nx, ny, nz), distance in zip(normals.astype(np.float32), room.T.astype(np.float32)):
        along = nx * direction[0] + ny * direction[1] + nz * direction[2]
        t = distance / along
        if distance.min() > 0:  # starts inside of this plane: can only leave through it
            np.minimum(leave, np.where(along > 0, t, np.inf), out=leave)
            continue
        outward = along >= 0
        later = ~outward & (t > enter)
        enter[later], cosine[later] = t[later], -along[later]
        leave = np.where(outward, np.minimum(leave, np.where(distance > 0, t, -1)), leave)
    return enter, cosine, (enter > 0) & (enter < leave)


def _ellipsoid(unit, rotation, origin, direction):
    """Where rays enter and leave, cosine of incidence and whether they meet, [rows, columns]."""
    linear = unit[:, :3] @ rotation.T
    q = (origin @ linear.T + unit[:, 3]).T.astype(np.float32)  # [3, columns]
    m = linear.astype(np.float32)
    e = [m[i, 0] * direction[0] + m[i, 1] * direction[1] + m[i, 2] * direction[2] for i in range(3)]
    a = e[0] * e[0] + e[1] * e[1] + e[2] * e[2]
    b = q[0] * e[0] + q[1] * e[1] + q[2] * e[2]
    # |q|^2 - (q . e)^2 / |e|^2 of the point of closest approach, without the cancellation of b^2 - a c
    s = b / a
    miss = [q[i] - s * e[i] for i in range(3)]
    rest = 1 - (miss[0] ** 2 + miss[1] ** 2 + miss[2] ** 2)
    half = np.sqrt(np.maximum(rest, 0) / a)
    start, end = -s - half, -s + half
    normal = [q[i] + start * e[i] for i in range(3)]
    gradient = [m[0, j] * normal[0] + m[1, j] * normal[1] + m[2, j] * normal[2] for j in range(3)]
    length = np.sqrt(gradient[0] ** 2 + gradient[1] ** 2 + gradient[2] ** 2)
    cosine = np.abs(sum(g * d for g, d in zip(gradient, direction))) / length
    return start, end, cosine, (rest > 0) & (start > 0)


def _filled(places: np.ndarray, cell: float, fill: float) -> np.ndarray:
    """Whether the cells of space around some places [..., 3] are filled."""
    x, y, z = np.moveaxis(np.floor(places / cell).astype(np.int32).astype(np.uint32), -1, 0)
    mixed = x * np.uint32(0x9E3779B1) ^ y * np.uint32(0x85EBCA77) ^ z * np.uint32(0xC2B2AE3D)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x2C1B3C6D)
    mixed ^= mixed >> np.uint32(13)
    return (mixed & np.uint32(0xFFFF)) < np.uint32(fill * 0x10000)


def cast_terrain(terrain: Terrain, rays: Rays, hits: Hits) -> None:
    """Hits on the ground, into `hits`: the smooth lower surface, what is raised above it, and the step between."""
    flat = np.hypot(rays.direction[0], rays.direction[1])
    # A ray that rises meets the ground far away if at all.
    rows, columns = np.nonzero(rays.direction[2] < 0.5 * terrain.max_slope * flat)
    # float32 is good to a tenth of a millimetre on a street of a kilometre, and twice as fast.
    way, level = rays.direction[:, rows, columns], flat[rows, columns]
    origin = rays.origin[columns].T.astype(np.float32)
    closing, far = terrain.max_slope * level - way[2], rays.max_range * 1.2

    def above(t, chosen=slice(None)):
        x, y = origin[0, chosen] + t * way[0, chosen], origin[1, chosen] + t * way[1, chosen]
        return origin[2, chosen] + t * way[2, chosen] - terrain.smooth_height(x, y)

    def descend(t, level_above, chosen=slice(None)):
        """Down to a level above the smooth surface. Steps as long as the steepest slope allows cannot pass it:
        three for all rays, more for those that are still high; Newton's method ends the way."""
        index = np.arange(len(rows))[chosen]
        gap = above(t, chosen) - level_above
        t, high = t + gap / closing[chosen], np.arange(len(t))
        for step in range(MAX_DESCENT):
            gap = above(t[high], index[high]) - level_above
            t[high] += gap / closing[index[high]]
            if step > 0:
                high = high[(gap > CLOSE_TO_GROUND) & (t[high] < far)]
        gap = above(t, chosen) - level_above
        slope = np.minimum((above(t + 0.05, chosen) - level_above - gap) / 0.05, -1e-3)
        for _ in range(2):
            t = t - gap / slope
            gap = above(t, chosen) - level_above
        return t - gap / slope

    # 1) The upper surface, a curb above the lower one: hit where the ray comes down on what is raised.
    t_upper = np.maximum(descend(np.zeros(len(rows), np.float32), terrain.curb), 0.0)
    x, y = origin[0] + t_upper * way[0], origin[1] + t_upper * way[1]
    edge = terrain.raised(x, y)
    # 2) The lower surface, elsewhere.
    below = np.flatnonzero(edge <= 0)
    t = t_upper.copy()
    t[below] = descend(t[below], 0.0, below)
    distance = t.copy()
    gap = above(t) - terrain.curb * (edge > 0)
    good = (t > 0) & (t < far) & (np.abs(gap) < 0.02)
    cosine = -way[2]
    # 3) The step: rays that come down beside a curb and reach it before the lower ground.
    reach = (t - t_upper) * level
    beside = np.flatnonzero(good & (edge <= 0) & (edge > -reach))
    if len(beside):
        low, high = t_upper[beside], t[beside]
        ox, oy, wx, wy = origin[0][beside], origin[1][beside], way[0][beside], way[1][beside]
        steps = low + (high - low) * np.linspace(0, 1, 8, dtype=np.float32)[:, None]
        over = terrain.raised(ox + steps * wx, oy + steps * wy) > 0
        first, met = over.argmax(0), over.any(0)
        inner, outer = steps[np.maximum(first - 1, 0), np.arange(len(beside))], steps[first, np.arange(len(beside))]
        for _ in range(5):
            middle = (inner + outer) / 2
            is_over = terrain.raised(ox + middle * wx, oy + middle * wy) > 0
            inner, outer = np.where(is_over, inner, middle), np.where(is_over, middle, outer)
        distance[beside[met]] = outer[met]
        cosine[beside[met]] = 0.7 * level[beside[met]]
    rows, columns = rows[good], columns[good]
    hits.range[rows, columns] = distance[good]
    hits.solid[rows, columns] = GROUND
    hits.cosine[rows, columns] = cosine[good]
