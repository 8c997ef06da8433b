"""Mamba's recurrence along sequences of points, whose step sizes and projections depend on the points."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import native, reference

CHUNK = 64  # points between two kept states, kChunk of csrc/selective_scan.h
MOST_STATES = 64  # of the native ops


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    gate: Tensor | None,
    delta_bias: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Output of a linear recurrence with D channels of S states each, along every sequence.

    With dt = softplus(delta + delta_bias) and h = 0 before the first point of a sequence, [D, S]:
    h_t = exp(dt_t a) h_{t-1} + dt_t u_t b_t, and y_t = (sum_s h_t c_t + skip u_t) silu(gate_t).

    Half types are computed in float32, under autocast too. The same for any number of threads, and on a GPU from run
    to run. For the backward a state [S, D] is kept for every 64 points.

    Args:
        u: Input, float [N, D], the sequences one after the other.
        delta: Step sizes before the softplus, float [N, D]. Softplus is the identity above 20.
        a: Decay rates, float [D, S], <= 0: -exp(A_log).
        b, c: Input and output projection of each point, float [N, S].
        skip: float [D].
        gate: float [N, D], or None: without gate.
        delta_bias: float [D].
        offsets: int64 [B + 1], ascending from 0 to N: rows of each sequence, which may be empty.
    Returns: y [N, D] in the type of u.
    Raises: ValueError if the shapes do not fit.
    Source: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023 (equation 2 and
        algorithm 2, with b discretised as dt b; the gate is that of the block around it).
    """
    if u.ndim != 2 or a.ndim != 2:
        raise ValueError(f"selective_scan: expected u [N, D] and a [D, S], got {list(u.shape)} and {list(a.shape)}")
    (num_points, channels), states = u.shape, a.shape[1]
    expected = {
        "delta": (delta, [num_points, channels]),
        "a": (a, [channels, states]),
        "b": (b, [num_points, states]),
        "c": (c, [num_points, states]),
        "skip": (skip, [channels]),
        "delta_bias": (delta_bias, [channels]),
    }
    if gate is not None:
        expected["gate"] = (gate, [num_points, channels])
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(
                f"selective_scan: expected {name} {shape} for u {list(u.shape)} and {states} states, "
                f"got {list(tensor.shape)}"
            )
    if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
        raise ValueError(
            f"selective_scan: expected offsets int64 [B + 1], got {offsets.dtype} {list(offsets.shape)}; "
            "one sequence is [0, N]"
        )
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    inputs = [t if t is None else t.to(wide).contiguous() for t in (u, delta, a, b, c, skip, gate, delta_bias)]
    if native.serves(u) and states <= MOST_STATES:
        with_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        y = torch.ops.kdmos.selective_scan(*inputs, offsets.contiguous(), with_states)[0]
    else:
        with torch.autocast(u.device.type, enabled=False):
            y = reference.selective_scan(*inputs, offsets)
    return y.to(u.dtype)


@native.fake("selective_scan")
def _(u, delta, a, b, c, skip, gate, delta_bias, offsets, with_states):
    chunks = (u.shape[0] + CHUNK - 1) // CHUNK if with_states else 0
    return torch.empty_like(u), u.new_empty(chunks, a.shape[1], u.shape[1])


@native.fake("selective_scan_backward")
def _(gradient, u, delta, a, b, c, skip, gate, delta_bias, offsets, states):
    like = [torch.empty_like(t) for t in (u, delta, a, b, c, skip)]
    return *like, u.new_empty(0 if gate is None else u.shape[0], u.shape[1]), torch.empty_like(delta_bias)


def _keep(ctx, inputs, output) -> None:
    *tensors, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, gradient, _):
    *inputs, states = ctx.saved_tensors
    gradients = list(torch.ops.kdmos.selective_scan_backward(gradient.contiguous(), *inputs, states))
    if inputs[6] is None:
        gradients[6] = None
    return *gradients, None, None


native.differentiate("selective_scan", _backward, _keep)
