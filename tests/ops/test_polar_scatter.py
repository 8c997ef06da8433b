"""Largest feature per BEV cell: against a plain loop, ties, padding, gradients, and the dense layout."""

import math

import pytest
import torch
from torch.testing import assert_close

from kdmos.ops import PointOrder, cell_max, cells_to_bev, polar_grid, polar_scatter, polar_scatter_bev
from kdmos.ops.polar_scatter import sorted_max
from kdmos.settings import PolarGrid

SMALL = PolarGrid(bins=(5, 6, 3))


def looped(features, cell, num_cells):
    """The definition, one number at a time."""
    maximum = torch.zeros(num_cells, features.shape[1], dtype=features.dtype)
    argmax = torch.full((num_cells, features.shape[1]), -1)
    for point, target in enumerate(cell.tolist()):
        if 0 <= target < num_cells:
            for channel, value in enumerate(features[point].tolist()):
                if argmax[target, channel] < 0 or value > maximum[target, channel]:
                    maximum[target, channel], argmax[target, channel] = value, point
    return maximum, argmax


def random_points(num_points, channels, num_cells, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_points, channels, generator=generator).to(dtype)
    return features, torch.randint(0, num_cells, (num_points,), generator=generator)


def test_worked_by_hand():
    features = torch.tensor([[1.0, -5.0], [3.0, -2.0], [3.0, -7.0], [0.0, 4.0]])
    maximum, argmax = polar_scatter(features, torch.tensor([2, 2, 2, 0]), 4)
    # cell 2: the largest of negative numbers is negative; equal 3s: the lower point
    assert maximum.tolist() == [[0, 4], [0, 0], [3, -2], [0, 0]]
    assert argmax.tolist() == [[3, 3], [-1, -1], [1, 1], [-1, -1]]
    assert argmax.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_points", "channels", "num_cells"), [(1, 1, 1), (41, 5, 7), (401, 3, 400), (97, 33, 2)])
def test_equals_the_loop(num_points, channels, num_cells, dtype):
    features, cell = random_points(num_points, channels, num_cells, dtype=dtype)
    maximum, argmax = polar_scatter(features, cell, num_cells)
    expected, point = looped(features, cell, num_cells)
    assert maximum.dtype == dtype
    assert torch.equal(maximum, expected)
    assert torch.equal(argmax, point)


def test_ties_go_to_the_lowest_point():
    features, cell = random_points(500, 4, 20)
    features = features.round()  # about five different values
    maximum, argmax = polar_scatter(features, cell, 20)
    expected, point = looped(features, cell, 20)
    assert torch.equal(maximum, expected)
    assert torch.equal(argmax, point)


def test_ranks_outside_are_padding():
    features = torch.tensor([[9.0], [1.0], [9.0], [9.0], [2.0]])
    maximum, argmax = polar_scatter(features, torch.tensor([-1, 0, 2, 1000, 0]), 2)
    assert maximum.tolist() == [[2], [0]]
    assert argmax.tolist() == [[4], [-1]]


def test_infinite_features():
    features = torch.tensor([[-math.inf], [math.inf], [1.0]])
    maximum, argmax = polar_scatter(features, torch.tensor([0, 1, 1]), 2)
    assert maximum.tolist() == [[-math.inf], [math.inf]]
    assert argmax.tolist() == [[0], [1]]


@pytest.mark.parametrize(("num_points", "channels", "num_cells"), [(0, 3, 2), (0, 3, 0), (2, 3, 0), (2, 0, 3)])
def test_nothing_in_or_out(num_points, channels, num_cells):
    features = torch.zeros(num_points, channels, requires_grad=True)
    maximum, argmax = polar_scatter(features, torch.zeros(num_points, dtype=torch.int64), num_cells)
    assert maximum.shape == argmax.shape == (num_cells, channels)
    assert not maximum.any()
    assert (argmax == -1).all()
    if num_points:
        maximum.sum().backward()
        assert not features.grad.any()


def test_non_contiguous_features():
    features, cell = random_points(60, 8, 9)
    expected = polar_scatter(features, cell, 9)
    for strided in (features.T.contiguous().T, torch.stack([features, features * 2], 2)[..., 0]):
        assert not strided.is_contiguous()
        maximum, argmax = polar_scatter(strided, cell, 9)
        assert torch.equal(maximum, expected[0])
        assert torch.equal(argmax, expected[1])


def test_gradient_goes_to_one_point():
    features = torch.tensor([[3.0, 1.0], [3.0, 2.0], [9.0, 9.0]], requires_grad=True)
    maximum, _ = polar_scatter(features, torch.tensor([1, 1, 5]), 2)
    maximum.backward(torch.tensor([[100.0, 100.0], [0.5, -0.25]]))  # cell 0 is empty
    # of the two equal 3s only the lower one; the padding none
    assert features.grad.tolist() == [[0.5, 0], [0, -0.25], [0, 0]]


def test_gradcheck():
    features, cell = random_points(30, 3, 8, dtype=torch.float64)
    cell[5] = -1
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: polar_scatter(x, cell, 9)[0], features)


def test_argmax_has_no_gradient():
    features, cell = random_points(10, 2, 3)
    assert not polar_scatter(features.requires_grad_(), cell, 3)[1].requires_grad


def test_refuses_what_does_not_fit():
    cell = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"polar_scatter: expected features \[N, C\] and cell \[N\], got \[4, 2\]"):
        polar_scatter(torch.zeros(4, 2), cell, 1)
    with pytest.raises(ValueError, match="polar_scatter: expected features"):
        polar_scatter(torch.zeros(3), cell, 1)
    with pytest.raises(ValueError, match=r"polar_scatter: features must be floating point, got torch\.int64"):
        polar_scatter(torch.zeros(3, 2, dtype=torch.int64), cell, 1)


def sorted_by(cell, num_cells):
    """The points by cell, those in none of them last."""
    cell = torch.where((cell >= 0) & (cell < num_cells), cell, num_cells)
    return PointOrder(cell.argsort(stable=True), torch.searchsorted(cell.sort().values, torch.arange(num_cells + 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_points", "channels", "num_cells"),
    [(1, 1, 1), (41, 5, 7), (401, 3, 400), (97, 33, 2), (900, 64, 9), (0, 3, 2), (2, 3, 0), (2, 0, 3)],
)
def test_cell_max_is_the_maximum_of_polar_scatter(num_points, channels, num_cells, dtype):
    """To the bit: of short and long cells and empty ones, of points in none, of NaN and infinity."""
    features, cell = random_points(num_points, channels, max(1, num_cells), dtype=dtype)
    features.flatten()[::50], features.flatten()[1::70], features.flatten()[2::90] = math.nan, math.inf, -math.inf
    cell[::5], cell[3::11] = -1, num_cells
    order = sorted_by(cell, num_cells)
    expected, _ = polar_scatter(features, cell, num_cells)
    found = cell_max(features, order)
    assert found.dtype == dtype
    assert torch.equal(found.nan_to_num(7e4), expected.nan_to_num(7e4))
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isposinf(), expected.isposinf())
    assert torch.equal(sorted_max(features[order.order], order.start).isnan(), expected.isnan())


def test_cell_max_worked_by_hand():
    features = torch.tensor([[9.0], [-3.0], [-2.0], [5.0], [9.0]])
    order = PointOrder(torch.tensor([0, 3, 2, 1, 4]), torch.tensor([1, 2, 2, 4]))  # the first and the last are in none
    assert cell_max(features, order).tolist() == [[5], [0], [-2]]
    assert cell_max(features.T.contiguous().T, order).tolist() == [[5], [0], [-2]]


def test_cell_max_refuses_what_does_not_fit():
    order = PointOrder(torch.arange(3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"cell_max: expected features \[N, C\] and an order \[N\], got \[4, 2\] and"):
        cell_max(torch.zeros(4, 2), order)
    with pytest.raises(ValueError, match="cell_max: expected features"):
        cell_max(torch.zeros(3), order)
    with pytest.raises(ValueError, match=r"cell_max: features must be floating point, got torch\.int64"):
        cell_max(torch.zeros(3, 2, dtype=torch.int64), order)


@pytest.mark.parametrize("start", [[0, 6], [3, 2, 5], [-1, 5]])
def test_a_start_outside_is_refused_or_cut(start, backend):
    """A CPU looks; a GPU, where looking would wait for it, reads and writes nothing elsewhere."""
    features, starts, order = torch.ones(5, 2), torch.tensor(start), torch.arange(5)
    argmax = torch.zeros(len(start) - 1, 2, dtype=torch.int64)
    calls = {
        "polar_scatter": lambda op: op(features, order, starts),
        "cell_max": lambda op: op(features, order, starts),
        "polar_scatter_bev": lambda op: op(features, order, starts, torch.arange(len(start) - 1), 3),
        "polar_scatter_backward": lambda op: op(torch.ones(argmax.shape), argmax, order, starts, 5),
    }
    for name, call in calls.items():
        if backend == "native":
            with pytest.raises(RuntimeError, match=f"{name}: start must ascend within 0 and 6"):
                call(getattr(torch.ops.kdmos, name))
        elif backend == "cuda":
            call(getattr(torch.ops.kdmos, name))


@pytest.mark.parametrize("num_points", [20, 100])
def test_an_order_outside_is_refused_or_skipped(num_points, backend):
    features, order = torch.arange(num_points * 2.0).view(-1, 2) - 9, torch.arange(num_points)
    order[-3:] = torch.tensor([num_points, -1, 2**40])
    start, argmax = torch.tensor([0, num_points]), torch.full((1, 2), num_points - 4)
    ops = torch.ops.kdmos
    if backend == "native":
        for name in ("polar_scatter", "cell_max"):
            with pytest.raises(RuntimeError, match=f"{name}: order must lie within 0 and {num_points}"):
                getattr(ops, name)(features, order, start)
        with pytest.raises(RuntimeError, match="polar_scatter_backward: order must lie within"):
            ops.polar_scatter_backward(torch.ones(1, 2), argmax, order, start, num_points)
    if backend == "cuda":
        expected = features[[num_points - 4]]
        maximum, point = ops.polar_scatter(features, order, start)
        assert torch.equal(maximum, expected) and torch.equal(point, argmax)
        assert torch.equal(ops.cell_max(features, order, start), expected)
        gradient = ops.polar_scatter_backward(torch.ones(1, 2), argmax, order, start, num_points)
        assert gradient[num_points - 4].tolist() == [1, 1] and not gradient[: num_points - 4].any()
        maximum, point = ops.polar_scatter(features[:2], order[-2:], torch.tensor([0, 2]))  # none that is inside
        assert maximum.tolist() == [[0, 0]] and point.tolist() == [[-1, -1]]


def test_points_before_the_first_cell_get_no_gradient(backend):
    if backend == "reference":
        pytest.skip("which takes no start")
    gradient = torch.ops.kdmos.polar_scatter_backward(
        torch.ones(1, 2), torch.full((1, 2), 4), torch.arange(9), torch.tensor([3, 6]), 9
    )
    assert gradient[4].tolist() == [1, 1] and gradient.sum() == 2


def test_cells_to_bev_worked_by_hand():
    # R x A = 5 x 6: cell 8 is ring 1, sector 2 of scan 0; cell 59 the last one of scan 1
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    bev = cells_to_bev(values, torch.tensor([8, 59]), 2, SMALL)
    assert bev.shape == (2, 3, 5, 6)
    assert bev.is_contiguous(memory_format=torch.channels_last)
    assert bev[0, :, 1, 2].tolist() == [1, 2, 3]
    assert bev[1, :, 4, 5].tolist() == [4, 5, 6]
    assert bev.count_nonzero() == 6


def test_cells_to_bev_without_cells():
    bev = cells_to_bev(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, SMALL)
    assert bev.shape == (2, 4, 5, 6)
    assert not bev.any()


def test_cells_to_bev_refuses_another_count():
    with pytest.raises(ValueError, match="cells_to_bev: 3 values but 2 cells"):
        cells_to_bev(torch.zeros(3, 1), torch.tensor([0, 1]), 1, SMALL)


def test_straight_into_the_dense_layout():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(200, 4, generator=generator) * 15
    features = torch.randn(200, 3, generator=generator, dtype=torch.float64).requires_grad_()
    gridded = polar_grid(points, torch.tensor([0, 120, 120, 200]), SMALL)  # the middle scan has no point
    bev = polar_scatter_bev(features, gridded.cell_rank, gridded.cells, 3, SMALL)
    assert bev.shape == (3, 3, 5, 6)
    assert not bev[1].any()
    maximum, _ = polar_scatter(features, gridded.cell_rank, len(gridded.cells))
    assert torch.equal(bev.permute(0, 2, 3, 1).reshape(-1, 3)[gridded.cells], maximum)
    assert bev.count_nonzero() == maximum.count_nonzero()
    weight = torch.randn(bev.shape, generator=generator, dtype=torch.float64)
    (dense,) = torch.autograd.grad((bev * weight).sum(), features)
    at_cells = weight.permute(0, 2, 3, 1).reshape(-1, 3)[gridded.cells]
    (sparse,) = torch.autograd.grad((maximum * at_cells).sum(), features)
    assert_close(dense, sparse)


@pytest.mark.parametrize("padding", [0, 1, 150])
def test_fixed_size(padding):
    """Padding points and cells change nothing: neither the maxima nor the dense layout, nor the gradient."""
    generator = torch.Generator().manual_seed(1)
    points, offsets = torch.randn(200 + padding, 4, generator=generator) * 15, torch.tensor([0, 120, 120, 200])
    features = torch.randn(200 + padding, 3, generator=generator, dtype=torch.float64) - 5
    features[200:] = math.inf
    plain = polar_grid(points[:200], offsets, SMALL)
    maximum, argmax = polar_scatter(features[:200], plain.cell_rank, len(plain.cells), plain.by_cell)
    bev = cells_to_bev(maximum, plain.cells, 3, SMALL)

    gridded = polar_grid(points, offsets, SMALL, fixed_size=True)
    features.requires_grad_()
    ours, point = polar_scatter(features, gridded.cell_rank, len(gridded.cells), gridded.by_cell)
    for found, wanted, empty in ((ours, maximum, 0), (point, argmax, -1)):
        assert len(found) == 200 + padding
        assert torch.equal(found[: len(wanted)], wanted)
        assert (found[len(wanted) :] == empty).all()
    (gradient,) = torch.autograd.grad(ours.sum(), features)
    assert gradient[:200].sum() == argmax.numel()
    assert not gradient[200:].any()
    ours, features = ours.detach(), features.detach()
    assert torch.equal(cells_to_bev(ours, gridded.cells, 3, SMALL), bev)
    assert torch.equal(sorted_max(features[gridded.order], gridded.cell_start), ours)
    order = gridded.by_cell
    assert torch.equal(polar_scatter_bev(features, gridded.cell_rank, gridded.cells, 3, SMALL, order), bev)


def test_of_a_cell_that_occurs_twice_the_later_one_stays(backend):
    if backend == "cuda":
        pytest.skip("in no fixed order there")
    grid = PolarGrid(bins=(16, 20, 8))
    dense = cells_to_bev(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([3, 3, 7]), 1, grid).flatten()
    assert dense[3] == 2 and dense[7] == 3 and dense.sum() == 5
