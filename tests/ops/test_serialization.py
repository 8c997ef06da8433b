"""Orders along space-filling curves: the authors' codes, small curves by hand, and what makes a curve one."""

import numpy as np
import pytest
import torch

from kdmos.ops import CURVES, curve_code

DEPTHS = (1, 3, 7, 10, 16)


@pytest.fixture(autouse=True)
def backend():
    """Plain torch on every backend: once is enough."""


@pytest.fixture(scope="module")
def authors(golden):
    with np.load(golden("a7_serialization.npz")) as file:
        return dict(file)


def cube(depth):
    """All voxels of a cube of 2^depth a side, [8^depth, 3]."""
    return torch.cartesian_prod(*[torch.arange(1 << depth)] * 3).view(-1, 3)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_codes_are_the_authors(authors, curve, depth):
    grid, batch = (torch.from_numpy(authors[f"d{depth:02d}_{name}"]) for name in ("grid_coord", "batch"))
    assert len(batch.unique()) > 1
    for dtype in (torch.int32, torch.int64):
        code = curve_code(grid.to(dtype), depth, curve)
        assert code.dtype == torch.int64
        np.testing.assert_array_equal(code, authors[f"d{depth:02d}_{curve}_nobatch"])
        np.testing.assert_array_equal(curve_code(grid.to(dtype), depth, curve, batch), authors[f"d{depth:02d}_{curve}"])


@pytest.mark.parametrize(
    ("curve", "visited"),
    [
        # x is the highest of three bits, z the lowest; "-trans" makes y the highest
        ("z", ["000", "001", "010", "011", "100", "101", "110", "111"]),
        ("z-trans", ["000", "001", "100", "101", "010", "011", "110", "111"]),
        # the Gray code: one bit changes from one to the next
        ("hilbert", ["000", "001", "011", "010", "110", "111", "101", "100"]),
        ("hilbert-trans", ["000", "001", "101", "100", "110", "111", "011", "010"]),
    ],
)
def test_the_eight_voxels_of_the_smallest_cube(curve, visited):
    grid = torch.tensor([[int(digit) for digit in voxel] for voxel in visited])
    assert curve_code(grid, 1, curve).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("voxel", "z", "z_trans"),
    [
        ((0, 0, 0), 0, 0),
        ((2, 0, 0), 0b100_000, 0b010_000),
        ((1, 2, 3), 0b011_101, 0b101_011),
        ((5, 3, 6), 0b101_011_110, 0b011_101_110),
        ((65535, 65535, 65535), 2**48 - 1, 2**48 - 1),
        ((32768, 0, 1), 2**47 + 1, 2**46 + 1),
    ],
)
def test_bits_take_turns(voxel, z, z_trans):
    grid = torch.tensor([voxel])
    assert (curve_code(grid, 16, "z").item(), curve_code(grid, 16, "z-trans").item()) == (z, z_trans)
    assert curve_code(grid, 16).item() == z  # the curve by default


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_every_place_of_a_full_cube_is_taken_once(curve, depth):
    assert torch.equal(curve_code(cube(depth), depth, curve).sort().values, torch.arange(8**depth))


@pytest.mark.parametrize("curve", ["hilbert", "hilbert-trans"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_hilbert_goes_from_voxel_to_voxel_that_share_a_face(curve, depth):
    grid = cube(depth)
    along = grid[curve_code(grid, depth, curve).argsort()]
    assert (along.diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("curve", CURVES)
def test_a_cube_of_voxels_is_left_only_when_all_of_it_was_visited(curve):
    """Without its last three bits a code is that of the voxel twice as large, up to how the curve lies in it."""
    grid = cube(4)
    above = curve_code(grid, 4, curve) >> 3
    for place in above.unique():
        assert len((grid[above == place] >> 1).unique(dim=0)) == 1


@pytest.mark.parametrize("curve", CURVES)
def test_samples_come_one_after_the_other(curve):
    grid, batch = cube(2), torch.arange(64) % 5
    code = curve_code(grid, 2, curve, batch.to(torch.int8))
    assert torch.equal(code, batch * 64 + curve_code(grid, 2, curve))
    # the largest sample that has bits left beside 48 of the voxel
    assert curve_code(torch.full((1, 3), 65535), 16, "z", torch.tensor([2**15 - 1])).item() == 2**63 - 1


@pytest.mark.parametrize("curve", CURVES)
def test_no_voxels_have_no_codes(curve):
    nothing = torch.zeros(0, 3, dtype=torch.int32)
    for batch in (None, nothing[:, 0]):
        code = curve_code(nothing, 7, curve, batch)
        assert (code.shape, code.dtype) == ((0,), torch.int64)


def test_the_voxels_are_left_as_they_are():
    grid = cube(2)
    before = grid.clone()
    for curve in CURVES:
        curve_code(grid, 2, curve)
        strided = torch.stack([grid, -grid], 2)[..., 0]
        assert not strided.is_contiguous()
        assert torch.equal(curve_code(strided, 2, curve), curve_code(grid, 2, curve))
    assert torch.equal(grid, before)


def test_what_is_no_curve_is_refused():
    grid = torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"curve_code: curve must be one of .*hilbert-trans.*got 'peano'"):
        curve_code(grid, 3, "peano")
    for depth in (-1, 17):
        with pytest.raises(ValueError, match=rf"expected grid \[N, 3\] and depth 0..16, got \[4, 3\] and {depth}"):
            curve_code(grid, depth)
    for wrong in (grid[:, :2], grid[0], grid[None]):
        with pytest.raises(ValueError, match=r"curve_code: expected grid \[N, 3\]"):
            curve_code(wrong, 3)
