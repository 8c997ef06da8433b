"""The packed batch: scans of different length behind one another, the one form between loader and loss."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class ScanId(NamedTuple):
    """Which scan this is, wherever it stands in a list: sequence name and frame number."""

    sequence: str
    frame: int

    def __str__(self) -> str:
        return f"{self.sequence}/{self.frame:06d}"


@dataclass(frozen=True)
class PackedBatch:
    """B scans with N points in all.

    points: float32 [N, 4] = x, y, z (metres, LiDAR frame), remission (0..1). Of windows of several scans, in the newest
        one's frame, whose points come first.
    offsets: int64 [B + 1]; scan b owns rows offsets[b]:offsets[b + 1].
    scans: identity of each scan.
    residual: float32 [N, K] motion channels, if known.
    labels: uint8 [N] classes of the model, 255 where the model has no class for the point, if known.
    teacher_logits: float16 or float32 [N, C], if known.
    age: uint8 [N], scans since each point's own, of windows of several scans.
    """

    points: Tensor
    offsets: Tensor
    scans: tuple[ScanId, ...] = ()
    residual: Tensor | None = None
    labels: Tensor | None = None
    teacher_logits: Tensor | None = None
    age: Tensor | None = None

    def _map(self, change) -> PackedBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in tensors.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        return self._map(Tensor.pin_memory)

    def rows(self, kept: Tensor, offsets: Tensor) -> PackedBatch:
        """Of the points, rows `kept` int64 [M] alone, as scans `offsets`; `scans` still names where all came from."""
        tensors = self._map(lambda t: t if t is self.offsets else t.index_select(0, kept))
        return replace(tensors, offsets=offsets)

    @property
    def num_scans(self) -> int:
        return self.offsets.numel() - 1


def pack(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenate tensors of different length: -> rows [N, ...], offsets int64 [B + 1] on the same device."""
    lengths = torch.tensor([0] + [part.shape[0] for part in parts], dtype=torch.int64)
    return torch.cat(parts), lengths.cumsum(0).to(parts[0].device)


def collate(samples: list[dict]) -> PackedBatch:
    """Pack what `MosDataset` yields, dicts with `scan` and numpy arrays named like the batch's fields."""
    columns = {}
    for name in ("points", "residual", "labels", "teacher_logits", "age"):
        if name in samples[0]:
            columns[name] = torch.from_numpy(np.concatenate([sample[name] for sample in samples]))
    lengths = [0] + [len(sample["points"]) for sample in samples]
    return PackedBatch(
        offsets=torch.tensor(lengths, dtype=torch.int64).cumsum(0),
        scans=tuple(sample["scan"] for sample in samples),
        **columns,
    )
