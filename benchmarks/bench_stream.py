"""A stream end to end, raw scans in memory -> labels in memory: latency, throughput, memory.

    python -m benchmarks.bench_stream [SEQUENCE] [--device cuda] [--precision bfloat16] [--scans 200] [--no-append]

Motion channels, gridding, network and labels included; poses given. Latency is the time from a scan's arrival until the
result that it completes is there; the wait for the look-ahead comes on top and stands on the row. At full speed a scan
comes when the one before it is done; at the sensor's rate it comes when it comes, from another thread, and is skipped
if the stream is busy with older ones. Scans are given forwards and backwards, in turns, so that no pose jumps.
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from collections.abc import Iterator
from itertools import cycle, islice

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


def at_full_speed(stream, source: Iterator[tuple], scans: int) -> tuple[list[float], list, int]:
    """Seconds of each scan, the results, scans skipped."""
    times, results = [], []
    for points, pose in islice(source, scans + WARM_UP):
        start = time.perf_counter()
        results.append(stream.push(points, pose))
        times.append(time.perf_counter() - start)
    return times[WARM_UP:], results[WARM_UP:], 0


def at_the_sensors_rate(stream, source: Iterator[tuple], scans: int) -> tuple[list[float], list, int]:
    """As `at_full_speed`; seconds from a scan's arrival until the result that it completes."""
    from kdmos.stream import BackgroundStream

    background, arrived, times, results = BackgroundStream(stream), [], {}, []

    def take() -> None:
        for result in background.results():
            completing = result.scan_id + result.late_by  # the last one's flush completes nothing more
            times.setdefault(completing, time.perf_counter() - arrived[completing])
            results.append(result)

    consumer = threading.Thread(target=take)
    consumer.start()
    start = time.perf_counter()
    for number, (points, pose) in enumerate(islice(source, scans + WARM_UP)):
        time.sleep(max(0.0, start + number / HZ - time.perf_counter()))
        arrived.append(time.perf_counter())
        background.put(points, pose)
    background.close()
    consumer.join()
    measured = list(times.values())
    return measured[min(WARM_UP, len(measured) // 2) :], results, scans + WARM_UP - len(results)


PACES = {"full speed": at_full_speed, f"{HZ:g} Hz": at_the_sensors_rate}


def measure(
    folder: str | None,
    device: str = "cpu",
    precisions: tuple[str, ...] = ("float32", "bfloat16"),
    scans: int = 100,
    checkpoint: str = "synthetic",
    sensor: str = "hdl64",
) -> Iterator[dict]:
    """A row for each precision and pace."""
    from kdmos.models import load_model
    from kdmos.stream import MosStream

    clouds, poses, _, name = real_scans(folder, sensor=sensor)
    for precision in precisions:
        for pace, run in PACES.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            stream = MosStream(load_model(checkpoint, device), precision=precision, timed=pace == "full speed")
            if precision != "float32" and stream.model.dtype == torch.float32:
                break  # not computed here
            times, results, skipped = run(stream, endless(clouds, poses), scans)
            p50, p95, p99 = np.percentile(np.array(times) * 1e3, [50, 95, 99]).round(2).tolist()
            row = {"scans": name, "points": int(np.median([len(cloud) for cloud in clouds])), "count": len(times)}
            row |= {"checkpoint": checkpoint, "form": stream.model.settings.motion.form}
            row |= {"lookahead": stream.lookahead, "precision": precision, "pace": pace, "skipped": skipped}
            for stage in STAGES:
                spent = [result.seconds[stage] for result in results if result is not None and result.seconds]
                row[f"{stage}_ms"] = round(1e3 * float(np.median(spent)), 2) if spent else ""
            row |= {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "scans_per_s": round(1e3 / p50, 2)}
            peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_of_process()
            row["peak_mib"] = round(peak)
            yield row


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
    parser.add_argument("--no-append", action="store_true", help="print only")
    given = parser.parse_args()
    precisions = tuple(given.precision.split(","))
    for row in measure(given.sequence, given.device, precisions, given.scans, given.checkpoint, given.sensor):
        print({**row, "threads": torch.get_num_threads()}, flush=True)
        if not given.no_append:
            rows.append("stream", row, given.device)


if __name__ == "__main__":
    main()
