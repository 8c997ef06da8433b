"""Convolution over occupied voxels: the authors' outputs, a dense convolution, spconv, voxels that occur twice."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.ops import find_neighbours, native, submanifold_conv
from kdmos.ops.submanifold_conv import CENTRE, OFFSETS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, params=native.BACKENDS)
def backend(request):
    """Plain torch but for adding rows on a CPU, so there is no kernel to run on a GPU."""
    if request.param == "native" and not native.BUILT:
        pytest.skip("the native ops are not built")
    with native.backend(request.param):
        yield


def random_voxels(num_voxels, side, num_samples=1, seed=0, twice=False):
    """grid [N, 3], batch [N]; not sorted; each voxel once, unless `twice`."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(num_samples * side**3, (num_voxels,), generator=generator)
    if not twice:
        place = place.unique()[torch.randperm(len(place.unique()), generator=generator)]
    batch, place = place // side**3, place % side**3
    return torch.stack([place // side**2, place // side % side, place % side], 1), batch


def random_layer(num_voxels, channels=5, outputs=7, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_voxels, channels, generator=generator, dtype=dtype)
    weight = torch.randn(outputs, 3, 3, 3, channels, generator=generator, dtype=dtype)
    return x, weight, torch.randn(outputs, generator=generator, dtype=dtype)


def dense_conv(x, weight, bias, grid, batch):
    """The same by a convolution over all voxels, the empty ones 0; each voxel occurs once."""
    volume = x.new_zeros(int(batch.max()) + 1, *(grid.amax(0) + 1).tolist(), x.shape[1])
    volume = volume.index_put((batch, *grid.T), x).permute(0, 4, 1, 2, 3)
    out = F.conv3d(volume, weight.permute(0, 4, 1, 2, 3), bias, padding=1)
    return out.permute(0, 2, 3, 4, 1)[(batch, *grid.T)]


def test_outputs_are_the_authors(golden):
    with np.load(golden("a7_subm_conv.npz")) as file:
        x, expected, weight, bias, grid, batch = (
            torch.from_numpy(file[f"subm_{name}"]) for name in ("x", "y", "w", "b", "grid_coord", "batch")
        )
    out = submanifold_conv(x, weight, bias, find_neighbours(grid, batch))
    assert_close(out, expected, rtol=0, atol=1e-6)  # sums of up to 135 products of size 0.1, in another order


@pytest.mark.parametrize(("num_voxels", "side", "num_samples"), [(1, 1, 1), (30, 3, 1), (300, 8, 3), (400, 30, 2)])
def test_equals_a_dense_convolution(num_voxels, side, num_samples):
    grid, batch = random_voxels(num_voxels, side, num_samples)
    x, weight, bias = random_layer(len(grid), dtype=torch.float64)
    for given in (bias, None):
        out = submanifold_conv(x, weight, given, find_neighbours(grid, batch))
        assert_close(out, dense_conv(x, weight, given, grid, batch))


def test_gradients_are_those_of_a_dense_convolution():
    grid, batch = random_voxels(200, 7, 2)
    layer = [tensor.requires_grad_() for tensor in random_layer(len(grid), dtype=torch.float64)]
    to_out = torch.randn(len(grid), 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(submanifold_conv(*layer, find_neighbours(grid, batch)), layer, to_out)
    expected = torch.autograd.grad(dense_conv(*layer, grid, batch), layer, to_out)
    for gradient, wanted in zip(ours, expected):
        assert_close(gradient, wanted)


def test_gradcheck_with_voxels_that_occur_twice():
    grid, batch = random_voxels(12, 2, 2, twice=True)
    assert len(torch.cat([grid, batch[:, None]], 1).unique(dim=0)) < len(grid)
    neighbours = find_neighbours(grid, batch)
    layer = [tensor.requires_grad_() for tensor in random_layer(len(grid), 2, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *layer: submanifold_conv(*layer, neighbours), layer)


def test_only_the_gradients_that_are_wanted():
    grid, batch = random_voxels(30, 4)
    x, weight, bias = random_layer(len(grid))
    neighbours = find_neighbours(grid, batch)
    for i in range(3):
        layer = [tensor.clone().requires_grad_(j == i) for j, tensor in enumerate((x, weight, bias))]
        submanifold_conv(*layer, neighbours).square().sum().backward()
        assert [tensor.grad is not None for tensor in layer] == [j == i for j in range(3)]


def test_neighbours_by_hand():
    """Four voxels of one sample, and one of another at the place of the first."""
    grid = torch.tensor([[1, 1, 1], [1, 1, 2], [2, 0, 1], [5, 5, 5], [1, 1, 1]])
    found = find_neighbours(grid, torch.tensor([0, 0, 0, 0, 1]))
    pairs = {
        offset: list(zip(here.tolist(), there.tolist()))
        for offset, here, there in zip(OFFSETS[CENTRE + 1 :], found.here, found.there)
    }
    expected = {(0, 0, 1): [(0, 1)], (1, -1, 0): [(0, 2)], (1, -1, -1): [(1, 2)]}
    assert pairs == {offset: expected.get(offset, []) for offset in OFFSETS[CENTRE + 1 :]}


def test_equal_rows_stand_next_to_each_other():
    """What adding rows on a GPU relies on, in both directions, where voxels occur many times too."""
    grid, batch = random_voxels(300, 4, 2, twice=True)
    found = find_neighbours(grid, batch)
    assert any(len(there.unique()) < len(there) for there in found.there)
    for index in (*found.here, *found.there):
        assert len(index.unique_consecutive()) == len(index.unique())


def test_voxels_at_opposite_ends_are_no_neighbours():
    """One key a voxel: what leaves an axis, or a sample, must not come back in the next one."""
    side = 3
    corners = torch.cartesian_prod(*[torch.tensor([0, side - 1])] * 3)
    grid, batch = corners.repeat(3, 1), torch.arange(3).repeat_interleave(8)
    assert all(len(here) == 0 for here in find_neighbours(grid, batch).here)
    far = [[0, 0, 65535], [0, 1, 0], [0, 65535, 65535], [2, 0, 0], [65535, 65535, 65535], [0, 0, 0]]
    grid, batch = torch.tensor([*far, [5, 5, 5], [5, 5, 6]]), torch.tensor([0, 0, 0, 0, 0, 1, 30000, 30000])
    here, there = find_neighbours(grid, batch)  # the largest keys that there may be
    assert [pair.tolist() for pair in (torch.cat(here), torch.cat(there))] == [[6], [7]]


def test_the_weights_are_those_of_the_neighbours_offset():
    """One voxel with value 1: at each voxel around it stands the weight of the way from there to it."""
    grid = torch.tensor(OFFSETS) + 4
    x = torch.zeros(27, 1)
    x[CENTRE] = 1
    weight = torch.arange(27.0).view(1, 3, 3, 3, 1)
    out = submanifold_conv(x, weight, None, find_neighbours(grid, torch.zeros(27, dtype=torch.int64)))
    assert out[:, 0].tolist() == list(range(26, -1, -1))


def test_of_a_voxel_that_occurs_twice_the_first_is_found():
    """Voxels look for neighbours on one side alone, and whom they find hears them too: as spconv does it."""
    one_voxel, upper = [3, 3, 3], [3, 3, 4]
    x = torch.tensor([[1.0], [10.0], [100.0]])
    weight = torch.zeros(1, 3, 3, 3, 1)
    weight[0, 1, 1, :, 0] = torch.tensor([1.0, 2.0, 3.0])  # of the voxel below, of itself, of the one above

    def convolved(*rows):
        neighbours = find_neighbours(torch.tensor(rows), torch.zeros(3, dtype=torch.int64))
        return submanifold_conv(x, weight, None, neighbours)[:, 0].tolist()

    # the lower one twice: both find the upper one, which hears both
    assert convolved(one_voxel, upper, one_voxel) == [2 + 30, 1 + 20 + 100, 200 + 30]
    # the upper one twice: the lower one finds the first, and the second hears nobody
    assert convolved(upper, one_voxel, upper) == [2 + 10, 20 + 3, 200]


@pytest.mark.parametrize("seed", range(20))
def test_equals_spconv(seed):
    """Random voxels of up to four samples, many of them twice or more, down to a single one."""
    spconv = pytest.importorskip("spconv.pytorch", reason="needs spconv", exc_type=ImportError)
    generator = torch.Generator().manual_seed(seed)
    num_voxels = 1 if seed == 0 else int(torch.randint(2, 400, (1,), generator=generator))
    side, num_samples = (int(torch.randint(1, most, (1,), generator=generator)) for most in (12, 5))
    grid, batch = random_voxels(num_voxels, side, num_samples, seed, twice=True)
    batch = batch.sort().values
    x, weight, _ = random_layer(num_voxels, seed=seed)

    layer = spconv.SubMConv3d(5, 7, 3, bias=False, indice_key="here").eval()
    layer.weight.data = weight
    rows, shape = torch.cat([batch[:, None], grid], 1).int(), (grid.amax(0) + 1).tolist()
    assert torch.get_num_threads() == 1  # its threads add to the same row, unguarded, where a voxel occurs twice
    with torch.no_grad():
        expected = layer(spconv.SparseConvTensor(x, rows, shape, num_samples)).features
    ours = submanifold_conv(x, weight, None, find_neighbours(grid, batch))
    # sums of up to some thousand products of size 1, in another order
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_the_order_of_the_voxels_does_not_matter():
    grid, batch = random_voxels(200, 7, 2)
    x, weight, bias = random_layer(len(grid), dtype=torch.float64)
    order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(1))
    out = submanifold_conv(x, weight, bias, find_neighbours(grid, batch))
    moved = submanifold_conv(x[order], weight, bias, find_neighbours(grid[order] + 5, batch[order]))
    assert_close(moved, out[order])


def test_no_voxels():
    grid, batch = torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, dtype=torch.int8)
    x, weight, bias = (tensor.requires_grad_() for tensor in random_layer(0))
    neighbours = find_neighbours(grid, batch)
    assert [len(side) for side in neighbours] == [CENTRE, CENTRE]
    out = submanifold_conv(x, weight, bias, neighbours)
    assert out.shape == (0, 7)
    out.sum().backward()
    assert x.grad.shape == (0, 5)
    assert not weight.grad.any() and not bias.grad.any()


def test_non_contiguous_and_small_integers():
    grid, batch = random_voxels(100, 5, 2)
    x, weight, bias = random_layer(len(grid), dtype=torch.float64)
    expected = submanifold_conv(x, weight, bias, find_neighbours(grid, batch))
    small = find_neighbours(grid.T.contiguous().T.to(torch.int16), batch.to(torch.int8))
    strided = weight.permute(4, 1, 2, 3, 0).contiguous().permute(4, 1, 2, 3, 0)
    assert not strided.is_contiguous()
    assert_close(submanifold_conv(x.T.contiguous().T, strided, bias, small), expected)


def test_autocast_computes_in_bfloat16():
    grid, batch = random_voxels(200, 6, 2)
    layer = [tensor.requires_grad_() for tensor in random_layer(len(grid))]
    neighbours = find_neighbours(grid, batch)
    expected = submanifold_conv(*layer, neighbours)
    wanted = torch.autograd.grad(expected.square().sum(), layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert submanifold_conv(*layer[:2], None, neighbours).dtype == torch.bfloat16
        out = submanifold_conv(*layer, neighbours)
    gradients = torch.autograd.grad(out.float().square().sum(), layer)
    for actual, reference in zip((out, *gradients), (expected, *wanted)):
        # 8 bits each: factors are off by up to 2^-9 and so are up to 27 roundings of the sum
        assert (actual.float() - reference).norm() < 0.02 * reference.norm()
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(dtype):
    """27 times 129, which 8 bits do not hold: rounded once, both ways."""
    grid = torch.tensor(OFFSETS) + 1
    x = torch.full((27, 1), 129.0, dtype=dtype, requires_grad=True)
    out = submanifold_conv(
        x, torch.ones(1, 3, 3, 3, 1, dtype=dtype), None, find_neighbours(grid, torch.zeros(27, dtype=torch.int64))
    )
    assert out.dtype == dtype and out[CENTRE] == torch.tensor(27 * 129.0).to(dtype)
    out.backward(torch.full_like(out, 129.0))
    assert x.grad.dtype == dtype and x.grad[CENTRE] == torch.tensor(27 * 129.0).to(dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_on_a_gpu_as_on_a_cpu(dtype, backend):
    """Voxels that occur twice among them; the same to the bit each time."""
    grid, batch = random_voxels(400, 6, 2, twice=True)
    layer = [tensor.to(dtype).requires_grad_() for tensor in random_layer(400, 16, 24, dtype=torch.float64)]
    upstream = torch.randn(400, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)

    def run(device):
        there = [tensor.detach().to(device).requires_grad_() for tensor in layer]
        out = submanifold_conv(*there, find_neighbours(grid.to(device), batch.to(device)))
        return [tensor.cpu() for tensor in (out, *torch.autograd.grad(out, there, upstream.to(device)))]

    first, second, expected = run("cuda"), run("cuda"), run("cpu")
    for one, other, wanted in zip(first, second, expected):
        if backend == "native":
            assert torch.equal(one, other)
        # sums of some hundred products in another order; of bfloat16, products that are rounded to 8 bits
        close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
        assert (one.double() - wanted.double()).norm() <= close * wanted.double().norm()


def test_what_does_not_fit_is_refused():
    grid, batch = random_voxels(20, 4)
    x, weight, bias = random_layer(len(grid))
    neighbours = find_neighbours(grid, batch)
    for wrong in (weight[..., :4], weight[:, :2], weight[0], weight.permute(0, 4, 1, 2, 3)):
        with pytest.raises(ValueError, match=r"submanifold_conv: expected x \[N, C\] and weight \[D, 3, 3, 3, C\]"):
            submanifold_conv(x, wrong, bias, neighbours)
    with pytest.raises(ValueError, match=r"got \[5\] and \[7, 3, 3, 3, 5\]"):
        submanifold_conv(x[0], weight, bias, neighbours)
    for voxels, samples in ((grid[:, :2], batch), (grid[0], batch), (grid, batch[:-1]), (grid, batch[:, None])):
        with pytest.raises(ValueError, match=r"find_neighbours: expected grid \[N, 3\] and batch \[N\]"):
            find_neighbours(voxels, samples)
