"""Scans, labels and poses of a drive: reproducible, rigid, consistent from scan to scan."""

from dataclasses import replace

import numpy as np
import pytest

from kdmos.data.labels import to_classes
from kdmos.data.synthetic.lidar import SENSORS, SensorSettings
from kdmos.data.synthetic.sequence import SyntheticSequence

NAMES = ("unlabeled", "static", "movable", "moving")
TINY = SensorSettings(beams=((2.0, -24.0, 16),), columns=180)
EXACT = replace(
    TINY, range_noise=0, beam_bias=0, beam_wobble=0, resolution=0, dropout=0, mixed_pixels=0, ghosts=0
)  # materials still have their roughness


def a_drive(find, seeds=range(40), sensor=TINY, scans=8, **settings):
    """The first sequence of which `find(street)` says yes."""
    for seed in seeds:
        sequence = SyntheticSequence(seed, 0, scans, sensor, **settings)
        if find(sequence.street):
            return sequence
    raise AssertionError("no such street")


def way(street):
    return np.linalg.norm(street.ego_xy[-1] - street.ego_xy[0])


def turns(street):
    return np.ptp(street.ego_yaw) > 0.3


def same(one, other):
    return one.points.tobytes() == other.points.tobytes() and one.labels.tobytes() == other.labels.tobytes()


def test_same_seed_same_bytes_in_any_order():
    first, again, other, second = (SyntheticSequence(*key, 5, TINY) for key in ((3, 1), (3, 1), (4, 1), (3, 2)))
    scans = [first.scan(frame) for frame in range(5)]
    assert all(same(again.scan(frame), scans[frame]) for frame in (4, 0, 2, 2, 1, 3))
    assert not same(other.scan(0), scans[0]) and not same(second.scan(0), scans[0]) and not same(scans[0], scans[1])
    np.testing.assert_array_equal(first.poses(0.3), again.poses(0.3))


def test_points_and_labels():
    sequence = SyntheticSequence(0, 0, 4, SENSORS["small"])
    scan = sequence.scan(1)
    assert scan.points.dtype == np.float32 and scan.labels.dtype == np.uint32
    assert 11_000 < len(scan.points) < 16_384 and len(scan.labels) == len(scan.points)
    assert np.isfinite(scan.points).all() and (scan.points[:, 3] >= 0).all() and (scan.points[:, 3] <= 0.99).all()
    distance = np.linalg.norm(scan.points[:, :3], axis=1)
    assert distance.min() > 1 and distance.max() < 82
    ground = np.isin(scan.labels & 0xFFFF, (40, 44, 48, 49, 60, 72))
    assert -2.6 < np.median(scan.points[ground, 2]) < -1.2 and ground.mean() > 0.3


def test_raw_ids_are_known_and_artefacts_occur():
    found = set()
    for seed in range(4):
        labels = np.concatenate([SyntheticSequence(seed, 0, 4, TINY).scan(frame).labels for frame in (0, 3)])
        to_classes(labels, NAMES, "a scan")  # an unknown raw id is an error
        found |= set(np.unique(labels & 0xFFFF))
    sequence = SyntheticSequence(0, 0, 2, replace(TINY, ghosts=0.02))
    found |= set(np.unique(sequence.scan(0).labels & 0xFFFF))
    assert {0, 1} <= found and found & {252, 253, 254, 259}


def test_instances_are_unique_and_last():
    """An instance is one thing: it keeps its raw id, but for what stops or starts, and its place, if it stands."""
    sequence = a_drive(lambda street: len(street.movers) > 8 and way(street) > 5, sensor=SENSORS["small"])
    owners = [*sequence.street.things, *sequence.street.movers]
    assert len({one.instance for one in owners}) == len(owners)
    allowed = {thing.instance: {thing.label} for thing in sequence.street.things}
    allowed |= {mover.instance: {mover.standing, mover.moving} for mover in sequence.street.movers}
    for frame in (0, 3, 7):
        labels = sequence.scan(frame).labels
        raw, instance = labels & 0xFFFF, labels >> 16
        for number in np.unique(instance[instance > 0]):
            assert set(raw[instance == number].tolist()) <= allowed[number]
        assert set(np.unique(raw[instance == 0]).tolist()) <= {0, 1, 40, 44, 48, 49, 60, 72}


def test_uncompensated_equals_compensated_where_the_vehicle_stands():
    still = a_drive(lambda street: way(street) == 0, scans=3)
    still.street.sway[:] = 0
    raw = SyntheticSequence(*still.key, 3, TINY, compensate=False)
    raw.street.sway[:] = 0
    for frame in range(3):
        one, other = still.scan(frame), raw.scan(frame)
        np.testing.assert_allclose(one.points, other.points, atol=2e-4)  # float32 directions in the world
        np.testing.assert_array_equal(one.labels, other.labels)


def test_uncompensated_points_lag_behind_while_it_drives():
    moving = a_drive(lambda street: way(street) > 15, scans=3)
    raw = SyntheticSequence(*moving.key, 3, TINY, compensate=False)
    one, other = moving.scan(1), raw.scan(1)
    assert len(one.points) == len(other.points)
    shift = np.linalg.norm(one.points[:, :3] - other.points[:, :3], axis=1)
    azimuth = np.arctan2(other.points[:, 1], other.points[:, 0])
    assert shift[np.abs(azimuth) < 0.1].max() < 0.1 and shift[np.abs(azimuth) > 3].min() > 0.1


@pytest.mark.parametrize("find", [lambda s: way(s) > 15, turns], ids=["straight", "turning"])
def test_standing_surfaces_coincide_in_the_world(find):
    """Points on houses: the planes that all scans together see are as thin as those of one."""
    sequence = a_drive(find, sensor=replace(EXACT, beams=((2.0, -10.0, 16),), columns=360))
    poses = sequence.poses()
    clouds = []
    for frame in (0, 3, 7):
        scan = sequence.scan(frame)
        world = scan.points[:, :3].astype(np.float64) @ poses[frame, :3, :3].T + poses[frame, :3, 3]
        clouds.append((world, scan.labels))
    start = sequence.street.ego_poses(np.zeros(1), sequence.sensor.height)[0]
    checked = 0
    for thing in sequence.street.things:
        if thing.label not in (50, 52):
            continue
        cos, sin = np.cos(thing.body.yaw), np.sin(thing.body.yaw)
        for world, labels in clouds:
            place = world[labels >> 16 == thing.instance] @ start[:3, :3].T + start[:3, 3] - thing.body.position
            if not len(place):
                continue
            x, y = cos * place[:, 0] + sin * place[:, 1], cos * place[:, 1] - sin * place[:, 0]
            body = np.stack([x, y, place[:, 2]], 1)
            away = np.full(len(body), np.inf)
            for solid in thing.body.solids:
                away = np.minimum(away, np.abs((body @ solid.planes[:, :3].T - solid.planes[:, 3]).max(1)))
            assert away.max() < 0.1  # the roughness of wood is 1.5 cm
            checked += len(away)
    assert checked > 100


def test_poses_are_rigid_and_start_at_the_identity():
    sequence = a_drive(turns)
    for drift in (0.0, 2.0):
        poses = sequence.poses(drift)
        np.testing.assert_array_equal(poses[:, 3], np.tile([0, 0, 0, 1], (8, 1)))
        np.testing.assert_allclose(poses[0], np.eye(4), atol=1e-12)
        rotation = poses[:, :3, :3]
        np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.tile(np.eye(3), (8, 1, 1)), atol=1e-9)
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-9)
    ego = sequence.street.ego_xy[50:-50:5][:8]
    steps = np.linalg.norm(np.diff(ego, axis=0), axis=1)
    np.testing.assert_allclose(np.linalg.norm(np.diff(sequence.poses()[:, :3, 3], axis=0), axis=1), steps, atol=0.05)


def test_drift_grows_with_the_root_of_the_way_and_leaves_the_scans_alone():
    """1 is a standard deviation of 1 cm in each axis and 0.05 degrees of yaw after a metre."""
    sequence = a_drive(lambda street: way(street) > 8, scans=30)
    exact, before = sequence.poses(), sequence.scan(5)
    sequence.poses(3.0)
    assert same(sequence.scan(5), before)
    errors, keys = {1.0: [], 4.0: []}, range(60)
    for key in keys:
        sequence.key = (key, 99)  # other random numbers for the drift, the same street
        for drift, found in errors.items():
            relative = np.linalg.inv(exact[:-1]) @ exact[1:]
            drifted = sequence.poses(drift)
            errors_of_steps = np.linalg.inv(relative) @ (np.linalg.inv(drifted[:-1]) @ drifted[1:])
            found.append(
                [errors_of_steps[:, 1, 0].sum(), errors_of_steps[:, 2, 0].sum(), *errors_of_steps[:, :3, 3].sum(0)]
            )
    metres = np.linalg.norm(relative[:, :3, 3], axis=1).sum()
    for drift, found in errors.items():
        spread = np.std(found, axis=0) / drift / np.sqrt(metres)
        np.testing.assert_allclose(spread[0], np.radians(0.05), rtol=0.3)
        np.testing.assert_allclose(spread[1], np.radians(0.05) / 3, rtol=0.3)
        np.testing.assert_allclose(spread[2:], 0.01, rtol=0.3)
    np.testing.assert_array_equal(sequence.poses(0.0), exact)


def test_tracks_tell_where_movers_are():
    sequence = a_drive(lambda street: len(street.movers) > 8 and way(street) > 5, sensor=SENSORS["small"])
    poses, seen = sequence.poses(), 0
    for frame in (0, 5):
        scan = sequence.scan(frame)
        tracks = sequence.tracks(frame, scan.labels)
        assert [track.instance for track in tracks] == [mover.instance for mover in sequence.street.movers]
        for track in tracks:
            own = scan.labels >> 16 == track.instance
            assert track.points == own.sum() and set(scan.labels[own] & 0xFFFF) <= {track.label}
            if track.points > 10:
                world = scan.points[own, :3] @ poses[frame, :3, :3].T + poses[frame, :3, 3]
                reach = 7.0 if track.kind in ("bus", "truck") else 4.0
                assert np.linalg.norm(world[:, :2] - [track.x, track.y], axis=1).max() < reach
                assert world[:, 2].min() > track.z - 0.3
                seen += 1
    assert seen >= 3


# --- drawn street by street, and poses as an odometry gives them


def drawn(seed, **settings):
    return SyntheticSequence(seed, 0, 4, None, **settings)


def test_drawn_sequences_have_their_ground_where_students_look_for_it(monkeypatch):
    """Whatever the height of their sensor: points and poses are those of a frame above or below it."""
    heights = iter((0.8, 2.8))
    monkeypatch.setattr(
        "kdmos.data.synthetic.sequence.draw_sensor", lambda rng: replace(EXACT, height=next(heights), vehicle=None)
    )
    for compensate in (True, False):
        sequence = drawn(1, compensate=compensate)
        scan = sequence.scan(1)
        road = (np.isin(scan.labels & 0xFFFF, (40, 60))) & (np.hypot(*scan.points[:, :2].T) < 8)
        assert road.sum() > 20 and abs(np.median(scan.points[road, 2]) + 1.73) < 0.15
        lift = sequence.sensor.height - 1.73
        sensor = sequence.street.ego_poses(np.arange(4) * 0.1, sequence.sensor.height)
        sensor[:, :3, 3] -= lift * sensor[:, :3, 2]
        np.testing.assert_allclose(sequence.poses(), np.linalg.inv(sensor[0]) @ sensor, atol=1e-12)


def test_drawn_sequences_differ_and_come_again():
    found = [drawn(seed, compensate=None) for seed in range(12)]
    assert len({sequence.sensor for sequence in found}) == 12
    assert {sequence.compensate for sequence in found} == {True, False}
    errors = [sequence.errors for sequence in found]
    assert all(0 <= factor <= 1 for factor in errors) and len(set(errors)) == 12
    again = drawn(3, compensate=None)
    assert (again.sensor, again.compensate, again.errors) == (found[3].sensor, found[3].compensate, found[3].errors)
    np.testing.assert_array_equal(again.poses(1.0, 1.0), found[3].poses(1.0, 1.0))


def test_jitter_is_white_and_of_the_size_it_says():
    sequence = SyntheticSequence(2, 0, 400, TINY)
    exact, jittered = sequence.poses(), sequence.poses(jitter=2.0)
    off = np.linalg.inv(exact) @ jittered
    assert abs(off[:, :3, 3].std() - 0.02) < 2e-3 and abs(off[:, :3, 3].mean()) < 2e-3
    turned = np.stack([off[:, 2, 1], off[:, 0, 2], off[:, 1, 0]], 1)
    np.testing.assert_allclose(np.degrees(turned).std(0), 0.1, rtol=0.1)
    np.testing.assert_allclose(
        off[:, :3, :3] @ off[:, :3, :3].transpose(0, 2, 1), np.tile(np.eye(3), (400, 1, 1)), atol=1e-12
    )
    after_another = (off[1:, :3, 3] * off[:-1, :3, 3]).mean() / off[:, :3, 3].var()
    assert abs(after_another) < 0.1
    both = sequence.poses(1.0, 2.0)  # the drift is the same with and without jitter
    np.testing.assert_allclose(np.linalg.inv(sequence.poses(1.0)) @ both, off, atol=1e-9)
