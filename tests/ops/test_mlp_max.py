"""A point MLP and the maximum of each cell, against the layers one by one and the plain maximum."""

import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.ops import PointOrder, mlp_max, native
from kdmos.ops.mlp_max import has_kernel
from kdmos.ops.polar_grid import sort_by_cell

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_the_cpu(backend):
    if backend == "cuda":
        pytest.skip("a GPU goes layer by layer: the op has no CUDA twin")


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def whole(*size, most, seed=0):
    """Whole numbers, whose products add up to the same in any order."""
    return torch.randint(-most, most + 1, size, generator=torch.Generator().manual_seed(seed)).float()


def network(widths, dtype, draw=lambda *size, seed: drawn(*size, seed=seed) / size[-1] ** 0.5):
    """The first layer in float32, the others in `dtype`."""
    types = [torch.float32, *[dtype] * (len(widths) - 2)]
    weights = [draw(o, d, seed=i).to(t) for i, (d, o, t) in enumerate(zip(widths, widths[1:], types))]
    biases = [draw(len(w), 1, seed=9 + i)[:, 0].to(w.dtype) for i, w in enumerate(weights[:-1])]
    return list(zip(weights, biases)), weights[-1]


def layer_by_layer(points, layers, last, cell, num_cells):
    """Summed in float32, each layer rounded to its type."""
    x = points
    for weight, bias in layers:
        x = F.linear(x.to(weight.dtype).float(), weight.float(), bias.float()).to(weight.dtype).relu()
    x = F.linear(x.to(last.dtype).float(), last.float())
    out = torch.zeros(num_cells, len(last))
    for m in cell.unique().tolist():
        if 0 <= m < num_cells:
            out[m] = x[cell == m].amax(0)
    return out.to(last.dtype)


def cells_of(num_points, num_cells, seed=0):
    """Points of many and of few, in no order, and cells that are empty."""
    return (torch.rand(num_points, generator=torch.Generator().manual_seed(seed)) ** 3 * num_cells).long()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(9, 32, 64, 128, 256), (9, 32, 32), (1, 64, 32, 96), (4, 6, 10, 5)])
@pytest.mark.parametrize("num_points", [0, 1, 13, 14, 15, 57, 400])
def test_is_the_network_and_the_maximum(dtype, widths, num_points):
    """To the last bit, of whole numbers, of which bfloat16 holds those that occur before the last layer."""
    layers, last = network(widths[:3], dtype, lambda *size, seed: whole(*size, most=1, seed=seed))
    if len(widths) > 3:
        layers, last = network(widths, dtype)
        points, close = drawn(num_points, widths[0]), {}
    else:
        points, close = whole(num_points, widths[0], most=2), {"rtol": 0, "atol": 0}
    cell = cells_of(num_points, 40)
    found = mlp_max(points, layers, last, sort_by_cell(cell, 40))
    assert found.dtype == dtype
    if dtype == torch.bfloat16 and len(widths) > 3:
        # a sum between two numbers of bfloat16 is rounded up or down as its last digits fall, layer after layer
        close = {"rtol": 0.02, "atol": 0.02}
    assert_close(found, layer_by_layer(points, layers, last, cell, 40), **close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_and_chunks_agree(dtype, monkeypatch):
    """Chunks of one cell and of several; bfloat16 rounds after each layer on both ways."""
    layers, last = network((9, 32, 64, 128, 256), dtype)
    points, order = drawn(3000, 9), sort_by_cell(cells_of(3000, 200), 200)
    found = mlp_max(points, layers, last, order)
    monkeypatch.setattr(native, "multiplies", lambda tensor: False)
    monkeypatch.setattr(sys.modules["kdmos.ops.polar_scatter"], "CHUNK", 64)
    other = mlp_max(points, layers, last, order)
    assert_close(found, other, **({"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}))


def test_a_cell_of_many_tiles_and_points_in_none():
    """The lowest point of a cell may lie in another tile than the largest; padding points count nowhere."""
    layers, last = network((9, 32, 64, 32), torch.float32)
    points = drawn(500, 9)
    cell = torch.full((500,), 1)
    cell[:7], cell[::50] = 0, 3  # 3 is no cell of these
    found = mlp_max(points, layers, last, sort_by_cell(cell, 3))
    assert_close(found, layer_by_layer(points, layers, last, cell, 3))
    assert not found[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_wins(dtype):
    layers, last = network((9, 32, 64), dtype)
    points = drawn(30, 9)
    points[[3, 29]] = torch.nan
    found = mlp_max(points, layers, last, PointOrder(torch.arange(30), torch.tensor([0, 10, 20, 30])))
    assert found.isnan().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_is_cut_off_by_relu(dtype):
    """Minus infinity becomes 0, as everything below."""
    layers, last = [(-torch.ones(32, 1), torch.zeros(32))], torch.eye(32, dtype=dtype)
    points = torch.tensor([[torch.inf], [-torch.inf], [1.0]])
    found = mlp_max(points, layers, last.abs() + 1, PointOrder(torch.arange(3), torch.arange(4)))
    assert found[:, 0].tolist() == [0, torch.inf, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "start", [[10, 20, 20, 90], [60, 60, 60, 61], [0, 0, 0, 3, 3, 100, 100, 100], [0] * 4, [100] * 4, [0], [100]]
)
def test_cells_that_are_empty_or_begin_late(dtype, start):
    """At either end, on more threads than there are points in some; points before the first and after the last."""
    layers, last = network((9, 32, 64), dtype, lambda *size, seed: whole(*size, most=1, seed=seed))
    points, order = whole(100, 9, most=2), torch.randperm(100, generator=torch.Generator().manual_seed(0))
    cell = torch.full((100,), -1)
    for m, (first, end) in enumerate(pairwise(start)):
        cell[order[first:end]] = m
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 64):
            torch.set_num_threads(threads)
            found = mlp_max(points, layers, last, PointOrder(order, torch.tensor(start)))
            assert torch.equal(found, layer_by_layer(points, layers, last, cell, len(start) - 1))
    finally:
        torch.set_num_threads(before)


def test_layout_does_not_matter():
    """Every other value of something larger."""

    def spread(tensor):
        return torch.stack([tensor, tensor], -1)[..., 0]

    layers, last = network((9, 32, 64, 32), torch.float32)
    points, order = drawn(50, 9), sort_by_cell(cells_of(50, 7), 7)
    found = mlp_max(spread(points), [(spread(w), spread(b)) for w, b in layers], spread(last), order)
    assert torch.equal(found, mlp_max(points, layers, last, order))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_neighbours_do_not_change_the_result(dtype):
    layers, last = network((9, 32, 64, 128, 256), dtype)
    points, order = drawn(1000, 9), sort_by_cell(cells_of(1000, 60), 60)
    if not has_kernel(points, [w for w, _ in layers] + [last]):
        pytest.skip("torch's products need not keep to that")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(mlp_max(points, layers, last, order))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    first = order.start[1]
    alone = mlp_max(points, layers, last, PointOrder(order.order, torch.tensor([0, first])))
    assert torch.equal(alone, results[0][:1])


def test_says_what_has_a_kernel(backend, monkeypatch):
    points, built = drawn(5, 9), native.instructions()
    layers, last = network((9, 32, 64), torch.float32)
    weights = [layers[0][0], last]
    assert has_kernel(points, weights) == (backend == "native" and built.startswith("AVX-512"))
    assert not has_kernel(points, [layers[0][0], last[:40]]) and not has_kernel(points.double(), weights)
    assert not has_kernel(points, [layers[0][0].bfloat16(), last]) and not has_kernel(points, [weights[0], last.half()])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert not has_kernel(points, [weights[0], last.bfloat16()])


@pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
def test_the_kernel_is_on_the_way_of_the_student(backend, monkeypatch):
    """Where the processor has it; else a slow way would go unseen."""
    from kdmos.models import build_student
    from kdmos.models.fast import FastStudent
    from kdmos.settings import PolarGrid

    fast = FastStudent(build_student("kdmos", grid=PolarGrid(bins=(16, 16, 4))).eval())
    chunked = []
    module = sys.modules["kdmos.ops.mlp_max"]
    monkeypatch.setattr(module, "chunks", lambda start, chunks=module.chunks: chunked.append(1) or chunks(start))
    fast(drawn(50, 4), torch.tensor([0, 50]), torch.zeros(50, 8))
    assert bool(chunked) == (backend == "reference" or not native.instructions().startswith("AVX-512"))


def test_refuses_what_does_not_fit():
    layers, last = network((9, 32, 64, 32), torch.float32)
    order = PointOrder(torch.arange(5), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"expected weight \[D', 8\] and bias \[D'\], got \[32, 9\] and \[32\]"):
        mlp_max(drawn(5, 8), layers, last, order)
    with pytest.raises(ValueError, match=r"expected weight \[D', 64\] and bias \[D'\], got \[32, 32\]"):
        mlp_max(drawn(5, 9), layers, last[:, :32], order)
    with pytest.raises(ValueError, match=r"got \[32, 9\] and \[1\]"):
        mlp_max(drawn(5, 9), [(layers[0][0], layers[0][1][:1]), layers[1]], last, order)
    with pytest.raises(ValueError, match="mlp_max: 6 points, but an order of 5"):
        mlp_max(drawn(6, 9), layers, last, order)


def test_the_kernel_reads_nothing_elsewhere(backend):
    layers, last = network((9, 32, 64), torch.float32)
    points, order, start = drawn(5, 9), torch.arange(5), torch.tensor([0, 2, 5])
    if not has_kernel(points, [layers[0][0], last]):
        pytest.skip("torch checks its own")
    for wrong in ([0, 6], [3, 2, 5], [-1, 5]):
        with pytest.raises(RuntimeError, match="mlp_max: start must ascend within 0 and 6"):
            mlp_max(points, layers, last, PointOrder(order, torch.tensor(wrong)))
    for wrong in (5, -1):
        with pytest.raises(RuntimeError, match="mlp_max: order must lie within 0 and 5"):
            mlp_max(points, layers, last, PointOrder(torch.tensor([0, 1, wrong, 3, 4]), start))
    for wrong in (PointOrder(order.int(), start), PointOrder(order, start.int()), PointOrder(order, start[:0])):
        with pytest.raises(RuntimeError, match=r"mlp_max: order \[N\] and start \[M \+ 1\], contiguous int64"):
            mlp_max(points, layers, last, wrong)
