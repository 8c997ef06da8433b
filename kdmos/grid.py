"""The two grids that points are sorted into, as settings that travel with every checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PolarGrid:
    """Polar BEV grid of the student, R rings x A sectors x Z heights; the defaults are the published one.

    A bin is `interval = extent / (bins - 1)` wide: the last bin starts at the upper bound, as in the authors' code.
    """

    rho: tuple[float, float] = (1.85, 50.15)  # metres, horizontal distance
    phi: tuple[float, float] = (-math.pi, math.pi)  # radians, atan2(y, x)
    z: tuple[float, float] = (-4.0, 2.0)  # metres
    bins: tuple[int, int, int] = (480, 360, 32)  # R, A, Z

    def __post_init__(self) -> None:
        if min(self.bins) < 2:
            raise ValueError(f"PolarGrid: every axis needs at least 2 bins, got {self.bins}")
        for name in ("rho", "phi", "z"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"PolarGrid: {name} must be (low, high) with low < high, got ({low}, {high})")

    @property
    def lower(self) -> tuple[float, float, float]:
        return (self.rho[0], self.phi[0], self.z[0])

    @property
    def upper(self) -> tuple[float, float, float]:
        return (self.rho[1], self.phi[1], self.z[1])

    @property
    def interval(self) -> tuple[float, float, float]:
        low, high = self.lower, self.upper
        return tuple((high[i] - low[i]) / (self.bins[i] - 1) for i in range(3))


@dataclass(frozen=True)
class ResidualGrid:
    """Spherical-range grid in which heights are compared: `rows` of yaw x `columns` of range, and the rule's limits.

    A residual is kept where `min_ratio` * I1 >= I2 and `min_height` <= I1 <= `max_height`.
    """

    rows: int = 360  # yaw, over the full turn
    columns: int = 480  # range, farthest first
    max_range: float = 60.0  # metres, 3-D norm; open bound
    z: tuple[float, float] = (-4.0, 2.0)  # metres; open bounds
    min_ratio: float = 0.2
    min_height: float = 0.4  # metres
    max_height: float = 4.0  # metres

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1 or self.max_range <= 0 or not self.z[0] < self.z[1]:
            raise ValueError(f"ResidualGrid: rows, columns and max_range must be positive and z ordered, got {self}")
