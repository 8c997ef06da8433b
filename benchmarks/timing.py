"""How the op benchmarks measure: both sides in turns in one process, medians, and the time the machine allows."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from . import rows

WARM_UP = 3
REST = 0.05  # seconds until the threads of the other side, which wait for more work by spinning, leave their cores
BEYOND_L2 = 256 << 20  # bytes: several times what the cache of a GPU holds
MOST_SETS = 32
CLOCKS = 2e9  # of a GPU a second, at most
Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One piece of work, done in plain torch or numpy as in `baseline.py`, and by this package.

    baseline, ours: Either side, or several that do the same on other memory and take turns (see `num_sets`).
    scans: Where its scans are from; "drawn" for random numbers.
    limit_bytes: Fewest bytes that must move; with the measured copy bandwidth, a lower bound of the time.
    limit_ms: A lower bound of another kind (arithmetic), if that is the higher one.
    """

    name: str
    baseline: Work | Sequence[Work]
    ours: Work | Sequence[Work]
    scans: str
    limit_bytes: float = 0.0
    limit_ms: float = 0.0


def num_sets(device: str, set_bytes: float) -> int:
    """Sets of inputs that take turns, so that on a GPU none is in the cache when its turn comes."""
    return 1 if device != "cuda" else max(1, min(MOST_SETS, math.ceil(BEYOND_L2 / max(1, set_bytes))))


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
    """Bytes a second, read and written, of a plain copy of 256 MB (1 GB on a GPU) into memory that is there already."""
    source = torch.randn(1 << (28 if device == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _median_seconds(lambda: target.copy_(source), device)


@cache
def multiply_adds_per_second(dtype: torch.dtype, device: str) -> float:
    """Of a product of random matrices of 2048 x 2048, on a GPU of 8192 x 8192, which fill it."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return size**3 / _median_seconds(lambda: a @ b, device)


def _median_seconds(work: Work, device: str) -> float:
    measure = OnGpu([work]) if device == "cuda" else lambda: clock(work, device)
    return float(np.median([measure() for _ in range(12)][2:]))


def clock(work: Work, device: str) -> float:
    """Seconds until the work is done."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


class OnGpu:
    """Seconds that a call of some work takes on the GPU, of many calls between two events.

    A kernel that waits goes first: while it does, the host queues the calls, so that what Python needs for them is not
    in the time, and the GPU never rests and keeps its clock. Work that takes LONG is timed by the host, call by call:
    such may be the host's own, as that in numpy is. What an op waits for by itself, to read a size back, stays in.

    Args:
        works: Take turns; each on memory of its own.
    """

    LONG = 0.02  # seconds
    SPAN = 0.004  # seconds between the events, about
    MOST = 64  # calls between them; a GPU queues some thousand launches

    def __init__(self, works: Sequence[Work]) -> None:
        self.works, self.turn = works, 0
        for work in works:
            work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for work in works:
            work()
        queued = (time.perf_counter() - start) / len(works)
        torch.cuda.synchronize()
        whole = (time.perf_counter() - start) / len(works)
        self.long = whole > self.LONG
        self.calls = max(1, min(self.MOST, math.ceil(self.SPAN / whole)))
        self.cycles = int(CLOCKS * 1.5 * (self.calls * queued + 1e-4))

    def __call__(self) -> float:
        calls = [self.works[(self.turn + i) % len(self.works)] for i in range(1 if self.long else self.calls)]
        self.turn += len(calls)
        if self.long:
            return clock(calls[0], "cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.cycles)
        start.record()
        for work in calls:
            work()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end) / len(calls)


def _timer(work: Work | Sequence[Work], device: str) -> Callable[[], float]:
    works = [work] if callable(work) else list(work)
    if device == "cuda":
        return OnGpu(works)

    def rested() -> float:
        rest()
        return clock(works[0], device)

    return rested


def compare(case: Case, device: str, rounds: int) -> dict:
    """One row: milliseconds of both sides (median, 20th and 80th percentile), their ratio, and the limit."""
    copy_gb_s = copy_bandwidth(device) / 1e9  # first: it warms a GPU up
    timers = {"baseline": _timer(case.baseline, device), "kdmos": _timer(case.ours, device)}
    times = {side: [] for side in timers}
    for number in range(WARM_UP + rounds):
        for side, timer in timers.items():  # in turns: a busy machine slows both
            seconds = timer()
            times[side] += [1e3 * seconds] if number >= WARM_UP else []
    digits = 4 if device == "cuda" else 3
    row = {"case": case.name, "scans": case.scans, "rounds": rounds}
    for side, values in times.items():
        low, median, high = np.percentile(values, [20, 50, 80]).tolist()
        row |= {f"{side}_ms_p20": round(low, digits), f"{side}_ms": round(median, digits)}
        row[f"{side}_ms_p80"] = round(high, digits)
    row["ratio"] = round(row["baseline_ms"] / row["kdmos_ms"], 2)
    limit = max(case.limit_ms, case.limit_bytes / copy_gb_s / 1e6)
    row["limit"] = "arithmetic" if limit == case.limit_ms and limit else "bytes"
    row["limit_ms"] = round(limit, digits)
    row["copy_gb_s"] = round(copy_gb_s, 1)
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
