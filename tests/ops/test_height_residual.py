"""Height-range residuals: the authors' cells and residuals, the rule worked by hand, and the edges of the grid."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kdmos.ops import height_residual
from kdmos.ops.reference import project
from kdmos.settings import ResidualGrid

# Four yaw rows and six range columns of 10 m; column 0 is the farthest.
COARSE = ResidualGrid(rows=4, columns=6, max_range=60.0)
OLDER, NEWER = (0, 1), (1, 2)  # of two scans


def cloud(heights, bottom=-3.0, y=0.5):
    """One point pair of each given height (None: no point) in the columns 0, 1, ..., at 55, 45, ... metres."""
    points = []
    for column, height in enumerate(heights):
        if height is not None:
            x = 55.0 - 10.0 * column
            points += [[x, y, bottom], [x, y, bottom + height]]
    return torch.tensor(points, dtype=torch.float32).reshape(-1, 3)


def residual_of(scans, newer=NEWER, older=(OLDER,), read=None, transforms=None, grid=COARSE):
    if transforms is None:
        transforms = torch.eye(4, dtype=torch.float64).repeat(len(scans), 1, 1)
    return height_residual(scans, transforms, grid, newer, older, read or (0, len(scans)))


@pytest.fixture(scope="module")
def sequence(golden):
    with np.load(golden("a1_residual.npz")) as file:
        return {name: file[name] for name in file.files if name not in ("poses_txt", "calib_txt")}


@pytest.mark.parametrize("window", ["single", "last"])
def test_cells_equal_the_authors(sequence, window):
    points = torch.from_numpy(sequence[f"proj_{window}_points"])
    cell, inside = project(points, ResidualGrid())
    valid = np.unpackbits(sequence[f"proj_{window}_valid"])[: len(points)].astype(bool)
    assert np.mean(inside.numpy() == valid) >= 0.9999
    expected = sequence[f"proj_{window}_y"].astype(np.int64) * 480 + sequence[f"proj_{window}_x"]
    assert np.mean(cell.numpy()[valid] == expected) >= 0.9999


@pytest.mark.parametrize("t", [7, 9, 13])
def test_one_step_equals_the_authors(sequence, t):
    """Eight scans in the frame of the last one: channel k of scan t - k."""
    splits = np.cumsum(sequence["n_points"])[:-1]
    scans, expected = (np.split(sequence[name], splits) for name in ("scans", "residual"))
    scans = [torch.from_numpy(scan) for scan in scans[t - 7 : t + 1]]
    poses = torch.from_numpy(sequence["velo_poses"][t - 7 : t + 1])
    transforms = torch.linalg.inv(poses[-1]) @ poses
    residual = residual_of(scans, (4, 8), ((0, 4),), transforms=transforms, grid=ResidualGrid())
    expected = np.concatenate([expected[f][:, t - f] for f in range(t - 7, t + 1)])
    assert np.mean(residual[:, 0].numpy() == expected) >= 0.9999
    assert np.mean(expected != 0) > 0.02


@pytest.mark.parametrize(
    ("newer", "older", "at_newer", "at_older"),
    [
        # `older` sees the far column, so nothing is occluded in it; what is new stands where nothing was
        ([0, 0, 1.0, None], [0.5, None, None, None], [0, 0, 1.0], [0.0]),
        # the same from the other side: something went away
        ([0.5, None, None, None], [0, 0, 1.0, None], [0.0], [0, 0, 1.0]),
        # nothing in `older` there or farther out: occluded; nearer than its farthest thing: not
        ([1.0, 1.0, 1.0], [None, 0.5, None], [0.0, 0.0, 1.0], [0.0]),
        # a pair of equal heights is as good as nothing: I = 0, so occluded
        ([1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
        # a fifth of the height may have been there before, no more
        ([1.0, 1.0], [0.125, 0.25], [0.875, 0.0], [0.0, 0.0]),
        # 0.4 m to 4 m, both included
        ([0.0, 0.375, 0.5, 4.0, 4.25], [0.5], [0, 0, 0.5, 4.0, 0], [0.0]),
        # both changed: each window's points read their own difference
        ([1.0, None, 0.125], [0.125, None, 2.0], [0.875, 0.0], [0.0, 1.875]),
        # an empty window hides everything
        ([1.0, 2.0], [None], [0.0, 0.0], []),
        ([None], [None], [], []),
    ],
)
def test_rule_worked_by_hand(newer, older, at_newer, at_older):
    expected = [value for value in at_older for _ in range(2)] + [value for value in at_newer for _ in range(2)]
    residual = residual_of([cloud(older), cloud(newer)])
    assert residual.dtype == torch.float32
    assert residual[:, 0].tolist() == expected  # all heights are exact in float32


@pytest.mark.parametrize(
    ("yaw", "row"),
    [
        (-math.pi + 0.01, 0),
        (-0.01, 1),
        (0.0, 2),  # a border: the row above it
        (0.01, 2),
        (math.pi / 2 + 0.01, 3),
        (math.pi, 3),  # would be row 4
    ],
)
def test_rows_worked_by_hand(yaw, row):
    """A tall thing is new in one row; the other rows hold the same low thing as before."""
    x, y = 25 * math.cos(yaw), 25 * math.sin(yaw) if yaw < math.pi else 0.0
    new = torch.tensor([[x, y, 0.0], [x, y, 1.0]])
    angles = torch.tensor([-2.0, -1.0, 1.0, 2.0])  # one in each row
    probes = torch.stack([25 * angles.cos(), 25 * angles.sin(), torch.zeros(4)], 1)
    far = torch.cat([probes * 2.1, probes * 2.1 + torch.tensor([0, 0, 0.5])])  # nothing is occluded in `older`
    residual = residual_of([far, torch.cat([probes, new])])
    assert residual[len(far) :, 0].tolist() == [1.0 if r == row else 0.0 for r in range(4)] + [1.0, 1.0]


@pytest.mark.parametrize(
    "point",
    [
        (60.0, 0.0, 0.0),  # the bounds are open
        (0.0, 0.0, 0.0),
        (25.0, 0.5, 2.0),
        (25.0, 0.5, -4.0),
        (100.0, 0.5, 0.0),
        (25.0, 0.5, 9.0),
        (math.nan, 0.5, 0.0),
        (25.0, math.nan, 0.0),
        (25.0, 0.5, math.nan),
        (math.inf, 0.5, 0.0),
        (25.0, -math.inf, 0.0),
        (25.0, 0.5, math.inf),
        (math.nan, math.nan, math.nan),
    ],
)
def test_points_off_the_grid_get_zero_and_change_nothing(point):
    # something stands in all but one column, and would be another height if the stray counted
    scans = [cloud([0.0625, None, 0.0, 0.0]), cloud([1.0, 1.0, 2.0, 0.5, None, 0.5])]
    expected = residual_of(scans)
    assert expected.count_nonzero() == 10
    stray = torch.tensor([point], dtype=torch.float32)
    residual = residual_of([torch.cat([scan, stray]) for scan in scans])
    rows = torch.ones(len(residual), dtype=torch.bool)
    rows[[len(scans[0]), -1]] = False
    assert torch.equal(residual[rows], expected)
    assert residual[~rows].tolist() == [[0], [0]]


def test_just_inside_the_open_bounds():
    top, bottom = np.nextafter(np.float32([2.0, -4.0]), np.float32(0))
    scans = [cloud([0.5]), torch.tensor([[25, 0.5, top - 1], [25, 0.5, top], [35, 0.5, bottom], [35, 0.5, bottom + 1]])]
    assert_close(residual_of(scans)[2:, 0], torch.ones(4))


def test_columns_are_of_the_distance_in_space():
    # 49.9 m ahead and 10 m up would be 50.9 m away: column 0, where x alone would say 1
    grid = ResidualGrid(rows=4, columns=6, max_range=60.0, z=(-20.0, 20.0))
    points = torch.tensor([[49.9, 0.5, 10.0], [52.0, 0.5, 9.0], [45.0, 0.5, 0.0]])
    far = torch.tensor([[55.0, 0.5, 0.0], [55.0, 0.5, 0.125]])
    assert residual_of([far, points], grid=grid)[2:, 0].tolist() == [0.875, 0.875, 0.0]


def test_height_of_a_window_is_over_all_its_scans():
    low, high = torch.tensor([[25.0, 0.5, -1.0]]), torch.tensor([[26.0, 0.5, 0.5]])
    far = cloud([0.5])
    # neither of the two newer scans has a height by itself
    residual = residual_of([far, low, high], newer=(1, 3), older=((0, 1),))
    assert residual[2:, 0].tolist() == [1.5, 1.5]
    assert residual_of([far, low, high], newer=(1, 2), older=((0, 1),))[2:, 0].tolist() == [0, 0]


def test_points_of_other_scans_get_zero():
    far, new = cloud([0.5]), cloud([None, 1.0])
    residual = residual_of([far, new, new], newer=(2, 3), older=((0, 1),))
    assert residual[:, 0].tolist() == [0, 0, 0, 0, 1, 1]


def test_each_older_window_is_one_channel():
    scans = [cloud([0.5, None, 0.0]), cloud([None, 0.5, 2.0]), cloud([0.5, 1.0]), cloud([1.0, 1.0, 1.0])]
    windows = ((0, 1), (0, 2), (1, 3))
    together = residual_of(scans, (3, 4), windows)
    assert together.shape == (18, 3)
    for channel, window in enumerate(windows):
        assert torch.equal(together[:, channel : channel + 1], residual_of(scans, (3, 4), (window,)))
    # in (0, 2) columns 0, 1, 2 were 0.5, 0.5, 2 m high: nothing is new; in (0, 1) only the far one was there
    assert together[-6:, 0].tolist() == [0, 0, 1, 1, 1, 1]
    assert together[-6:, 1].tolist() == [0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("read", [(0, 1), (1, 2), (2, 4), (0, 4)])
def test_reads_the_scans_asked_for(read):
    scans = [cloud([0.5]), cloud([None, 0.5]), cloud([None, None, 1.0]), cloud([None, 2.0])]
    everything = residual_of(scans, (2, 4), ((0, 2),)).split([len(scan) for scan in scans])
    some = residual_of(scans, (2, 4), ((0, 2),), read=read)
    assert torch.equal(some, torch.cat(everything[slice(*read)]))


def test_transforms_move_the_points():
    """The older scan was taken 10 m behind and looking left: x there is -y here."""
    turned = torch.eye(4, dtype=torch.float64)
    turned[:2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])  # x' = -y, y' = x
    turned[0, 3] = -10.0
    older = torch.tensor([[0.5, -65.0, 0.0], [0.5, -65.0, 0.5], [0.5, -35.0, 0.0], [0.5, -35.0, 1.5]])
    transforms = torch.stack([turned, torch.eye(4, dtype=torch.float64)])
    newer = cloud([None, 1.0, 1.0])
    # here the older points are at x = 55 (column 0) and x = 25 (column 3), y = 0.5
    residual = residual_of([older, newer], transforms=transforms)
    # column 0 is hidden in the newer scan; in column 3 a 1.5 m thing went away
    assert residual[:, 0].tolist() == [0, 0, 1.5, 1.5, 1, 1, 1, 1]


def test_scans_without_points():
    nothing = torch.zeros(0, 3)
    residual = residual_of([cloud([0.5]), nothing, cloud([None, 1.0]), nothing], newer=(2, 4), older=((0, 2),))
    assert residual[:, 0].tolist() == [0, 0, 1, 1]
    assert residual_of([nothing, nothing]).shape == (0, 1)
    assert residual_of([cloud([0.5]), nothing], read=(1, 2)).shape == (0, 1)


def test_one_point():
    assert residual_of([torch.tensor([[25.0, 0.5, 0.0]]), torch.zeros(0, 3)]).tolist() == [[0]]


def test_non_contiguous_points_and_more_columns():
    scans = [cloud([0.5, None, 0.0]), cloud([None, 1.0, 2.0])]
    expected = residual_of(scans)
    strided = [torch.stack([scan, scan + 9], 2)[..., 0] for scan in scans]
    assert torch.equal(residual_of(strided), expected)
    with_remission = [torch.cat([scan, torch.full((len(scan), 2), math.nan)], 1) for scan in scans]
    assert torch.equal(residual_of(with_remission), expected)


def test_other_limits():
    grid = ResidualGrid(rows=4, columns=6, min_ratio=0.5, min_height=1.0, max_height=2.0)
    residual = residual_of([cloud([0.5, 0.5, 0.5]), cloud([0.75, 1.0, 2.0, 2.25])], grid=grid)
    assert residual[6:, 0].tolist() == [0, 0, 0.5, 0.5, 1.5, 1.5, 0, 0]


def test_no_gradient_is_kept():
    points = cloud([0.5, 1.0]).requires_grad_()
    assert not residual_of([points, points]).requires_grad


def test_refuses_what_does_not_fit():
    scans, eye = [torch.zeros(2, 3)] * 2, torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    with pytest.raises(ValueError, match=r"height_residual: expected scans \[n, >= 3\], got \[2, 2\]"):
        height_residual([scan[:, :2] for scan in scans], eye, COARSE, NEWER, (OLDER,), (0, 2))
    with pytest.raises(ValueError, match=r"height_residual: expected transforms \[2, 4, 4\].*got \[1, 4, 4\]"):
        height_residual(scans, eye[:1], COARSE, NEWER, (OLDER,), (0, 2))
    for newer, older, read in (
        ((1, 3), (OLDER,), (0, 2)),
        ((1, 1), (OLDER,), (0, 2)),
        (NEWER, (OLDER, (-1, 1)), (0, 2)),
        (NEWER, (OLDER,), (2, 2)),
        (NEWER, (OLDER,), (1, 0)),
    ):
        with pytest.raises(ValueError, match=r"height_residual: scans \(-?\d, \d\) are not among 0\.\.2"):
            height_residual(scans, eye, COARSE, newer, older, read)
