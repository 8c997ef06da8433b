"""Joining images and closing phi: against torch.cat and a circular F.pad."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.ops import native, wrap_around


def expected_of(parts, halo):
    rings, sectors = parts[0].shape[2:]
    parts = [F.pad(part, (0, sectors - part.shape[3], 0, rings - part.shape[2])) for part in parts]
    return F.pad(torch.cat(parts, 1), (halo, halo, 0, 0), mode="circular")


@pytest.mark.parametrize("halo", [0, 1, 2, 5])
@pytest.mark.parametrize("smaller", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_joins_and_wraps(halo, smaller):
    """Values and gradients, whatever the layout of the parts."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 4, 5), (3, 4 - smaller[0], 5 - smaller[1]))
    parts = [torch.randn(2, *size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]
    laid_out = [parts[0], parts[1].to(memory_format=torch.channels_last)]
    joined, expected = wrap_around(laid_out, halo), expected_of(parts, halo)
    assert joined.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(joined, expected)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for gradient, wanted in zip(*(torch.autograd.grad((out * weight).sum(), parts) for out in (joined, expected))):
        assert_close(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(dtype):
    x = torch.randn(1, 3, 41, 17).to(dtype)
    assert torch.equal(wrap_around([x]), expected_of([x], 1))
    wide = wrap_around([x, torch.ones(1, 1, 41, 17)])
    assert wide.dtype == torch.float32
    assert torch.equal(wide, expected_of([x.float(), torch.ones(1, 1, 41, 17)], 1))


def test_parts_smaller_than_the_first_end_in_zeros():
    skip, up = torch.ones(1, 2, 5, 7), 2 * torch.ones(1, 3, 4, 6)
    out = wrap_around([skip, up], 0)
    assert out.shape == (1, 5, 5, 7)
    assert torch.equal(out[:, :2], skip)
    assert torch.equal(out[:, 2:, :4, :6], up)
    assert not out[:, 2:, 4].any()
    assert not out[:, 2:, :, 6].any()


def test_one_row_and_an_empty_batch():
    x = torch.randn(1, 1, 1, 1)
    assert wrap_around([x]).flatten().tolist() == [x.item()] * 3
    assert wrap_around([torch.zeros(0, 2, 3, 4)]).shape == (0, 2, 3, 6)


def test_refuses_what_does_not_fit():
    x = torch.zeros(1, 2, 3, 4)
    for other in (torch.zeros(2, 2, 3, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 3, 5)):
        with pytest.raises(ValueError, match="wrap_around: parts"):
            wrap_around([x, other])
    for halo in (-1, 5):
        with pytest.raises(ValueError, match=f"wrap_around: a halo of {halo} around 4 sectors"):
            wrap_around([x], halo)


@pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
def test_the_op_itself_refuses_what_it_would_read_beyond(backend):
    if backend == "reference":
        pytest.skip("of the native ops")
    x = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for bad in (x.half(), x[:1], x.contiguous(), x.transpose(2, 3).contiguous(memory_format=torch.channels_last)):
        with pytest.raises(RuntimeError, match="wrap_around"):
            torch.ops.kdmos.wrap_around([x, bad], 1)
    with pytest.raises(RuntimeError, match="wrap_around_backward"):
        torch.ops.kdmos.wrap_around_backward(x.contiguous(), [3, 4, 3], 1)
