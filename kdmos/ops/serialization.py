"""Orders along space-filling curves: integers of voxels whose sorting puts neighbours in space next to each other."""

from __future__ import annotations

from torch import Tensor

from kdmos.settings import CURVES

MOST_BITS = 16  # per axis


def curve_code(grid: Tensor, depth: int, curve: str = "z", batch: Tensor | None = None) -> Tensor:
    """Place of each voxel along a curve through a cube of 2^depth voxels a side.

    Args:
        grid: int [N, 3], 0 <= x, y, z < 2^depth.
        depth: Bits per axis, 0..16.
        curve: One of `CURVES`.
        batch: int [N], sample of each voxel; it goes before the curve's bits.
    Returns: int64 [N].
    Raises: ValueError for another curve, depth or shape.
    Source: Morton order; Hilbert order by Skilling, Programming the Hilbert Curve, 2004.
    """
    if curve not in CURVES:
        raise ValueError(f"curve_code: curve must be one of {CURVES}, got {curve!r}")
    if grid.ndim != 2 or grid.shape[1] != 3 or not 0 <= depth <= MOST_BITS:
        raise ValueError(f"curve_code: expected grid [N, 3] and depth 0..16, got {list(grid.shape)} and {depth}")
    axes = list(grid.long().unbind(1))
    if curve.endswith("-trans"):
        axes = [axes[1], axes[0], axes[2]]
    code = _hilbert(axes, depth) if curve.startswith("hilbert") else _interleave(axes)
    return code if batch is None else (batch.long() << 3 * depth) | code


def _interleave(axes: list[Tensor]) -> Tensor:
    """Bits of x, y, z in turns, x first."""
    x, y, z = (_spread(axis) for axis in axes)
    return (x << 2) | (y << 1) | z


def _spread(axis: Tensor) -> Tensor:
    """16 bits, two zeros put between any two of them."""
    for shift, mask in ((16, 0xFF0000FF), (8, 0xF00F00F00F), (4, 0xC30C30C30C3), (2, 0x249249249249)):
        axis = (axis | (axis << shift)) & mask
    return axis


def _hilbert(axes: list[Tensor], depth: int) -> Tensor:
    # 1) undo the rotations and reflections of each level of cubes, the largest first
    for bit in reversed(range(depth)):
        below = (1 << bit) - 1
        for i in range(3):
            set_here = (axes[i] >> bit) & 1
            reflect = set_here * below  # all bits below where the bit is set
            swap = (axes[0] ^ axes[i]) & (below ^ reflect)
            axes[i] = axes[i] ^ swap
            axes[0] = axes[0] ^ swap ^ reflect
    # 2) the interleaved bits are a Gray code: each bit is the sum of those above
    code = _interleave(axes)
    for shift in (1, 2, 4, 8, 16, 32):
        code = code ^ (code >> shift)
    return code
