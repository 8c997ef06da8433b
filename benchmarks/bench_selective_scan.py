"""Mamba's recurrence over a long sequence, forward and backward: `selective_scan` against a chunked scan in torch.

python -m benchmarks.bench_selective_scan
"""

from __future__ import annotations

from .timing import Case, main

SHAPES = ((300_000, 64), (40_000, 256))  # points and channels: all scans of a sample, and the same at a coarser level
STATES = 16


def cases(arguments) -> list[Case]:
    import torch

    from kdmos import ops

    from . import baseline

    def inputs(num_points, channels):
        generator = torch.Generator().manual_seed(0)
        u, delta, gate, gradient = (torch.randn(num_points, channels, generator=generator) for _ in range(4))
        b, c = (torch.randn(num_points, STATES, generator=generator) for _ in range(2))
        a = -torch.arange(1.0, STATES + 1).repeat(channels, 1)  # as initialised
        skip, bias = torch.ones(channels), torch.full((channels,), -3.0)
        tensors = [t.to(arguments.device) for t in (u, delta, a, b, c, skip, gate, bias)]
        return [t.requires_grad_() for t in tensors], gradient.to(arguments.device)

    found = []
    for num_points, channels in SHAPES:
        leaves, gradient = inputs(num_points, channels)
        offsets = torch.tensor([0, num_points], device=arguments.device)

        def ours(leaves=leaves, offsets=offsets):
            return ops.selective_scan(*leaves, offsets)

        def theirs(leaves=leaves):
            return baseline.selective_scan(*leaves)

        def forward(scan):
            with torch.no_grad():
                scan()

        def both(scan, leaves=leaves, gradient=gradient):
            torch.autograd.grad(scan(), leaves, gradient)

        # forward: u, delta, gate, y; backward: u, delta, gate, the gradient of y, and three gradients
        wide, narrow = 4 * num_points * channels, 4 * num_points * STATES
        for name, work, moved in (
            ("forward", forward, 4 * wide + 2 * narrow),
            ("forward and backward", both, 11 * wide + 6 * narrow),
        ):
            found.append(
                Case(
                    f"{name}, {num_points} x {channels}, {STATES} states",
                    lambda work=work, scan=theirs: work(scan),
                    lambda work=work, scan=ours: work(scan),
                    scans="drawn",
                    limit_bytes=moved,
                )
            )
    return found


if __name__ == "__main__":
    main("selective_scan", cases, __doc__)
