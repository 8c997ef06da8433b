"""The student on a real scan, points and residuals in -> point logits out, against the authors' arrangement.

    python -m benchmarks.bench_student [SEQUENCE] [--device cuda]

Gridding included on both sides; residuals given; batch 1; the published grid; the shipped weights on both sides.
The limit counts the multiply-adds of the convolutions and the point MLP at the rate of a plain matrix product. It is
that of convolving everywhere, and plainly: on a CPU the fast student leaves out the background and transforms what is
deep in the network, and may come below it.
"""

from __future__ import annotations

from itertools import product

from .timing import Case, main, multiply_adds_per_second, real_scans

GMAC = 33.0  # 28 of convolutions, 5 of the point MLP, see kdmos.models.student


def cases(arguments) -> list[Case]:
    import torch

    from kdmos.models import load_student
    from kdmos.models.fast import FastStudent, GraphedStudent
    from kdmos.motion import motion_channels

    from . import baseline

    device = arguments.device
    scans, poses, _, name = real_scans(arguments.sequence)
    points, residual = scans[7], motion_channels(scans, poses)[7]
    student = load_student("synthetic", device)
    theirs = baseline.Student(4, 8).to(device).eval()
    packed, given = torch.from_numpy(points).to(device), torch.from_numpy(residual).to(device)
    offsets = torch.tensor([0, len(points)], device=device)

    def run(model):
        with torch.inference_mode():
            return model(packed, offsets, given).point_logits

    found = [
        Case(
            "float32, as trained",
            lambda: baseline.predict(theirs, [points], [residual]),
            lambda: run(student),
            scans=name,
            limit_ms=1e12 * GMAC / multiply_adds_per_second(torch.float32, device),
        )
    ]
    forms = (FastStudent, GraphedStudent) if packed.is_cuda else (FastStudent,)
    for (precision, dtype), form in product((("float32", torch.float32), ("bfloat16", torch.bfloat16)), forms):
        fast = form(student, precision)
        if fast.dtype == dtype:
            found.append(
                Case(
                    f"{precision}, {form.__name__}",
                    lambda: baseline.predict(theirs, [points], [residual]),
                    lambda fast=fast: run(fast),
                    scans=name,
                    limit_ms=1e12 * GMAC / multiply_adds_per_second(dtype, device),
                )
            )
    return found


if __name__ == "__main__":
    main("student", cases, __doc__)
