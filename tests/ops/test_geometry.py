"""Where points lie: CPU and GPU say the same of every one, to the bit."""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from kdmos.ops import height_residual, polar_grid
from kdmos.settings import PolarGrid, ResidualGrid


@pytest.fixture(autouse=True)
def on_the_gpu(backend):
    if backend != "cuda":
        pytest.skip("compares the CUDA kernels with those of the CPU")


def points(num_points, seed=0):
    """Remote and near ones, among them all that lie on the axes and diagonals, zeros of either sign included."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_points, 4, generator=generator) * torch.tensor([25.0, 25.0, 2.0, 1.0])
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 1e-30, -1e30])
    edges = torch.cat([torch.cartesian_prod(edges, edges, torch.tensor([-1.0, 0.0])), torch.ones(128, 1)], 1)
    return torch.cat([drawn, edges])


def test_cells_of_the_polar_grid():
    """Also with sectors of 0.01 degrees and rings of 3 mm: more points lie close to a border."""
    cloud = points(100_000)
    offsets = torch.tensor([0, 60_000, len(cloud)])
    for bins in (PolarGrid().bins, (2, 36000, 2), (16000, 2, 2)):
        grid = PolarGrid(bins=bins)
        found = polar_grid(cloud, offsets, grid)
        with _disable_current_modes():
            expected = polar_grid(cloud, offsets, grid)
        for ours, wanted in zip(found, expected):
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize("grid", [ResidualGrid(), ResidualGrid(rows=4000, columns=30)])
def test_residuals(grid):
    scans = [points(30_000, seed)[:, :3].contiguous() for seed in range(4)]
    transforms = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    transforms[:, :3, 3] = torch.randn(4, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    arguments = scans, transforms, grid, (2, 4), ((0, 2), (1, 2)), (0, 4)
    found = height_residual(*arguments)
    with _disable_current_modes():
        expected = height_residual(*arguments)
    assert torch.equal(found, expected)
    assert found.count_nonzero() > 1000
