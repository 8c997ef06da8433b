"""Ray casting against all rays x all solids in float64, and the ground against dense marching along its rays."""

import numpy as np
import pytest

from kdmos.data.synthetic.ground import Ground, Road
from kdmos.data.synthetic.lidar import Lidar, SensorSettings
from kdmos.data.synthetic.raycast import (
    GROUND,
    LATH,
    LEAF,
    MISS,
    Body,
    Solids,
    box,
    cast,
    ellipsoid,
    frustum,
    limb,
    polyhedron,
    prism,
)

SENSOR = SensorSettings(beams=((15.0, -40.0, 24),), columns=180, max_range=60.0, beam_wobble=0.0, vehicle=None)
GAP = 1e-3  # metres and unit vectors: how near to an edge float32 may decide either way


def rotation(yaw, pitch, roll):
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return about_z @ about_y @ about_x


def some_rays(sensor=SENSOR, position=(0, 0, 1.7), yaw=0.0, pitch=0.0, roll=0.0, speed=(0, 0, 0), yaw_rate=0.0):
    """One turn; `speed` in m/s in the world, `yaw_rate` in radians/s."""
    lidar = Lidar(sensor, np.random.default_rng(0))
    poses = np.tile(np.eye(4), (sensor.columns, 1, 1))
    for pose, time in zip(poses, lidar.time):
        pose[:3, :3] = rotation(yaw + yaw_rate * time, pitch, roll)
        pose[:3, 3] = np.asarray(position) + np.asarray(speed) * time
    return lidar.rays(poses)


def random_solid(rng):
    kind, size = rng.integers(6), rng.uniform(0.1, 2.5, 3)
    if kind == 0:
        return box(-size, size)
    if kind == 1:
        x, y, top = *size[:2], rng.uniform(0.2, 0.9)
        return frustum((-x, x, -y, y), (-x * top, x * top - 0.01, -y * top, y * top), (-size[2], 0.5 * size[2]))
    if kind == 2:
        return prism(rng.uniform(0.03, 0.4), (-2.0, rng.uniform(0, 5)), rng.normal(0, 0.3, 2), sides=rng.integers(3, 9))
    if kind == 3:
        axes = rotation(*rng.uniform(-3, 3, 3))
        return ellipsoid(rng.normal(0, 0.5, 3), 0.5 * size, axes)
    if kind == 4:
        return limb(rng.normal(0, 1, 3), rng.normal(0, 1, 3), rng.uniform(0.05, 0.2))
    normals = np.concatenate([rng.normal(size=(4, 3)), np.eye(3), -np.eye(3)])  # leaning faces of any length
    room = np.concatenate([np.linalg.norm(normals[:4], axis=1) * rng.uniform(0.2, 1, 4), size, size])
    return polyhedron(np.c_[normals, room], -size, size)


def random_bodies(rng, count, nearest=1.5, moving=True):
    """Around the origin in all directions, also above and below, none over the sensor itself."""
    bodies = []
    for _ in range(count):
        angle, away = rng.uniform(-np.pi, np.pi), nearest + rng.exponential(8.0)
        solids = [random_solid(rng) for _ in range(rng.integers(1, 4))]
        reach = max(np.hypot(*np.abs([s.low, s.high]).max(0)[:2]) for s in solids)
        place = (away + reach) * np.array([np.cos(angle), np.sin(angle)])
        velocity = np.array([*rng.normal(0, 6, 2), 0.0]) if moving and rng.random() < 0.5 else np.zeros(3)
        bodies.append(Body(solids, np.array([*place, rng.normal(1.0, 2.0)]), rng.uniform(-7, 7), velocity))
    return bodies


def brute_force(bodies, rays):
    """First hit of every ray: range [B, A], solid [B, A], and whether another answer is as good within `GAP`.

    A ray is close if it gains or loses its hit by a turn of about GAP, or if two solids are as near as GAP.
    """
    way = rays.direction.astype(np.float64)  # [3, B, A]
    ranges, close = [], []
    for body in bodies:
        turn = rotation(body.yaw, 0, 0)
        start = (rays.origin - body.position - rays.time[:, None] * body.velocity) @ turn  # [A, 3], the body's frame
        along = np.einsum("ij,iba->jba", turn, way)
        for solid in body.solids:
            enter = enter_ellipsoid if solid.planes is None else enter_polyhedron
            shape = solid.unit if solid.planes is None else solid.planes
            exact, larger, smaller = (enter(shape, start, along, grow) for grow in (0.0, GAP, -GAP))
            ranges.append(exact)
            close.append((np.isfinite(larger) != np.isfinite(exact)) | (np.isfinite(smaller) != np.isfinite(exact)))
    ranges, close = np.array(ranges), np.array(close)
    order = np.sort(ranges, axis=0)
    nearest = np.where(order[0] <= rays.max_range, order[0], np.inf)
    with np.errstate(invalid="ignore"):
        doubtful = close.any(0) | (order[1] - order[0] < GAP) | (np.abs(order[0] - rays.max_range) < GAP)
    return nearest, np.where(np.isfinite(nearest), ranges.argmin(0), MISS), doubtful


def enter_polyhedron(planes, start, along, grow):
    enter, leave = np.full(along.shape[1:], -np.inf), np.full(along.shape[1:], np.inf)
    for *normal, offset in planes:
        room = offset + grow - start @ normal  # [A]
        slope = np.einsum("i,iba->ba", normal, along)
        with np.errstate(divide="ignore"):
            t = room / slope
        enter = np.where(slope < 0, np.maximum(enter, t), enter)
        leave = np.where(slope > 0, np.minimum(leave, t), leave)
    return np.where((enter > 0) & (enter < leave), enter, np.inf)


def enter_ellipsoid(unit, start, along, grow):
    q, e = start @ unit[:, :3].T + unit[:, 3], np.einsum("ij,jba->iba", unit[:, :3], along)
    a, b, c = (e * e).sum(0), np.einsum("ai,iba->ba", q, e), (q * q).sum(1) - (1 + 10 * grow) ** 2
    root = b * b - a * c
    with np.errstate(invalid="ignore"):
        t = (-b - np.sqrt(root)) / a
    return np.where((root > 0) & (t > 0), t, np.inf)


def assert_same_hits(bodies, rays, groups=None):
    """Few rays may be in doubt, all others agree exactly."""
    hits = cast([Solids(group) for group in groups or [bodies]], None, rays)
    ranges, solid, doubtful = brute_force(bodies, rays)
    assert doubtful.mean() < 0.06
    sure = ~doubtful
    np.testing.assert_array_equal(hits.solid[sure], solid[sure])
    hit = sure & (solid != MISS)
    # float32: 60 m x 2^-24 of the range itself, times what a grazing incidence makes of a direction's rounding
    error = np.abs(hits.range[hit] - ranges[hit])
    assert (error * np.clip(hits.cosine[hit], 1e-3, 1) < 3e-5).all()
    assert np.isinf(hits.range[sure & (solid == MISS)]).all()
    return hits


@pytest.mark.parametrize("seed", range(3))
def test_a_scene_of_everything(seed):
    rng = np.random.default_rng(seed)
    hits = assert_same_hits(random_bodies(rng, 40), some_rays(yaw=rng.uniform(-3, 3)))
    assert (hits.solid != MISS).mean() > 0.2 and len(np.unique(hits.solid)) > 20


@pytest.mark.parametrize("seed", range(4))
def test_a_tilted_sensor_that_drives_and_turns(seed):
    rng = np.random.default_rng(10 + seed)
    pitch, roll = rng.choice([-1, 1], 2) * rng.uniform(0.03, 0.15, 2)
    rays = some_rays(SENSOR, (0, 0, 1.7), rng.uniform(-3, 3), pitch, roll, rng.normal(0, 8, 3), rng.uniform(-2, 2))
    assert_same_hits(random_bodies(rng, 30, nearest=2.5), rays)


@pytest.mark.parametrize("elevation", [(89.0, -89.0, 40), (75.0, 40.0, 12), (-30.0, -88.0, 24)])
def test_beams_that_look_far_up_and_down(elevation):
    rng = np.random.default_rng(3)
    sensor = SensorSettings(beams=(elevation,), columns=90, beam_wobble=0.0, vehicle=None)
    bodies = random_bodies(rng, 12, nearest=1.0)
    bodies.append(Body([box((-3, -3, 0), (3, 3, 0.5))], np.array([0.5, 0.3, 6.0])))  # a roof above
    bodies.append(Body([ellipsoid((0, 0, 0), (2, 1, 0.4))], np.array([0.2, -0.3, -2.0])))  # and a stone below
    assert_same_hits(bodies, some_rays(sensor, pitch=0.05, roll=-0.04, speed=(9, 2, 0)))


def test_what_passes_closely_while_the_sensor_turns():
    """The nearest position lies between the first and the last one."""

    def oncoming(x, y):
        solids = [box((-0.3, -0.2, 1.2), (0.3, 0.2, 1.6)), limb((0, 0, 2.4), (0, 0.3, 1.9), 0.06)]
        return Body(solids, np.array([x, y, 0.0]), 0.4, np.array([-15.0, 0, 0]))

    bodies = [oncoming(x, y) for x in np.arange(-8.0, 9.0, 1.5) for y in (-0.9, 0.9)]
    assert_same_hits(bodies, some_rays(speed=(14, 0, 0)))


def test_around_the_back_of_the_turn():
    """A wall across the seam of the scan, which the sensor's turning closes twice or leaves open."""
    bodies = [Body([box((-0.1, -4, 0), (0.1, 4, 4))], np.array([-6.0, 0, 0]))]
    bodies.append(Body([box((5, -1, 0), (6, 1, 3))], np.zeros(3)))
    for yaw_rate in (-2.0, 0.0, 2.0):
        for yaw in (0.0, 3.1, -3.1):
            assert_same_hits(bodies, some_rays(yaw=yaw, yaw_rate=yaw_rate))


def test_groups_are_numbered_through_and_hide_each_other():
    rng = np.random.default_rng(5)
    bodies = random_bodies(rng, 20)
    rays = some_rays()
    hits = assert_same_hits(bodies, rays, [bodies[:7], [], bodies[7:]])
    for part, whole in zip(hits, cast([Solids(bodies)], None, rays)):
        np.testing.assert_array_equal(part, whole)


def test_cosine_by_hand():
    """A wall 5 m ahead, and a ball 5 m to the left."""
    bodies = [Body([box((5, -9, -9), (6, 9, 9))], np.zeros(3)), Body([ellipsoid((0, 7, 0), (2, 2, 2))], np.zeros(3))]
    sensor = SensorSettings(beams=((10.0, -10.0, 3),), columns=36, beam_wobble=0.0, vehicle=None)
    rays = some_rays(sensor, (0, 0, 0))
    hits = cast([Solids(bodies)], None, rays)
    ahead, left = 18, 27
    np.testing.assert_allclose(hits.range[:, ahead], 5 / np.cos(np.radians([10, 0, 10])), rtol=1e-6)
    np.testing.assert_allclose(hits.cosine[:, ahead], np.cos(np.radians([10, 0, 10])), rtol=1e-6)
    np.testing.assert_allclose((hits.range[1, left], hits.cosine[1, left]), (5, 1), rtol=1e-6)
    slant = np.radians(10)  # the ball's centre is 7 m away, its radius 2
    chord = 7 * np.cos(slant) - np.sqrt(4 - (7 * np.sin(slant)) ** 2)
    np.testing.assert_allclose(hits.range[0, left], chord, rtol=1e-5)
    np.testing.assert_allclose(hits.cosine[0, left], np.sqrt(4 - (7 * np.sin(slant)) ** 2) / 2, rtol=1e-5)


def test_from_inside_nothing_is_seen_of_a_solid():
    inside = [Body([box((-1, -1, 0), (1, 1, 3)), ellipsoid((0, 0, 1.7), (0.5, 0.5, 0.5))], np.zeros(3))]
    assert (cast([Solids(inside)], None, some_rays()).solid == MISS).all()


def test_no_solids_and_no_ground():
    hits = cast([Solids([])], None, some_rays())
    assert (hits.solid == MISS).all() and np.isinf(hits.range).all() and (hits.cosine == 0).all()


# --- porous solids


def fence(fill, **body):
    return Body([box((-0.04, -4, 0), (0.04, 4, 3), fill=fill)], np.array([5.0, 0, 0]), **body)


def crown(fill, **body):
    return Body([ellipsoid((0, 0, 2), (2, 2.2, 1.8), fill=fill)], np.array([7.0, 0, 0]), **body)


FINE = SensorSettings(beams=((14.0, -14.0, 60),), columns=720, beam_wobble=0.0, vehicle=None)


@pytest.mark.parametrize("fill", [0.2, 0.5, 0.9])
def test_share_of_a_fence_that_stops_rays(fill):
    rays = some_rays(FINE)
    solid, porous = (cast([Solids([fence(f)])], None, rays) for f in (1.0, fill))
    stopped = porous.solid == 0
    assert (solid.solid[stopped] == 0).all()
    np.testing.assert_array_equal(porous.range[stopped], solid.range[stopped])  # on its face
    share = stopped.sum() / (solid.solid == 0).sum()
    assert abs(share - fill) < 4 * np.sqrt(fill * (1 - fill) / (8 * 3 / LATH**2))  # of so many cells


def test_leaves_fill_a_crown_to_its_depth():
    rays = some_rays(FINE)
    opaque = cast([Solids([crown(1.0)])], None, rays)
    shares = []
    for fill in (0.05, 0.2, 0.5):
        hits = cast([Solids([crown(fill)])], None, rays)
        leaf = hits.solid == 0
        assert (opaque.solid[leaf] == 0).all() and (hits.range[leaf] >= opaque.range[leaf]).all()
        shares.append(leaf.sum() / (opaque.solid == 0).sum())
        deep = hits.range[leaf] - opaque.range[leaf]
        assert deep.max() < 4.4 and deep.mean() < 2 * LEAF / fill
    assert shares[0] < 0.7 and shares[0] < shares[1] < shares[2] and shares[2] > 0.85


@pytest.mark.parametrize("make", [fence, crown])
def test_cells_stay_where_they_are(make):
    """From another place, and carried along by a body that moves, the same cells stop the rays."""
    rays = some_rays(FINE)
    first = cast([Solids([make(0.4)])], None, rays)
    for part, again in zip(first, cast([Solids([make(0.4)])], None, rays)):
        np.testing.assert_array_equal(part, again)
    velocity = np.array([6.0, 3.0, 0])
    carried = cast([Solids([make(0.4, velocity=velocity)])], None, some_rays(FINE, speed=velocity))
    # float32 directions and the sum of two positions: a point on a cell's border may fall to either side
    assert (carried.solid != first.solid).mean() < 1e-3 and (first.solid == 0).any()
    other_place = some_rays(FINE, (0.0, 0.7, 1.9))
    cells = []
    for rays_ in (rays, other_place):
        hits = cast([Solids([fence(0.4)])], None, rays_)
        rows, columns = np.nonzero(hits.solid == 0)
        place = rays_.origin[columns] + rays_.direction[:, rows, columns].T * hits.range[rows, columns, None]
        cells.append({tuple(cell) for cell in np.floor((place - [5, 0, 0])[:, 1:] / LATH).astype(int)})
    assert len(cells[0] & cells[1]) > 0.95 * min(map(len, cells))


# --- the ground


def hilly(seed=0, curb=0.14):
    rng = np.random.default_rng(seed)
    toward = rng.uniform(0, 2 * np.pi, 3)
    rates = 2 * np.pi / np.array([180.0, 90.0, 35.0])
    hills = np.stack([[0.6, 0.25, 0.06], rates * np.cos(toward), rates * np.sin(toward), rng.uniform(0, 6, 3)], 1)
    roads = Road(False, 0.0, (3.0, 2 * np.pi / 150, 1.0), 5.0, 3.2), Road(True, 15.0, (0, 0, 0), 3.5, 2.8)
    return Ground(roads, 2.0, False, curb, hills)


def marched(ground, rays):
    """Where rays first lie under the ground, by steps of a centimetre: float64 [B, A], inf where they do not."""
    way = np.moveaxis(rays.direction.astype(np.float64), 0, 2)  # [B, A, 3]
    found = np.full(way.shape[:2], np.inf)
    for begin in np.arange(0, rays.max_range, 2.0):
        rows, columns = np.nonzero(np.isinf(found))
        t = begin + np.arange(0, 2.005, 0.01)
        x, y, z = ((rays.origin[columns, i, None] + t * way[rows, columns, i, None]) for i in range(3))
        near = (z < ground.smooth_height(x, y) + ground.curb).any(1)  # only there the curbs matter
        under = z[near] < ground.height(x[near], y[near])
        found[rows[near], columns[near]] = np.where(under.any(1), t[under.argmax(1)], np.inf)
    return found


@pytest.mark.parametrize(("seed", "tilt"), [(0, 0.0), (1, 0.03), (2, -0.03)])
def test_ground_against_marching(seed, tilt):
    """No ray goes through the ground or stops before it, nor through the face of a curb."""
    ground = hilly(seed)
    sensor = SensorSettings(beams=((1.0, -30.0, 24),), columns=72, max_range=60, beam_wobble=0.0, vehicle=None)
    height = float(ground.smooth_height(0.0, -1.5)) + 1.73
    rays = some_rays(sensor, (0, -1.5, height), 0.3, tilt, 0.5 * tilt, (8, 1, 0))
    hits = cast([Solids([])], ground, rays)
    expected = marched(ground, rays)
    hit = hits.solid == GROUND
    np.testing.assert_array_equal(hit, np.isfinite(expected))
    assert 0.6 < hit.mean() < 0.98
    assert (np.abs(hits.range[hit] - expected[hit]) < 0.02).all()  # two of its steps
    rows, columns = np.nonzero(hit)
    place = rays.origin[columns] + rays.direction[:, rows, columns].T * hits.range[hit][:, None]
    above = place[:, 2] - ground.height(place[:, 0], place[:, 1])
    level = np.abs(above) < 1e-3  # the rest are on the face of a curb, between both levels
    lift = place[:, 2] - ground.smooth_height(place[:, 0], place[:, 1])
    assert level.mean() > 0.95
    edge = ground.raised(place[:, 0], place[:, 1])
    assert (np.abs(edge[~level]) < 0.02).all() and (lift[~level] > 0).all() and (lift[~level] < ground.curb).all()
    level &= np.abs(edge) > 0.01
    np.testing.assert_allclose(hits.cosine[hit][level], -rays.direction[2, rows, columns][level], rtol=1e-5)


def test_the_face_of_a_curb_is_hit():
    """By hand: a flat road, its curb of 0.15 m at y = 5 m; a ray to the left meets it at half its height."""
    ground = Ground(
        (Road(False, 0.0, (0.0, 0.1, 0.0), 5.0, 3.0),), 2.0, True, 0.15, np.array([[0.0, 0.1, 0.1, 0.0]]), 0.0
    )
    down = np.degrees(np.arctan2(1.5 - 0.075, 5.0))
    sensor = SensorSettings(beams=((-down, -down - 9, 2),), columns=36, beam_wobble=0.0, vehicle=None)
    hits = cast([Solids([])], ground, some_rays(sensor, (0, 0, 1.5)))
    left = 27
    assert hits.solid[0, left] == GROUND
    assert abs(hits.range[0, left] - np.hypot(5.0, 1.425)) < 5e-3
    assert hits.cosine[0, left] > 0.5 > 0.35 > np.sin(np.radians(down))  # it stands upright
    assert abs(hits.range[1, left] - 1.5 / np.sin(np.radians(down + 9))) < 1e-3  # the road before it


def test_solids_on_the_ground_hide_it():
    wall = [Body([box((8, -3, -2), (8.2, 3, 3))], np.zeros(3))]
    ground, rays = hilly(), some_rays(position=(0, -1.5, 2.4))
    alone, both, only_wall = (
        cast(g, t, rays) for g, t in (([], ground), ([Solids(wall)], ground), ([Solids(wall)], None))
    )
    np.testing.assert_array_equal(both.range, np.minimum(alone.range, only_wall.range))
    assert {GROUND, 0, MISS} == set(np.unique(both.solid))
