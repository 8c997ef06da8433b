"""How the op benchmarks measure: both sides in turns in one process, medians, and the time the machine allows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from . import rows

WARM_UP = 3
REST = 0.05  # seconds until the threads of the other side, which wait for more work by spinning, leave their cores


@dataclass(frozen=True)
class Case:
    """One piece of work, done in plain torch or numpy as in `baseline.py`, and by this package.

    scans: Where its scans are from; "drawn" for random numbers.
    limit_bytes: Fewest bytes that must move; with the measured copy bandwidth, a lower bound of the time.
    limit_ms: A lower bound of another kind (arithmetic), if that is the higher one.
    """

    name: str
    baseline: Callable[[], object]
    ours: Callable[[], object]
    scans: str
    limit_bytes: float = 0.0
    limit_ms: float = 0.0


def rest() -> None:
    """Lets the threads of one side leave their cores, and wakes torch's, which the other side begins with."""
    time.sleep(REST)
    work = torch.zeros(1 << 20)
    for _ in range(20):
        work.add_(1)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a plain copy of 256 MB into memory that is there already."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    seconds = [clock(lambda: target.copy_(source), device) for _ in range(12)][2:]
    return 2 * source.numel() * 4 / float(np.median(seconds))


@cache
def multiply_adds_per_second(dtype: torch.dtype, device: str) -> float:
    """Of a matrix product of 2048 x 2048."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    return 2048**3 / float(np.median([clock(lambda: a @ b, device) for _ in range(12)][2:]))


def clock(work: Callable[[], object], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def compare(case: Case, device: str, rounds: int) -> dict:
    """One row: milliseconds of both sides (median, 20th and 80th percentile), their ratio, and the limit."""
    times = {"baseline": [], "kdmos": []}
    for number in range(WARM_UP + rounds):
        for side, work in (("baseline", case.baseline), ("kdmos", case.ours)):  # in turns: a busy machine slows both
            rest()
            seconds = clock(work, device)
            times[side] += [1e3 * seconds] if number >= WARM_UP else []
    row = {"case": case.name, "scans": case.scans, "rounds": rounds}
    for side, values in times.items():
        low, median, high = np.percentile(values, [20, 50, 80]).tolist()
        row |= {f"{side}_ms_p20": round(low, 3), f"{side}_ms": round(median, 3), f"{side}_ms_p80": round(high, 3)}
    row["ratio"] = round(row["baseline_ms"] / row["kdmos_ms"], 2)
    limit = max(case.limit_ms, 1e3 * case.limit_bytes / copy_bandwidth(device))
    row["limit"] = "arithmetic" if limit == case.limit_ms and limit else "bytes"
    row["limit_ms"] = round(limit, 3)
    row["copy_gb_s"] = round(copy_bandwidth(device) / 1e9, 1)
    row["share_of_limit"] = round(limit / row["kdmos_ms"], 3)
    return row


@cache
def real_scans(
    folder: str | None, count: int = 16, sensor: str = "hdl64"
) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray], str]:
    """Scans, their LiDAR poses and classes, and where they are from: a sequence folder, or a synthetic street."""
    if folder is None:
        return _synthetic_scans(count, sensor)
    from kdmos.data.labels import CLASSES, to_classes
    from kdmos.data.semantic_kitti import find_sequences

    (sequence,) = find_sequences(folder)
    frames = sequence.frames[:count]
    scans = [sequence.read_points(frame) for frame in frames]
    labels = [
        to_classes(sequence.read_labels(f, len(s)), CLASSES[4], sequence.labels_path(f)) for f, s in zip(frames, scans)
    ]
    return scans, sequence.poses()[: len(frames)].copy(), labels, Path(folder).resolve().name


def _synthetic_scans(count: int, sensor: str):
    import tempfile

    from kdmos.data.synthetic.lidar import load_sensor
    from kdmos.synth import SynthSettings, synthesize

    with tempfile.TemporaryDirectory() as folder:
        synthesize(Path(folder), SynthSettings(load_sensor(sensor), sequences=1, scans=count))
        scans, poses, labels, _ = real_scans.__wrapped__(f"{folder}/sequences/00", count)
    return scans, poses, labels, f"synthetic {sensor}"


def main(op: str, cases: Callable[[argparse.Namespace], list[Case]], description: str | None, argv=None) -> list[dict]:
    """Command line of a benchmark: measure its cases, print them, append them to results/<op>.csv."""
    from kdmos.command import keep_memory

    keep_memory()  # as every command does, for both sides: fresh memory costs more than some of the work
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequence", nargs="?", help="folder of a sequence with labels; default: synthetic scans")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-append", action="store_true", help="print only")
    arguments = parser.parse_args(argv)
    found = []
    for case in cases(arguments):
        row = compare(case, arguments.device, arguments.rounds)
        print({**row, "threads": torch.get_num_threads()}, flush=True)
        if not arguments.no_append:
            rows.append(op, row, arguments.device)
        found.append(row)
    return found
