"""Every launch of a streamed scan on a GPU, its bytes and its time by arithmetic; needs no GPU.

    python -m benchmarks.launches [--points 123000] [--cells 25000] [--precision bfloat16] [--all]

The student of fixed size runs on tensors that have shapes and no values, the way of a GPU; each call is noted with the
bytes of its tensors and its operations. Tensors of fixed size count as far as they are filled: the rest is padding,
which our ops skip and torch's do not. The time of a launch is the larger of bytes over bandwidth and operations over
the rate, for convolutions and products by the share of a tile of 128 outputs that is used, and a fixed time between
launches of a graph. It is a floor with the constants of an H100 on PCIe 5, and no measurement; what the host does while
the device works is not in it. `--all` lists every launch.
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
ALONE = 5e-6  # of a launch by itself, for which the host works as long
PCIE = 50e9  # bytes a second, PCIe 5
HOST = 20e9  # bytes a second, read and written, of a copy by one core
TILE = 128  # outputs that a product makes at a time, at least
# launches of one call; those of torch's are 1, views none
LAUNCHES = {
    "kdmos.polar_grid": 9,  # points, radix sort (5: histogram, scan, 3 passes of 8 bits), scan of counts (2), ranks
    "kdmos.co_attention": 4,
    "kdmos.wrap_around": None,  # one a part
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
    filled = {graphed.capacity: points, graphed.max_cells: cells}
    filled |= {rows + 1: filled[rows] for rows in list(filled)}
    with Trace(filled) as traced, torch.inference_mode():
        graphed._of_capacity()
    return traced.found


def around(points: int, scans: int = 8, channels: int = 8, classes: int = 4) -> list[Launch]:
    """What comes before and after the graph, from a scan in the host's memory to its labels there."""
    scan, out, cells = 16.0 * points, 8.0 * points, 360 * 480
    window = scans * scan + 2 * 8.0 * cells * 4 + 4.0 * points * scans  # points, bounds and values, each point's cell
    steps = [
        ("copy_scan, by the host", 0, 2 * scan, HOST),
        ("upload", 1, scan, PCIE),
        ("channels, zeroed", 1, 4.0 * channels * points, BANDWIDTH),
        ("kdmos.height_residual", 4, window, BANDWIDTH),
        ("points and channels into the graph's place", 3, 2 * (scan + 4.0 * channels * points), BANDWIDTH),
        ("graph", 1, 0.0, BANDWIDTH),
        ("logits kept", 1, 8.0 * classes * points, BANDWIDTH),
        ("kdmos.label_points, into the host's memory", 1, out, PCIE),
        ("labels and probabilities, by the host", 0, 2 * out, HOST),
    ]
    return [Launch(name, count, moved, 0.0, count * ALONE + moved / rate) for name, count, moved, rate in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=123_000)
    parser.add_argument("--cells", type=int, default=25_000)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--all", action="store_true", help="every launch, not sums by name")
    given = parser.parse_args()
    graph = trace(given.points, given.cells, given.precision)
    whole = Launch("sum of the graph", *total(graph))
    if not given.all:
        names = dict.fromkeys(launch.name for launch in graph)
        graph = [Launch(name, *total([x for x in graph if x.name == name])) for name in names]
        graph.sort(key=lambda launch: -launch.seconds)
    outside = around(given.points)
    print("| call | launches | MB | GFLOP | us |\n|---|---|---|---|---|")
    for x in (*graph, whole, *outside, Launch("sum of all", *total([whole, *outside]))):
        print(f"| `{x.name}` | {x.launches} | {x.bytes / 1e6:.1f} | {x.operations / 1e9:.2f} | {1e6 * x.seconds:.0f} |")


def total(launches: list[Launch]) -> list[float]:
    return [sum(getattr(x, key) for x in launches) for key in ("launches", "bytes", "operations", "seconds")]


if __name__ == "__main__":
    main()
