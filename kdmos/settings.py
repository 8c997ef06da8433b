"""What a student's shape and meaning depend on: settings that a config states and every checkpoint carries.

Standard library only, so that everything else may import it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

STRICT = {"extra": "forbid"}  # for pydantic, where a config holds one of these
FORMS = ("published", "causal")  # of the motion channels
CURVES = ("z", "z-trans", "hilbert", "hilbert-trans")  # through the teacher's voxels; "-trans": x and y change places
STUDENTS = {"kdmos": "dysample", "motionbev": "transposed"}  # name -> how its decoder upsamples


@dataclass(frozen=True)
class PolarGrid:
    """Polar BEV grid of the student, R rings x A sectors x Z heights; the defaults are the published one.

    A bin is `interval = extent / (bins - 1)` wide: the last bin starts at the upper bound, as in the authors' code.
    """

    __pydantic_config__ = STRICT

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

    __pydantic_config__ = STRICT

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


@dataclass(frozen=True)
class MotionSettings:
    """Which motion channels: saved with every checkpoint, part of the key of every cache.

    form: "published": channel k of a scan is read k scans later and so needs k future scans; "causal": channel
        k compares the newest window with one that ends K/2 + k scans ago, and needs no future scan.
    num_channels: K, even; a window is K/2 scans.
    lookahead: Future scans an answer may wait for, 0..K-1; channels above it are 0. Always 0 when causal.
        None: as many as the form can use.
    grid: The residual grid.
    """

    __pydantic_config__ = STRICT

    form: str = "published"
    num_channels: int = 8
    lookahead: int | None = None
    grid: ResidualGrid = field(default_factory=ResidualGrid)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"motion form must be one of {FORMS}, got {self.form!r}")
        if self.num_channels < 2 or self.num_channels % 2:
            raise ValueError(f"motion num_channels must be even and at least 2, got {self.num_channels}")
        most = self.num_channels - 1 if self.form == "published" else 0
        if self.lookahead is None:
            object.__setattr__(self, "lookahead", most)
        if not 0 <= self.lookahead <= most:
            raise ValueError(
                f"motion lookahead must lie in 0..{most} for the {self.form} form with "
                f"{self.num_channels} channels, got {self.lookahead}"
            )

    @property
    def history(self) -> int:
        """Scans before the current one that its channels are made from."""
        if self.form == "published":
            return self.num_channels - 1
        return 2 * self.num_channels - 2


def _set_moving(settings: StudentSettings | TeacherSettings) -> None:
    if settings.moving is None:
        if "moving" not in settings.classes:
            raise ValueError(f'one of the classes must be "moving", got {settings.classes}')
        object.__setattr__(settings, "moving", settings.classes.index("moving"))
    if not 0 <= settings.moving < len(settings.classes):
        raise ValueError(f"moving class {settings.moving} is not among the {len(settings.classes)} classes")


@dataclass(frozen=True)
class StudentSettings:
    """All that the network's shape and meaning depend on; saved in every checkpoint's header.

    name: "kdmos" (DySample upsampling) or "motionbev" (transposed convolution).
    classes: Class names in logit order.
    moving: Index of the moving class; None: of the class named "moving".
    grid: Polar grid.
    motion: Motion channels the network reads: K inputs of the motion branch.
    """

    __pydantic_config__ = STRICT

    name: str = "kdmos"
    classes: tuple[str, ...] = ("unlabeled", "static", "movable", "moving")
    moving: int | None = None
    grid: PolarGrid = field(default_factory=PolarGrid)
    motion: MotionSettings = field(default_factory=MotionSettings)

    def __post_init__(self) -> None:
        if self.name not in STUDENTS:
            raise ValueError(f"student must be one of {tuple(STUDENTS)}, got {self.name!r}")
        _set_moving(self)
        if min(self.grid.bins[:2]) < 16:
            raise ValueError(f"the U-Net halves its input four times: needs 16 x 16 cells, got {self.grid.bins}")

    @property
    def history(self) -> int:
        """Scans before the current one that its labels are made from."""
        return self.motion.history

    @property
    def lookahead(self) -> int:
        """Scans after the current one that its labels wait for."""
        return self.motion.lookahead

    @property
    def reads(self) -> str:
        """What it is fed with, in words."""
        return f"{self.motion.form} motion channels"


@dataclass(frozen=True)
class TeacherSettings:
    """All that the teacher's shape and meaning depend on; saved in every checkpoint's header. Defaults: MambaMOS.

    classes: Class names in logit order.
    moving: Index of the moving class; None: of the class named "moving".
    num_scans: The newest scan and so many less one before it.
    voxel: Metres a side.
    curves: Space-filling curves; block i of a stage goes along curve i, and so on in turns.
    encoder_depths, encoder_channels, decoder_depths, decoder_channels: Blocks and width of each stage, finest first.
    mlp_ratio: Hidden channels of the blocks' MLPs per channel.
    drop_path: Probability of leaving out a branch of the last block in training; those before it have less.
    """

    __pydantic_config__ = STRICT

    name: str = "mambamos"
    classes: tuple[str, ...] = ("unlabeled", "static", "movable", "moving")
    moving: int | None = None
    num_scans: int = 8
    voxel: float = 0.09
    curves: tuple[str, ...] = CURVES
    encoder_depths: tuple[int, ...] = (2, 2, 2, 6, 2)
    encoder_channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    decoder_depths: tuple[int, ...] = (2, 2, 2, 2)
    decoder_channels: tuple[int, ...] = (64, 64, 128, 256)
    mlp_ratio: float = 4.0
    drop_path: float = 0.3

    @property
    def in_channels(self) -> int:
        """x, y, z, remission, age."""
        return 5

    def __post_init__(self) -> None:
        if self.name != "mambamos":
            raise ValueError(f"teacher must be mambamos, got {self.name!r}")
        _set_moving(self)
        stages = len(self.encoder_depths)
        lengths = [len(self.encoder_channels), len(self.decoder_depths) + 1, len(self.decoder_channels) + 1]
        if stages < 2 or lengths != [stages] * 3:
            raise ValueError(
                "teacher: needs two encoder_depths or more, as many encoder_channels and one less decoder_depths and "
                f"decoder_channels, got {stages}, {lengths[0]}, {lengths[1] - 1} and {lengths[2] - 1}"
            )
        if self.num_scans < 1 or self.voxel <= 0 or not self.curves or not 0 <= self.drop_path < 1:
            raise ValueError(f"teacher: num_scans, voxel and curves must be positive, drop_path in 0..1, got {self}")
        if unknown := set(self.curves) - set(CURVES):
            raise ValueError(f"teacher: curves must be among {CURVES}, got {', '.join(sorted(unknown))}")

    @property
    def history(self) -> int:
        """Scans before the current one that its labels are made from."""
        return self.num_scans - 1

    @property
    def lookahead(self) -> int:
        return 0

    @property
    def reads(self) -> str:
        """What it is fed with, in words."""
        return f"windows of {self.num_scans} scans"
