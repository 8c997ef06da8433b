"""Training step, batch 1, on a scan: this package against the authors' arrangement in `baseline.py`.

    python -m benchmarks.bench_training_step [SEQUENCE] [--rounds 9]

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


def prepare(folder: str | None):
    """One scan with its labels, motion channels and made-up teacher logits."""
    from kdmos.motion import motion_channels

    from .timing import real_scans

    scans, poses, labels, _ = real_scans(folder)
    residual = motion_channels(scans, poses)
    teacher = np.random.default_rng(0).normal(size=(len(labels[7]), 4)).astype(np.float32)
    return scans[7], residual[7], labels[7], teacher


def baseline_step(points, residual, labels, teacher, device: str):
    """A function that runs one step of the authors' arrangement."""
    import torch

    from . import baseline

    torch.manual_seed(0)
    student = baseline.Student(4, 8).to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=1e-4)
    labels = np.where(labels == 255, 0, labels)
    batch = baseline.make_batch([points], [residual], [labels], [teacher], device=device)
    return lambda: baseline.training_step(student, optimizer, batch)


def kdmos_step(points, residual, labels, teacher, device: str, precision: str | None):
    """A function that runs one step of this package."""
    import torch

    from kdmos.config import load_config
    from kdmos.data.batch import PackedBatch
    from kdmos.train import Training

    module = Training(load_config(None, ["distill.teacher=any"])).to(device).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.01, 0.9, weight_decay=1e-4)
    batch = PackedBatch(
        torch.from_numpy(points),
        torch.tensor([0, len(points)]),
        residual=torch.from_numpy(residual),
        labels=torch.from_numpy(labels),
        teacher_logits=torch.from_numpy(teacher),
    ).to(device)
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


def serve(side: str, folder: str | None, device: str, pipe) -> None:
    """Runs one step for each message and answers with its seconds; at the end with the peak memory in GiB."""
    import torch

    from kdmos.command import keep_memory

    from .timing import clock

    if side != "baseline":  # as every command of ours does; theirs does not, and it would count in its memory
        keep_memory()
    data = prepare(folder)
    work = baseline_step(*data, device) if side == "baseline" else kdmos_step(*data, device, SIDES[side])
    before = peak_gib()
    while pipe.recv():
        pipe.send(clock(work, device))
    pipe.send(torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak_gib() - before)


def measure(folder: str | None, device: str, rounds: int) -> list[dict]:
    """Rows: one for each precision of ours, against the same steps of the baseline."""
    from .timing import REST, real_scans

    context, pipes, times = multiprocessing.get_context("spawn"), {}, {side: [] for side in SIDES}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(side, folder, device, theirs), daemon=True).start()
    for number in range(rounds + WARM_UP):
        for side, pipe in pipes.items():  # in turns, so that a busy machine slows all
            pipe.send(True)
            seconds = pipe.recv()
            times[side] += [1e3 * seconds] if number >= WARM_UP else []
            time.sleep(REST)
    memory = {}
    for side, pipe in pipes.items():
        pipe.send(False)
        memory[side] = pipe.recv()
    found = []
    for side in list(SIDES)[1:]:
        row = {"case": side.removeprefix("kdmos "), "rounds": rounds, "scans": real_scans(folder)[3]}
        for name, values in (("baseline", times["baseline"]), ("kdmos", times[side])):
            low, median, high = np.percentile(values, [20, 50, 80])
            row |= {f"{name}_ms_p20": round(low), f"{name}_ms": round(median), f"{name}_ms_p80": round(high)}
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
    parser.add_argument("--no-append", action="store_true")
    arguments = parser.parse_args()
    for row in measure(arguments.sequence, arguments.device, arguments.rounds):
        print(row)
        if not arguments.no_append:
            rows.append("training_step", row, arguments.device)


if __name__ == "__main__":
    main()
