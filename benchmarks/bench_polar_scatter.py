"""Maximum of 256 features per BEV cell, forward and backward: `polar_scatter` against `scatter_reduce`.

python -m benchmarks.bench_polar_scatter [SEQUENCE]
"""

from __future__ import annotations

from .timing import Case, main, real_scans


def cases(arguments) -> list[Case]:
    import torch

    from kdmos import ops
    from kdmos.settings import PolarGrid

    from . import baseline

    scans, _, _, name = real_scans(arguments.sequence)
    points = torch.from_numpy(scans[0]).to(arguments.device)
    gridded = ops.polar_grid(points, torch.tensor([0, len(points)], device=arguments.device), PolarGrid())
    num_points, num_cells, channels = len(points), len(gridded.cells), 256
    features = torch.randn(num_points, channels, device=arguments.device, requires_grad=True)
    gradient = torch.randn(num_cells, channels, device=arguments.device)

    def forward_backward(function):
        features.grad = None
        function().backward(gradient)

    def theirs():
        return baseline.cell_max(features, gridded.cell_rank, num_cells)

    def ours():
        return ops.polar_scatter(features, gridded.cell_rank, num_cells, gridded.by_cell)[0]

    forward = 4 * num_points * channels + 12 * num_cells * channels
    backward = 4 * num_points * channels + 12 * num_cells * channels
    return [
        Case("forward", lambda: theirs().detach(), lambda: ours().detach(), name, limit_bytes=forward),
        Case(
            "forward and backward",
            lambda: forward_backward(theirs),
            lambda: forward_backward(ours),
            scans=name,
            limit_bytes=forward + backward,
        ),
    ]


if __name__ == "__main__":
    main("polar_scatter", cases, __doc__)
