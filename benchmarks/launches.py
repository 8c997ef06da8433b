"""Every launch of a streamed scan on a GPU, its bytes and its time by arithmetic; needs no GPU.

    python -m benchmarks.launches [--points 123000] [--cells 25000] [--precision bfloat16] [--all]

The student of fixed size runs on tensors that have shapes and no values, the way of a GPU; each call is noted with the
bytes of its tensors and its operations. Tensors of fixed size count as far as they are filled: the rest is padding,
which our ops skip and torch's do not. The time of a launch is the larger of bytes over bandwidth and operations over
the rate, for convolutions and products by the share of a tile of 128 outputs that is used, and a fixed time between
launches of a graph. It is a floor with four constants of an H100, and no measurement. `--all` lists every launch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BANDWIDTH = 3.0e12  # bytes a second of a copy, H100
RATE = {torch.bfloat16: 800e12, torch.float16: 800e12, torch.float32: 60e12}  # operations a second, H100
GAP = 1.2e-6  # seconds from the end of a node of a graph to the begin of the next
TILE = 128  # outputs that a product makes at a time, at least
# launches of one call; those of torch's are 1, views none
LAUNCHES = {
    "kdmos.polar_grid": 9,  # points, radix sort (5: histogram, scan, 3 passes of 8 bits), scan of counts (2), ranks
    "kdmos.co_attention": 4,
    "kdmos.wrap_around": None,  # one a part
    "kdmos.height_residual": 4,  # memset, project, difference, read
}


@dataclass
class Launch:
    """One call: its name, launches, bytes, operations and seconds."""

    name: str
    launches: int
    bytes: float
    operations: float
    seconds: float


def nbytes(tensor: torch.Tensor) -> float:
    """Of its elements, a broadcast dimension once."""
    size = tensor.element_size()
    for extent, stride in zip(tensor.shape, tensor.stride()):
        size *= extent if stride else 1
    return size


class Trace(TorchDispatchMode):
    """Notes what is launched.

    Args:
        filled: Rows of a tensor of fixed size that hold something, by their number of rows.
    """

    def __init__(self, filled: dict[int, int]) -> None:
        super().__init__()
        self.filled, self.found = filled, []

    def bytes_of(self, tensor: torch.Tensor, ours: bool) -> float:
        rows = tensor.shape[0] if tensor.ndim else 0
        share = self.filled[rows] / rows if ours and rows in self.filled else 1.0
        return nbytes(tensor) * share

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        out = op(*arguments, **(options or {}))
        name = op._schema.name.removeprefix("aten::").replace("::", ".")
        given = [x for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        written = [
            x for x, about in zip(arguments, op._schema.arguments) if about.alias_info and about.alias_info.is_write
        ]
        held = {x.untyped_storage()._cdata for x in given}
        if name in ("empty", "new_empty", "lift_fresh") or not (made or written):
            return out
        if not written and all(x.untyped_storage()._cdata in held for x in made):  # a view, or nothing to do
            return out
        ours = name.startswith("kdmos.")
        moved = sum(self.bytes_of(x, ours) for x in {id(x): x for x in (*given, *made)}.values())
        if name not in ("copy_", "fill_"):
            moved += sum(self.bytes_of(x, ours) for x in written)  # which are read, too
        operations, used, dtype = 0.0, 1.0, torch.float32
        if name == "conv2d":
            image, weight = arguments[:2]
            operations, dtype = 2.0 * out.numel() * weight[0].numel(), image.dtype
            used = min(1.0, weight.shape[0] / TILE)
            out = out.contiguous(memory_format=torch.channels_last)  # as a GPU lays it out
        elif name in ("linear", "matmul", "_addmm_activation"):
            rows, columns = made[0].numel() // made[0].shape[-1], made[0].shape[-1]
            left = given[name == "_addmm_activation"]  # behind its bias
            operations, dtype = 2.0 * rows * columns * left.shape[-1], left.dtype
            used = min(1.0, columns / TILE)
        launches = LAUNCHES.get(name, 1)
        launches = len(arguments[0]) if launches is None else launches
        seconds = launches * GAP + max(moved / BANDWIDTH, operations / RATE[dtype] / used)
        self.found.append(Launch(name, launches, moved, operations, seconds))
        return out


def trace(points: int, cells: int, precision: str) -> list[Launch]:
    """The launches from a scan on the device to its logits."""
    from kdmos.models import load_student
    from kdmos.models.fast import GraphedStudent
    from kdmos.ops import native

    native.DEVICES = native.DEVICES | {"meta"}
    graphed = GraphedStudent(load_student("synthetic").to("meta"), precision)
    channels = graphed.settings.motion.num_channels
    filled = {graphed.capacity: points, graphed.max_cells: cells}
    filled |= {rows + 1: filled[rows] for rows in list(filled)}
    scan, residual = (torch.zeros(points, columns, device="meta") for columns in (4, channels))
    with Trace(filled) as traced, torch.inference_mode():
        graphed(scan, torch.tensor([0, points]), residual)
    return traced.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=123_000)
    parser.add_argument("--cells", type=int, default=25_000)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--all", action="store_true", help="every launch, not sums by name")
    given = parser.parse_args()
    found = trace(given.points, given.cells, given.precision)
    if not given.all:
        sums: dict[str, Launch] = {}
        for launch in found:
            one = sums.setdefault(launch.name, Launch(launch.name, 0, 0.0, 0.0, 0.0))
            for key in ("launches", "bytes", "operations", "seconds"):
                setattr(one, key, getattr(one, key) + getattr(launch, key))
        found = sorted(sums.values(), key=lambda launch: -launch.seconds)
    total = Launch(
        "sum", *(sum(getattr(x, key) for x in found) for key in ("launches", "bytes", "operations", "seconds"))
    )
    print("| operation | launches | MB | GFLOP | us |\n|---|---|---|---|---|")
    for x in (*found, total):
        print(f"| `{x.name}` | {x.launches} | {x.bytes / 1e6:.1f} | {x.operations / 1e9:.2f} | {1e6 * x.seconds:.0f} |")


if __name__ == "__main__":
    main()
