"""The selective scan against a recurrence in float64, forward and backward, with sequences of every length."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kdmos.ops import native, selective_scan

NAMES = ("u", "delta", "a", "b", "c", "skip", "gate", "delta_bias")


def draw(sizes, channels=20, states=16, gate=True, dtype=torch.float32, seed=0):
    """Arguments as a trained layer has them: steps about 0.01 .. 1, decay rates 1 .. S."""
    generator = torch.Generator().manual_seed(seed)
    num_points = sum(sizes)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "u": normal(num_points, channels),
        "delta": normal(num_points, channels),
        "a": -torch.arange(1, states + 1).to(dtype) * torch.exp(0.1 * normal(channels, states)),
        "b": normal(num_points, states),
        "c": normal(num_points, states),
        "skip": normal(channels),
        "gate": normal(num_points, channels) if gate else None,
        "delta_bias": normal(channels) - 2,
        "offsets": torch.tensor([0, *sizes]).cumsum(0),
    }


def by_hand(u, delta, a, b, c, skip, gate, delta_bias, offsets):
    """The definition in float64, one point after the other."""
    u, delta, a, b, c, skip, delta_bias = (t.detach().double().numpy() for t in (u, delta, a, b, c, skip, delta_bias))
    dt = np.logaddexp(0, delta + delta_bias)
    y = np.empty_like(u)
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        state = np.zeros_like(a)
        for t in range(first, last):
            state = np.exp(dt[t, :, None] * a) * state + (dt[t] * u[t])[:, None] * b[t]
            y[t] = state @ c[t] + skip * u[t]
    if gate is not None:
        z = gate.detach().double().numpy()
        y *= z / (1 + np.exp(-z))
    return torch.from_numpy(y)


def assert_near(ours, wanted, tolerance=1e-5):
    """Relative to the largest entry, or to 1e-20: decays of less than 1e-37 may be taken for that."""
    assert ours.shape == wanted.shape
    if wanted.numel():
        assert_close(ours.double(), wanted.double(), rtol=0, atol=tolerance * max(1e-20, wanted.abs().max().item()))


def gradients(inputs, weight):
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items() if n in NAMES and t is not None}
    y = selective_scan(**inputs | leaves)
    return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), weight, materialize_grads=True)))


def one_point():
    """u = 2, softplus(delta) = ln 2, b = 3, c = 5, skip = 7."""
    one = torch.ones(1, 1)
    return dict(u=2 * one, delta=0 * one, a=-one, b=3 * one, c=5 * one, skip=7 * one[0], gate=None)


def test_one_point_worked_by_hand():
    inputs = one_point() | dict(delta_bias=torch.zeros(1), offsets=torch.tensor([0, 1]))
    # h = ln 2 * 2 * 3, y = 5 h + 7 * 2
    assert selective_scan(**inputs).item() == pytest.approx(30 * np.log(2) + 14)
    inputs["gate"] = torch.full((1, 1), np.log(3))  # silu = ln 3 * 3 / 4
    assert selective_scan(**inputs).item() == pytest.approx((30 * np.log(2) + 14) * 0.75 * np.log(3))


def test_two_points_worked_by_hand():
    """With dt = ln 2 and a = -1 the state is halved, then pushed."""
    inputs = {n: t if t is None or n in ("a", "skip") else t.repeat(2, 1) for n, t in one_point().items()}
    inputs |= dict(delta_bias=torch.zeros(1), offsets=torch.tensor([0, 2]))
    push = 6 * float(np.log(2))
    assert_close(
        selective_scan(**inputs)[:, 0], torch.tensor([5 * push + 14, 5 * 1.5 * push + 14], dtype=torch.float32)
    )
    inputs["offsets"] = torch.tensor([0, 1, 2])
    assert_close(selective_scan(**inputs)[:, 0], torch.tensor([5 * push + 14, 5 * push + 14], dtype=torch.float32))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("num_points", [1, 2, 63, 64, 65, 1000])
def test_equals_the_definition(num_points, gate):
    inputs = draw([num_points], gate=gate)
    assert_near(selective_scan(**inputs), by_hand(**inputs))


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (16, 16), (33, 3), (5, 20), (130, 16), (7, 64), (3, 65)])
def test_any_number_of_channels_and_states(channels, states):
    inputs = draw([70, 59], channels, states)
    assert_near(selective_scan(**inputs), by_hand(**inputs))


@pytest.mark.parametrize("sizes", [[0, 1, 0, 0, 63, 65, 0], [64, 64, 1], [1] * 130, [200, 3, 100]])
def test_sequences_know_nothing_of_each_other(sizes):
    inputs = draw(sizes)
    y = selective_scan(**inputs)
    assert_near(y, by_hand(**inputs))
    rows = ("u", "delta", "b", "c", "gate")
    for first, last in zip(inputs["offsets"][:-1].tolist(), inputs["offsets"][1:].tolist()):
        alone = {n: t[first:last] if n in rows else t for n, t in inputs.items()}
        assert_near(selective_scan(**alone | {"offsets": torch.tensor([0, last - first])}), y[first:last])


def test_a_long_sequence(backend):
    if backend == "reference":
        pytest.skip("it takes minutes")
    inputs = draw([300_000], channels=16)
    assert_near(selective_scan(**inputs), by_hand(**inputs))


@pytest.mark.parametrize("shift", [-30.0, -8.0, 5.0, 15.0, 19.9, 20.1, 100.0])
def test_extreme_steps(shift, backend):
    """Softplus down to 1e-13, where nothing decays, and up to 100, where nothing stays."""
    inputs = draw([300], seed=1) | {"skip": torch.zeros(20)}
    inputs["delta_bias"] = inputs["delta_bias"] + shift
    # float32 steps of exp(shift) are off by shift * 6e-8; a GPU's exp2 is off by two units in the last place
    assert_near(selective_scan(**inputs), by_hand(**inputs), 1e-4 if backend == "cuda" else 1e-5)
    _, found = gradients(inputs, torch.ones(300, 20))
    wide = {n: t.double() if n in NAMES else t for n, t in inputs.items()}
    with native.backend("reference"):
        _, wanted = gradients(wide, torch.ones(300, 20, dtype=torch.float64))
    for name in found:
        assert_near(found[name], wanted[name], 1e-4)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("sizes", [[1], [150], [64, 0, 2, 70, 0]])
def test_gradients_equal_the_reference(sizes, gate):
    inputs = draw(sizes, gate=gate)
    weight = torch.randn(sum(sizes), 20, generator=torch.Generator().manual_seed(3))
    _, found = gradients(inputs, weight)
    with native.backend("reference"):
        _, wanted = gradients(inputs, weight)
    for name in wanted:
        assert found[name].dtype == torch.float32
        assert_near(found[name], wanted[name])


@pytest.mark.parametrize(("gate", "states"), [(True, 2), (False, 2), (True, 17)])
def test_gradcheck(gate, states):
    inputs = draw([3, 0, 66 if states == 2 else 2], channels=2, states=states, gate=gate, dtype=torch.float64)
    leaves = [inputs[name].requires_grad_() for name in NAMES if inputs[name] is not None]

    def scan(*leaves):
        u, delta, a, b, c, skip, *gate, delta_bias = leaves
        return selective_scan(u, delta, a, b, c, skip, gate[0] if gate else None, delta_bias, inputs["offsets"])

    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_do_not_change_the_result(threads, backend):
    if backend != "native":
        pytest.skip("the reference sums as torch does")
    inputs = draw([300, 5, 0, 900], channels=70)
    weight = torch.randn(1205, 70, generator=torch.Generator().manual_seed(3))
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            y, found = gradients(inputs, weight)
            results.append([y, *found.values()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_without_gradient_the_same():
    inputs = draw([130])
    y, _ = gradients(inputs, torch.ones(130, 20))
    assert torch.equal(selective_scan(**inputs), y)


def test_non_contiguous_input():
    inputs = draw([100, 30])
    weight = torch.randn(20, 130, generator=torch.Generator().manual_seed(3)).T
    expected, wanted = gradients(inputs, weight.contiguous())
    strided = {n: t if n not in NAMES else torch.stack([t, t + 1], -1)[..., 0] for n, t in inputs.items()}
    assert not strided["u"].is_contiguous()
    y, found = gradients(strided, weight)
    assert_close(y, expected)
    for name in NAMES:
        assert_near(found[name], wanted[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    inputs = draw([100])
    half = {n: t.to(dtype) if n in ("u", "delta", "b", "c", "gate") else t for n, t in inputs.items()}
    y, found = gradients(half, torch.ones(100, 20, dtype=dtype))
    assert y.dtype == dtype
    assert torch.equal(y, selective_scan(**{n: t.float() if n in NAMES else t for n, t in half.items()}).to(dtype))
    assert found["u"].dtype == dtype
    assert found["a"].dtype == torch.float32


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_no_points(sizes):
    y, found = gradients(draw(sizes), torch.ones(0, 20))
    assert y.shape == (0, 20)
    assert all(not gradient.any() for gradient in found.values())
    assert found["a"].shape == (20, 16)


def test_refuses_what_does_not_fit(backend):
    inputs = draw([10])
    with pytest.raises(ValueError, match=r"selective_scan: expected b \[10, 16\] for u \[10, 20\] and 16 states, got"):
        selective_scan(**inputs | {"b": torch.zeros(10, 15)})
    with pytest.raises(ValueError, match=r"selective_scan: expected gate \[10, 20\]"):
        selective_scan(**inputs | {"gate": torch.zeros(9, 20)})
    with pytest.raises(ValueError, match=r"selective_scan: expected u \[N, D\] and a \[D, S\], got \[10\]"):
        selective_scan(**inputs | {"u": torch.zeros(10)})
    with pytest.raises(ValueError, match=r"selective_scan: expected offsets int64 \[B \+ 1\]"):
        selective_scan(**inputs | {"offsets": torch.tensor([0.0, 10.0])})
    if backend == "native":
        for offsets in ([0, 9], [1, 10], [0, 11], [0, 7, 6, 10]):
            with pytest.raises(RuntimeError, match="selective_scan: offsets must"):
                selective_scan(**inputs | {"offsets": torch.tensor(offsets)})
