"""Training step, batch 1, on a real scan: this package against the authors' arrangement in `baseline.py`.

    python -m benchmarks.bench_training_step SEQUENCE [--steps 9]

Each side runs in a process of its own, so that the peak of its memory is its own; their steps alternate. A step is
forward with dropout, all losses of the authors' run (made-up teacher logits), backward and SGD, from points and
motion channels in memory; ours also sorts the points into the grid, which the authors do in the loader.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import numpy as np

SIDES = ("baseline", "kdmos")
WARM_UP = 5


def prepare(folder: Path):
    """One scan with its labels, motion channels and made-up teacher logits."""
    from kdmos.data.labels import CLASSES, to_classes
    from kdmos.data.semantic_kitti import find_sequences
    from kdmos.motion import motion_channels

    (sequence,) = find_sequences(folder)
    frames = sequence.frames[:15]
    scans = [sequence.read_points(frame) for frame in frames]
    residual = motion_channels(scans, sequence.poses()[: len(frames)])
    raw = sequence.read_labels(frames[7], len(scans[7]))
    labels = to_classes(raw, CLASSES[4], sequence.labels_path(frames[7]))
    teacher = np.random.default_rng(0).normal(size=(len(labels), 4)).astype(np.float32)
    return scans[7], residual[7], labels, teacher


def baseline_step(points, residual, labels, teacher):
    """A function that runs one step of the authors' arrangement."""
    import torch

    from . import baseline

    torch.manual_seed(0)
    student = baseline.Student(4, 8).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=1e-4)
    batch = baseline.make_batch([points], [residual], [labels], [teacher])
    return lambda: baseline.training_step(student, optimizer, batch)


def kdmos_step(points, residual, labels, teacher):
    """A function that runs one step of this package."""
    import torch

    from kdmos.config import load_config
    from kdmos.data.batch import PackedBatch
    from kdmos.train import Training

    module = Training(load_config(None, ["distill.teacher=any"])).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.01, 0.9, weight_decay=1e-4)
    batch = PackedBatch(
        torch.from_numpy(points),
        torch.tensor([0, len(points)]),
        residual=torch.from_numpy(residual),
        labels=torch.from_numpy(labels),
        teacher_logits=torch.from_numpy(teacher),
    )

    def step():
        optimizer.zero_grad()
        output = module.student(batch.points, batch.offsets, batch.residual)
        torch.stack(list(module.losses(output, batch).values())).sum().backward()
        optimizer.step()

    return step


def serve(side: str, folder: Path, pipe) -> None:
    """Runs one step for each message and answers with its seconds; at the end with the peak memory in GiB."""
    data = prepare(folder)
    step = {"baseline": baseline_step, "kdmos": kdmos_step}[side](*data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while pipe.recv():
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequence", type=Path)
    parser.add_argument("--steps", type=int, default=9)
    arguments = parser.parse_args()
    context, pipes, times = multiprocessing.get_context("spawn"), {}, {side: [] for side in SIDES}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(side, arguments.sequence, theirs), daemon=True).start()
    for number in range(arguments.steps + WARM_UP):
        for side, pipe in pipes.items():  # in turns, so that a busy machine slows both
            pipe.send(True)
            seconds = pipe.recv()
            times[side] += [seconds] if number >= WARM_UP else []
    results = {}
    for side, pipe in pipes.items():
        pipe.send(False)
        results[side] = times[side], pipe.recv()

    from . import rows

    row = {"sequence": arguments.sequence.resolve().name, "steps": arguments.steps}
    for side, (times, memory) in results.items():
        low, median, high = np.percentile(times, [20, 50, 80]).tolist()
        row |= {f"{side}_s_p20": round(low, 3), f"{side}_s": round(median, 3), f"{side}_s_p80": round(high, 3)}
        row[f"{side}_gib"] = round(memory, 2)
    row["time_ratio"] = round(row["baseline_s"] / row["kdmos_s"], 2)
    row["memory_ratio"] = round(row["baseline_gib"] / row["kdmos_gib"], 2)
    print(row)
    print(f"appended to {rows.append('training_step', row)}")


if __name__ == "__main__":
    main()
