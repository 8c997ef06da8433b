"""Convolution near what is there alone: against the convolution of the whole image."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.ops import can_mask, cell_distance, masked_conv, native

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(2, 7, 41), (1, 1, 5), (1, 2, 3), (3, 5, 2), (1, 3, 1), (0, 3, 4)]  # scans, rings, sectors


@pytest.fixture(autouse=True)
def on_the_cpu(backend):
    if backend == "cuda":
        pytest.skip("a GPU convolves everywhere: the op has no CUDA twin")


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def whole(*size, most, seed=0):
    """Whole numbers, whose products add up to the same in any order."""
    return torch.randint(-most, most + 1, size, generator=torch.Generator().manual_seed(seed)).float()


def convolved(parts, weight, bias, slope):
    """Everywhere, summed in float32."""
    rings, sectors = parts[0].shape[2:]
    parts = [F.pad(part.float(), (0, sectors - part.shape[3], 0, rings - part.shape[2])) for part in parts]
    image = F.pad(torch.cat(parts, 1), (1, 1, 0, 0), mode="circular")
    out = F.conv2d(image, weight.float(), bias.float(), padding=(1, 0))
    return F.leaky_relu(out, slope).to(weight.dtype)


def with_background(everywhere, distance, near):
    """Ring by ring: cells beyond `near` take the first one's value."""
    out = everywhere.clone()
    for b, ring in torch.cartesian_prod(*map(torch.arange, distance.shape[:2])).tolist():
        beyond = (distance[b, ring] > near).nonzero()[:, 0]
        if len(beyond):
            out[b, :, ring, beyond] = everywhere[b, :, ring, beyond[:1]]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inputs", "outputs"), [([32], 32), ([8], 16), ([32, 16], 32), ([2, 4], 48), ([16], 64), ([3], 16), ([4], 5)]
)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_is_the_convolution_near_by(dtype, inputs, outputs, share):
    """Of no cell, some, all; of sizes that fill no block, and a circle of one sector; to the last bit."""
    weight, bias = whole(outputs, sum(inputs), 3, 3, most=2).to(dtype), whole(outputs, most=9).to(dtype)
    for batch, rings, sectors in SIZES:
        parts = [whole(batch, c, rings, sectors, most=3, seed=c).to(dtype) for c in inputs]
        occupied = torch.rand(batch, rings, sectors, generator=torch.Generator().manual_seed(1)) < share
        distance, everywhere = cell_distance(occupied, 4), convolved(parts, weight, bias, 0.25)
        for near in (0, 2):
            expected = with_background(everywhere, distance, near)
            out = masked_conv(parts, weight, bias, distance, near, slope=0.25)
            assert out.dtype == dtype
            assert torch.equal(out, expected)
            out = masked_conv(parts, weight, bias, distance, near, fill=False, slope=0.25)
            computed = (distance <= near)[:, None].expand_as(out)
            assert torch.equal(out[computed], expected[computed])
        assert torch.equal(masked_conv(parts, weight, bias, slope=0.25), everywhere)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
def test_any_values(dtype, slope):
    """Sums of another order: float32 differs in its last digits, bfloat16 where one lies between two of its numbers."""
    parts = [drawn(1, c, 9, 13, seed=c).to(dtype) for c in (64, 32)]
    weight, bias = (drawn(32, 96, 3, 3) / 30).to(dtype), drawn(32).to(dtype)
    distance = cell_distance(drawn(1, 9, 13, seed=1) > 1, 4)
    expected = with_background(convolved(parts, weight, bias, slope), distance, 1)
    assert_close(masked_conv(parts, weight, bias, distance, 1, slope=slope), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_background_beyond_a_distance_is_convolved_everywhere(dtype):
    """Layer after layer, each a cell farther, across the seam; rings next to the ends differ from the others."""
    occupied = torch.zeros(2, 12, 20, dtype=torch.bool)
    occupied[0, 5, 0] = occupied[0, 11, 7] = True
    distance = cell_distance(occupied, 5)
    x = whole(1, 16, 12, 1, most=2).repeat(2, 1, 1, 20)
    x.permute(0, 2, 3, 1)[occupied] = whole(2, 16, most=2, seed=1)
    x = expected = x.to(dtype)
    for layer in range(3):
        weight, bias = whole(16, 16, 3, 3, most=1, seed=layer).to(dtype), whole(16, most=9, seed=layer).to(dtype)
        x = masked_conv([x], weight, bias, distance, layer + 1, slope=0.5)
        expected = convolved([expected], weight, bias, 0.5)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("smaller", [(1, 0), (0, 1), (2, 2)])
def test_parts_smaller_than_the_first_end_in_zeros(smaller):
    parts = [whole(2, 4, 6, 9, most=3), whole(2, 2, 6 - smaller[0], 9 - smaller[1], most=3)]
    parts[0] = parts[0].to(memory_format=torch.channels_last)
    weight, bias = whole(16, 6, 3, 3, most=2).transpose(2, 3), whole(16, most=9)
    assert torch.equal(masked_conv(parts, weight, bias, slope=0.25), convolved(parts, weight, bias, 0.25))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_the_result(dtype):
    x, weight, bias = drawn(2, 32, 40, 30).to(dtype), drawn(32, 32, 3, 3).to(dtype), drawn(32).to(dtype)
    occupied = drawn(2, 40, 30, seed=1) > torch.linspace(-1, 4, 40)[:, None]  # most of them near the sensor
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(masked_conv([x], weight, bias, cell_distance(occupied, 2), 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results) or native._chosen == "reference"


def test_distance_of_a_small_grid():
    occupied = torch.zeros(2, 5, 8, dtype=torch.bool)
    occupied[0, 0, 7] = occupied[0, 4, 3] = True
    expected = [
        [1, 2, 3, 3, 3, 2, 1, 0],
        [1, 2, 3, 3, 3, 2, 1, 1],
        [2, 2, 2, 2, 2, 2, 2, 2],
        [3, 2, 1, 1, 1, 2, 3, 3],
        [3, 2, 1, 0, 1, 2, 3, 3],
    ]
    assert cell_distance(occupied, 3).tolist() == [expected, [[3] * 8] * 5]
    assert torch.equal(cell_distance(occupied, 1), (~occupied).to(torch.uint8))


def test_says_where_it_saves_work(backend):
    x = torch.zeros(1, 8, 3, 4)
    built = native.instructions()
    assert can_mask([x]) == (backend == "native" and built.startswith("AVX-512"))
    assert not can_mask([x], 40) and not can_mask([x.double()]) and not can_mask([x.to("meta")])
    assert not can_mask([torch.zeros(1, 3, 3, 4, dtype=torch.bfloat16)])


def test_amx_is_quicker_by_itself(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert not can_mask([torch.zeros(1, 8, 3, 4, dtype=torch.bfloat16)])


def test_refuses_what_does_not_fit():
    x, weight, bias = torch.zeros(1, 2, 3, 4), torch.zeros(16, 2, 3, 3), torch.zeros(16)
    distance = torch.zeros(1, 3, 4, dtype=torch.uint8)
    for other in (torch.zeros(2, 2, 3, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 3, 5)):
        with pytest.raises(ValueError, match=r"masked_conv: parts .* do not fit the first"):
            masked_conv([x, other], weight, bias, distance)
    with pytest.raises(
        ValueError, match=r"expected weight \[O, 4, 3, 3\] and bias \[O\], got \[16, 2, 3, 3\] and \[16\]"
    ):
        masked_conv([x, x], weight, bias, distance)
    with pytest.raises(ValueError, match=r"and bias \[O\], got \[16, 2, 3, 3\] and \[1\]"):
        masked_conv([x], weight, bias[:1], distance)
    with pytest.raises(ValueError, match=r"masked_conv: parts .*float64.* and weight torch.float32 differ in type"):
        masked_conv([x.double()], weight, bias, distance)
    for wrong in (distance.long(), distance[0], distance[:, :, 1:]):
        with pytest.raises(ValueError, match=r"masked_conv: expected distance uint8 \[1, 3, 4\], got torch"):
            masked_conv([x], weight, bias, wrong)
    for slope in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"masked_conv: slope must be in \[0, 1\]"):
            masked_conv([x], weight, bias, distance, slope=slope)
