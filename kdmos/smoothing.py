"""Moving probability fused over scans: a binary Bayes filter over the voxels of the world, with a receding horizon."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

REACH = 1 << 20  # voxels to either side of the first scan that a key tells apart


class BayesFilter:
    """Fuses what the last scans said of the same places.

    The log-odds of a voxel are the sum over the scans of the horizon of logit(p) - logit(prior), p being the mean
    probability of the voxel's points in a scan, plus logit(prior). A place that most scans took for standing needs more
    than one to be taken for moving, and the other way round. Something that moves is in other voxels in the next scan;
    there its own scan speaks alone, until it stays.

    4DMOS (RA-L 2022) fuses so what it says several times of one scan's points. A student here says it once, so the
    places are fused instead, as the volumetric belief of MapMOS (RA-L 2023) does.

    Args:
        horizon: Scans that are fused, the newest among them; older ones are forgotten.
        voxel: Side of a voxel, metres.
        prior: Moving probability of a place of which nothing is known.
        certain: Probabilities are taken to lie this far from 0 and 1: no single scan decides for good.
    Raises: ValueError for a setting out of range.
    """

    def __init__(self, horizon: int = 10, voxel: float = 0.25, prior: float = 0.5, certain: float = 0.02) -> None:
        if horizon < 1 or voxel <= 0 or not 0 < prior < 1 or not 0 < certain < 0.5:
            raise ValueError(
                f"BayesFilter: expected horizon >= 1, voxel > 0, prior in 0..1, certain in 0..0.5, got {horizon}, "
                f"{voxel}, {prior}, {certain}"
            )
        self.voxel, self.certain = voxel, certain
        self.prior = float(np.log(prior / (1 - prior)))
        self._scans: deque[tuple[Tensor, Tensor]] = deque(maxlen=horizon - 1)  # sorted keys, evidence
        self._origin: np.ndarray | None = None

    def reset(self) -> None:
        """Forget everything."""
        self._scans.clear()
        self._origin = None

    def update(self, points: Tensor, pose: np.ndarray, probability: Tensor) -> Tensor:
        """Take the next scan.

        Args:
            points: float [n, >= 3], metres, LiDAR frame, finite.
            pose: [4, 4], fixed frame from the LiDAR's.
            probability: float [n], of moving.
        Returns: float32 [n], fused.
        """
        if self._origin is None:
            self._origin = np.asarray(pose, np.float64)[:3, 3].copy()
        key = self._keys(points, pose)
        keys, of_voxel = torch.unique(key, return_inverse=True)
        count = torch.zeros_like(keys, dtype=torch.float32).index_add_(0, of_voxel, torch.ones_like(probability))
        mean = torch.zeros_like(count).index_add_(0, of_voxel, probability.float()) / count
        evidence = torch.logit(mean.clamp(self.certain, 1 - self.certain)) - self.prior
        fused = evidence + self.prior
        for others, said in self._scans:
            if not len(others):
                continue
            place = torch.searchsorted(others, keys).clamp_(max=len(others) - 1)
            fused += torch.where(others[place] == keys, said[place], 0.0)
        self._scans.append((keys, evidence))
        return fused.sigmoid()[of_voxel]

    def _keys(self, points: Tensor, pose: np.ndarray) -> Tensor:
        transform = np.array(pose, np.float64)
        transform[:3, 3] -= self._origin
        rotation, shift = torch.from_numpy(transform[:3, :3]), torch.from_numpy(transform[:3, 3])
        world = points[:, :3].double() @ rotation.T.to(points.device) + shift.to(points.device)
        cell = (world / self.voxel).floor().long().clamp_(-REACH, REACH - 1) + REACH
        return (cell[:, 0] << 42) + (cell[:, 1] << 21) + cell[:, 2]
