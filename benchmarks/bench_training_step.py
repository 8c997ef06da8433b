"""Training step, batch 1, on a real scan: this package against the authors' arrangement in `baseline.py`.

    python -m benchmarks.bench_training_step SEQUENCE [--steps 5]

Each side runs in a process of its own, so that the peak of its memory is its own. Forward with dropout, all losses
of the authors' run (random teacher logits), backward, SGD step; points and motion channels in memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import numpy as np

SIDES = ("baseline", "kdmos")


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

    from benchmarks import baseline

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


def measure(side: str, folder: Path, steps: int, queue) -> None:
    """Times of the steps after two for warm-up, and the peak resident memory above the prepared data, to `queue`."""
    data = prepare(folder)
    step = {"baseline": baseline_step, "kdmos": kdmos_step}[side](*data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    queue.put((times[2:], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequence", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    context, results = multiprocessing.get_context("spawn"), {}
    for side in SIDES:
        queue = context.Queue()
        process = context.Process(target=measure, args=(side, arguments.sequence, arguments.steps, queue))
        process.start()
        results[side] = queue.get()
        process.join()

    from benchmarks import rows

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
