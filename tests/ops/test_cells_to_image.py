"""The normalised dense image: by hand, against the definition, padding, crowded and empty places, types."""

import pytest
import torch
from torch.testing import assert_close

from kdmos.ops import cells_to_bev, cells_to_image, native, reference
from kdmos.settings import PolarGrid

GRIDS = [PolarGrid(bins=bins) for bins in ((2, 2, 2), (5, 6, 3), (16, 16, 2), (41, 25, 2))]
HALF = [torch.float16, torch.bfloat16]


def random(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_cells(num_cells, num_places, seed=0):
    return torch.randperm(num_places, generator=torch.Generator().manual_seed(seed))[:num_cells].sort()[0]


def check(values, cells, num_scans, grid, dtype):
    factor, background = random(values.shape[1], seed=1), random(values.shape[1], seed=2)
    image = cells_to_image(values, cells, factor, background, num_scans, grid, dtype)
    expected = reference.cells_to_image(values, cells, factor, background, num_scans, grid, dtype)
    assert image.dtype == dtype
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert_close(image, expected)  # a fused multiply-add is rounded once, torch's twice
    rows = image.permute(0, 2, 3, 1).flatten(0, 2)
    empty = torch.ones(len(rows), dtype=torch.bool)
    empty[cells[cells < len(rows)]] = False
    assert torch.equal(rows[empty], background.to(dtype).expand(int(empty.sum()), -1))
    return image


def test_worked_by_hand():
    values, cells = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 3])
    factor, background = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    image = cells_to_image(values, cells, factor, background, 1, PolarGrid(bins=(2, 2, 2)), torch.float32)
    assert image.shape == (1, 2, 2, 2)
    assert image[0, 0].tolist() == [[0.5, 2.5], [0.5, 6.5]]
    assert image[0, 1].tolist() == [[0.25, -1.75], [0.25, -3.75]]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid.bins)))
@pytest.mark.parametrize("channels", [1, 3, 8, 32, 40])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_equals_the_definition(grid, channels, dtype):
    places = 2 * grid.bins[0] * grid.bins[1]
    for share in (0, 0.2, 1):
        cells = some_cells(round(share * places), places)
        for value_dtype in {torch.float32, dtype}:
            check(random(len(cells), channels, dtype=value_dtype), cells, 2, grid, dtype)


@pytest.mark.parametrize(
    "cells",
    [
        [0],
        [1024],
        [0, 1024],
        [255, 256],
        range(256),
        range(256, 512),
        range(200, 300),
        [0, 255, 256, 511, 512, 767, 768, 1023, 1024],
        range(1, 1025, 2),
    ],
    ids=str,
)
def test_wherever_the_cells_lie(cells):
    """In one run of 256 places, in none, at their borders."""
    cells = torch.tensor(list(cells))
    check(random(len(cells), 16), cells, 1, GRIDS[3], torch.bfloat16)


@pytest.mark.parametrize("num_padding", [1, 31, 33, 5000])
@pytest.mark.parametrize("num_cells", [0, 1, 77, 1025])
def test_padding_is_skipped(num_cells, num_padding):
    """Also where it is not the number of places but more."""
    cells, values = some_cells(num_cells, 1025), random(num_cells + num_padding, 8)
    for padding in (1025, 1 << 40):
        padded = torch.cat([cells, torch.full((num_padding,), padding)])
        image = check(values, padded, 1, GRIDS[3], torch.bfloat16)
        assert torch.equal(image, check(values[:num_cells], cells, 1, GRIDS[3], torch.bfloat16))


def test_no_norm_is_the_plain_layout():
    cells, values = some_cells(300, 1025), random(300, 5)
    image = cells_to_image(values, cells, torch.ones(5), torch.zeros(5), 1, GRIDS[3], torch.float32)
    assert torch.equal(image, cells_to_bev(values, cells, 1, GRIDS[3]))


def test_nothing_in_or_out():
    none = torch.zeros(0, dtype=torch.int64)
    image = cells_to_image(torch.zeros(0, 3), none, torch.ones(3), torch.ones(3), 2, GRIDS[1], torch.float16)
    assert torch.equal(image, torch.ones(2, 3, 5, 6, dtype=torch.float16))
    image = cells_to_image(torch.zeros(0, 3), none, torch.ones(3), torch.ones(3), 0, GRIDS[1], torch.float16)
    assert image.shape == (0, 3, 5, 6)


def test_values_with_holes():
    values, factor = random(30, 8)[:, ::2], random(8, seed=3)[::2]
    assert not values.is_contiguous()
    cells = some_cells(60, 1025)[::2]
    image = cells_to_image(values, cells, factor, torch.zeros(4), 1, GRIDS[3], torch.float32)
    assert_close(image.permute(0, 2, 3, 1).flatten(0, 2)[cells], values * factor)


def test_threads_do_not_change_the_result():
    grid, before, results = PolarGrid(bins=(120, 90, 2)), torch.get_num_threads(), []
    values, cells = random(4000, 32), some_cells(4000, 10800)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(check(values, cells, 1, grid, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_cells_that_do_not_ascend(backend):
    """Refused on a CPU; on a GPU nothing is written elsewhere."""
    for cells in ([5, 3], [-1, 3], [1025, 3], [3, 1025, 4]):
        arguments = torch.zeros(len(cells), 2), torch.tensor(cells), torch.ones(2), torch.ones(2), 1, GRIDS[3]
        if backend == "cuda":
            assert torch.equal(cells_to_image(*arguments, torch.float32), torch.ones(1, 2, 41, 25))
        elif backend == "native":
            with pytest.raises(RuntimeError, match="cells_to_image: cells must ascend within 0 and 1025"):
                cells_to_image(*arguments, torch.float32)


def test_refuses_what_does_not_fit():
    values, cells, each = torch.zeros(2, 3), torch.tensor([1, 2]), torch.ones(3)
    for wrong in ((values[0], cells), (values, cells[:1]), (values, cells[:, None])):
        with pytest.raises(ValueError, match=r"cells_to_image: expected values \[M, C\] and cells \[M\]"):
            cells_to_image(*wrong, each, each, 1, GRIDS[1], torch.float32)
    for value_dtype, dtype in ((torch.float32, torch.float64), (torch.float16, torch.bfloat16), (torch.float64,) * 2):
        with pytest.raises(ValueError, match="cells_to_image: expected an image of one of"):
            cells_to_image(values.to(value_dtype), cells, each, each, 1, GRIDS[1], dtype)
    for wrong in (torch.ones(2), torch.ones(3).half()):
        with pytest.raises(ValueError, match=r"cells_to_image: expected factor float32 \[3\]"):
            cells_to_image(values, cells, wrong, each, 1, GRIDS[1], torch.float32)
        with pytest.raises(ValueError, match=r"cells_to_image: expected background float32 \[3\]"):
            cells_to_image(values, cells, each, wrong, 1, GRIDS[1], torch.float32)


@pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
def test_the_op_refuses_what_it_would_read_wrongly(backend):
    if backend == "reference":
        pytest.skip("torch checks its own")
    values, cells, each = torch.zeros(2, 3), torch.tensor([1, 2]), torch.ones(3)
    for wrong, dtype in (
        ((values, cells.int(), each, each), torch.float32),
        ((values, cells, each[:2], each), torch.float32),
        ((values.half(), cells, each, each), torch.bfloat16),
        ((values, cells, each, each), torch.float64),
    ):
        with pytest.raises(RuntimeError, match="cells_to_image"):
            torch.ops.kdmos.cells_to_image(*wrong, 20, dtype)
