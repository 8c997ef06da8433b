"""WDCD of 8 scans of 120,000 points, forward and backward: `wdcd_loss` against a chain of torch operations.

    python -m benchmarks.bench_wdcd_loss

The labels are drawn with the shares of SemanticKITTI: 0.3 % of the points move.
"""

from __future__ import annotations

from functools import partial

from .timing import Case, main, num_sets

SCANS, POINTS = 8, 120_000


def cases(arguments) -> list[Case]:
    import torch

    from kdmos.losses import WDCD

    from . import baseline

    num_points, loss = SCANS * POINTS, WDCD("authors")
    moved = num_points * (3 * 16 + 1)

    def pieces(seed):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (torch.randn(num_points, 4, generator=generator) * 3 for _ in range(2))
        # in stretches, as a sensor sees them
        shares = torch.tensor([0.03, 0.90, 0.067, 0.003])
        labels = torch.multinomial(shares, num_points // 20, True, generator=generator).repeat_interleave(20)
        student, teacher, labels = (t.to(arguments.device) for t in (student, teacher, labels))
        return student.requires_grad_(), teacher, labels, labels.to(torch.uint8)

    def theirs(student, teacher, labels, _):
        student.grad = None
        baseline.wdcd_authors_loss(student, teacher, labels).backward()

    def ours(student, teacher, _, labels):
        student.grad = None
        loss(student, teacher, labels).backward()

    sets = [pieces(seed) for seed in range(num_sets(arguments.device, moved))]
    sides = ([partial(side, *each) for each in sets] for side in (theirs, ours))
    return [Case("8 x 120 k points, forward and backward", *sides, "drawn", limit_bytes=moved)]


if __name__ == "__main__":
    main("wdcd_loss", cases, __doc__)
