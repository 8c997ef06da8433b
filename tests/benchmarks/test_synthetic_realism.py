"""The statistics of benchmarks/synthetic_realism.py on scans small enough to count by hand."""

import argparse

import numpy as np
import pytest

from benchmarks import rows, synthetic_realism
from benchmarks.synthetic_realism import (
    COLUMNS,
    DRIVES,
    HISTOGRAMS,
    RINGS,
    Against,
    Drive,
    beam_of,
    compare,
    draw,
    in_view,
    make_drive,
    read_calib,
    static_points,
    statistics,
    texture,
    total_variation,
)
from kdmos.data.synthetic.lidar import SensorSettings
from kdmos.errors import InputError

TINY = SensorSettings(beams=((2.0, -24.0, 12),), columns=90)


def ring(degrees, distance=10.0, z=0.0):
    angle = np.radians(np.asarray(degrees, np.float64))
    full = np.full(len(angle), 1.0)
    return np.stack([distance * np.cos(angle), distance * np.sin(angle), z * full, 0.3 * full], 1).astype(np.float32)


def test_total_variation_is_0_for_equal_and_1_for_disjoint_shares():
    assert total_variation(np.array([1, 3]), np.array([10, 30])) == 0
    assert total_variation(np.array([1, 0]), np.array([0, 7])) == 1
    assert total_variation(np.array([1, 1]), np.array([3, 1])) == pytest.approx(0.25)


@pytest.mark.parametrize("seam", [0, -180])
def test_a_beam_ends_where_the_azimuth_passes_the_seam(seam):
    first, second, third = [1, 90, 180, 270, 359], [2, 300, 357, 358], [1, 3, 200]
    points = ring(np.array(first + second + third) + seam)
    expected = [1] * len(first) + [2] * len(second) + [3] * len(third)  # the topmost of four saw the sky
    assert beam_of(points, np.radians(seam), beams=4).tolist() == expected


def test_noise_at_the_seam_ends_no_beam_twice():
    points = ring([1, 90, 180, 270, 359, 0.1, 359.9, 0.2, 90, 180, 359])
    assert beam_of(points, 0.0, beams=2).tolist() == [0] * 5 + [1] * 6


def test_the_camera_sees_ahead_within_its_image(tmp_path):
    path = tmp_path / "calib.txt"
    tr = "0 -1 0 0 0 0 -1 0 1 0 0 0"  # the camera looks along the LiDAR's x axis
    path.write_text(f"P2: 700 0 621 0 0 700 187 0 0 0 1 0\nTr: {tr}\n")
    points = np.array([[10, 0, 0, 0], [10, 8, 0, 0], [10, 9, 0, 0], [-10, 0, 0, 0], [10, 0, -3, 0]], np.float32)
    assert in_view(points, read_calib(path)).tolist() == [True, True, False, False, False]


def test_what_counts_as_static():
    labels = np.array([40, 0, 252, 1, 10, 0], np.uint32)
    assert static_points(labels, synthetic=False).tolist() == [True, False, False, False, True, False]
    assert static_points(labels, synthetic=True).tolist() == [True, False, False, False, True, True]


def test_counts_of_a_hand_made_drive():
    scan = np.concatenate([ring(np.arange(0, 360, 10.0), 10.5), ring(np.arange(0, 360, 20.0), 31.0, -1.5)])
    labels = np.full(len(scan), 40, np.uint32)
    labels[:9] = 252
    found = statistics(Drive([scan] * 16, [labels] * 16, np.tile(np.eye(4), (16, 1, 1)), 0.0), beams=2)
    assert found.points == 54
    assert found.counts["beam"].tolist() == [36 * 16, 18 * 16]
    assert {float(RINGS[i]): found.counts["range"][i] for i in found.counts["range"].nonzero()[0]} == {
        10.0: 36 * 16,
        30.0: 18 * 16,
    }
    assert found.counts["remission"][15] == 54 * 16  # 0.30 and 0.31
    assert np.allclose(found.moving, 9 / 54)
    # The 9 moving points and the one beside them, on the same ring, do not count as static.
    assert found.movers.tolist() == [9 * 2, 0]  # of the two scans that have all channels; the rule finds none
    assert found.scored.sum() == 44 * 16 and found.complete.sum() == 44 * 2
    assert found.changed.sum() == found.ruled.sum() == found.counts["magnitude"].sum() == 0


def test_what_appears_has_channels():
    wall = np.concatenate([ring(np.arange(0, 360, 0.5), 20.05, z) for z in (1.0, 0.0, -1.0)])
    behind = np.concatenate([ring(np.arange(0, 360, 0.5), 30.05, z) for z in (-1.0, -1.1)])
    found = statistics(Drive([behind] * 8 + [wall] * 8, None, np.tile(np.eye(4), (16, 1, 1)), 0.0), beams=3)
    assert found.changed.sum() > 0 and found.ruled.sum() > 0
    # The wall is 2 m high, found in the bin from 1.9 to 2.0 m or in the next.
    assert HISTOGRAMS["magnitude"][found.counts["magnitude"].argmax()] == pytest.approx(1.95, abs=0.06)


@pytest.fixture(scope="module")
def streets():
    against = Against("any", 8, compensate=True, movers=True, camera=False)
    return [statistics(make_drive(TINY, 0, number, against), beams=12) for number in range(2)]


def test_rows_and_figure(streets, tmp_path):
    table = compare(streets[0], streets, streets[1])
    assert all(set(row) <= set(COLUMNS) for row in table)
    assert {"points", "moving", *HISTOGRAMS} <= {row["statistic"] for row in table}
    by_range = next(row for row in table if row["statistic"] == "range")
    assert by_range["synthetic_p10"] < by_range["real"]  # a street resembles itself more than the other
    draw(tmp_path / "figure.png", streets, [streets, streets])
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_streets_without_movers():
    drive = make_drive(TINY, 0, 0, Against("any", 2, compensate=False, movers=False, camera=False))
    assert statistics(drive, beams=12).moving.max() == 0


def test_missing_real_drives_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_realism, "SHARED", tmp_path)
    with pytest.raises(InputError, match=r"kitti-raw-0005-a is not under .*KDMOS_SHARED"):
        synthetic_realism.real_folder(DRIVES[0].name)


def test_another_number_of_beams_is_refused(monkeypatch):
    monkeypatch.setattr(rows, "append", None)  # nothing may be written
    with pytest.raises(InputError, match="64 beams"):
        synthetic_realism.run(argparse.Namespace(sensor="small"))


def test_texture_of_a_made_up_ring():
    """A circle of 400 rays: 40 points dark in one piece, 4 alone; three rays missing one by one."""
    azimuth = np.arange(400) * 2 * np.pi / 400 - np.pi
    noise = np.random.default_rng(0).normal(0, 0.01, 400)
    distance = 10 + noise
    points = np.stack([distance * np.cos(azimuth), distance * np.sin(azimuth), 0 * noise, np.full(400, 0.3)], 1)
    points[50:90, 3] = points[[100, 150, 200, 250], 3] = 0
    like = texture(np.delete(points, [300, 320, 340], 0).astype(np.float32))
    assert like.zeros == 44 / 397 and like.missing == 3 / 396
    lit = 397 - 2 - 40 - 2 - 8 - 6  # between two with remission, a ray away: not in or beside the dark, nor at a gap
    assert abs(like.alone - 4 / (lit + 4)) < 0.002
    assert abs(like.noise - 0.01) < 0.002
    assert np.isnan(texture(points[:1].astype(np.float32)[:1].repeat(2, 0)).noise)
