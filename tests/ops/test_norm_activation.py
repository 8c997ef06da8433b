"""Batch norm in training and LeakyReLU in one op: against F.batch_norm and F.leaky_relu."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.ops import norm_activation, norm_activation_again, norm_activation_backward

EPS = 1e-5


def random(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(channels, dtype=torch.float32):
    return random(channels, seed=1, dtype=dtype) + 0.2, random(channels, seed=2, dtype=dtype)


def expected_of(x, weight, bias, slope):
    return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS), slope)


@pytest.mark.parametrize("slope", [0.0, 0.01])
@pytest.mark.parametrize("size", [(2, 5), (257, 16), (600, 33), (5, 300), (2, 3, 4, 5), (2, 8, 41, 17), (1, 32, 1, 2)])
def test_values_and_gradients(size, slope):
    x = random(*size, dtype=torch.float64).requires_grad_()
    weight, bias = (p.requires_grad_() for p in parameters(size[1], torch.float64))
    out, mean, variance = norm_activation(x, weight, bias, EPS, slope)
    expected = expected_of(x, weight, bias, slope)
    assert_close(out, expected)
    rows = x.detach().transpose(0, 1).flatten(1)
    assert_close(mean, rows.mean(1))
    assert_close(variance, rows.var(1, correction=0))
    assert not mean.requires_grad
    assert not variance.requires_grad
    upstream = random(*size, seed=3, dtype=torch.float64)
    for ours, wanted in zip(*(torch.autograd.grad(o, (x, weight, bias), upstream) for o in (out, expected))):
        assert_close(ours, wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_half_precision_is_rounded_once(dtype, tolerance):
    """Statistics, parameters and the gradients of these stay in float32."""
    x, upstream, (weight, bias) = random(700, 24, dtype=dtype), random(700, 24, seed=3, dtype=dtype), parameters(24)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out, mean, variance = norm_activation(*leaves, EPS, 0.01)
    assert (out.dtype, mean.dtype, variance.dtype) == (dtype, torch.float32, torch.float32)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = expected_of(*wide, 0.01)
    # half a step of the type; the reference rounds twice, before the activation too
    assert_close(out.double(), expected, rtol=tolerance, atol=1e-5)
    gradients = torch.autograd.grad(out, leaves, upstream)
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    to_x, *to_parameters = torch.autograd.grad(expected, wide, upstream.double())
    assert_close(gradients[0].double(), to_x, rtol=tolerance, atol=1e-4)
    for ours, wanted in zip(gradients[1:], to_parameters):
        assert_close(ours, wanted.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_again_is_the_same_to_the_bit(dtype):
    x, (weight, bias) = random(2, 19, 13, 11, dtype=dtype), parameters(19)
    out, mean, variance = norm_activation(x, weight, bias, EPS, 0.01)
    again = norm_activation_again(x, mean, variance, weight, bias, EPS, 0.01)
    assert torch.equal(again, out)
    assert again.dtype == dtype


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_gradcheck(slope):
    x = random(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    weight, bias = (p.requires_grad_() for p in parameters(3, torch.float64))
    assert torch.autograd.gradcheck(lambda *leaves: norm_activation(*leaves, EPS, slope)[0], (x, weight, bias))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_layout(layout):
    x, (weight, bias) = random(2, 6, 7, 9).to(memory_format=layout), parameters(6)
    upstream = random(2, 6, 7, 9, seed=3).transpose(2, 3).contiguous().transpose(2, 3)
    leaf = x.requires_grad_()
    out = norm_activation(leaf, weight, bias, EPS, 0.01)[0]
    expected = expected_of(leaf, weight, bias, 0.01)
    assert_close(out, expected)
    assert_close(*(torch.autograd.grad(o, leaf, upstream)[0] for o in (out, expected)))
    rows = random(9, 6).T.contiguous().T
    assert_close(norm_activation(rows, weight, bias, EPS, 0.01)[0], expected_of(rows, weight, bias, 0.01))


@pytest.mark.parametrize("outlier", [0.0, 1e5])
def test_a_large_mean_does_not_swallow_the_variance(outlier):
    """Neither does a first row far from the others, of which distances are summed."""
    x = 1000 + random(5000, 20) / 100
    x[0] += outlier
    weight, bias = torch.ones(20), torch.zeros(20)
    out, mean, variance = norm_activation(x, weight, bias, EPS, 0.01)
    wide = x.double()
    assert_close(mean, wide.mean(0).float(), rtol=1e-6, atol=0)
    # 256 equal squares added in float32: each addition may err to the same side
    assert_close(variance, wide.var(0, correction=0).float(), rtol=5e-4, atol=0)
    # torch's sum gives the mean to 1e-4, which is 0.01 standard deviations
    assert_close(out.double(), expected_of(wide, weight.double(), bias.double(), 0.01), rtol=1e-3, atol=2e-2)


def test_a_constant_channel_has_no_variance():
    x, (weight, bias) = torch.full((3000, 4), 0.1), parameters(4)
    out, mean, variance = norm_activation(x, weight, bias, EPS, 0.01)
    assert_close(mean, torch.full((4,), 0.1))
    assert_close(variance, torch.zeros(4), rtol=0, atol=1e-14)
    assert_close(out, F.leaky_relu(bias, 0.01).expand_as(out), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_nan_stays_in_its_channel(dtype, slope):
    x, (weight, bias) = random(300, 8, dtype=dtype), parameters(8)
    x[270, 3] = torch.nan
    x.requires_grad_()
    out, mean, variance = norm_activation(x, weight, bias, EPS, slope)
    to_x = torch.autograd.grad(out.float().square().sum(), x)[0]
    elsewhere = torch.arange(8) != 3
    for result in (out, mean[None], variance[None], to_x):
        assert result[:, 3].isnan().all()
        assert result[:, elsewhere].isfinite().all()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_the_result(threads, backend):
    if backend == "reference":
        pytest.skip("the reference sums as torch does")
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            x, (weight, bias) = random(20000, 16), parameters(16)
            out, mean, variance = norm_activation(x, weight, bias, EPS, 0.01)
            gradients = norm_activation_backward(out, x, mean, variance, weight, bias, EPS, 0.01)
            results.append([out, mean, variance, *gradients])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("size", [(0, 5), (0, 5, 3, 4), (2, 5, 0, 4)])
def test_empty(size):
    x = torch.zeros(size, requires_grad=True)
    weight, bias = (p.requires_grad_() for p in parameters(5))
    out, mean, variance = norm_activation(x, weight, bias, EPS, 0.01)
    assert out.shape == x.shape
    assert not mean.any()
    assert not variance.any()
    to_x, *others = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert to_x.shape == x.shape
    assert all(torch.equal(gradient, torch.zeros(5)) for gradient in others)


@pytest.mark.parametrize("size", [(1, 5), (1, 5, 1, 1)])
def test_refuses_a_single_value(size):
    with pytest.raises(ValueError, match=r"norm_activation: more than one value a channel is needed, got \[1, 5"):
        norm_activation(torch.zeros(size), torch.ones(5), torch.zeros(5))


def test_refuses_what_does_not_fit():
    five, x = torch.ones(5), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"norm_activation: expected x \[P, C\] or \[B, C, R, A\], got \[2, 5, 3\]"):
        norm_activation(torch.zeros(2, 5, 3), five, five)
    with pytest.raises(ValueError, match=r"norm_activation: expected \[5\] by channel, got \[\[5\], \[4\]\]"):
        norm_activation(x, five, torch.ones(4))
    with pytest.raises(ValueError, match=r"norm_activation_backward: gradient \[4, 4\] for x \[4, 5\]"):
        norm_activation_backward(torch.zeros(4, 4), x, five, five, five, five)
