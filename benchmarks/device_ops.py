"""Every op on the GPU: right at real size, right at a tiny one (for a memory checker), and how fast.

    python -m benchmarks.device_ops smoke [--only NAME]   # against the CPU, each op in a process of its own
    python -m benchmarks.device_ops tiny                  # every op once, small, in this process
    python -m benchmarks.device_ops once                  # every op once at real size, for a profiler
    python -m benchmarks.device_ops time                  # by events, on inputs that take turns; rows of gpu_ops.csv

What an op must give is what it gives on the CPU for the same numbers, in float32. Before it runs, the memory that it
will get is filled with NaN: what a kernel leaves unwritten shows. Inputs are new each time; the seed is printed.
A part of the staged run, see `device.py`; ends with 77 where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from kdmos import ops
from kdmos.losses import WDCD
from kdmos.models import load_student
from kdmos.models.fast import FastStudent, GraphedStudent
from kdmos.ops import native
from kdmos.ops.mlp_max import point_mlp
from kdmos.ops.polar_scatter import sorted_max
from kdmos.settings import PolarGrid, ResidualGrid

from . import rows
from .timing import OnGpu, copy_bandwidth, multiply_adds_per_second, num_sets

NO_GPU = 77
TOGETHER = 8  # processes of `smoke`
SECONDS = 40  # for one op of `smoke`
POISON = ((1 << 28, 4), (1 << 24, 16), (1 << 18, 256), (1 << 7, 2000))  # floats, and how many such blocks
HALVES = ("float32", "bfloat16")
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}  # of |ours - wanted| / |wanted|
LEVELS = ((32, 16), (64, 32), (128, 64), (256, 128))  # channels of appearance and motion at each level of the student


@dataclass(frozen=True)
class Size:
    """points: Of a scan. grid: The student's. residual: That of the residuals. shrink: Of other sizes."""

    points: int
    grid: PolarGrid
    residual: ResidualGrid
    shrink: int

    def level(self, number: int) -> tuple[int, int]:
        return self.grid.bins[0] >> number, self.grid.bins[1] >> number


REAL = Size(120_000, PolarGrid(), ResidualGrid(), 1)
TINY = Size(700, PolarGrid(bins=(33, 20, 8)), ResidualGrid(rows=36, columns=48), 400)


class Work(NamedTuple):
    """An op and what it is given.

    forward: (*inputs) -> a tensor, or several.
    inputs: Tensors on the CPU and lists of them; those of `leaves` get a gradient, from the first result's.
    multiply_adds: Of products of matrices within.
    few: Share of the rows that may differ: points on the border of a cell lie in one of two.
    view: What of the result is compared, and not timed.
    """

    forward: Callable
    inputs: tuple
    leaves: tuple[int, ...] = ()
    multiply_adds: float = 0.0
    few: float = 0.0
    view: Callable = lambda found: found


class Draw:
    """Random inputs of one type."""

    def __init__(self, seed: int, size: Size, dtype: torch.dtype) -> None:
        self.generator, self.size, self.dtype = torch.Generator().manual_seed(seed), size, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def below(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def image(self, channels: int, level: int = 0, batch: int = 1) -> Tensor:
        return self(batch, channels, *self.size.level(level)).contiguous(memory_format=torch.channels_last)

    def points(self) -> Tensor:
        """As 64 beams see them, beam by beam: some 30 k cells of 120 k points; float32."""
        count, beams = self.size.points, 64
        beam = torch.arange(count) * beams // count
        phi = (2 * torch.rand(count, generator=self.generator) - 1) * torch.pi
        reach = 2.5 + 55 * torch.rand(beams, generator=self.generator)[beam] ** 1.5
        turn = 6 * torch.rand(beams, generator=self.generator)[beam]
        rho = reach * (1 + 0.1 * (3 * phi + turn).sin()) + 0.02 * torch.randn(count, generator=self.generator)
        z = 0.1 * torch.randn(count, generator=self.generator) - 1.7 + 0.5 * turn
        return torch.stack([rho * phi.cos(), rho * phi.sin(), z, torch.rand(count, generator=self.generator)], 1)

    def gridded(self) -> ops.GriddedPoints:
        points = self.points()
        return ops.polar_grid(points, torch.tensor([0, len(points)]), self.size.grid)


def polar_grid(draw: Draw, fixed_size: bool) -> Work:
    grid, points = draw.size.grid, draw.points()

    def view(gridded):
        return gridded.index(grid), gridded.features[:, 3:]

    forward = partial(ops.polar_grid, grid=grid, fixed_size=fixed_size)
    return Work(forward, (points, torch.tensor([0, len(points) // 3, len(points)])), few=1e-4, view=view)


def voxel_label(draw: Draw) -> Work:
    gridded, num_classes = draw.gridded(), 4
    labels = draw.below(num_classes, draw.size.points).to(torch.uint8)

    def forward(rank, labels, order, start):
        return ops.voxel_label(rank, labels, len(start) - 1, num_classes, ops.PointOrder(order, start))

    return Work(forward, (gridded.voxel_rank, labels, *gridded.by_voxel))


def polar_scatter(draw: Draw) -> Work:
    gridded = draw.gridded()

    def forward(features, rank, order, start):
        return ops.polar_scatter(features, rank, len(start) - 1, ops.PointOrder(order, start))

    return Work(forward, (draw(draw.size.points, 256), gridded.cell_rank, *gridded.by_cell), (0,))


def polar_scatter_unsorted(draw: Draw) -> Work:
    cells = draw.size.points // 5
    return Work(
        partial(ops.polar_scatter, num_cells=cells), (draw(draw.size.points, 8), draw.below(cells, draw.size.points))
    )


def polar_scatter_bev(draw: Draw) -> Work:
    gridded, grid = draw.gridded(), draw.size.grid

    def forward(residual, rank, cells, order, start):
        return ops.polar_scatter_bev(residual, rank, cells, 1, grid, ops.PointOrder(order, start))

    residual = draw(draw.size.points, 8).relu()
    return Work(forward, (residual, gridded.cell_rank, gridded.cells, *gridded.by_cell))


def cell_max(draw: Draw) -> Work:
    def forward(features, order, start):
        return ops.cell_max(features, ops.PointOrder(order, start))

    return Work(forward, (draw(draw.size.points, 256), *draw.gridded().by_cell))


def cells_to_image(draw: Draw) -> Work:
    cells, wide = draw.gridded().cells, partial(draw, dtype=torch.float32)

    def forward(values, cells, factor, background):
        return ops.cells_to_image(values, cells, factor, background, 1, draw.size.grid, values.dtype)

    return Work(forward, (draw(len(cells), 32), cells, wide(32), wide(32)))


def bias_activation(draw: Draw) -> Work:
    """In place: over and over the values grow or shrink, which costs the same."""

    def forward(x, bias):
        ops.bias_activation(x, bias, 0.01)
        return x

    return Work(forward, (draw.image(32), draw(32, dtype=torch.float32)))


def copy_scan(draw: Draw) -> Work:
    points = draw.points()
    points[::100, 1] = torch.nan
    points[5::100, 3] = 2.0

    def forward(points):
        out = torch.empty_like(points)
        return ops.copy_scan(points, out, 1.0), out

    def view(found):
        count, out = found
        return count, out.isnan(), out.nan_to_num(7.0)

    return Work(forward, (points,), view=view)


def label_points(draw: Draw) -> Work:
    def forward(logits):
        labels = torch.empty(len(logits), dtype=torch.uint32, device=logits.device)
        probability = torch.empty(len(logits), device=logits.device)
        ops.label_points(logits, 3, [0, 9, 10, 251], labels, probability)
        return labels, probability

    return Work(forward, (3 * draw(draw.size.points, 4),), view=lambda found: (found[0].long(), found[1]))


def cells_to_bev(draw: Draw) -> Work:
    gridded = draw.gridded()
    forward = partial(ops.cells_to_bev, num_scans=1, grid=draw.size.grid)
    return Work(forward, (draw(len(gridded.cells), 32), gridded.cells), (0,))


def linear_max(draw: Draw) -> Work:
    start = draw.gridded().cell_start
    count = int(start[-1])
    inputs = (draw(count, 128), draw(256, 128) / 11, draw(256), start)
    return Work(ops.linear_max, inputs, (0, 1, 2), multiply_adds=count * 128 * 256)


def mlp_max(draw: Draw) -> Work:
    gridded, sizes = draw.gridded(), (9, 32, 64, 128, 256)
    weights = [draw(b, a) / a**0.5 for a, b in pairwise(sizes)]
    biases = [draw(size) for size in sizes[1:-1]]

    def forward(features, weights, biases, order, start):
        order = ops.PointOrder(order, start)
        if features.device.type == "cpu":  # plainly: the CPU's own kernel rounds otherwise
            product = point_mlp(features.index_select(0, order.order), list(zip(weights, biases)), weights[-1])
            return sorted_max(product, order.start)
        return ops.mlp_max(features, list(zip(weights, biases)), weights[-1], order)

    adds = draw.size.points * sum(a * b for a, b in pairwise(sizes))
    return Work(forward, (gridded.features, weights, biases, *gridded.by_cell), multiply_adds=adds)


def dysample(draw: Draw, level: int, circular: bool = False) -> Work:
    channels = (32, 64, 128, 256)[level - 1]
    offset = 0.3 * draw(1, 32, *draw.size.level(level), dtype=torch.float32)
    forward = partial(ops.dysample, circular=circular)
    return Work(forward, (draw.image(channels, level), offset.contiguous(memory_format=torch.channels_last)), (0, 1))


def voxel_head(draw: Draw) -> Work:
    grid, voxels = draw.size.grid, draw.gridded().voxels
    inputs = (draw.image(32), voxels, draw(grid.bins[2] * 4, 32, 1, 1, dtype=torch.float32) / 6)
    bias = draw(grid.bins[2] * 4, dtype=torch.float32)
    forward = partial(ops.voxel_head, grid=grid)
    return Work(forward, (*inputs, bias), (0, 2, 3), multiply_adds=len(voxels) * 32 * 4)


def wdcd_loss(draw: Draw, variant: str) -> Work:
    count = 8 * draw.size.points
    shares = torch.tensor([0.03, 0.90, 0.067, 0.003])
    labels = torch.multinomial(shares, count // 20, True, generator=draw.generator).repeat_interleave(20)
    labels, offsets = labels.to(torch.uint8), torch.arange(9) * len(labels) // 8
    student, teacher = (3 * draw(len(labels), 4) for _ in range(2))
    return Work(WDCD(variant), (student, teacher, labels, offsets), (0,))


def selective_scan(draw: Draw, count: int, channels: int, states: int = 16) -> Work:
    count //= draw.size.shrink
    u, delta, gate = (draw(count, channels) for _ in range(3))
    b, c = (draw(count, states) for _ in range(2))
    a = -torch.arange(1.0, states + 1).repeat(channels, 1)
    skip, bias = torch.ones(channels), torch.full((channels,), -3.0)
    offsets = torch.tensor([0, count // 3, count // 3, count])
    return Work(ops.selective_scan, (u, delta, a, b, c, skip, gate, bias, offsets), (0, 1, 2, 3, 4, 5, 6, 7))


def submanifold_conv(draw: Draw, channels: int) -> Work:
    side = 120 if draw.size.shrink == 1 else 9
    grid = draw.below(side, 300_000 // draw.size.shrink, 3).unique(dim=0)
    neighbours = ops.find_neighbours(grid, grid.new_zeros(len(grid)))
    weight = draw(channels, 3, 3, 3, channels) / (27 * channels) ** 0.5
    adds = channels**2 * (len(grid) + 2 * sum(map(len, neighbours.here)))

    def forward(x, weight, bias, here, there):
        return ops.submanifold_conv(x, weight, bias, ops.Neighbours(here, there))

    return Work(forward, (draw(len(grid), channels), weight, draw(channels), *neighbours), (0, 1, 2), adds)


def _transforms(draw: Draw, *shape: int) -> Tensor:
    """Frames a metre and a few degrees apart, float64 [..., 4, 4]."""
    angle = 0.05 * draw(*shape, dtype=torch.float64)
    transforms = torch.eye(4, dtype=torch.float64).repeat(*shape, 1, 1)
    transforms[..., 0, 0] = transforms[..., 1, 1] = angle.cos()
    transforms[..., 1, 0], transforms[..., 0, 1] = angle.sin(), -angle.sin()
    transforms[..., :2, 3] = draw(*shape, 2, dtype=torch.float64)
    return transforms


def height_residual(draw: Draw) -> Work:
    forward = partial(ops.height_residual, grid=draw.size.residual, newer=(4, 8), older=((0, 4),), read=(4, 8))
    return Work(forward, ([draw.points() for _ in range(8)], _transforms(draw, 8)), few=1e-3)


def height_residual_sequence(draw: Draw) -> Work:
    forward = partial(ops.height_residual_sequence, grid=draw.size.residual)
    return Work(forward, ([draw.points() for _ in range(10)], _transforms(draw, 3, 8)), few=3e-3)


def co_attention(draw: Draw, level: int) -> Work:
    appearance, motion = LEVELS[level]
    wide, layers = partial(draw, dtype=torch.float32), []
    for out, inside, kernel in ((2, 32, 3), (1, motion, 1), (appearance, appearance, 1)):
        layers.append((wide(out, inside, kernel, kernel) / (inside * kernel**2) ** 0.5, wide(out)))
    images = (draw.image(appearance, level), draw.image(motion, level), draw.image(32, level))
    return Work(ops.co_attention, (*images, *layers))


def norm_activation(draw: Draw, rows_: bool) -> Work:
    x = draw(draw.size.points, 128) if rows_ else draw.image(32)
    x = 2 * x + 1
    channels = x.shape[1]

    def forward(x, weight, bias):
        out, mean, variance = ops.norm_activation(x, weight, bias)
        return out, mean, variance, ops.norm_activation_again(x, mean, variance, weight, bias)

    weight, bias = 1 + 0.1 * draw(channels, dtype=torch.float32), draw(channels, dtype=torch.float32)
    return Work(forward, (x, weight, bias), (0, 1, 2))


def wrap_around(draw: Draw, halo: int) -> Work:
    rings, sectors = draw.size.level(0)
    parts = (draw.image(32), draw(1, 32, rings - 1, sectors - 1).contiguous(memory_format=torch.channels_last))
    return Work(lambda a, b: ops.wrap_around([a, b], halo), parts, (0, 1))


def student(draw: Draw, graphed: bool = False) -> Work:
    """The shipped one, whole, in the type that is drawn: float32 weights on the CPU, whatever that is."""
    points = draw.points()
    residual = draw(len(points), 8, dtype=torch.float32).relu()
    weights, made, precision = load_student("synthetic"), {}, str(draw.dtype).removeprefix("torch.")

    def forward(points, residual, offsets):
        where = points.device.type
        if where not in made:
            kind = GraphedStudent if graphed and where == "cuda" else FastStudent
            made[where] = kind(weights.to(points.device), "float32" if where == "cpu" else precision)
        return made[where](points, offsets, residual).point_logits

    return Work(forward, (points, residual, torch.tensor([0, len(points)])), multiply_adds=33e9)


CASES: dict[str, tuple[Callable[[Draw], Work], tuple[str, ...]]] = {
    "polar_grid": (partial(polar_grid, fixed_size=False), ("float32",)),
    "polar_grid of fixed size": (partial(polar_grid, fixed_size=True), ("float32",)),
    "voxel_label": (voxel_label, ("float32",)),
    "polar_scatter": (polar_scatter, HALVES),
    "polar_scatter unsorted": (polar_scatter_unsorted, HALVES),
    "polar_scatter_bev": (polar_scatter_bev, HALVES),
    "cell_max": (cell_max, HALVES),
    "cells_to_bev": (cells_to_bev, HALVES),
    "cells_to_image": (cells_to_image, HALVES),
    "bias_activation": (bias_activation, HALVES),
    "copy_scan": (copy_scan, ("float32",)),
    "label_points": (label_points, ("float32",)),
    "linear_max": (linear_max, HALVES),
    "mlp_max": (mlp_max, HALVES),
    **{f"dysample at level {n}": (partial(dysample, level=n), HALVES) for n in (1, 2, 3, 4)},
    "dysample in a circle": (partial(dysample, level=2, circular=True), HALVES),
    "voxel_head": (voxel_head, HALVES),
    **{f"wdcd_loss, {name}": (partial(wdcd_loss, variant=name), ("float32",)) for name in ("authors", "paper", "dcd")},
    "selective_scan, 64": (partial(selective_scan, count=300_000, channels=64), ("float32",)),
    "selective_scan, 256": (partial(selective_scan, count=40_000, channels=256), ("float32",)),
    "submanifold_conv, 32": (partial(submanifold_conv, channels=32), HALVES),
    "submanifold_conv, 128": (partial(submanifold_conv, channels=128), HALVES),
    "height_residual": (height_residual, ("float32",)),
    "height_residual_sequence": (height_residual_sequence, ("float32",)),
    **{f"co_attention at level {n}": (partial(co_attention, level=n), HALVES) for n in range(4)},
    "norm_activation of an image": (partial(norm_activation, rows_=False), HALVES),
    "norm_activation of rows": (partial(norm_activation, rows_=True), HALVES),
    "wrap_around by 1": (partial(wrap_around, halo=1), HALVES),
    "wrap_around by 2": (partial(wrap_around, halo=2), HALVES),
    "student": (student, HALVES),
    "student as a graph": (partial(student, graphed=True), HALVES),
}
LOOSE = {
    "student": (1e-3, 5e-2),  # through some fifty layers
    "student as a graph": (1e-3, 5e-2),
    "linear_max": (1e-4, 0.2),  # a product that rounds otherwise has its maximum, and so the gradient, elsewhere
}
ONLY_REAL = ("student", "student as a graph")  # has its own grid


def build(name: str, seed: int, size: Size, dtype: str) -> Work:
    return CASES[name][0](Draw(seed, size, getattr(torch, dtype)))


def run(work: Work, gradient: Tensor | None = None) -> tuple:
    """The forward's results, and with a gradient of the first those of the leaves."""
    if gradient is None:
        with torch.no_grad():
            return work.forward(*work.inputs)
    inputs = list(work.inputs)
    for i in work.leaves:
        inputs[i] = inputs[i].detach().requires_grad_()
    found = work.forward(*inputs)
    first = tree_leaves(found)[0]
    return found, torch.autograd.grad(first, [inputs[i] for i in work.leaves], gradient.to(first.dtype))


def moved(work: Work, device: str) -> Work:
    inputs = tree_map_only(Tensor, lambda t: t.to(device, copy=True), work.inputs)
    return work._replace(inputs=inputs)


def widened(work: Work) -> Work:
    """A copy with the same numbers in float32."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.clone()

    return work._replace(inputs=tree_map_only(Tensor, wide, work.inputs))


def poison(device: str) -> None:
    """NaN in the memory that is given out next."""
    if device == "cuda":
        blocks = [torch.full((size,), torch.nan, device=device) for size, count in POISON for _ in range(count)]
        del blocks
        torch.cuda.synchronize()


def error(ours: Tensor, wanted: Tensor, few: float) -> float:
    """How far ours is from what is wanted, over its size; of whole numbers the share that differs.

    With `few`, that share of the rows may differ and counts as nothing.
    """
    ours, wanted = ours.detach().cpu(), wanted.detach()
    if ours.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    exact = not wanted.is_floating_point()
    ours, wanted = (t.reshape(len(t), -1) if t.ndim else t.reshape(1, 1) for t in (ours, wanted))
    ours, wanted = ours.double(), wanted.double()
    off = ~((ours - wanted).abs() <= (0 if exact else 1e-4 * wanted.abs().max().clamp(min=1e-30)))
    if few and off.any(1).double().mean() <= few:
        ours, wanted = (t[~off.any(1)] for t in (ours, wanted))
        off = off[~off.any(1)]
    if exact:
        return float(off.double().mean()) if off.numel() else 0.0
    return float((ours - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(name: str, seed: int, size: Size, dtype: str, device: str) -> tuple[bool, str]:
    """Whether an op is right on the device, and a line about it."""
    work = build(name, seed, size, dtype)
    wide = widened(work)
    gradient = None
    if work.leaves:
        shape = tree_leaves(run(wide))[0].shape
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) if shape else torch.tensor(1.0)
    on_device = moved(work, device)  # first: some ops write into what they are given
    expected = run(wide, gradient)
    if size is REAL:  # a memory checker tells by itself
        poison(device)
    found = run(on_device, None if gradient is None else gradient.to(device))
    if gradient is None:
        found, expected = work.view(found), work.view(expected)
    errors = [error(a, b, work.few) for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True)]
    limit = LOOSE[name][dtype != "float32"] if name in LOOSE else LIMITS[dtype]
    right = all(e <= limit for e in errors)  # NaN is not
    return right, f"{'ok   ' if right else 'WRONG'} {name}, {dtype}: " + " ".join(f"{e:.1e}" for e in errors)


def check_all(names, seed: int, size: Size, device: str) -> int:
    """Exit code, after a line for each op."""
    right = True
    for name in names:
        for dtype in CASES[name][1]:
            try:
                good, line = check(name, seed, size, dtype, device)
            except Exception as fault:
                good, line = False, f"WRONG {name}, {dtype}: {type(fault).__name__}: {str(fault).splitlines()[0]}"
            print(line, flush=True)
            right &= good
    return 0 if right else 1


def smoke(seed: int) -> int:
    """Each op in a process of its own, which an illegal access ends; exit code."""

    def one(name: str) -> tuple[str, bool]:
        command = [sys.executable, "-m", __spec__.name, "smoke", "--only", name, "--seed", str(seed)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"WRONG {name}: not done in {SECONDS} s\n", False
        lines = "".join(line + "\n" for line in done.stdout.splitlines() if line[:5] in ("ok   ", "WRONG"))
        if done.returncode not in (0, 1) or not lines:
            lines += f"WRONG {name}: died with exit code {done.returncode}: {' '.join(done.stderr.split())[-300:]}\n"
        return lines, done.returncode == 0

    os.environ["OMP_NUM_THREADS"] = "2"
    with ThreadPoolExecutor(TOGETHER) as pool:
        found = []
        for lines, good in pool.map(one, CASES):
            print(lines, end="", flush=True)
            found.append((lines, good))
    bad = [line for lines, _ in found for line in lines.splitlines() if line.startswith("WRONG")]
    total = sum(len(lines.splitlines()) for lines, _ in found)
    print(f"found: {total - len(bad)} of {total} right" + (f"; {bad[0]}" if bad else ""))
    return 0 if all(good for _, good in found) else 1


def nbytes(tree) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def measure(name: str, seed: int, dtype: str, rounds: int = 9) -> list[dict]:
    """Rows: microseconds of the forward, and of forward and backward, and what they must at least take.

    The bytes are those of inputs and results, each once: a bound from below for the forward, and for the backward a
    low one, because it reads again what the forward read.
    """
    work = build(name, seed, REAL, dtype)
    found = run(moved(work, "cuda"))
    first, size = tree_leaves(found)[0], nbytes(work.inputs) + nbytes(found)
    gradient = torch.randn_like(first) if work.leaves else None
    sets = [moved(work, "cuda") for _ in range(num_sets("cuda", size))]
    out, copy = [], copy_bandwidth("cuda")
    rate = multiply_adds_per_second(torch.bfloat16, "cuda")
    for kind in ("forward", "forward and backward") if work.leaves else ("forward",):
        given = gradient if kind != "forward" else None
        timer = OnGpu([partial(run, each, given) for each in sets])
        times = [1e6 * timer() for _ in range(3 + rounds)][3:]
        low, median, high = np.percentile(times, [20, 50, 80]).tolist()
        least = size if given is None else size + nbytes(gradient) + nbytes([work.inputs[i] for i in work.leaves])
        adds = work.multiply_adds * (1 if given is None else 3)
        out.append(
            {
                "case": name,
                "dtype": dtype,
                "part": kind,
                "sets": len(sets),
                "us_p20": round(low, 1),
                "us": round(median, 1),
                "us_p80": round(high, 1),
                "mb": round(least / 1e6, 2),
                "copy_gb_s": round(copy / 1e9, 1),
                "share_of_copy": round(least / copy / median * 1e6, 3),
                "gmac": round(adds / 1e9, 3),
                "bf16_tmac_s": round(rate / 1e12, 1),
                "share_of_bf16": round(adds / rate / median * 1e6, 3),
            }
        )
    return out


def time_all(names, seed: int) -> int:
    failed = 0
    print(
        f"copy {copy_bandwidth('cuda') / 1e9:.0f} GB/s, bf16 "
        f"{2 * multiply_adds_per_second(torch.bfloat16, 'cuda') / 1e12:.0f} TFLOP/s, float32 "
        f"{2 * multiply_adds_per_second(torch.float32, 'cuda') / 1e12:.0f} TFLOP/s"
    )
    best = (0.0, "")
    for name in names:
        for dtype in CASES[name][1]:
            try:
                found = measure(name, seed, dtype)
            except Exception as fault:
                print(f"{name}, {dtype}: {type(fault).__name__}: {str(fault).splitlines()[0]}", flush=True)
                failed += 1
                continue
            for row in found:
                rows.append("gpu_ops", row, "cuda")
                share = max(row["share_of_copy"], row["share_of_bf16"])
                best = max(best, (share, name))
                print(f"{row['us']:9.1f} us  {share:5.0%} of the limit  {name}, {dtype}, {row['part']}", flush=True)
            torch.cuda.empty_cache()
    print(
        f"found: copy {copy_bandwidth('cuda') / 1e9:.0f} GB/s; nearest to it {best[1]}, {best[0]:.0%}; {failed} failed"
    )
    return 1 if failed else 0


def forward_and_backward(work: Work) -> None:
    found = run(work)
    if work.leaves:
        run(work, torch.randn_like(tree_leaves(found)[0]))


def once(names, seed: int) -> int:
    """Forward and backward in the narrowest type, at real size, kernel by kernel."""
    for name in names:
        if name == "student as a graph":
            continue
        forward_and_backward(moved(build(name, seed, REAL, CASES[name][1][-1]), "cuda"))
    torch.cuda.synchronize()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("smoke", "tiny", "once", "time"))
    parser.add_argument("--only", choices=CASES, help="one op, in this process")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    if not torch.cuda.is_available():
        print("found: no GPU")
        return NO_GPU
    if "cuda" not in native.DEVICES:
        print(f"found: {native.WHY_NOT}")
        return 1
    torch.backends.cudnn.allow_tf32 = False
    names = [given.only] if given.only else [name for name in CASES if name not in ONLY_REAL or given.what != "tiny"]
    if given.what == "smoke":
        return check_all(names, given.seed, REAL, "cuda") if given.only else smoke(given.seed)
    if given.what == "tiny":
        code = check_all(names, given.seed, TINY, "cuda")
        print(f"found: {'all right' if code == 0 else 'something is wrong'}")
        return code
    return time_all(names, given.seed) if given.what == "time" else once(names, given.seed)


if __name__ == "__main__":
    sys.exit(main())
