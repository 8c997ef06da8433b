"""What the teacher reads: the authors' window and voxels, and by hand which point stands for a voxel."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kdmos.data.multi_scan import (
    MOST_VOXELS,
    VoxelBatch,
    Window,
    find_voxels,
    gather_window,
    nearest_share,
    representatives,
    voxel_batch,
)

STILL = torch.eye(4, dtype=torch.float64)


@pytest.fixture(scope="module")
def sequence(golden):
    """Scans and poses of the goldens' sequence."""
    with np.load(golden("a1_residual.npz")) as file:
        scans = np.split(file["scans"], np.cumsum(file["n_points"])[:-1])
        return [torch.from_numpy(scan) for scan in scans], torch.from_numpy(file["velo_poses"])


@pytest.fixture(scope="module")
def authors(golden):
    with np.load(golden("a7_multiscan.npz")) as file:
        return dict(file)


@pytest.fixture(scope="module")
def window(sequence, authors):
    """Frame 9 with the seven scans before it."""
    scans, poses = sequence
    return gather_window(scans[: authors["frame"] + 1], poses[: authors["frame"] + 1], 8)


def made_up(rows):
    """A window of (x, remission, age) with y = z = 0."""
    x, remission, age = (torch.tensor(column) for column in zip(*rows))
    points = torch.zeros(len(rows), 4, dtype=torch.float64)
    points[:, 0], points[:, 3] = x, remission
    return Window(points, age)


def check(window, voxels, size):
    """What the docstring of `Voxels` promises."""
    assert voxels.start[0] == 0 and voxels.start[-1] == len(window.points)
    assert (voxels.start.diff() > 0).all()
    assert torch.equal(voxels.order.sort().values, torch.arange(len(window.points)))
    assert torch.equal(
        voxels.voxel[voxels.order], torch.arange(len(voxels.grid)).repeat_interleave(voxels.start.diff())
    )
    assert (voxels.grid.amin(0) == 0).all()
    assert len(voxels.grid.unique(dim=0)) == len(voxels.grid)
    # points of a voxel: within its bounds, newer scans' first
    offset = window.points[:, :3] / size - voxels.grid[voxels.voxel]
    assert ((offset - offset.amin(0).floor() >= 0) & (offset - offset.amin(0).floor() < 1)).all()
    inside = torch.ones(len(voxels.order) - 1, dtype=torch.bool)
    inside[voxels.start[1:-1] - 1] = False
    assert (window.age[voxels.order].diff()[inside] >= 0).all()


# --- the window


def test_the_window_is_the_authors(window, authors):
    assert torch.bincount(window.age).tolist() == authors["points_per_tn"].tolist()
    assert (window.age.diff() >= 0).all()  # the newest first
    # theirs is float32: 3e-6 m at 60 m, and once more for the pose
    assert_close(window.points[::8, :3].float(), torch.from_numpy(authors["coord_every8"]), rtol=0, atol=1e-5)
    assert torch.equal(window.points[::8, 3:].float(), torch.from_numpy(authors["strength_every8"]))


def test_the_newest_scan_is_left_as_it_was(window, sequence):
    newest = sequence[0][9]
    assert torch.equal(window.points[: len(newest)], newest.double())


def test_the_oldest_scan_stands_in_for_those_before_it(sequence, authors):
    scans, poses = sequence
    window = gather_window(scans[:4], poses[:4], 8)
    assert torch.bincount(window.age).tolist() == authors["f03_points_per_tn"].tolist()
    # as above
    assert_close(window.points[::32, :3].float(), torch.from_numpy(authors["f03_coord_every32"]), rtol=0, atol=1e-5)
    oldest = window.points[window.age == 3]
    assert all(torch.equal(window.points[window.age == age], oldest) for age in range(4, 8))


def test_scans_too_old_are_left_out(sequence):
    scans, poses = sequence
    window = gather_window(scans[:10], poses[:10], 3)
    expected = gather_window(scans[7:10], poses[7:10], 3)
    assert torch.equal(window.points, expected.points) and torch.equal(window.age, expected.age)
    (alone, age) = gather_window(scans[:10], poses[:10], 1)
    assert torch.equal(alone, scans[9].double()) and not age.any()


def test_poses_by_hand():
    """The LiDAR drives 10 m along x and turns left by a quarter: what was 12 m ahead is 2 m to its right now."""
    pose = torch.tensor([[0.0, -1, 0, 10], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    before, now = torch.tensor([[12.0, 0, 1, 0.5]]), torch.tensor([[4.0, 5, 6, 0.25]])
    window = gather_window([before, now], torch.stack([STILL, pose]), 2)
    assert_close(window.points, torch.tensor([[4, 5, 6, 0.25], [0, -2, 1, 0.5]], dtype=torch.float64))
    assert window.age.tolist() == [0, 1]


def test_scans_without_points():
    scans = [torch.ones(2, 4), torch.zeros(0, 4), torch.ones(1, 4)]
    assert gather_window(scans, STILL.repeat(3, 1, 1), 3).age.tolist() == [0, 2, 2]
    assert gather_window(scans[:2], STILL.repeat(2, 1, 1), 3).age.tolist() == [1, 1, 2, 2]


# --- its voxels


def test_fine_voxels_are_the_authors(window, authors):
    voxels = find_voxels(window, 0.045)
    assert len(voxels.grid) == len(authors["sampled_tn"])
    check(window, voxels, 0.045)
    # the same points share a voxel: the pairs (ours, theirs) are as many as the voxels
    theirs = torch.from_numpy(authors["inverse"]).long()
    pairs = torch.stack([voxels.voxel, theirs], 1).unique(dim=0)
    assert len(pairs) == len(voxels.grid) == len(theirs.unique())


def test_voxels_of_the_network_are_the_authors(window, authors):
    voxels = find_voxels(window, 0.09)
    check(window, voxels, 0.09)
    ours, theirs = (set(map(tuple, grid.tolist())) for grid in (voxels.grid, authors["frag0_grid_coord"]))
    assert len(ours) == len(theirs) == 47932
    # two points lie on a border up to the last bit of a float64, and their poses are multiplied in another order
    assert len(ours - theirs) <= 2


def test_voxels_by_hand():
    """0.5 m; a point on a border belongs to the upper voxel, and below zero they go on."""
    window = made_up([(0.0, 1, 0), (-0.1, 2, 0), (0.5, 3, 0), (-0.5, 4, 1), (0.49, 5, 1), (-1.1, 6, 2)])
    voxels = find_voxels(window, 0.5)
    check(window, voxels, 0.5)
    assert voxels.grid.tolist() == [[0, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0]]
    assert voxels.voxel.tolist() == [2, 1, 3, 1, 2, 0]
    assert voxels.order.tolist() == [5, 1, 3, 0, 4, 2]
    assert voxels.start.tolist() == [0, 1, 3, 5, 6]


@pytest.mark.parametrize("shift", [-1000.0, 0.0, 0.3])
def test_random_voxels(shift):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(500, 4, generator=generator, dtype=torch.float64) + shift
    window = Window(points, torch.randint(0, 4, (500,), generator=generator).sort().values)
    check(window, find_voxels(window, 0.4), 0.4)


def test_one_point():
    voxels = find_voxels(made_up([(-7.3, 0.5, 0)]), 0.09)
    assert [part.tolist() for part in voxels] == [[[0, 0, 0]], [0], [0], [0, 1]]


@pytest.mark.parametrize("axis", range(3))
def test_points_too_far_apart_are_refused(axis):
    window = made_up([(0.0, 0, 0), (0.0, 0, 0), (0.0, 0, 1)])
    window.points[1, axis] = MOST_VOXELS - 1
    assert find_voxels(window, 1.0).grid.amax(0)[axis] == MOST_VOXELS - 1
    for far in (MOST_VOXELS, 1e9, 1e18, 1e25, 3e38, -1.0 - MOST_VOXELS, -3e38):
        window.points[1, axis] = far
        with pytest.raises(ValueError, match=r"points .* m apart do not fit 65536 voxels of 1 m"):
            find_voxels(window, 1.0)


# --- the points that stand for them

# by remission: a voxel with two new points and an old one, one with a new point and two old ones, one with three old
ROWS = [
    *[(0.1, 1, 0), (0.2, 2, 0), (1.1, 3, 0)],
    *[(0.3, 4, 1), (1.2, 5, 1), (2.1, 7, 1), (2.2, 8, 1)],
    *[(1.3, 6, 2), (2.3, 9, 2)],
]


def test_the_newest_scans_points_stand_first_and_the_turns_cycle():
    window = made_up(ROWS)
    voxels = find_voxels(window, 1.0)
    stand = [window.points[representatives(window, voxels, turn), 3].tolist() for turn in range(7)]
    assert stand == [[1, 3, 7], [2, 3, 8], [1, 3, 9], [2, 3, 7], [1, 3, 8], [2, 3, 9], [1, 3, 7]]


def test_drawn_points_are_of_any_scan_and_come_again_with_the_seed():
    window = made_up(ROWS)
    voxels = find_voxels(window, 1.0)

    def draws(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([representatives(window, voxels, 0, generator) for _ in range(600)])

    drawn = draws(0)
    assert torch.equal(drawn, draws(0))
    assert not torch.equal(drawn, draws(1))
    for voxel, points in enumerate(([0, 1, 3], [2, 4, 7], [5, 6, 8])):
        values, counts = drawn[:, voxel].unique(return_counts=True)
        assert values.tolist() == points
        assert (counts - 200).abs().max() < 60  # a third each: five deviations of sqrt(600 / 3 * 2 / 3)


def test_each_stands_for_its_own_voxel(window):
    voxels = find_voxels(window, 0.3)
    generator = torch.Generator().manual_seed(0)
    has_new = torch.zeros(len(voxels.grid), dtype=torch.bool)
    has_new[voxels.voxel[window.age == 0]] = True
    assert has_new.any() and not has_new.all()
    for turn in (0, 1, 5, 1000):
        stand = representatives(window, voxels, turn)
        assert torch.equal(voxels.voxel[stand], torch.arange(len(voxels.grid)))
        assert torch.equal(window.age[stand] == 0, has_new)
    assert torch.equal(voxels.voxel[representatives(window, voxels, 0, generator)], torch.arange(len(voxels.grid)))
    # after as many turns as the fullest voxel has points, each of the newest scan stood
    turns = torch.bincount(voxels.voxel[window.age == 0]).max()
    stood = torch.cat([representatives(window, voxels, turn) for turn in range(turns)])
    assert torch.isin((window.age == 0).nonzero()[:, 0], stood).all()


# --- packed


def test_samples_are_packed():
    first, second = made_up(ROWS), made_up([(-3.0, 0.5, 0), (4.0, 0.25, 3)])
    samples = []
    for window in (first, second):
        voxels = find_voxels(window, 1.0)
        samples.append((window, voxels.grid, representatives(window, voxels, 1)))
    batch = voxel_batch(samples)
    assert isinstance(batch, VoxelBatch)
    assert (batch.num_samples, batch.offsets.tolist()) == (2, [0, 3, 5])
    assert batch.grid.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 0, 0], [7, 0, 0]]
    expected = [[0.2, 0, 0, 2, 0], [1.1, 0, 0, 3, 0], [2.2, 0, 0, 8, 1], [-3, 0, 0, 0.5, 0], [4, 0, 0, 0.25, 3]]
    assert torch.equal(batch.features, torch.tensor(expected))
    assert (batch.features.dtype, batch.grid.dtype, batch.time.dtype) == (torch.float32, torch.int64, torch.int64)
    assert batch.time.tolist() == [0, 0, 1, 0, 3]


def test_the_nearest_share_of_the_points():
    xyz = torch.tensor([[5.0, 0, 0], [0, 1, 0], [0, 0, -3], [2, 0, 0]])
    centre = torch.zeros(3)
    kept = [nearest_share(xyz, centre, share).tolist() for share in (1.0, 0.75, 0.5, 0.25, 0.01)]
    assert kept == [[0, 1, 2, 3], [1, 2, 3], [1, 3], [1], [1]]
