"""WDCD of 8 scans of 120,000 points, forward and backward: `wdcd_loss` against a chain of torch operations.

    python -m benchmarks.bench_wdcd_loss

The labels are drawn with the shares of SemanticKITTI: 0.3 % of the points move.
"""

from __future__ import annotations

from .timing import Case, main

SCANS, POINTS = 8, 120_000


def cases(arguments) -> list[Case]:
    import torch

    from kdmos.losses import WDCD

    from . import baseline

    generator = torch.Generator().manual_seed(0)
    num_points = SCANS * POINTS
    student, teacher = (torch.randn(num_points, 4, generator=generator) * 3 for _ in range(2))
    # in stretches, as a sensor sees them
    shares = torch.tensor([0.03, 0.90, 0.067, 0.003])
    labels = torch.multinomial(shares, num_points // 20, True, generator=generator).repeat_interleave(20)
    student, teacher, labels = (t.to(arguments.device) for t in (student, teacher, labels))
    student.requires_grad_()
    bytes_labels = labels.to(torch.uint8)
    loss = WDCD("authors")

    def theirs():
        student.grad = None
        baseline.wdcd_authors_loss(student, teacher, labels).backward()

    def ours():
        student.grad = None
        loss(student, teacher, bytes_labels).backward()

    return [
        Case("8 x 120 k points, forward and backward", theirs, ours, "drawn", limit_bytes=num_points * (3 * 16 + 1))
    ]


if __name__ == "__main__":
    main("wdcd_loss", cases, __doc__)
