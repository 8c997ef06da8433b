"""Who moves through a street, where, how fast and how labelled; over many seeds."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kdmos.data.labels import to_classes
from kdmos.data.synthetic import shapes
from kdmos.data.synthetic.scenes import SCENES, StreetSettings
from kdmos.data.synthetic.street import Street, make_street
from kdmos.data.synthetic.things import HEADROOM
from kdmos.data.synthetic.traffic import KINDS, MARGIN, MOVING_DISTANCE, STEP, Mover

NAMES = ("unlabeled", "static", "movable", "moving")
DURATION, SEEDS = 4.0, 24
SEEN = 90.0  # metres from the vehicle: farther than any sensor sees
EGO = (-2.2, -0.9, 2.2, 0.9)  # its footprint: x, y, x, y, metres


@pytest.fixture(scope="module")
def streets():
    return [make_street(np.random.default_rng(seed), DURATION) for seed in range(SEEDS)]


def footprint(solids):
    parts = [solid for solid in solids if solid.low[2] < HEADROOM]
    return (*np.min([part.low[:2] for part in parts], 0), *np.max([part.high[:2] for part in parts], 0))


def corners(footprint, xy, yaw):
    x0, y0, x1, y1 = footprint
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) @ np.array([[cos, sin], [-sin, cos]]) + xy


def overlap(one, other, slack):
    """Whether two rectangles [4, 2] share more than `slack` metres in every direction."""
    for axis in (one[1] - one[0], one[3] - one[0], other[1] - other[0], other[3] - other[0]):
        axis = axis / np.linalg.norm(axis)
        a, b = one @ axis, other @ axis
        if min(a.max(), b.max()) - max(a.min(), b.min()) <= slack:
            return False
    return True


def meetings(street):
    """(what, what) for all that overlaps at some time within sight: movers, the vehicle and what stands."""
    standing = [thing for thing in street.things if any(s.low[2] < HEADROOM for s in thing.body.solids)]
    walls = [corners(footprint(t.body.solids), t.body.position[:2], t.body.yaw) for t in standing]
    middle = np.array([wall.mean(0) for wall in walls])
    reach = np.array([np.linalg.norm(wall - wall.mean(0), axis=1).max() for wall in walls])
    movers = [(m.kind, footprint(m.solids(0.5)), m.xy, m.yaw) for m in street.movers]
    movers.append(("ego", EGO, street.ego_xy, street.ego_yaw))
    for step in range(round(MARGIN / STEP), round((MARGIN + DURATION) / STEP), 10):
        here = [(kind, corners(f, xy[step], yaw[step]), xy[step]) for kind, f, xy, yaw in movers]
        here = [one for one in here if np.linalg.norm(one[2] - street.ego_xy[step]) < SEEN]
        for i, (kind, shape, xy) in enumerate(here):
            for other_kind, other_shape, other_xy in here[:i]:
                if np.linalg.norm(xy - other_xy) < 12 and overlap(shape, other_shape, 0.0):
                    yield kind, other_kind
            for j in np.flatnonzero(np.linalg.norm(middle - xy, axis=1) < reach + 6):
                if overlap(shape, walls[j], 0.1):
                    yield kind, standing[j].label


def test_nobody_runs_into_anything(streets):
    """Not into each other, the vehicle, parked cars, nor through buildings, walls, poles and trees."""
    assert sum(len(street.movers) for street in streets) > 5 * SEEDS
    assert Counter(pair for street in streets for pair in meetings(street)) == {}


def test_speeds_are_those_of_their_kind():
    """But for acts, which set a pace of their own."""
    stopped, settings = 0, replace(StreetSettings(), acts=(), traffic=(0.6, 1.6))
    for street in (make_street(np.random.default_rng(seed), DURATION, settings) for seed in range(12)):
        for mover in street.movers:
            slowest, fastest = KINDS[mover.kind].speed
            speed = np.diff(mover.travelled) / STEP
            assert speed.min() > -1e-9 and slowest <= speed.max() + 1e-9 and speed.max() < fastest + 1e-9
            assert np.abs(np.diff(speed)).max() < 2.5 * STEP + 1e-6  # m/s^2
            along = np.linalg.norm(np.diff(mover.xy, axis=0), axis=1) / STEP
            # paths are lines of half a metre: a corner cuts a step short
            assert (along < fastest + 0.01).all() and np.median(np.abs(along - speed)) < 0.05
            stopped += speed.min() < 0.01 and speed.max() > slowest
    assert stopped > 5


def test_all_kinds_of_paths_occur(streets):
    found = Counter()
    for street in streets:
        for m in street.movers:
            ego = street.ego_yaw[np.linalg.norm(m.xy - street.ego_xy, axis=1).argmin()]
            turned = np.unwrap(m.yaw) - ego
            across = np.cos(turned)
            found[m.kind] += 1
            found["turning"] += np.ptp(turned) > 1.0
            if m.kind in ("car", "van") and np.ptp(turned) < 0.5:
                found["same lane"] += across.min() > 0.9
                found["oncoming"] += across.max() < -0.9
                found["crossing car"] += np.abs(across).max() < 0.5
            found["crossing person"] += m.kind == "person" and np.abs(across).min() < 0.2
    for kind in (*KINDS, "turning", "same lane", "oncoming", "crossing person"):
        assert found[kind] > 0, (kind, found)
    assert found["oncoming"] > 10 and found["same lane"] > 10


def test_the_vehicle_drives_straight_turns_and_stands(streets):
    way = np.array([np.linalg.norm(np.diff(s.ego_xy, axis=0), axis=1).sum() for s in streets])
    turned = np.array([np.ptp(s.ego_yaw) for s in streets])
    assert (way < 0.01).sum() >= 3 and (turned > 1.0).sum() >= 2 and ((way > 20) & (turned < 0.5)).sum() >= 8
    stops = [np.linalg.norm(np.diff(s.ego_xy, axis=0), axis=1).min() < 1e-6 for s in streets]
    assert ((way > 3) & stops).any()


def test_long_drives_meet_traffic_all_the_way():
    street = make_street(np.random.default_rng(2), 40.0, replace(StreetSettings(), traffic=(1.0, 1.6)))
    fast = [m for m in street.movers if m.kind == "car" and m.travelled[-1] / 42 > 5]
    assert len(fast) >= 6
    met = [np.linalg.norm(m.xy - street.ego_xy, axis=1).argmin() * STEP for m in street.movers]
    assert np.histogram(met, 4, (0, 42))[0].min() > 0


def a_mover(speeds):
    travelled = np.concatenate([[0], np.cumsum(speeds[1:] + speeds[:-1]) / 2 * STEP])
    xy = np.stack([travelled, np.zeros_like(travelled)], 1)
    return Mover("car", lambda _: [], 10, 252, np.inf, 1.0, (0.0,), xy, np.zeros(len(xy)), travelled)


def test_moving_is_what_moves_within_half_a_second():
    """A car brakes from 5 m/s, stands for 2 s and drives off: its label follows its way around the scan."""
    time = np.arange(round(8 / STEP) + 1) * STEP - MARGIN
    mover = a_mover(np.interp(time, [1, 2, 4, 5], [5.0, 0, 0, 5]))
    flat = SimpleNamespace(height=lambda x, y: 0 * x)
    street = Street(flat, [], [mover], np.zeros((len(time), 2)), np.zeros(len(time)))
    for now in np.arange(0, 6, 0.1):
        bodies, labels, speeds = street.moving_bodies(now)
        way = np.interp([now - 0.5, now + 0.5], time, mover.travelled)
        if abs(np.ptp(way) - MOVING_DISTANCE) > 0.02:
            assert labels == [252 if np.ptp(way) > MOVING_DISTANCE else 10]
        np.testing.assert_allclose(bodies[0].position, [np.interp(now, time, mover.travelled), 0, 0], atol=1e-9)
        # taken over the tenth of a second of the scan
        assert abs(speeds[0] - np.interp(now, [1, 2, 4, 5], [5, 0, 0, 5])) < 0.25
    assert street.moving_bodies(3.0)[1] == [10] and street.moving_bodies(1.9)[1] == [252]


@pytest.mark.parametrize("make", [shapes.person, shapes.cyclist])
def test_limbs_move_with_the_phase(make):
    at = make(np.random.default_rng(0))

    def middles(phase):
        return np.array([np.add(solid.low, solid.high) / 2 for solid in at(phase)])

    still, step, other = middles(0.0), middles(np.pi / 2), middles(3 * np.pi / 2)
    moved = np.linalg.norm(step - still, axis=1)
    assert (moved > 0.05).sum() >= 2 and (moved == 0).sum() >= 2  # legs and arms, not the trunk
    np.testing.assert_allclose(middles(2 * np.pi), still, atol=1e-9)
    legs = np.flatnonzero(moved > 0.05)
    assert np.abs(step - other)[legs].max() > 0.1  # left and right in turn


def test_gait_follows_the_way(streets):
    walking = next(m for s in streets for m in s.movers if m.kind == "person" and np.diff(m.travelled).min() > 0)
    assert 2 < 2 * np.pi * walking.stride / 0.7 < 3  # a cycle is two steps of about 0.7 m


def test_what_stands_where(streets):
    raw = Counter(thing.label for street in streets for thing in street.things)
    assert {10, 18, 20, 30, 11, 15, 50, 51, 52, 70, 71, 80, 81, 99} == set(raw)
    for street in streets:
        numbers = [one.instance for one in (*street.things, *street.movers)]
        assert numbers == list(range(1, len(numbers) + 1))
        to_classes(np.array([thing.label for thing in street.things], np.uint32), NAMES, "things")
        ground = street.ground
        for thing in street.things:
            x, y, z = thing.body.position
            assert z == ground.height(np.array([x]), np.array([y]))[0]
            if thing.label in (50, 52, 51, 80, 71):
                assert ground.raised(x, y) > 0  # not on a road
        assert 0 <= ground.curb <= 0.16 and ground.max_slope < 0.1


def test_surface_of_the_ground(streets):
    found = set()
    for street in streets[:20]:
        x, y = np.meshgrid(np.arange(-40, 40, 0.35), np.arange(-20, 20, 0.05))
        label, material, shade = street.ground.surface(x.ravel(), y.ravel())
        assert label.shape == material.shape == shade.shape and 0.2 < shade.min() <= shade.max() < 4
        found |= set(np.unique(label))
        raised = street.ground.raised(x.ravel(), y.ravel()) > 0
        np.testing.assert_array_equal(raised, np.isin(label, (48, 49, 72)))
    assert found == {40, 44, 48, 49, 60, 72}


# --- scenes


def some(scene, count=4):
    return [make_street(np.random.default_rng([7, seed]), DURATION, SCENES[scene]) for seed in range(count)]


def ahead_and_aside(street, xy, step):
    """Of places [n, 2] in the vehicle's frame at a step."""
    yaw = street.ego_yaw[step]
    away = np.asarray(xy) - street.ego_xy[step]
    return away @ [np.cos(yaw), np.sin(yaw)], away @ [-np.sin(yaw), np.cos(yaw)]


def speeds_of(mover):
    return np.diff(mover.travelled) / STEP


def of_traffic(street):
    """Its movers, more than one circle's size of them: no persons."""
    return [mover for mover in street.movers if mover.kind != "person"]


def test_no_scene_lets_anybody_run_into_anything():
    for scene in SCENES:
        assert Counter(pair for street in some(scene, 1) for pair in meetings(street)) == {}, scene


def test_parked_vehicles_are_passed_closely():
    nearest = []
    for street in some("parked"):
        xy = [thing.body.position[:2] for thing in street.things if thing.label in (10, 18, 20)]
        ahead, aside = np.stack([ahead_and_aside(street, xy, step) for step in range(0, len(street.ego_xy), 10)], 1)
        nearest.append(-aside[(np.abs(ahead) < 3) & (aside < -1)].max(initial=-99))
        assert 1.7 < np.linalg.norm(np.diff(street.ego_xy, axis=0), axis=1).max() / STEP < 16
    assert 2 < np.median(nearest) < 4.5


def test_queues_stand_start_and_arrive():
    found = Counter()
    for street in some("queue", 24):
        ends = [(speeds_of(m)[0], speeds_of(m)[-1]) for m in of_traffic(street)]
        found["stands"] += sum(first == last == 0 for first, last in ends) > 1
        found["starts"] += sum(first == 0 < last for first, last in ends) > 1
        found["arrives"] += sum(first > 0 == last for first, last in ends) > 1
    assert min(found[how] for how in ("stands", "starts", "arrives")) > 0, found


def test_the_vehicle_stands():
    assert all(np.ptp(street.ego_xy, axis=0).max() == 0 for street in some("ego_stands"))


def test_slow_movers_are_slow():
    speeds = [speeds_of(mover).max() for street in some("slow") for mover in street.movers]
    assert len(speeds) > 10 and min(speeds) >= 0.3 and max(speeds) <= 1.0


def test_some_stop_and_go():
    stopped = [speeds_of(m).min() == 0 < speeds_of(m).max() for street in some("stop_and_go") for m in street.movers]
    assert len(stopped) > 10 and np.mean(stopped) > 0.3


def test_overtaking():
    """Somebody comes from behind and is ahead at the end, or the other way round."""
    changes = []
    for street in some("overtaking"):
        for mover in of_traffic(street):
            first, _ = ahead_and_aside(street, mover.xy[:1], 0)
            last, _ = ahead_and_aside(street, mover.xy[-1:], -1)
            same_way = abs(np.angle(np.exp(1j * (mover.yaw[60] - street.ego_yaw[60])))) < 0.3
            changes.append(same_way and first[0] * last[0] < 0)
    assert sum(changes) >= 3


def test_a_truck_comes_close():
    nearest = [
        min(np.linalg.norm(m.xy - street.ego_xy, axis=1).min() for m in street.movers if m.kind in ("truck", "bus"))
        for street in some("truck_close")
        if any(m.kind in ("truck", "bus") for m in street.movers)
    ]
    assert len(nearest) >= 3 and np.median(nearest) < 5


def test_persons_cross_from_behind_parked_cars():
    across = 0
    for street in some("crossing", 6):
        for mover in street.movers:
            along = np.abs(np.cos(mover.yaw[60] - street.ego_yaw[60]))
            ahead, _ = ahead_and_aside(street, mover.xy, 60)
            across += mover.kind == "person" and along < 0.3 and bool((np.abs(ahead) < 40).any())
    assert across >= 4


def test_nothing_moves():
    assert not any(street.movers for street in some("nothing"))


def test_same_generator_same_street(streets):
    again = make_street(np.random.default_rng(3), DURATION)
    np.testing.assert_array_equal(again.ego_xy, streets[3].ego_xy)
    assert [m.kind for m in again.movers] == [m.kind for m in streets[3].movers]
    assert [t.label for t in again.things] == [t.label for t in streets[3].things]
