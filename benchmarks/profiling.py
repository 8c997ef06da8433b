"""Which operations the time of the student and of a training step goes to, on one CPU thread.

    python -m benchmarks.profiling [SEQUENCE]

Prints the shares of the costliest operations, from torch's profiler.
"""

from __future__ import annotations

import argparse
from functools import partial

MOST = 10  # operations shown


def shares(work, rounds: int = 3) -> list[tuple[str, float]]:
    """(operation, share of the time), the costliest first."""
    import torch

    for _ in range(2):
        work()
    with torch.profiler.profile() as profile:
        for _ in range(rounds):
            work()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(spent.values())
    return sorted(((name, time / total) for name, time in spent.items()), key=lambda pair: -pair[1])[:MOST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequence", nargs="?", help="folder of a sequence with labels; default: synthetic scans")
    folder = parser.parse_args().sequence
    import torch

    from kdmos.command import keep_memory
    from kdmos.models import load_student
    from kdmos.models.fast import FastStudent
    from kdmos.motion import motion_channels

    from .bench_training_step import SIDES, kdmos_step, prepare
    from .timing import real_scans

    keep_memory()
    torch.set_num_threads(1)
    scans, poses, _, _ = real_scans(folder)
    points, residual = torch.from_numpy(scans[7]), torch.from_numpy(motion_channels(scans, poses)[7])
    offsets, student, data = torch.tensor([0, len(points)]), load_student("synthetic"), prepare(folder)
    work = {}
    for precision in ("float32", "bfloat16"):
        work[f"student, {precision}"] = partial(FastStudent(student, precision), points, offsets, residual)
    for side, precision in list(SIDES.items())[1:]:
        work[f"training step, {side.removeprefix('kdmos ')}"] = kdmos_step(*data, "cpu", precision)
    for name, function in work.items():
        print(name)
        print("\n".join(f"  {share:6.1%}  {operation}" for operation, share in shares(function)))


if __name__ == "__main__":
    main()
