"""Gridding, features and voxel labels of a scan: `polar_grid` and `voxel_label` against numpy.

python -m benchmarks.bench_polar_grid [SEQUENCE]
"""

from __future__ import annotations

from .timing import Case, main, real_scans


def cases(arguments) -> list[Case]:
    import torch

    from kdmos import ops
    from kdmos.settings import PolarGrid

    from . import baseline

    scans, _, labels, name = real_scans(arguments.sequence)
    grid = PolarGrid()
    points, truth = (torch.from_numpy(array).to(arguments.device) for array in (scans[0], labels[0]))
    offsets = torch.tensor([0, len(points)], device=arguments.device)
    numbers = labels[0].astype("int64")
    numbers[numbers == 255] = 0

    def ours():
        gridded = ops.polar_grid(points, offsets, grid)
        return ops.voxel_label(gridded.voxel_rank, truth, len(gridded.voxels), 4, gridded.by_voxel)

    return [
        Case(
            "grid, features and labels of a scan",
            lambda: baseline.polar_grid(scans[0], numbers),
            ours,
            scans=name,
            limit_bytes=len(points) * (16 + 36 + 3 * 8 + 1),  # points in; features, two ranks and order out; labels in
        )
    ]


if __name__ == "__main__":
    main("polar_grid", cases, __doc__)
