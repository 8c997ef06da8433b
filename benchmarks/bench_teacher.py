"""MambaMOS at full size on one real frame: seconds and peak memory, from scans in memory to point logits.

    python -m benchmarks.bench_teacher [SEQUENCE] [--device cuda] [--precision bfloat16] [--rounds 3]

Random weights, which cost the same. The window is the 8 scans up to the eighth of the sequence.
"""

from __future__ import annotations

import argparse

import numpy as np

WARM_UP = 1  # frames: the first makes what all later ones use


def measure(folder: str | None, device: str, precision: str, rounds: int) -> dict:
    import torch

    from kdmos.command import keep_memory
    from kdmos.data.multi_scan import find_voxels, gather_window
    from kdmos.inference import prepared
    from kdmos.models import build_teacher

    from .bench_training_step import peak_gib
    from .timing import clock, real_scans

    keep_memory()
    scans, poses, _, name = real_scans(folder)
    torch.manual_seed(0)
    teacher = prepared(build_teacher().to(device).eval(), precision)
    window = [torch.from_numpy(scan).to(device) for scan in scans[:8]], torch.from_numpy(poses[:8])
    cloud = gather_window(*window, teacher.settings.num_scans)
    voxels = len(find_voxels(cloud, teacher.settings.voxel).grid)
    before = peak_gib()
    with torch.inference_mode():
        times = [clock(lambda: teacher.point_logits(*window), device) for _ in range(WARM_UP + rounds)][WARM_UP:]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak_gib() - before
    low, median, high = np.percentile(times, [20, 50, 80]).tolist()
    return {
        "case": f"one frame, {precision}",
        "scans": name,
        "rounds": rounds,
        "points": len(cloud.points),
        "voxels": voxels,
        "s_p20": round(low, 3),
        "s": round(median, 3),
        "s_p80": round(high, 3),
        "peak_gib": round(peak, 2),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    from . import rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequence", nargs="?")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-append", action="store_true")
    arguments = parser.parse_args()
    row = measure(arguments.sequence, arguments.device, arguments.precision, arguments.rounds)
    print(row)
    if not arguments.no_append:
        rows.append("teacher", row, arguments.device)


if __name__ == "__main__":
    main()
