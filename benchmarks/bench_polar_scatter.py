"""Maximum of 256 features per BEV cell, forward and backward: `polar_scatter` against `scatter_reduce`.

python -m benchmarks.bench_polar_scatter [SEQUENCE]
"""

from __future__ import annotations

from functools import partial

from .timing import Case, main, num_sets, real_scans


def cases(arguments) -> list[Case]:
    import torch

    from kdmos import ops
    from kdmos.settings import PolarGrid

    from . import baseline

    scans, _, _, name = real_scans(arguments.sequence)
    points = torch.from_numpy(scans[0]).to(arguments.device)
    gridded = ops.polar_grid(points, torch.tensor([0, len(points)], device=arguments.device), PolarGrid())
    num_points, num_cells, channels = len(points), len(gridded.cells), 256
    forward = 4 * num_points * channels + 12 * num_cells * channels
    backward = 4 * num_points * channels + 12 * num_cells * channels
    gradient = torch.randn(num_cells, channels, device=arguments.device)
    sets = [
        torch.randn(num_points, channels, device=arguments.device, requires_grad=True)
        for _ in range(num_sets(arguments.device, forward))
    ]

    def theirs(features):
        return baseline.cell_max(features, gridded.cell_rank, num_cells)

    def ours(features):
        return ops.polar_scatter(features, gridded.cell_rank, num_cells, gridded.by_cell)[0]

    def forward_backward(function, features):
        features.grad = None
        function(features).backward(gradient)

    return [
        Case(
            "forward",
            [lambda features=features: theirs(features).detach() for features in sets],
            [lambda features=features: ours(features).detach() for features in sets],
            scans=name,
            limit_bytes=forward,
        ),
        Case(
            "forward and backward",
            [partial(forward_backward, theirs, features) for features in sets],
            [partial(forward_backward, ours, features) for features in sets],
            scans=name,
            limit_bytes=forward + backward,
        ),
    ]


if __name__ == "__main__":
    main("polar_scatter", cases, __doc__)
