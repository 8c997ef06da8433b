"""Augmentation: a function of (seed, epoch, scan), distributed as the authors draw, applied as they apply it."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from kdmos import ops
from kdmos.data.augment import (
    MOST_FALSE,
    NO_REMISSION,
    FalseMotion,
    RemissionChange,
    Sector,
    add_false_motion,
    apply_transforms,
    change_remission,
    draw_false_motion,
    draw_remission,
    draw_sector,
    draw_transform,
    mix_sectors,
)
from kdmos.data.batch import PackedBatch, ScanId, pack
from kdmos.settings import PolarGrid, ResidualGrid

SCAN = ScanId("08", 123)
DRAWS = 4000


def draws(**settings) -> np.ndarray:
    """float64 [DRAWS, 3, 4], one for each of as many scans."""
    return np.stack([draw_transform(0, 0, ScanId("00", frame), **settings) for frame in range(DRAWS)])


# ---- what the draw is a function of


def test_the_same_for_the_same_seed_epoch_and_scan():
    first = draw_transform(3, 5, SCAN)
    assert first.shape == (3, 4) and first.dtype == np.float64
    np.random.seed(1)
    torch.manual_seed(1)
    np.testing.assert_array_equal(draw_transform(3, 5, ScanId("08", 123)), first)
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    draw_transform(3, 5, SCAN)  # leaves the global generators as they were
    assert np.array_equal(np.random.get_state()[1], state[0]) and torch.equal(torch.get_rng_state(), state[1])


def test_the_same_in_another_process():
    """Python's own hash of a string is not."""
    script = "from kdmos.data.augment import *; print(draw_transform(3, 5, ScanId('08', 123)).tobytes().hex())"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == draw_transform(3, 5, SCAN).tobytes().hex(), done.stderr


def test_another_for_every_other_seed_epoch_and_scan():
    scans = [ScanId(sequence, frame) for sequence in ("00", "01", "10", "08") for frame in (0, 1, 8, 10)]
    found = {draw_transform(s, e, scan).tobytes() for s in range(3) for e in range(4) for scan in scans}
    assert len(found) == 3 * 4 * len(scans)


def test_switching_one_kind_off_leaves_the_others():
    for frame in range(20):
        scan = ScanId("00", frame)
        whole = draw_transform(0, 1, scan)
        flip = draw_transform(0, 1, scan, rotate=False)
        rotation = draw_transform(0, 1, scan, flip=False)
        still = draw_transform(0, 1, scan, translation=0)
        np.testing.assert_array_equal(flip[:, :3], np.diag(np.diag(flip)))
        np.testing.assert_array_equal(whole[:, :3], flip[:, :3] @ rotation[:, :3])  # rotated, then mirrored
        np.testing.assert_array_equal(still, np.c_[whole[:, :3], np.zeros(3)])
        for other in (flip, rotation):
            np.testing.assert_array_equal(other[:, 3], whole[:, 3])
        np.testing.assert_allclose(draw_transform(0, 1, scan, translation=0.3)[:, 3], 3 * whole[:, 3], rtol=1e-15)


def test_all_off_is_the_identity():
    off = draw_transform(0, 0, SCAN, rotate=False, flip=False, translation=0)
    np.testing.assert_array_equal(off, np.eye(3, 4))


# ---- how it is distributed


def test_it_is_rigid_or_mirrored_and_upright():
    for matrix in draws()[:200, :, :3]:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        np.testing.assert_array_equal(matrix[2], [0, 0, 1])
        np.testing.assert_array_equal(matrix[:2, 2], 0)


def test_yaw_is_uniform_over_the_full_turn():
    matrix = draws(flip=False)
    yaw = np.sort(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]) / (2 * math.pi) % 1)
    step = np.arange(1, DRAWS + 1) / DRAWS
    assert np.abs(yaw - step).max() < 1.63 / math.sqrt(DRAWS)  # Kolmogorov-Smirnov, 1 %


def test_each_of_four_flips_occurs_equally_often_whatever_the_yaw():
    flips, yaws = draws(rotate=False), draws(flip=False)
    flip = (flips[:, 0, 0] < 0) + 2 * (flips[:, 1, 1] < 0)
    count = np.bincount(flip, minlength=4)
    assert len(count) == 4
    sigma = math.sqrt(DRAWS * 3 / 16)
    assert (np.abs(count - DRAWS / 4) < 4 * sigma).all()
    for kind in range(4):
        mean = yaws[flip == kind, :2, 0].mean(0)  # cosine and sine
        assert (np.abs(mean) < 4 * math.sqrt(0.5 / count[kind])).all()


def test_translation_is_normal_with_the_given_deviation():
    shift = draws(translation=0.1)[:, :, 3]
    assert (np.abs(shift.mean(0)) < 4 * 0.1 / math.sqrt(DRAWS)).all()
    np.testing.assert_allclose(shift.std(0), 0.1, rtol=4 / math.sqrt(2 * DRAWS))
    kurtosis = ((shift / 0.1) ** 4).mean(0)
    np.testing.assert_allclose(kurtosis, 3, atol=4 * math.sqrt(96 / DRAWS))  # 3: normal; 1.8: uniform
    correlation = np.corrcoef(shift.T) - np.eye(3)
    assert np.abs(correlation).max() < 4 / math.sqrt(DRAWS)


# ---- how it is applied


@pytest.fixture
def scans():
    """Three scans of different length, one of them empty; up to 50 m."""
    rng = np.random.default_rng(0)
    parts = [np.c_[rng.uniform(-50, 50, (n, 2)), rng.uniform(-4, 2, n), rng.random(n)] for n in (40, 0, 25)]
    return [torch.from_numpy(part.astype(np.float32)) for part in parts]


def distances(scan: torch.Tensor) -> torch.Tensor:
    return torch.cdist(scan[:, :3].double(), scan[:, :3].double())


def test_each_scan_moves_by_its_own_transform(scans):
    points, offsets = pack(scans)
    transforms = np.stack([draw_transform(0, 0, ScanId("00", frame)) for frame in range(3)])
    before = points.clone()
    moved = apply_transforms(points, offsets, transforms)
    assert moved.dtype == torch.float32 and moved.shape == points.shape
    assert torch.equal(points, before)  # a new tensor
    assert torch.equal(moved[:, 3], points[:, 3])  # the remission is kept
    for part, scan, transform in zip(moved.split([40, 0, 25]), scans, torch.from_numpy(transforms)):
        expected = scan[:, :3].double() @ transform[:, :3].T + transform[:, 3]
        torch.testing.assert_close(part[:, :3], expected.float())
        # Coordinates up to 75 m are rounded to 4e-6 m, so distances are good to a few of these.
        torch.testing.assert_close(distances(part), distances(scan), rtol=0, atol=2e-5)


def test_by_hand():
    points = torch.tensor([[1.0, 2.0, 3.0, 0.5], [1.0, 0.0, -1.0, 0.25]])
    quarter_then_x_mirrored = np.array([[0.0, 1, 0, 10], [1, 0, 0, 20], [0, 0, 1, 30]])
    shift = np.c_[np.eye(3), [0, 0, 0.5]]
    moved = apply_transforms(points, torch.tensor([0, 1, 2]), np.stack([quarter_then_x_mirrored, shift]))
    assert moved.tolist() == [[12, 21, 33, 0.5], [1, 0, -0.5, 0.25]]


def test_the_identity_changes_no_bit(scans):
    points, offsets = pack(scans)
    assert torch.equal(apply_transforms(points, offsets, np.tile(np.eye(3, 4), (3, 1, 1))), points)


def test_strided_points_and_no_point(scans):
    points, offsets = pack(scans)
    transforms = np.stack([draw_transform(0, 0, ScanId("00", frame)) for frame in range(3)])
    strided = points.repeat_interleave(2, dim=0)[::2]
    assert not strided.is_contiguous()
    assert torch.equal(apply_transforms(strided, offsets, transforms), apply_transforms(points, offsets, transforms))
    assert apply_transforms(torch.zeros(0, 4), torch.tensor([0, 0]), transforms[:1]).shape == (0, 4)


# ---- the authors' augmentation


def authors_transform(seed: int) -> np.ndarray:
    """Their draw: yaw in degrees, one of four flips (none, x, y, both), a shift per axis; float64 [1, 3, 4]."""
    rng = np.random.RandomState(seed)
    yaw = math.radians(rng.random_sample() * 360)
    flip = rng.choice(4, 1).item()
    shift = rng.normal(0, 0.1, 3)
    rotation = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    signs = np.array([[1, 1, 1], [-1, 1, 1], [1, -1, 1], [-1, -1, 1]])[flip]
    return np.c_[signs[:, None] * rotation, shift][None]


@pytest.mark.parametrize("seed", [100, 101, 102])
def test_equals_the_authors_augmented_scan(seed, golden):
    with np.load(golden("a1_residual.npz")) as data:
        start, stop = np.cumsum(data["n_points"])[[6, 7]]
        points = torch.from_numpy(data["scans"][start:stop])
    with np.load(golden("a2_polar.npz")) as data:
        index, features = (data[f"aug_seed{seed}_{name}_every4"] for name in ("grid_ind", "features8"))
    offsets = torch.tensor([0, len(points)])
    gridded = ops.polar_grid(apply_transforms(points, offsets, authors_transform(seed)), offsets, PolarGrid())
    same = (gridded.index(PolarGrid())[::4].numpy() == index).all(1)
    # They rotate in float32, we in float64 and round once: a point on a border may change its cell.
    assert same.mean() >= 0.9999
    found = gridded.features[::4, :8].numpy()[same]
    # Two last bits of a coordinate up to 128 m.
    np.testing.assert_allclose(found, features[same], rtol=0, atol=2e-5)


# ---- another remission


def some_points(n=4000, seed=0):
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.uniform(-40, 40, (n, 3)), rng.uniform(0, 1, (n, 1))], 1)
    return torch.from_numpy(points.astype(np.float32))


def test_a_change_of_remission_is_a_function_of_seed_epoch_and_scan():
    assert draw_remission(3, 5, SCAN, 1.0) == draw_remission(3, 5, ScanId("08", 123), 1.0)
    others = [draw_remission(*key, 1.0) for key in ((4, 5, SCAN), (3, 6, SCAN), (3, 5, ScanId("08", 124)))]
    assert len({draw_remission(3, 5, SCAN, 1.0), *others}) == 4
    assert draw_remission(3, 5, SCAN, 0.0) is None
    found = [draw_remission(0, 0, ScanId("00", frame), 0.4) for frame in range(DRAWS)]
    changed = [change for change in found if change is not None]
    assert abs(len(changed) / DRAWS - 0.4) < 0.03
    assert abs(np.mean([change.gain == 0 for change in changed]) - NO_REMISSION) < 0.03
    assert all(0.5 <= c.gain <= 2 or c.gain == 0 for c in changed)
    assert all(0.5 <= c.gamma <= 2 and 0.25 <= c.patch <= 2 and c.spread <= 0.7 and c.dark <= 0.6 for c in changed)


def test_gain_and_gamma():
    points = some_points()
    plain = RemissionChange(0.5, 2.0, 1.0, 0.0, 0.0, 7)
    changed = change_remission(points, torch.tensor([0, 4000]), [plain])
    torch.testing.assert_close(changed[:, 3], 0.5 * points[:, 3] ** 2)
    assert torch.equal(changed[:, :3], points[:, :3])
    bright = change_remission(points, torch.tensor([0, 4000]), [plain._replace(gain=3.0)])
    assert bright[:, 3].max() == 1
    gone = change_remission(points, torch.tensor([0, 4000]), [plain._replace(gain=0.0)])
    assert not gone[:, 3].any()


def test_patches_of_space_change_alike_and_some_go_dark():
    points = some_points(20_000)
    change = RemissionChange(0.4, 1.0, 2.0, 0.6, 0.25, 11)
    factor = change_remission(points, torch.tensor([0, 20_000]), [change])[:, 3] / (0.4 * points[:, 3])
    cube = (points[:, :3] / 2).floor().long()
    _, patch = cube.unique(dim=0, return_inverse=True)
    low = torch.full((int(patch.max()) + 1,), 9.0).scatter_reduce(0, patch, factor, "amin")
    high = torch.zeros(int(patch.max()) + 1).scatter_reduce(0, patch, factor, "amax")
    assert (high - low).max() < 1e-3 * high.max()
    dark = high == 0
    assert abs(dark.float().mean() - 0.25) < 0.02
    assert abs(high[~dark].log().mean()) < 0.02 and high[~dark].log().abs().max() <= 0.6 + 1e-4
    other = change_remission(points, torch.tensor([0, 20_000]), [change._replace(key=12)])
    assert not torch.equal(other[:, 3] == 0, factor == 0)


def test_each_scan_of_a_batch_has_its_own_change():
    points = some_points(300)
    offsets, change = torch.tensor([0, 100, 100, 300]), RemissionChange(0.5, 1.0, 1.0, 0.0, 0.0, 1)
    changed = change_remission(points, offsets, [None, change, change])
    assert torch.equal(changed[:100], points[:100])
    torch.testing.assert_close(changed[100:, 3], 0.5 * points[100:, 3])
    assert change_remission(points, offsets, [None] * 3) is points


# ---- false motion


def a_wall(height=1.5):
    """Points of an upright wall 6 m ahead, 12 m wide, one column of them each 2 cm."""
    y, z = np.meshgrid(np.arange(-6, 6, 0.02), np.arange(-1.5, -1.5 + height + 0.01, 0.1), indexing="ij")
    return torch.from_numpy(np.stack([np.full_like(y, 6.0), y, z, np.full_like(y, 0.3)], -1).reshape(-1, 4)).float()


def false_motion(points, change, still=None, known=8):
    """Channels of which the first `known` are there: one point, of which nothing is expected, has them all."""
    residual = torch.zeros(len(points) + 1, 8)
    residual[-1, :known] = 0.5
    still = torch.ones(len(points), dtype=torch.bool) if still is None else still
    points, still = torch.cat([points, torch.full((1, 4), 200.0)]), torch.cat([still, torch.ones(1, dtype=torch.bool)])
    return add_false_motion(points, torch.tensor([0, len(points)]), residual, still, ResidualGrid(), [change])[:-1]


def test_false_motion_is_a_function_of_seed_epoch_and_scan():
    assert draw_false_motion(3, 5, SCAN, 1.0) == draw_false_motion(3, 5, ScanId("08", 123), 1.0)
    others = [draw_false_motion(*key, 1.0) for key in ((4, 5, SCAN), (3, 6, SCAN), (3, 5, ScanId("08", 124)))]
    assert len({draw_false_motion(3, 5, SCAN, 1.0), *others}) == 4
    assert draw_false_motion(3, 5, SCAN, 0.0) is None
    found = [draw_false_motion(0, 0, ScanId("00", frame), 0.4) for frame in range(DRAWS)]
    changed = [change for change in found if change is not None]
    assert abs(len(changed) / DRAWS - 0.4) < 0.03
    assert all(0 <= change.share <= MOST_FALSE and 1 <= change.rows <= 4 for change in changed)


@pytest.mark.parametrize("rows", [1, 4])
def test_false_motion_fills_cells_to_their_height(rows):
    points = a_wall()
    found = torch.cat([false_motion(points, FalseMotion(0.3, rows, key)) for key in range(40)])
    on = found != 0
    assert abs(on.any(1).float().mean() - 0.3) < 0.04
    assert on.sum(1)[on.any(1)].min() >= 1 and on.sum(1).max() <= 4
    # a run of neighbouring channels, the same value in each
    assert ((on[:, 1:] & ~on[:, :-1]).sum(1) + on[:, 0] <= 1).all()
    high = found.amax(1)
    assert (found[on] == high[:, None].expand_as(found)[on]).all()
    assert found[on].min() >= 0.4 and found[on].max() <= 1.5 + 1e-3 and found[on].mean() > 1.0


def test_only_what_stands_and_stood_still_gets_false_motion():
    points = a_wall()
    still = points[:, 1] > 0
    found = false_motion(points, FalseMotion(1.0, 1, 3), still)
    assert not found[~still].any()
    assert (found[still] != 0).any(1).float().mean() > 0.9
    assert not false_motion(a_wall(height=0.3), FalseMotion(1.0, 1, 3)).any()  # lower than any true one


@pytest.mark.parametrize("known", [0, 1, 2, 5])
def test_false_motion_is_in_half_of_the_channels_that_the_scan_has(known):
    found = false_motion(a_wall(), FalseMotion(1.0, 1, 3), known=known) != 0
    assert not found[:, known:].any()
    assert found.sum(1).max() == known // 2


def test_true_motion_stays():
    points, true = a_wall(), torch.full((len(a_wall()), 8), 0.7)
    offsets, still = torch.tensor([0, len(points)]), torch.ones(len(points), dtype=torch.bool)
    assert torch.equal(add_false_motion(points, offsets, true, still, ResidualGrid(), [FalseMotion(1.0, 1, 3)]), true)


def test_each_scan_of_a_batch_has_its_own_false_motion():
    wall, offsets = a_wall(), torch.tensor([0, len(a_wall()), 2 * len(a_wall())])
    points, residual = torch.cat([wall, wall]), torch.zeros(2 * len(wall), 8)
    residual[::7] = 0.5
    still, grid = torch.ones(2 * len(wall), dtype=torch.bool), ResidualGrid()
    changed = add_false_motion(points, offsets, residual, still, grid, [None, FalseMotion(0.5, 2, 1)])
    assert torch.equal(changed[: len(wall)], residual[: len(wall)])
    assert (changed[len(wall) :] != residual[len(wall) :]).any()
    assert add_false_motion(points, offsets, residual, still, grid, [None, None]) is residual


# ---- sectors


def test_a_sector_is_a_function_of_seed_epoch_and_scan():
    assert draw_sector(3, 5, SCAN) == draw_sector(3, 5, ScanId("08", 123))
    assert len({draw_sector(3, 5, SCAN), draw_sector(4, 5, SCAN), draw_sector(3, 6, SCAN)}) == 3
    found = [draw_sector(0, 0, ScanId("00", frame)) for frame in range(DRAWS)]
    for about in ("moving", "evidence", "any"):
        assert abs(sum(sector.about == about for sector in found) / DRAWS - 1 / 3) < 0.03
    assert abs(np.mean([sector.pick for sector in found]) - 0.5) < 0.03
    assert abs(np.mean([sector.place for sector in found]) - 0.5) < 0.03


def rings(counts):
    """Scans of a ring each, 10 m wide, of evenly spread points; the remission says which scan."""
    scans = []
    for number, count in enumerate(counts):
        azimuth = torch.arange(count) * (2 * math.pi / max(count, 1)) + 0.001
        rest = [torch.full((count,), float(number)), torch.full((count,), number / 10)]
        scans.append(torch.stack([10 * azimuth.cos(), 10 * azimuth.sin(), *rest], 1))
    return pack(scans)


@pytest.mark.parametrize("about", ["moving", "evidence", "any"])
def test_scans_become_one_of_a_sector_each(about):
    points, offsets = rings([900, 900, 900, 600, 600])
    moving, residual = torch.zeros(len(points), dtype=torch.bool), torch.zeros(len(points), 8)
    chosen = torch.tensor([offsets[0] + 17, offsets[1] + 450, offsets[2] + 800, offsets[3] + 5, offsets[4] + 300])
    moving[chosen] = about == "moving"
    residual[chosen, 3] = 0.5
    sectors = [Sector(about, 0.0, place) for place in (0.5, 0.1, 0.9, 0.5, 0.25)]
    if about == "any":
        chosen = offsets[:-1]  # the first of all
    mixed, kept, new = mix_sectors(points, offsets, residual, moving, sectors, 3)
    assert new.tolist()[0] == 0 and len(new) == 3 and new[-1] == len(mixed) == len(kept)
    assert abs(new[1] - 900) <= 3 and abs(new[2] - new[1] - 600) <= 2  # a third of each of three, half of each of two
    assert torch.equal(mixed[:, 2:], points[kept, 2:])  # height and remission, row by row
    assert torch.equal(kept, kept.sort().values) and torch.isin(chosen, kept).all()
    torch.testing.assert_close(mixed[:, :2].norm(dim=1), points[kept, :2].norm(dim=1))
    azimuth = torch.atan2(mixed[:, 1], mixed[:, 0]).remainder(2 * math.pi) / (2 * math.pi)
    scan = (mixed[:, 3] * 10).round()
    low = torch.tensor([0, 1 / 3, 2 / 3, 0, 0.5])[scan.long()]
    width = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.5, 0.5])[scan.long()]
    assert (azimuth >= low).all() and (azimuth <= low + width).all()
    place = torch.tensor([sector.place for sector in sectors])
    at = torch.isin(kept, chosen)  # what the sector is about lies where it should
    torch.testing.assert_close(azimuth[at], low[at] + place * width[at], atol=1e-5, rtol=0)


def test_what_a_sector_is_not_about_and_empty_scans():
    points, offsets = rings([300, 0, 300])
    nothing = torch.zeros(len(points), dtype=torch.bool), torch.zeros(len(points), 8)
    mixed, kept, new = mix_sectors(points, offsets, nothing[1], nothing[0], [Sector("moving", 0.3, 0.5)] * 3, 3)
    assert set(mixed[:, 3].tolist()) == {points[0, 3].item(), points[-1, 3].item()} and len(new) == 2
    assert abs(len(mixed) - 200) <= 2
    whole, kept, new = mix_sectors(points, offsets, nothing[1], nothing[0], [Sector("any", 0.3, 0.5)] * 3, 1)
    assert torch.equal(whole, points) and torch.equal(new, offsets) and torch.equal(kept, torch.arange(len(points)))


def test_rows_of_a_batch_belong_together():
    points, offsets = rings([4, 2])
    numbers = torch.arange(6)
    batch = PackedBatch(points, offsets, (SCAN, SCAN), numbers[:, None].float(), numbers.to(torch.uint8))
    some = batch.rows(torch.tensor([1, 3, 5]), torch.tensor([0, 3]))
    assert torch.equal(some.points, points[[1, 3, 5]]) and some.residual[:, 0].tolist() == [1, 3, 5]
    assert some.labels.tolist() == [1, 3, 5] and some.num_scans == 1 and some.teacher_logits is None
