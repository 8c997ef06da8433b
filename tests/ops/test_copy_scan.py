"""Copying and counting: by hand, against the definition, strides, blocks, threads."""

import math

import pytest
import torch

from kdmos.ops import copy_scan, native, reference

NAN, INF = math.nan, math.inf


def same(ours, wanted):
    """Bit for bit, but that NaN is NaN."""
    return torch.equal(ours.isnan(), wanted.isnan()) and torch.equal(
        *(torch.where(each.isnan(), 0.0, each).view(torch.int32) for each in (ours, wanted))
    )


def copied(points, most=2.0):
    """The copy and the counts; the values between are those of the reference."""
    out = torch.full((len(points), 4), 7.0)
    counts = copy_scan(points, out, most)
    expected = torch.empty_like(out)
    assert counts.dtype == torch.int64
    assert counts.tolist() == reference.copy_scan(points, expected, most).tolist()
    assert same(out, expected)
    return out, counts.tolist()


@pytest.mark.parametrize(
    ("point", "counts"),
    [
        ((1, 2, 3, 0.5), [0, 0]),
        ((1, 2, 3, 0), [0, 0]),
        ((-0.0, 0.0, 1e-45, -0.0), [0, 0]),  # -0 is not below 0, and comes as it is
        ((3.4e38, -3.4e38, 3, 2), [0, 0]),
        ((1, 2, 3, 2.5), [0, 1]),
        ((1, 2, 3, -1e-45), [0, 1]),
        ((NAN, 2, 3, 0.5), [1, 0]),
        ((1, INF, 3, 0.5), [1, 0]),
        ((1, 2, -INF, 2.5), [1, 0]),  # not finite: its remission does not count
        ((1, 2, 3, NAN), [1, 0]),
        ((1, 2, 3, INF), [1, 0]),
        ((1, 2, 3, -INF), [1, 0]),
    ],
)
def test_a_point_worked_by_hand(point, counts):
    points = torch.tensor([[0, 0, 0, 0.1], point, [4, 5, 6, 0.2]])
    out, found = copied(points)
    assert found == counts
    assert out[1].isnan().tolist() == [bool(counts[0])] * 4
    assert same(out[::2], points[::2])


def test_every_nan_is_one():
    """Quiet, signalling, of either sign."""
    bits = torch.tensor([0x7FC00000, 0x7F800001, -1, -0x7FFFFF, -0x400000], dtype=torch.int32)
    points = torch.zeros(20, 4)
    for k in range(4):
        points[5 * k : 5 * k + 5, k] = bits.view(torch.float32)
    out, counts = copied(points)
    assert counts == [20, 0]
    assert out.isnan().all()


@pytest.mark.parametrize("num_points", [0, 1, 2, 255, 256, 257, 1001])
@pytest.mark.parametrize("share", [0, 0.01, 1])
def test_equals_the_definition(num_points, share):
    generator = torch.Generator().manual_seed(num_points)
    points = torch.randn(num_points, 4, generator=generator)
    odd = torch.tensor([NAN, INF, -INF, 3.0])[torch.randint(0, 4, points.shape, generator=generator)]
    points = torch.where(torch.rand(points.shape, generator=generator) < share, odd, points)
    copied(points)


@pytest.mark.parametrize(("columns", "first"), [(5, 0), (6, 1), (8, 4), (9, 5)])
def test_rows_at_a_distance(columns, first):
    """Of a scan with more columns, at addresses that are no multiple of 16 bytes either."""
    wide = torch.randn(301, columns, generator=torch.Generator().manual_seed(0))
    wide[7, first + 2] = NAN
    wide[8, (first + 4) % columns] = NAN  # of another column
    points = wide[:, first : first + 4]
    assert points.stride() == (columns, 1)
    assert copied(points)[1][0] == 1
    copied(points[::2])
    copied(wide[:1, first : first + 4].expand(10, 4))


def test_memory_that_begins_anywhere():
    memory, to = torch.randn(101 * 4 + 1), torch.zeros(101 * 4 + 1)
    points, out = memory[1:].view(101, 4), to[1:].view(101, 4)
    copy_scan(points, out, 2.0)
    assert torch.equal(out, points)
    assert to[0] == 0


@pytest.mark.parametrize("most", [0.0, 1.5, -1.0, 255.0, INF, NAN])
def test_any_limit(most):
    copied(torch.randn(200, 4, generator=torch.Generator().manual_seed(1)) * 2, most)


def test_many_points_on_any_number_of_threads():
    points = torch.rand(300_001, 4, generator=torch.Generator().manual_seed(2))
    points[::1000, 1], points[5::1000, 3] = INF, -1
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(copied(points))
    finally:
        torch.set_num_threads(before)
    assert [counts for _, counts in results] == [[301, 300]] * 3


def test_from_numpy_and_into_a_part():
    """As the stream has it: a scan from outside, a buffer that is larger."""
    points, held = torch.from_numpy(torch.rand(50, 4).numpy()), torch.zeros(80, 4)
    assert copy_scan(points, held[:50], 2.0).tolist() == [0, 0]
    assert torch.equal(held[:50], points)
    assert not held[50:].any()


def test_refuses_what_does_not_fit():
    points, out = torch.zeros(3, 4), torch.zeros(3, 4)
    for wrong in (torch.zeros(3, 5), torch.zeros(12), torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4, 3).T):
        with pytest.raises(ValueError, match=r"copy_scan: expected points float32 \[n, 4\]"):
            copy_scan(wrong, out, 2.0)
    for wrong in (torch.zeros(2, 4), torch.zeros(3, 4).half(), torch.zeros(4, 3).T, torch.zeros(3, 8)[:, :4]):
        with pytest.raises(ValueError, match=r"copy_scan: expected out float32 \[3, 4\]"):
            copy_scan(points, wrong, 2.0)


@pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
def test_the_op_refuses_what_it_would_read_wrongly(backend):
    if backend == "reference":
        pytest.skip("torch checks its own")
    points, out = torch.zeros(3, 4), torch.zeros(3, 4)
    for arguments in (
        (points[:, :3], out),
        (points.T, out),
        (points.double(), out),
        (points, out[:2]),
        (points, out.T),
    ):
        with pytest.raises(RuntimeError, match="copy_scan"):
            torch.ops.kdmos.copy_scan(*arguments, 2.0)
