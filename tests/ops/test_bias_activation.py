"""Bias and LeakyReLU in place: against torch, types, layouts, odd sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.ops import bias_activation, native, reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def random(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def image(batch, channels, height, width, dtype=torch.float32):
    return random(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)


def check(x, bias, slope=0.01):
    """Bit for bit: a sum and a product, rounded once."""
    expected = x.clone()
    reference.bias_activation(expected, bias, slope)
    assert bias_activation(x, bias, slope) is None
    assert torch.equal(x, expected)


def test_worked_by_hand():
    x = torch.tensor([[1.0, -3.0, 0.0], [-1.0, 5.0, -0.5]])
    bias_activation(x, torch.tensor([1.0, -1.0, 0.25]), 0.125)
    assert x.tolist() == [[2.0, -0.5, 0.25], [0.0, 4.0, -0.03125]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 32, 33, 96, 512])
def test_images(channels, dtype):
    for bias_dtype in {dtype, torch.float32}:
        check(image(2, channels, 7, 9, dtype), random(channels, seed=1, dtype=bias_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "channels"), [(0, 8), (1, 1), (5, 0), (1001, 16), (3, 2500), (40_000, 4)])
def test_rows(num_rows, channels, dtype):
    check(random(num_rows, channels, dtype=dtype), random(channels, seed=1, dtype=dtype))


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3, 1.0])
def test_slopes(slope):
    check(image(1, 16, 5, 6), random(16, seed=1), slope)


def test_equals_torch_in_float32():
    """As a convolution with a bias and its activation have it."""
    x, weight, bias = image(1, 4, 9, 8), random(16, 4, 3, 3, seed=1), random(16, seed=2)
    out = F.conv2d(x, weight).contiguous(memory_format=torch.channels_last)
    bias_activation(out, bias, 0.01)
    assert_close(out, F.leaky_relu(F.conv2d(x, weight, bias), 0.01))


def test_half_types_are_rounded_once():
    """1 + 2^-9 is no bfloat16, and 2^-9 - 2^-10 is lost where the sum is rounded before the product."""
    x, bias = torch.tensor([[-1.0]], dtype=torch.bfloat16), torch.tensor([2**-9 + 2**-10])
    bias_activation(x, bias, 0.75)
    assert x.item() == torch.tensor((-1 + 2**-9 + 2**-10) * 0.75).bfloat16().item()


def test_what_is_not_finite():
    x = torch.tensor([[math.nan, math.inf, -math.inf, -0.0]])
    bias_activation(x, torch.zeros(4), 0.5)
    assert_close(x, torch.tensor([[math.nan, math.inf, -math.inf, 0.0]]), equal_nan=True)


def test_memory_that_begins_anywhere():
    memory = random(8 * 50 + 1)
    check(memory[1:].view(50, 8), random(8, seed=1))
    before = memory[0].item()
    assert memory[0] == before


def test_a_bias_with_holes():
    check(random(20, 6), random(6, 2, seed=1)[:, 0])


def test_threads_do_not_change_the_result():
    x, bias, before, results = random(30_000, 12), random(12, seed=1), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(x.clone())
            bias_activation(results[-1], bias, 0.01)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_refuses_what_does_not_fit():
    bias = torch.zeros(8)
    for x in (torch.zeros(2, 8, 3, 4), torch.zeros(8, 3).T, torch.zeros(3, 8, dtype=torch.int64), torch.zeros(8)):
        with pytest.raises(ValueError, match="bias_activation: expected floating point x"):
            bias_activation(x, bias, 0.01)
    for wrong in (torch.zeros(7), torch.zeros(8, 1), torch.zeros(8).half(), torch.zeros(8).double()):
        with pytest.raises(ValueError, match=r"bias_activation: expected bias \[8\]"):
            bias_activation(torch.zeros(3, 8), wrong, 0.01)
    for slope in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"bias_activation: expected a slope in \[0, 1\]"):
            bias_activation(torch.zeros(3, 8), bias, slope)


@pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
def test_the_op_refuses_what_it_would_read_wrongly(backend):
    if backend == "reference":
        pytest.skip("torch checks its own")
    x, bias = torch.zeros(3, 8), torch.zeros(8)
    for arguments in ((x.T, bias[:3]), (torch.zeros(1, 8, 2, 2), bias), (x, bias[:7]), (x, bias.half())):
        with pytest.raises(RuntimeError, match="bias_activation"):
            torch.ops.kdmos.bias_activation(*arguments, 0.01)
