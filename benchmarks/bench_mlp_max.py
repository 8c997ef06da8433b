"""The shipped student's point MLP and the maximum of each cell, against its layers one by one in the same precision.

    python -m benchmarks.bench_mlp_max [SEQUENCE]

The points are sorted by cell on both sides. On a CPU with AVX-512, where the op has its kernel. The limit counts the
multiply-adds at the rate of a plain matrix product.
"""

from __future__ import annotations

from .timing import Case, main, multiply_adds_per_second, real_scans


def cases(arguments) -> list[Case]:
    import torch

    from kdmos import ops
    from kdmos.models import load_student
    from kdmos.models.fast import FastStudent
    from kdmos.ops.mlp_max import has_kernel, point_mlp

    scans, _, _, name = real_scans(arguments.sequence)
    points, student = torch.from_numpy(scans[7]), load_student("synthetic")
    gridded = ops.polar_grid(points, torch.tensor([0, len(points)]), student.settings.grid)
    order = gridded.by_cell
    features = gridded.features[order.order]
    cell = gridded.cell_rank[order.order][:, None]
    identity = order._replace(order=torch.arange(len(points)))

    def theirs(fast):
        with torch.inference_mode():
            x = point_mlp(features, fast.mlp, fast.last)
            return x.new_zeros(len(gridded.cells), x.shape[1]).scatter_reduce_(
                0, cell.expand_as(x), x, "amax", include_self=False
            )

    found = []
    for precision in ("float32", "bfloat16"):
        fast = FastStudent(student, precision)
        weights = [weight for weight, _ in fast.mlp] + [fast.last]
        if str(fast.dtype) == f"torch.{precision}" and has_kernel(features, weights):
            products = len(points) * sum(weight.numel() for weight in weights)
            found.append(
                Case(
                    precision,
                    lambda fast=fast: theirs(fast),
                    lambda fast=fast: ops.mlp_max(features, fast.mlp, fast.last, identity),
                    scans=name,
                    limit_ms=1e3 * products / multiply_adds_per_second(fast.dtype, "cpu"),
                )
            )
    return found


if __name__ == "__main__":
    main("mlp_max", cases, __doc__)
