"""Where the time of the student and of a training step goes.

    python -m benchmarks.profiling [SEQUENCE]                    # shares of the costliest operations, on one CPU thread
    python -m benchmarks.profiling [SEQUENCE] --device cuda [--traces FOLDER]

On a GPU: the kernels of one scan pushed into a stream, of one replay of the student's graph, and of one training step,
with how often each runs and how long, and how long the GPU rested between the first and the last. From torch's
profiler; its traces go to FOLDER.
"""

from __future__ import annotations

import argparse
import gzip
from collections import defaultdict
from functools import partial
from pathlib import Path

MOST = 10  # operations shown
MOST_KERNELS = 60
ROUNDS = 5  # profiled, after as many to warm up


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


def kernel_table(spans: list[tuple[str, float, float]], rounds: int) -> str:
    """Lines of (name, count, microseconds) a round, the costliest first, under their sums.

    Args:
        spans: Name, start and end in microseconds of all that ran on the GPU, over `rounds` rounds.
    """
    count, spent = defaultdict(int), defaultdict(float)
    for name, start, end in spans:
        count[name] += 1
        spent[name] += end - start
    busy, last = 0.0, -1.0
    for _, start, end in sorted(spans, key=lambda span: span[1]):  # side streams overlap
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    whole = last - min((start for _, start, _ in spans), default=last)
    lines = [
        f"  {whole / rounds:9.1f} us, {busy / rounds:.1f} of them busy, {len(spans) / rounds:.0f} kernels and copies",
        *(
            f"  {spent[name] / rounds:9.1f} us {count[name] / rounds:6.1f} x  {name}"
            for name in sorted(spent, key=spent.get, reverse=True)[:MOST_KERNELS]
        ),
    ]
    return "\n".join(lines)


def kernels(name: str, work, traces: Path | None) -> str:
    """What ran on the GPU in one round of the work."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    for _ in range(ROUNDS):
        work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        for _ in range(ROUNDS):
            work()
        torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if traces:
        traces.mkdir(parents=True, exist_ok=True)
        plain = traces / f"{name.replace(' ', '-')}.json"
        profile.export_chrome_trace(str(plain))
        plain.with_suffix(".json.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return kernel_table(spans, ROUNDS)


def on_gpu(folder: str | None, traces: Path | None) -> None:
    import torch

    from kdmos.models import load_model, load_student
    from kdmos.models.fast import GraphedStudent
    from kdmos.motion import motion_channels
    from kdmos.stream import MosStream

    from .bench_stream import WARM_UP, endless
    from .bench_training_step import kdmos_step, prepare
    from .timing import real_scans

    scans, poses, _, _ = real_scans(folder)
    source, stream = endless(scans, poses), MosStream(load_model("synthetic", "cuda"), precision="bfloat16")
    for _ in range(WARM_UP):
        stream.push(*next(source))
    graphed = GraphedStudent(load_student("synthetic", "cuda"), "bfloat16")
    points = torch.from_numpy(scans[7]).cuda()
    residual = torch.from_numpy(motion_channels(scans, poses)[7]).cuda()
    graphed(points, torch.tensor([0, len(points)], device="cuda"), residual)
    works = {
        "push": lambda: stream.push(*next(source)),
        "replay": graphed.graph.replay,
        "training step of 8": kdmos_step(*prepare(folder, 8), "cuda", "bfloat16"),
    }
    for name, work in works.items():
        print(f"{name}, bfloat16\n{kernels(name, work, traces)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequence", nargs="?", help="folder of a sequence with labels; default: synthetic scans")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--traces", type=Path, help="folder for the profiler's traces")
    given = parser.parse_args()
    folder = given.sequence
    import torch

    from kdmos.command import keep_memory
    from kdmos.models import load_student
    from kdmos.models.fast import FastStudent
    from kdmos.motion import motion_channels

    from .bench_training_step import SIDES, kdmos_step, prepare
    from .timing import real_scans

    keep_memory()
    if given.device == "cuda":
        return on_gpu(folder, given.traces)
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
