"""Gridding, features and voxel labels of a scan: `polar_grid` and `voxel_label` against numpy.

python -m benchmarks.bench_polar_grid [SEQUENCE]
"""

from __future__ import annotations

from functools import partial

from .timing import Case, main, num_sets, real_scans


def cases(arguments) -> list[Case]:
    import torch

    from kdmos import ops
    from kdmos.settings import PolarGrid

    from . import baseline

    scans, _, labels, name = real_scans(arguments.sequence)
    grid = PolarGrid()
    moved = len(scans[0]) * (16 + 36 + 3 * 8 + 1)  # points in; features, two ranks and order out; labels in
    device, order = arguments.device, [i % len(scans) for i in range(num_sets(arguments.device, moved))]
    numbers = labels[0].astype("int64")
    numbers[numbers == 255] = 0

    def ours(points, offsets, truth):
        gridded = ops.polar_grid(points, offsets, grid)
        return ops.voxel_label(gridded.voxel_rank, truth, len(gridded.voxels), 4, gridded.by_voxel)

    sets = [(scans[i], [0, len(scans[i])], labels[i]) for i in order]
    return [
        Case(
            "grid, features and labels of a scan",
            lambda: baseline.polar_grid(scans[0], numbers),
            [partial(ours, *(torch.tensor(part, device=device) for part in each)) for each in sets],
            scans=name,
            limit_bytes=moved,
        )
    ]


if __name__ == "__main__":
    main("polar_grid", cases, __doc__)
