"""Convolution after Winograd: against its specification and against the convolution that it is."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.ops import can_winograd, native, reference, winograd_conv, winograd_weight

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(2, 7, 41), (1, 30, 22), (1, 1, 5), (1, 2, 3), (3, 5, 2), (1, 3, 1), (0, 3, 4)]  # scans, rings, sectors


@pytest.fixture(autouse=True)
def on_the_cpu(backend):
    if backend == "cuda":
        pytest.skip("a GPU convolves in torch: the op has no CUDA twin")


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def whole(*size, most, seed=0):
    """Whole numbers, whose products add up to the same in any order."""
    return torch.randint(-most, most + 1, size, generator=torch.Generator().manual_seed(seed)).float()


def convolved(parts, weight, bias, slope):
    """In float64."""
    rings, sectors = parts[0].shape[2:]
    parts = [F.pad(part.double(), (0, sectors - part.shape[3], 0, rings - part.shape[2])) for part in parts]
    image = F.pad(torch.cat(parts, 1), (1, 1, 0, 0), mode="circular")
    return F.leaky_relu(F.conv2d(image, weight.double(), bias.double(), padding=(1, 0)), slope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inputs", "outputs"), [([32], 32), ([64, 16], 64), ([128], 96), ([16, 32, 16], 32), ([512], 32)]
)
def test_is_the_convolution(dtype, inputs, outputs):
    """To the last bit, of whole numbers and weights in quarters: all that comes between is held exactly."""
    weight, bias = 4 * whole(outputs, sum(inputs), 3, 3, most=1), whole(outputs, most=9)
    transformed = winograd_weight(weight, dtype)
    for batch, rings, sectors in SIZES:
        parts = [whole(batch, c, rings, sectors, most=3, seed=c).to(dtype) for c in inputs]
        out = winograd_conv(parts, transformed, bias, slope=0.25)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, convolved(parts, weight, bias, 0.25).to(dtype))


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
def test_float32_rounds_little(slope):
    parts, weight, bias = [drawn(1, c, 9, 13, seed=c) for c in (64, 32)], drawn(32, 96, 3, 3) / 30, drawn(32)
    expected = convolved(parts, weight, bias, slope).float()
    # float32's defaults hold for sums of 864 products; here some cancel each other
    assert_close(
        winograd_conv(parts, winograd_weight(weight, torch.float32), bias, slope), expected, rtol=1e-5, atol=1e-5
    )


def test_bfloat16_rounds_not_much_more_than_a_convolution():
    """The inputs are rounded once more after their transform, and so are the weights."""
    x, weight, bias = drawn(1, 128, 30, 22).bfloat16(), drawn(64, 128, 3, 3) / 34, drawn(64)
    exact = convolved([x], weight, bias, 0.01)
    plain = (convolved([x], weight.bfloat16(), bias, 0.01).bfloat16() - exact).abs().mean()
    ours = (winograd_conv([x], winograd_weight(weight, torch.bfloat16), bias, 0.01) - exact).abs().mean()
    assert ours < 2 * plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_its_specification(dtype):
    """Rounded where that is rounded; the sums of an instruction may end in other digits."""
    parts = [drawn(2, 48, 11, 14).to(dtype), drawn(2, 16, 10, 13, seed=1).to(dtype)]
    weight, bias = winograd_weight(drawn(64, 64, 3, 3) / 24, dtype), drawn(64)
    assert_close(winograd_conv(parts, weight, bias, 0.01), reference.winograd_conv(parts, weight, bias, 0.01))


def test_of_no_channels_the_bias_is_left():
    out = winograd_conv([torch.zeros(1, 0, 3, 4)], torch.zeros(16, 1, 0, 32, 1), torch.arange(-16.0, 16), 0.25)
    assert torch.equal(out, F.leaky_relu(torch.arange(-16.0, 16), 0.25)[:, None, None].expand_as(out))


@pytest.mark.parametrize("smaller", [(1, 0), (0, 1), (2, 2)])
def test_parts_smaller_than_the_first_end_in_zeros(smaller):
    parts = [whole(2, 32, 6, 9, most=3), whole(2, 16, 6 - smaller[0], 9 - smaller[1], most=3)]
    parts[0] = parts[0].to(memory_format=torch.channels_last)
    weight, bias = 4 * whole(32, 48, 3, 3, most=1).transpose(2, 3), whole(32, most=9)
    out = winograd_conv(parts, winograd_weight(weight, torch.float32), bias, 0.25)
    assert torch.equal(out.double(), convolved(parts, weight, bias, 0.25))


def test_a_bad_pixel_stays_where_the_convolution_leaves_it():
    """At the nine outputs that see it, not at the others of their tiles."""
    x, weight = drawn(1, 16, 7, 9), drawn(32, 16, 3, 3)
    if not can_winograd([x], 32):
        pytest.skip("the reference multiplies by zeros, too, where the kernel leaves out")
    x[0, 0, 3, 8] = torch.nan
    out = winograd_conv([x], winograd_weight(weight, torch.float32), torch.zeros(32))
    bad = out.isnan().any(1)[0].nonzero().tolist()
    assert bad == [[ring, sector] for ring in (2, 3, 4) for sector in (0, 7, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_the_result(dtype):
    x, bias = drawn(2, 64, 40, 31).to(dtype), drawn(32)
    weight = winograd_weight(drawn(32, 64, 3, 3), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(winograd_conv([x], weight, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results) or native._chosen == "reference"


def test_says_where_it_has_a_kernel(backend, monkeypatch):
    x, built = torch.zeros(1, 32, 3, 4), native.instructions()
    assert can_winograd([x], 32) == (backend == "native" and built.startswith("AVX-512"))
    assert not can_winograd([x], 48) and not can_winograd([x, x[:, :8]], 32)
    assert not can_winograd([x.double()], 32) and not can_winograd([x.to("meta")], 32)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert not can_winograd([x.bfloat16()], 32)


def test_refuses_what_does_not_fit():
    x, weight, bias = (
        torch.zeros(1, 32, 3, 4),
        winograd_weight(torch.zeros(32, 32, 3, 3), torch.float32),
        torch.zeros(32),
    )
    for other in (torch.zeros(2, 32, 3, 4), torch.zeros(1, 32, 4, 4), torch.zeros(1, 32, 3, 5)):
        with pytest.raises(ValueError, match=r"winograd_conv: parts .* do not fit the first"):
            winograd_conv([x, other], weight, bias)
    for parts in ([x, x], [x.bfloat16()]):
        with pytest.raises(ValueError, match=r"expected transformed weight \[16, 1, \d+, 32, 1\] of the parts' type"):
            winograd_conv(parts, weight, bias)
    with pytest.raises(ValueError, match=r"expected transformed weight \[16, 2, 32, 32, 1\]"):
        winograd_conv([x], weight, torch.zeros(64))
    for wrong in (40, 63):
        with pytest.raises(ValueError, match=rf"winograd_conv: expected bias \[32\], got \[{wrong}\]"):
            winograd_conv([x], weight, torch.zeros(wrong))
    with pytest.raises(ValueError, match=r"expected transformed weight .* and 33 channels of"):
        winograd_conv(
            [torch.zeros(1, 33, 3, 4).bfloat16()], winograd_weight(torch.zeros(32, 32, 3, 3), torch.bfloat16), bias
        )
    with pytest.raises(ValueError, match=r"winograd_conv: slope must be in \[0, 1\], got 2"):
        winograd_conv([x], weight, bias, 2)
    for shape in ((40, 32, 3, 3), (32, 24, 3, 3), (32, 32, 1, 1)):
        with pytest.raises(ValueError, match=r"winograd_conv: expected weight \[O, C, 3, 3\], O a multiple of 32"):
            winograd_weight(torch.zeros(shape), torch.float32)
    with pytest.raises(ValueError, match=r"and float32 or bfloat16; got \[32, 32, 3, 3\] and torch.float16"):
        winograd_weight(torch.zeros(32, 32, 3, 3), torch.float16)
