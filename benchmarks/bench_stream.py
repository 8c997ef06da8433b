"""A stream end to end, raw scans in memory -> labels in memory: latency, throughput, memory.

    python -m benchmarks.bench_stream [SEQUENCE] [--device cuda] [--precision bfloat16] [--scans 200] [--untimed]
        [--no-append]

Motion channels, gridding, network and labels included; poses given. Latency is the time from a scan's arrival until the
result that it completes is there; the wait for the look-ahead comes on top and stands on the row. At full speed a scan
comes when the one before it is done; at the sensor's rate it comes when it comes, from another thread, and is skipped
if the stream is busy with older ones. The times of its stages cost a GPU its lead (each waits for the device):
`--untimed` leaves them out. Scans are given forwards and backwards, in turns, so that no pose jumps.
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from . import rows
from .timing import real_scans

HZ = 10.0  # of the sensor
WARM_UP = 20  # scans, a whole window among them
STAGES = ("residual", "network", "labels")


def endless(scans: list, poses: np.ndarray) -> Iterator[tuple]:
    order = [*range(len(scans)), *range(len(scans) - 2, 0, -1)]
    return ((scans[i], poses[i]) for i in cycle(order))


class Found:
    """What is kept of a run: no result, of which thousands would fill the memory that is measured."""

    def __init__(self) -> None:
        self.seconds: list[float] = []  # of each scan
        self.stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.skipped = 0
        self.resident: list[float] = []  # MiB, after each scan

    def take(self, seconds: float, result) -> None:
        self.seconds.append(seconds)
        self.resident.append(resident())
        for stage, times in self.stages.items():
            if result is not None and result.seconds:
                times.append(result.seconds[stage])


def resident() -> float:
    """MiB of memory that the process has now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def at_full_speed(stream, source: Iterator[tuple], scans: int) -> Found:
    found = Found()
    for number, (points, pose) in enumerate(islice(source, scans + WARM_UP)):
        start = time.perf_counter()
        result = stream.push(points, pose)
        seconds = time.perf_counter() - start
        if number >= WARM_UP:
            found.take(seconds, result)
    return found


def at_the_sensors_rate(stream, source: Iterator[tuple], scans: int) -> Found:
    """Seconds from a scan's arrival until the result that it completes."""
    from kdmos.stream import BackgroundStream

    background, arrived, found, answered = BackgroundStream(stream), [], Found(), []

    def take() -> None:
        completed = WARM_UP - 1
        for result in background.results():
            answered.append(result.scan_id)
            completing = result.scan_id + result.late_by
            if completing > completed:  # what the end flushes completes nothing more
                found.take(time.perf_counter() - arrived[completing], result)
                completed = completing

    consumer = threading.Thread(target=take)
    consumer.start()
    start = time.perf_counter()
    for number, (points, pose) in enumerate(islice(source, scans + WARM_UP)):
        time.sleep(max(0.0, start + number / HZ - time.perf_counter()))
        arrived.append(time.perf_counter())
        background.put(points, pose)
    background.close()
    consumer.join()
    found.skipped = scans + WARM_UP - len(answered)
    return found


PACES = {"full speed": at_full_speed, f"{HZ:g} Hz": at_the_sensors_rate}


def measure(
    folder: str | None,
    device: str = "cpu",
    precisions: tuple[str, ...] = ("float32", "bfloat16"),
    scans: int = 100,
    checkpoint: str = "synthetic",
    sensor: str = "hdl64",
    paces: tuple[str, ...] = tuple(PACES),
    timed: bool = True,
) -> Iterator[dict]:
    """A row for each precision and pace; `timed`: with the times of its stages."""
    from kdmos.models import load_model
    from kdmos.stream import MosStream

    clouds, poses, _, name = real_scans(folder, sensor=sensor)
    for precision in precisions:
        for pace in paces:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            else:
                forget_peak_of_process()
            stream = MosStream(load_model(checkpoint, device), precision=precision, timed=timed)
            if precision != "float32" and stream.model.dtype == torch.float32:
                break  # not computed here
            found = PACES[pace](stream, endless(clouds, poses), scans)
            p50, p95, p99 = np.percentile(np.array(found.seconds) * 1e3, [50, 95, 99]).round(2).tolist()
            row = {"scans": name, "points": int(np.median([len(cloud) for cloud in clouds]))}
            row |= {"count": len(found.seconds), "checkpoint": checkpoint, "form": stream.model.settings.motion.form}
            row |= {"lookahead": stream.lookahead, "precision": precision, "pace": pace, "skipped": found.skipped}
            for stage, spent in found.stages.items():
                row[f"{stage}_ms"] = round(1e3 * float(np.median(spent)), 2) if spent else ""
            row |= {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "scans_per_s": round(1e3 / p50, 2)}
            peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_of_process()
            # what the second half of the scans added to the memory that the process holds
            grown = max(found.resident[len(found.resident) // 2 :]) - max(
                found.resident[: len(found.resident) // 2 + 1]
            )
            row |= {"peak_mib": round(peak), "grown_mib": round(grown, 1)}
            yield row


def forget_peak_of_process() -> None:
    """Else the peak of a row would be that of all rows before it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_of_process() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB


def main() -> None:
    from kdmos.command import keep_memory

    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequence", nargs="?", help="folder of a sequence with labels; default: synthetic scans")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="float32,bfloat16")
    parser.add_argument("--scans", type=int, default=100)
    parser.add_argument("--checkpoint", default="synthetic")
    parser.add_argument("--sensor", default="hdl64", help="of the synthetic scans")
    parser.add_argument("--full-speed", action="store_true", help="not at the sensor's rate too")
    parser.add_argument("--untimed", action="store_true", help="without the times of the stages")
    parser.add_argument("--no-append", action="store_true", help="print only")
    given = parser.parse_args()
    precisions = tuple(given.precision.split(","))
    paces = ("full speed",) if given.full_speed else tuple(PACES)
    settings = (given.scans, given.checkpoint, given.sensor, paces, not given.untimed)
    for row in measure(given.sequence, given.device, precisions, *settings):
        print({**row, "threads": torch.get_num_threads()}, flush=True)
        if not given.no_append:
            rows.append("stream", row, given.device)


if __name__ == "__main__":
    main()
