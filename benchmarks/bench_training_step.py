"""Training step on one scan, or a batch: this package against the authors' arrangement in `baseline.py`.

    python -m benchmarks.bench_training_step [SEQUENCE] [--rounds 9] [--batch 8]

Each side runs in a process of its own, so that the peak of its memory is its own; their steps alternate. A step is
forward with dropout, all losses of the authors' run (made-up teacher logits), backward and SGD, from points and
motion channels in memory; ours also sorts the points into the grid, which the authors do in the loader. The baseline
computes in float32; ours once in float32 and once with the convolutions in bfloat16 (`precision: bf16-mixed`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import resource
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np

SIDES = {"baseline": None, "kdmos float32": None, "kdmos bf16-mixed": "bfloat16"}
WARM_UP = 5
TOGETHER = 3  # steps on a GPU between two looks at the clock


def first_scan(batch: int) -> int:
    """The batch ends with the eighth scan of a sequence, the first that has its whole window."""
    return max(0, 8 - batch)


def prepare(folder: str | None, batch: int = 1) -> tuple[list[np.ndarray], ...]:
    """Scans with their motion channels, labels and made-up teacher logits, a list of each."""
    from kdmos.motion import motion_channels

    from .timing import real_scans

    scans, poses, labels, _ = real_scans(folder)
    residual, generator = motion_channels(scans, poses), np.random.default_rng(0)
    chosen = [i % len(scans) for i in range(first_scan(batch), first_scan(batch) + batch)]
    teacher = [generator.normal(size=(len(labels[i]), 4)).astype(np.float32) for i in chosen]
    return [scans[i] for i in chosen], [residual[i] for i in chosen], [labels[i] for i in chosen], teacher


def baseline_step(points, residual, labels, teacher, device: str):
    """A function that runs one step of the authors' arrangement."""
    import torch

    from . import baseline

    torch.manual_seed(0)
    student = baseline.Student(4, 8).to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=1e-4)
    labels = [np.where(label == 255, 0, label) for label in labels]
    batch = baseline.make_batch(points, residual, labels, teacher, device=device)
    return lambda: baseline.training_step(student, optimizer, batch)


def kdmos_step(points, residual, labels, teacher, device: str, precision: str | None):
    """A function that runs one step of this package."""
    import torch

    from kdmos.config import load_config
    from kdmos.data.batch import PackedBatch
    from kdmos.train import Training

    module = Training(load_config(None, ["distill.teacher=any"])).to(device).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.01, 0.9, weight_decay=1e-4)
    packed, residual, labels, teacher = (
        torch.from_numpy(np.concatenate(each)) for each in (points, residual, labels, teacher)
    )
    offsets = torch.tensor([0, *(len(scan) for scan in points)]).cumsum(0)
    batch = PackedBatch(packed, offsets, residual=residual, labels=labels, teacher_logits=teacher).to(device)
    cast = torch.autocast(device, getattr(torch, precision)) if precision else nullcontext()

    def step():
        optimizer.zero_grad()
        with cast:
            output = module.student(batch.points, batch.offsets, batch.residual)
            loss = torch.stack(list(module.losses(output, batch).values())).sum()
        loss.backward()
        optimizer.step()

    return step


def peak_gib() -> float:
    """Most memory this process has held; of Linux's own account, because getrusage's begins with the parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20


def serve(side: str, folder: str | None, device: str, pipe, batch: int = 1) -> None:
    """Runs a step for each message and answers with its seconds; at the end with the peak memory in GiB.

    On a GPU some steps in a row, as training runs them: the host may be ahead of the device.
    """
    import torch

    from kdmos.command import keep_memory

    from .timing import clock

    if side != "baseline":  # as every command of ours does; theirs does not, and it would count in its memory
        keep_memory()
    data = prepare(folder, batch)
    work = baseline_step(*data, device) if side == "baseline" else kdmos_step(*data, device, SIDES[side])
    before = peak_gib()
    together = TOGETHER if device == "cuda" else 1
    while pipe.recv():
        pipe.send(clock(lambda: [work() for _ in range(together)], device) / together)
    pipe.send(torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak_gib() - before)


def measure(folder: str | None, device: str, rounds: int, batch: int = 1) -> list[dict]:
    """Rows: one for each precision of ours, against the same steps of the baseline."""
    from .timing import REST, real_scans

    context, pipes, times = multiprocessing.get_context("spawn"), {}, {side: [] for side in SIDES}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(side, folder, device, theirs, batch), daemon=True).start()
    for number in range(rounds + WARM_UP):
        for side, pipe in pipes.items():  # in turns, so that a busy machine slows all
            pipe.send(True)
            seconds = pipe.recv()
            times[side] += [1e3 * seconds] if number >= WARM_UP else []
            time.sleep(REST if device == "cpu" else 0.0)  # a GPU that rests lets its clock fall
    memory = {}
    for side, pipe in pipes.items():
        pipe.send(False)
        memory[side] = pipe.recv()
    found = []
    for side in list(SIDES)[1:]:
        case = side.removeprefix("kdmos ") + (f", batch {batch}" if batch > 1 else "")
        row = {"case": case, "rounds": rounds, "scans": real_scans(folder)[3]}
        for name, values in (("baseline", times["baseline"]), ("kdmos", times[side])):
            low, median, high = np.percentile(values, [20, 50, 80])
            low, median, high = (round(value, None if device == "cpu" else 2) for value in (low, median, high))
            row |= {f"{name}_ms_p20": low, f"{name}_ms": median, f"{name}_ms_p80": high}
        row["ratio"] = round(row["baseline_ms"] / row["kdmos_ms"], 2)
        row |= {"baseline_gib": round(memory["baseline"], 2), "kdmos_gib": round(memory[side], 2)}
        row["memory_ratio"] = round(memory["baseline"] / memory[side], 2)
        found.append(row)
    return found


def main() -> None:
    from . import rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequence", nargs="?")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1, help="scans")
    parser.add_argument("--no-append", action="store_true")
    arguments = parser.parse_args()
    for row in measure(arguments.sequence, arguments.device, arguments.rounds, arguments.batch):
        print(row)
        if not arguments.no_append:
            rows.append("training_step", row, arguments.device)


if __name__ == "__main__":
    main()
