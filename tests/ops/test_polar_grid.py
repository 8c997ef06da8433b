"""Points to polar voxels: the authors' indices and features, a table worked by hand, and the edges of the grid."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kdmos.ops import polar_grid
from kdmos.settings import PolarGrid

# Rings of 1 m from 0, sectors of a quarter turn from -pi, heights of 1 m from 0.
TABLE_GRID = PolarGrid(rho=(0.0, 4.0), phi=(-math.pi, math.pi), z=(0.0, 3.0), bins=(5, 5, 4))


def one_scan(*points):
    points = torch.tensor(points, dtype=torch.float32).reshape(-1, 4)
    return points, torch.tensor([0, len(points)])


@pytest.fixture(scope="module")
def goldens(golden):
    """frame -> points, and the authors' indices and features."""
    with np.load(golden("a1_residual.npz")) as file:
        scans = np.split(file["scans"], np.cumsum(file["n_points"])[:-1])
    with np.load(golden("a2_polar.npz")) as file:
        return {
            frame: tuple(
                torch.from_numpy(array)
                for array in (scans[frame], file[f"f{frame:02d}_grid_ind"], file[f"f{frame:02d}_features"][:, :9])
            )
            for frame in (7, 11)
        }


@pytest.mark.parametrize("frame", [7, 11])
def test_equals_the_authors(goldens, frame):
    points, index, features = goldens[frame]
    gridded = polar_grid(points, torch.tensor([0, len(points)]), PolarGrid())
    same = (gridded.index(PolarGrid()) == index).all(1)
    assert same.float().mean() >= 0.9999
    # The authors take the offsets from float32 bin centres of up to 50 m: 7.6e-6 seen.
    assert_close(gridded.features[same], features[same], rtol=0, atol=1e-4)


def test_a_batch_is_its_scans_one_after_another(goldens):
    scans = [goldens[7][0][:500], goldens[11][0][:0], goldens[11][0][:700]]  # the middle one has no point
    grid = PolarGrid()
    batch = polar_grid(torch.cat(scans), torch.tensor([0, 500, 500, 1200]), grid)
    start, num_cells = 0, grid.bins[0] * grid.bins[1]
    for b, points in enumerate(scans):
        rows = slice(start, start + len(points))
        start += len(points)
        alone = polar_grid(points, torch.tensor([0, len(points)]), grid)
        assert torch.equal(batch.index(grid)[rows], alone.index(grid))
        assert torch.equal(batch.features[rows], alone.features)
        assert torch.equal(batch.cells[batch.cell_rank[rows]], alone.cells[alone.cell_rank] + b * num_cells)
        voxels = alone.voxels[alone.voxel_rank] + b * num_cells * grid.bins[2]
        assert torch.equal(batch.voxels[batch.voxel_rank[rows]], voxels)


@pytest.mark.parametrize(
    ("point", "index"),
    [
        ((1.5, 0.1, 0.5), (1, 2, 0)),
        ((0.1, 1.5, 1.5), (1, 2, 1)),  # just short of a quarter turn to the left
        ((-0.1, 1.5, 1.5), (1, 3, 1)),  # just past it
        ((0.1, -2.5, 2.5), (2, 1, 2)),
        ((-0.1, -2.5, 2.5), (2, 0, 2)),
        # on a border: the bin above it
        ((3.0, 0.5, 0.0), (3, 2, 0)),
        ((3.0, 0.0, 0.5), (3, 2, 0)),
        ((1.5, 0.1, 1.0), (1, 2, 1)),
        ((1.5, 0.1, 1 - 2**-24), (1, 2, 0)),
        # straight behind: the last sector holds nothing but phi = pi; the sign of y's zero decides
        ((-1.5, 0.0, 0.5), (1, 4, 0)),
        ((-1.5, -0.0, 0.5), (1, 0, 0)),
        # the last bin starts at the upper bound
        ((4.0, 0.0, 3.0), (4, 2, 3)),
        ((3.9, 0.0, 2.9), (3, 2, 2)),
        # beyond the grid: its first or last bin
        ((10.0, 0.1, 7.0), (4, 2, 3)),
        ((1e20, 0.1, -1e20), (4, 2, 0)),
        ((0.0, 0.0, -5.0), (0, 2, 0)),
    ],
)
def test_indices_worked_by_hand(point, index):
    gridded = polar_grid(*one_scan((*point, 0.3)), TABLE_GRID)
    assert gridded.index(TABLE_GRID).tolist() == [list(index)]
    ring, sector, height = index
    assert gridded.cells.tolist() == [ring * 5 + sector]
    assert gridded.voxels.tolist() == [(ring * 5 + sector) * 4 + height]
    assert gridded.cell_rank.tolist() == gridded.voxel_rank.tolist() == [0]


@pytest.mark.parametrize(
    ("point", "features"),
    [
        # ring 1 has its centre at 1.5 m, sector 2 at pi / 4, height 0 at 0.5 m
        ((1.75, 0.0, 0.25, 0.5), (0.25, -math.pi / 4, -0.25, 1.75, 0.0, 0.25, 1.75, 0.0, 0.5)),
        # 3-4-5; sector 3 has its centre at 3 pi / 4; beyond the last ring (centre 4.5 m) and height (3.5 m):
        # the offset is that of the point itself, not of the border
        ((-3.0, 4.0, 6.0, 1.0), (0.5, math.atan2(4, -3) - 0.75 * math.pi, 2.5, 5.0, math.atan2(4, -3), 6, -3, 4, 1)),
    ],
)
def test_features_worked_by_hand(point, features):
    gridded = polar_grid(*one_scan(point), TABLE_GRID)
    assert gridded.features.dtype == torch.float32
    assert_close(gridded.features, torch.tensor([features], dtype=torch.float32))


def test_cells_and_voxels_are_sorted_and_shared():
    points = [(3.5, 0.1, 2.5, 0), (1.5, 0.1, 1.5, 0), (1.6, 0.2, 0.5, 0), (1.7, 0.1, 1.4, 0), (3.5, 0.1, 2.6, 0)]
    gridded = polar_grid(*one_scan(*points), TABLE_GRID)
    # cells 1 * 5 + 2 = 7 and 3 * 5 + 2 = 17; in the first, heights 0 and 1, in the other height 2
    assert gridded.cells.tolist() == [7, 17]
    assert gridded.voxels.tolist() == [28, 29, 70]
    assert gridded.cell_rank.tolist() == [1, 0, 0, 0, 1]
    assert gridded.voxel_rank.tolist() == [2, 1, 0, 1, 2]


def test_published_grid_ends():
    far, near = (-1e3, 0.0, 9.0, 1.0), (1e-3, 0.0, -9.0, 0.0)
    assert polar_grid(*one_scan(far, near), PolarGrid()).index(PolarGrid()).tolist() == [[479, 359, 31], [0, 179, 0]]


def test_no_points():
    gridded = polar_grid(torch.zeros(0, 4), torch.tensor([0, 0, 0]), PolarGrid())
    assert gridded.features.shape == (0, 9)
    assert gridded.index(PolarGrid()).shape == (0, 3)
    for tensor in (gridded.cell_rank, gridded.cells, gridded.voxel_rank, gridded.voxels):
        assert tensor.shape == (0,)
        assert tensor.dtype == torch.int64


def test_non_contiguous_points(goldens):
    points = goldens[7][0]
    offsets = torch.tensor([0, len(points)])
    wide = torch.stack([points, torch.full_like(points, math.nan)], 2).flatten(1)[:, ::2]
    assert not wide.is_contiguous()
    for ours, theirs in zip(polar_grid(wide, offsets, PolarGrid()), polar_grid(points, offsets, PolarGrid())):
        assert torch.equal(ours, theirs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    bins=st.tuples(st.integers(2, 50), st.integers(2, 401), st.integers(2, 33)),
    low=st.floats(-3.0, 3.0),
    extent=st.floats(0.1, 80.0),
    num_points=st.integers(1, 60),
)
def test_every_point_has_its_place(seed, bins, low, extent, num_points):
    """Any grid, points far beyond it included: indices in range, ranks that lead back to them."""
    grid = PolarGrid(rho=(max(low, 0.0), max(low, 0.0) + extent), z=(low, low + extent), bins=bins)
    points = torch.randn(num_points, 4, generator=torch.Generator().manual_seed(seed)) * 30
    offsets = torch.tensor([0, num_points // 3, num_points])
    gridded = polar_grid(points, offsets, grid)
    rings, sectors, heights = bins
    index = gridded.index(grid)
    assert (index >= 0).all()
    assert (index < torch.tensor(bins)).all()
    scan = (torch.arange(num_points) >= num_points // 3).long()
    cell = (scan * rings + index[:, 0]) * sectors + index[:, 1]
    assert torch.equal(gridded.cells, cell.unique())
    assert torch.equal(gridded.cells[gridded.cell_rank], cell)
    assert torch.equal(gridded.voxels, (cell * heights + index[:, 2]).unique())
    assert torch.equal(gridded.voxels[gridded.voxel_rank], cell * heights + index[:, 2])
    # A point inside the grid lies in its bin: at most half a bin from the centre, up to float32 rounding.
    inside = (points[:, 2] >= grid.z[0]) & (points[:, 2] < grid.z[1])
    assert (gridded.features[inside, 2].abs() <= grid.interval[2] / 2 + 1e-5).all()


@pytest.mark.parametrize("lengths", [(300,), (1,), (0,), (0, 0), (120, 0, 180), (0, 1, 0)])
@pytest.mark.parametrize("padding", [0, 1, 500])
def test_fixed_size(lengths, padding):
    """The ordinary form, and behind it what no op takes for a point, cell or voxel."""
    grid, (n, offsets) = PolarGrid(bins=(7, 50, 40)), (sum(lengths), torch.tensor([0, *lengths]).cumsum(0))
    points = torch.randn(n + padding, 4, generator=torch.Generator().manual_seed(n)) * 20
    points[n:] = math.nan
    rows, places = n + padding, len(lengths) * 7 * 50
    ours, plain = polar_grid(points, offsets, grid, fixed_size=True), polar_grid(points[:n], offsets, grid)
    tails = {
        "features": (rows, 0),
        "cell_rank": (rows, rows),
        "cells": (rows, places),
        "cell_start": (rows + 1, n),
        "voxel_rank": (rows, rows - 1),
        "voxels": (rows, places * 40),
        "voxel_start": (rows + 1, n),
    }
    for name, (length, value) in tails.items():
        found, wanted = getattr(ours, name), getattr(plain, name)
        assert found.dtype == wanted.dtype, name
        assert found.shape == (length, *wanted.shape[1:]), name
        assert torch.equal(found[: len(wanted)], wanted), name
        assert (found[len(wanted) :] == value).all(), name
    assert torch.equal(ours.order, torch.cat([plain.order, torch.arange(n, rows)]))
    assert ours.cell_rank[:n].lt(len(plain.cells)).all()


def test_fixed_size_with_a_voxel_for_each_point():
    """N cells and voxels: no row is left for padding."""
    points = [(rho, 0.1, 0.5, 0.0) for rho in (3.5, 0.5, 2.5, 1.5)]
    for ours, plain in zip(
        polar_grid(*one_scan(*points), TABLE_GRID, True), polar_grid(*one_scan(*points), TABLE_GRID)
    ):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("lengths", [(300,), (120, 0, 180)])
@pytest.mark.parametrize("spare", [1, 0, -1, -100])
def test_room_for_so_many_cells(lengths, spare):
    """Cells beyond have no place, their points no cell, and the end of `cell_start` tells."""
    grid, (n, offsets) = PolarGrid(bins=(7, 50, 40)), (sum(lengths), torch.tensor([0, *lengths]).cumsum(0))
    points = torch.randn(n + 20, 4, generator=torch.Generator().manual_seed(n)) * 20
    plain = polar_grid(points[:n], offsets, grid)
    size = len(plain.cells) + spare
    ours, roomy = polar_grid(points, offsets, grid, True, size), polar_grid(points, offsets, grid, True)
    assert len(ours.cells) == size
    assert torch.equal(ours.cells, roomy.cells[:size])
    assert torch.equal(ours.cell_start, roomy.cell_start[: size + 1])
    assert (int(ours.cell_start[-1]) == n) == (spare >= 0)
    for name in ("features", "cell_rank", "voxel_rank", "voxels", "voxel_start", "order"):
        assert torch.equal(getattr(ours, name), getattr(roomy, name)), name
    assert len(polar_grid(points, offsets, grid, True, 10**6).cells) == n + 20


def test_refuses_offsets_that_do_not_fit(backend):
    if backend == "cuda":
        pytest.skip("reading them would wait for the device")
    with pytest.raises(ValueError, match="polar_grid: offsets end at 3, but there are 5 points"):
        polar_grid(torch.zeros(5, 4), torch.tensor([0, 3]), PolarGrid())
    with pytest.raises(RuntimeError):
        polar_grid(torch.zeros(5, 4), torch.tensor([0, 6]), PolarGrid(), fixed_size=True)


@pytest.mark.parametrize("shape", [(5, 3), (5, 5), (4,), (1, 5, 4)])
def test_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"polar_grid: expected points \[N, 4\].*is remission missing"):
        polar_grid(torch.zeros(shape), torch.tensor([0, shape[0]]), PolarGrid())
