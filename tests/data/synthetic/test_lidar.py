"""What the sensor makes of what its rays meet: losses, noise, edges, remission; and sensors from YAML."""

from dataclasses import replace

import numpy as np
import pytest

from kdmos.data.synthetic.lidar import (
    FAINT,
    GHOST,
    MIXED,
    SENSORS,
    Lidar,
    SensorSettings,
    Surface,
    draw_sensor,
    load_sensor,
)
from kdmos.data.synthetic.raycast import Hits
from kdmos.errors import InputError

SILENT = SensorSettings(
    beams=((2.0, -20.0, 40),), columns=1000, vehicle=None, range_noise=0, beam_bias=0, beam_wobble=0, resolution=0,
    dropout=0, reach=1e6, beam_gain=0, dark=0, faintest=0, mixed_pixels=0, ghosts=0,
)  # fmt: skip
SHAPE = (40, 1000)


def measure(settings, distance=20.0, cosine=1.0, remission=0.3, roughness=0.0, lost=0.0, gloss=0.0, solid=0, seed=0):
    """A turn that meets the same surface everywhere, or arrays of [B, A]."""
    lidar = Lidar(settings, np.random.default_rng(1))

    def full(value):
        return np.broadcast_to(np.asarray(value, np.float32), SHAPE).copy()

    hits = Hits(full(distance), np.broadcast_to(np.int32(solid), SHAPE).copy(), full(cosine))
    surface = Surface(*map(full, (remission, roughness, lost, gloss)))
    return lidar.measure(hits, surface, np.random.default_rng(seed))


def share(mask):
    return np.count_nonzero(mask) / mask.size


def test_without_noise_ranges_are_exact():
    distance = np.random.default_rng(0).uniform(2, 79, SHAPE).astype(np.float32)
    measured = measure(SILENT, distance)
    np.testing.assert_array_equal(measured.range, distance)
    assert not measured.artefact.any() and measured.range.dtype == np.float32


def test_what_is_missed_too_near_or_too_far_does_not_come_back():
    distance = np.full(SHAPE, 20.0)
    distance[0], distance[1], distance[2] = np.inf, SILENT.min_range - 0.1, SILENT.max_range + 0.1
    returned = measure(SILENT, distance).range > 0
    assert not returned[:3].any() and returned[3:].all()


def test_noise_bias_and_resolution():
    noise = measure(replace(SILENT, range_noise=0.03)).range - 20
    assert abs(noise.std() - 0.03) < 1e-3 and abs(noise.mean()) < 1e-3
    noise = measure(replace(SILENT, range_noise=0.03), roughness=0.04).range - 20
    assert abs(noise.std() - 0.05) < 1e-3
    biased = measure(replace(SILENT, beam_bias=0.1)).range - 20
    assert (np.ptp(biased, axis=1) < 1e-5).all() and 0.07 < biased.std() < 0.13
    stepped = measure(replace(SILENT, range_noise=0.1, resolution=0.25)).range
    assert set(np.unique(stepped)) <= {19.5, 19.75, 20.0, 20.25, 20.5}


def test_dropouts_and_losses():
    assert abs(1 - share(measure(replace(SILENT, dropout=0.2)).range) - 0.2) < 0.01
    assert abs(1 - share(measure(SILENT, lost=0.35).range) - 0.35) < 0.01


def test_returns_fall_off_with_range_incidence_and_remission():
    settings = replace(SILENT, reach=40.0, max_range=1000.0)
    assert abs(share(measure(settings, 40, remission=0.1).range) - 0.5) < 0.01  # what `reach` says
    assert abs(share(measure(settings, 80, remission=0.4).range) - 0.5) < 0.01  # four times as bright, twice as far
    assert abs(share(measure(settings, 40, 0.25, remission=0.4).range) - 0.5) < 0.01  # or as much aslant
    shares = [share(measure(settings, distance, remission=0.1).range) for distance in (10, 30, 50, 100)]
    assert shares[0] > 0.99 and shares == sorted(shares, reverse=True) and shares[-1] < 0.001
    assert share(measure(settings, remission=0.0).range) == 0


def test_mixed_pixels_lie_between_both_sides_of_an_edge():
    distance = np.where(np.arange(1000) // 10 % 2, 12.0, 10.0) * np.ones(SHAPE)
    measured = measure(replace(SILENT, mixed_pixels=0.4), distance)
    at_edge = np.broadcast_to(np.arange(1000) % 10 == 0, SHAPE)
    mixed = measured.artefact == MIXED
    assert abs(share(mixed[at_edge]) - 0.4) < 0.03 and not mixed[~at_edge].any()
    assert (measured.range[mixed] >= 10).all() and (measured.range[mixed] <= 12).all()
    np.testing.assert_array_equal(measured.range[~mixed], distance[~mixed].astype(np.float32))
    far_apart = np.where(distance > 11, 30.0, distance)  # too far for one pulse to see both
    assert not measure(replace(SILENT, mixed_pixels=1.0), far_apart).artefact.any()


def test_ghosts():
    measured = measure(replace(SILENT, ghosts=0.1))
    ghost = measured.artefact == GHOST
    assert abs(share(ghost) - 0.1) < 0.01
    assert (measured.range[ghost] < 20).all() and (measured.range[ghost] > 5.9).all()


def test_remission_falls_with_incidence_only():
    near, far, aslant = (measure(SILENT, *at, remission=0.6).remission for at in ((5,), (60,), (5, 0.2)))
    assert abs(near.mean() - 0.6) < 0.01 and abs(far.mean() - 0.6) < 0.01
    assert abs(aslant.mean() - 0.6 * (0.55 + 0.45 * 0.2)) < 0.01
    glaring = measure(SILENT, remission=1.3).remission
    assert glaring.max() <= np.float32(0.99) and glaring.min() >= 0
    np.testing.assert_allclose(near, np.round(near * 100) / 100, atol=1e-6)


def test_a_glossy_surface_answers_squarely():
    square, aslant = (measure(SILENT, 5, cosine, 0.4, gloss=0.5).remission.mean() for cosine in (1.0, 0.5))
    assert abs(square - 0.4 * (0.5 + 0.5 * 2)) < 0.01 and abs(aslant - 0.4 * (0.5 * 0.775 + 0.5 * 2 / 64)) < 0.01


def test_remission_is_lost_where_the_echo_is_faint():
    faint = replace(SILENT, reach=20.0)  # an echo of 10 at 20 m
    at_border = 20 * np.sqrt(10 / FAINT)
    distances = (0.5 * at_border, at_border, 1.2 * at_border)
    zeros = [share((seen := measure(faint, at, remission=1.0)).remission[seen.range > 0] == 0) for at in distances]
    np.testing.assert_allclose(zeros, [0, 0.5, 1 - 1 / (1 + 1.2**16)], atol=0.02)


def test_dark_solids_have_no_remission():
    """Of all their points, in every scan; the ground is never dark."""
    solid = np.repeat(np.arange(-2, 998), 40).reshape(SHAPE)
    seen = [measure(replace(SILENT, dark=0.1), 5, solid=solid, seed=seed).remission == 0 for seed in (1, 2)]
    np.testing.assert_array_equal(*seen)
    dark = np.bincount(solid.ravel() + 2, seen[0].ravel()) / 40
    assert set(dark) == {0, 1} and not dark[:2].any() and abs(dark.mean() - 0.1) < 0.03


def test_gain_gamma_and_sensors_without_remission():
    assert abs(measure(replace(SILENT, remission_gain=0.5), remission=0.6).remission.mean() - 0.3) < 0.01
    assert abs(measure(replace(SILENT, remission_gamma=2.0), remission=0.6).remission.mean() - 0.36) < 0.02
    assert not measure(replace(SILENT, has_remission=False)).remission.any()
    assert not measure(replace(SILENT, faintest=0.3), remission=0.15).remission.any()


def test_field_of_view():
    seen = measure(replace(SILENT, field_of_view=(-60.0, 30.0))).range.any(0)
    degrees = (np.arange(1000) / 1000 - 0.5) * 360
    np.testing.assert_array_equal(seen, (degrees >= -60) & (degrees <= 30))
    with pytest.raises(ValueError, match="field_of_view: expected -180 <= from < to <= 180"):
        replace(SILENT, field_of_view=(30.0, -60.0))


def test_drawn_sensors_differ_and_are_sensors():
    drawn = [draw_sensor(np.random.default_rng(seed)) for seed in range(200)]
    assert len(set(drawn)) == 200 and drawn[3] == draw_sensor(np.random.default_rng(3))
    beams = [len(sensor.elevations_of_blocks()) for sensor in drawn]
    assert set(beams) == {32, 40, 64, 128} and 0.03 < np.mean([not sensor.has_remission for sensor in drawn]) < 0.2
    heights = np.array([sensor.height for sensor in drawn])
    assert heights.min() < 1.2 and heights.max() > 2.4 and 1.6 < np.median(heights) < 2.1
    assert max(beam * sensor.columns for beam, sensor in zip(beams, drawn)) < 150_000


def test_the_vehicle_hides_what_is_behind():
    """Rays into the roof, by hand: its front edge, 1.6 m ahead and 0.6 m below, hides what is steeper."""
    settings = replace(SILENT, beams=((-15.0, -25.0, 40),), vehicle=SensorSettings().vehicle)
    lidar = Lidar(settings, np.random.default_rng(0))
    ahead, limit = settings.columns // 2, -np.arctan2(0.6, 1.6)
    np.testing.assert_array_equal(lidar.hidden[:, ahead], lidar.elevation < limit)
    returned = lidar.measure(
        Hits(np.full(SHAPE, 9.0, np.float32), np.zeros(SHAPE, int), np.ones(SHAPE, np.float32)),
        Surface(*np.full((4, *SHAPE), [[[0.5]], [[0]], [[0]], [[0]]], np.float32)),
        np.random.default_rng(0),
    )
    np.testing.assert_array_equal(returned.range > 0, ~lidar.hidden)
    assert not Lidar(SILENT, np.random.default_rng(0)).hidden.any()


def test_when_and_where_beams_look():
    lidar = Lidar(SENSORS["hdl64"], np.random.default_rng(0))
    assert lidar.direction.shape == (3, 64, 2150)
    assert (np.diff(lidar.elevation) < 0).all() and (np.diff(lidar.azimuth) > 0).all()
    np.testing.assert_allclose(np.linalg.norm(lidar.direction, axis=0), 1, atol=1e-6)
    ahead = 2150 // 2
    assert lidar.time[ahead] == 0 and lidar.direction[1, :, ahead].max() == 0
    assert abs(np.ptp(lidar.time) - 0.1) < 1e-4
    table = np.radians(SENSORS["hdl64"].elevations_of_blocks())
    assert 0 < np.abs(lidar.elevation - table).max() < np.radians(0.3)


# --- sensors from YAML


def test_sensor_from_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("beams: [[15, -15, 16]]\ncolumns: 900\nrate: 20\nvehicle: null\n")
    assert load_sensor(path) == SensorSettings(beams=((15.0, -15.0, 16),), columns=900, rate=20.0, vehicle=None)
    path.write_text("")
    assert load_sensor(str(path)) == SensorSettings() == load_sensor("hdl64")
    assert load_sensor("small") is SENSORS["small"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("colums: 900", "colums"),
        ("columns: many", "columns"),
        ("columns: 12.5", "columns"),
        ("columns: 12", "36 columns"),
        ("beams: [[15, -15]]", "beams"),
        ("beams: [[-15, 15, 16]]", "from the top down"),
        ("beams: []", "beams"),
        ("beams: [[120, -15, 16]]", "-90..90"),
        ("dropout: 1.5", "0..1"),
        ("range_noise: -0.1", "range_noise"),
        ("max_range: .inf", "max_range"),
        ("reach: .nan", "reach"),
        ("rate: 0", "turn a second"),
        ("min_range: 90", "min_range < max_range"),
        ("vehicle: [[1, 1, 1], [0, 2, 2]]", "vehicle"),
        ("- 1\n- 2", "the file"),
        ("beams: [", "not YAML"),
        ("just words", "the file"),
    ],
)
def test_a_wrong_sensor_is_one_clear_error(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        load_sensor(path)
    assert str(path) in str(raised.value) and says in str(raised.value)


def test_files_that_are_no_sensor(tmp_path):
    with pytest.raises(InputError, match=r"hdl65: no such file, and the sensors by name are hdl64, small"):
        load_sensor("hdl65")
    (tmp_path / "scan.bin").write_bytes(np.arange(100, dtype=np.float32).tobytes() + b"\xff\xfe\x80")
    with pytest.raises(InputError, match="not YAML"):
        load_sensor(tmp_path / "scan.bin")
