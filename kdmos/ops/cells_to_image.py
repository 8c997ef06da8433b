"""Values of the occupied cells, normalised, in a dense image whose other cells are background."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmos.ops import native, reference
from kdmos.settings import PolarGrid

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cells_to_image(
    values: Tensor,
    cells: Tensor,
    factor: Tensor,
    background: Tensor,
    num_scans: int,
    grid: PolarGrid,
    dtype: torch.dtype,
) -> Tensor:
    """Dense image with values * factor + background at the occupied cells and the background elsewhere.

    It is `cells_to_bev` followed by a norm: one pass, each row written once. Computed in float32 and rounded once. For
    inference: no gradient.

    Args:
        values: [M, C], float32 or of the image's type.
        cells: int64 [M], ascending, each once, as `polar_grid` gives them; what is B * R * A or more at the end is
            padding and skipped.
        factor: float32 [C].
        background: float32 [C]; what a cell of zeros has too.
        num_scans: B.
        grid: The polar grid.
        dtype: Of the image: float32, float16 or bfloat16.
    Returns: [B, C, R, A] of that type, channels last in memory.
    Raises: ValueError if shapes or types do not fit; RuntimeError on a CPU if the cells do not ascend, which a GPU does
        not look at.
    """
    if values.ndim != 2 or cells.shape != values.shape[:1]:
        raise ValueError(
            f"cells_to_image: expected values [M, C] and cells [M], got {list(values.shape)} and {list(cells.shape)}"
        )
    if dtype not in DTYPES or values.dtype not in (torch.float32, dtype):
        raise ValueError(
            f"cells_to_image: expected an image of one of {DTYPES} and values of it or float32, got {dtype} and "
            f"{values.dtype}"
        )
    for name, each in (("factor", factor), ("background", background)):
        if each.shape != values.shape[1:] or each.dtype != torch.float32:
            raise ValueError(
                f"cells_to_image: expected {name} float32 [{values.shape[1]}], got {each.dtype} {list(each.shape)}"
            )
    if native.serves(values):
        rings, sectors, _ = grid.bins
        places = num_scans * rings * sectors
        dense = torch.ops.kdmos.cells_to_image(
            values.contiguous(), cells.contiguous(), factor.contiguous(), background.contiguous(), places, dtype
        )
        return dense.view(num_scans, rings, sectors, values.shape[1]).permute(0, 3, 1, 2)  # [B, C, R, A]
    return reference.cells_to_image(values, cells, factor, background, num_scans, grid, dtype)


@native.fake("cells_to_image")
def _(values, cells, factor, background, num_places, dtype):
    return values.new_empty(num_places, values.shape[1], dtype=dtype)
