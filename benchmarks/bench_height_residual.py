"""Residual channels of a sequence, per scan: `height_residual` against the authors' arrangement in numpy.

    python -m benchmarks.bench_height_residual [SEQUENCE]

What limits it is arithmetic: a float64 transform, an arctangent and one update of a cell for each of the 8 x 120 k
points of a step. `limit_ms` counts only the bytes, which are few.
"""

from __future__ import annotations

from .timing import Case, main, real_scans


def cases(arguments) -> list[Case]:
    import torch

    from kdmos.motion import MotionStream, motion_channels

    from . import baseline

    scans, poses, _, name = real_scans(arguments.sequence)
    tensors = [torch.from_numpy(scan).to(arguments.device) for scan in scans]
    steps = len(scans) - 7
    scan_bytes = sum(scan.nbytes for scan in scans) / len(scans)

    def stream():
        motion = MotionStream()
        for points, pose in zip(tensors, poses):
            motion.push(points, pose)

    return [
        Case(
            f"sequence of {len(scans)} scans",
            lambda: baseline.residual_channels(scans, poses),
            lambda: motion_channels(tensors, poses),
            scans=name,
            limit_bytes=8 * steps * scan_bytes,
        ),
        Case(
            f"stream of {len(scans)} scans",
            lambda: baseline.residual_channels(scans, poses),
            stream,
            scans=name,
            limit_bytes=8 * steps * scan_bytes,
        ),
    ]


if __name__ == "__main__":
    main("height_residual", cases, __doc__)
