"""Adding rows to rows, in place: what the sparse convolution ends with."""

import pytest
import torch
from torch.testing import assert_close

from kdmos.ops import native

pytestmark = pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def native_on_the_cpu(backend):
    if backend == "reference":
        pytest.skip("the reference is torch's own")


def add(to, index, rows, backend):
    if backend != "cuda" or not torch.cuda.is_available():
        torch.ops.kdmos.add_rows(to, index, rows)
        return to
    there = to.cuda()  # in place: the copy that the fixture would make is not what changes
    torch.ops.kdmos.add_rows(there, index.cuda(), rows.cuda())
    return there.cpu()


def wide(dtype):
    """What rows of a type are summed in."""
    return torch.promote_types(dtype, torch.float32)


def random_index(num_to, num_rows, generator, backend):
    """Equal values next to each other where they must be, in no other order."""
    index = torch.randint(0, num_to, (num_rows,), generator=generator)
    return torch.randperm(num_to, generator=generator)[index.sort().values] if backend == "cuda" else index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_to", "num_rows", "channels"),
    [(50, 0, 3), (50, 20, 3), (50, 20, 0), (7, 900, 1), (4000, 9000, 32), (9, 50, 264)],
)
def test_equals_index_add(num_to, num_rows, channels, dtype, backend):
    """Rows named several times, and none at all; small whole numbers, which every type adds exactly."""
    generator = torch.Generator().manual_seed(0)
    to = torch.randint(-4, 5, (num_to, channels), generator=generator).to(wide(dtype))
    rows = torch.randint(-1, 2, (num_rows, channels), generator=generator).to(dtype)
    index = random_index(num_to, num_rows, generator, backend)
    expected = to.double().index_add(0, index, rows.double())
    assert torch.equal(add(to.clone(), index, rows, backend).double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 16])
def test_sums_row_by_row_in_the_type_of_the_sums(channels, dtype, backend):
    """To the bit, on a GPU too."""
    generator = torch.Generator().manual_seed(2)
    to = torch.randn(20, channels, generator=generator, dtype=wide(dtype))
    rows = torch.randn(300, channels, generator=generator).to(dtype)
    index = random_index(20, 300, generator, backend)
    expected = to.clone()
    for place, row in zip(index.tolist(), rows):
        expected[place] += row
    assert torch.equal(add(to, index, rows, backend), expected)


def test_the_order_of_the_sum_does_not_depend_on_the_threads(backend):
    generator, before, results = torch.Generator().manual_seed(1), torch.get_num_threads(), []
    to, rows = torch.zeros(100, 16), torch.randn(20000, 16, generator=generator)
    index = random_index(100, 20000, generator, backend)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(add(to.clone(), index, rows, backend))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert_close(results[0], to.index_add(0, index, rows), atol=1e-4, rtol=1e-4)  # float32 sums of 200 in other orders


@pytest.mark.parametrize("index", [[0, 3], [-1, 0]])
def test_an_index_outside_is_refused(index, backend):
    if backend == "cuda":
        pytest.skip("skipped there: looking would wait for the device")
    with pytest.raises(RuntimeError, match="add_rows: the index must lie within 0 and 3"):
        torch.ops.kdmos.add_rows(torch.zeros(3, 2), torch.tensor(index), torch.zeros(2, 2))


def test_an_index_outside_is_skipped_on_a_gpu(backend):
    if backend != "cuda":
        pytest.skip("refused on a CPU")
    index, rows = torch.tensor([3, 3, -1, 1, 2**40, -(2**40), 0]), torch.ones(7, 2)
    assert add(torch.zeros(3, 2), index, rows, backend).tolist() == [[1, 1], [1, 1], [0, 0]]


def test_what_does_not_fit_is_refused(backend):
    to, index, rows = torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2)
    for arguments in (
        (to, index, rows[:, :1]),
        (to, index[:1], rows),
        (to.T, index, rows),
        (to, index.int(), rows),
        (to, index, rows.double()),
        (to.double(), index, rows),
        (to.half(), index, rows.half()),
        (to.int(), index, rows.int()),
    ):
        with pytest.raises(RuntimeError, match="add_rows"):
            torch.ops.kdmos.add_rows(*arguments)
