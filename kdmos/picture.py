"""Scans from above as pictures: what moves, what was predicted to, where the two differ, what changed in height.

`bev_picture` is the page of the report; `panels_picture` draws any panels, fast enough for a film; `map_picture` a
whole drive.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kdmos.checkpoint import write_atomic
from kdmos.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

# A dark page sits well in light and in dark viewers. Hit, missed and false alarm are those three colours of the
# Okabe-Ito palette that stay farthest apart, also from grey, for every kind of colour blindness.
PAGE, PANEL, RING, TEXT = "#0d1117", "#10161f", "#313b48", "#d5dbe3"
MOVING, HIT, MISSED, FALSE_ALARM, NO_TRUTH = "#e69f00", "#56b4e9", "#d55e00", "#f0e442", "#8b949e"
GREYS = (0.34, 0.78)  # brightness of the lowest and of the highest background point
GREY_HEIGHTS = (-2.0, 1.5)  # metres above the sensor: from the road to above a van
DIM = 0.6  # of that brightness, where a point has no truth
RING_STEP = 10.0  # metres
MARGIN, GAP = 0.005, 0.015  # left and right of the panels, of the picture's width; between them, of a panel's
TITLE_HEIGHT = 0.06  # of the picture's height; below it are the panels with their own titles
# Residuals by their height, metres: of a person or a low car, of a car or a van, of what is higher. Their brightness
# rises with the height, so that the order shows without the colours.
RESIDUALS = ((1.0, "below 1 m", "#3f7ee8"), (2.0, "1 to 2 m", "#27b7a4"), (np.inf, "above 2 m", "#f7e26b"))
TRAJECTORY = "#c08cf0"
DPI = 100  # of pictures that are drawn as pixels: only the size of their letters depends on it
MOST_COLUMNS = 4
FULL_LETTERS = 480  # side of a panel, pixels, from which the letters have their usual size
SCALE_BARS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # metres
SMOOTH = 2  # their points are set on a grid so many times as fine, which is then averaged
MARK_SHARE = 190  # a marked point is a dot whose radius is this part of the panel's side, in pixels of that grid


def bev_picture(
    path: str | Path,
    points: np.ndarray,
    truth_moving: np.ndarray,
    predicted_moving: np.ndarray,
    title: str,
    extent: float = 50.0,
    scored: np.ndarray | None = None,
) -> None:
    """Write a PNG of three panels, truth, prediction and errors, the sensor in the centre and x (forward) up.

    Args:
        path: The PNG; folders are made, an old file is replaced.
        points: float [N, >= 3] = x, y, z in metres, LiDAR frame; non-finite ones are left out.
        truth_moving: bool [N].
        predicted_moving: bool [N].
        title: Stands above the panels.
        extent: Half the side of the square shown, metres. The counts below a panel are of the points shown.
        scored: bool [N], points that have a truth: the others are dim, and errors on them are none. None: all.
    Raises: InputError if the lengths differ, the extent is not positive, matplotlib is missing or the file
        cannot be written.
    """
    need_matplotlib()
    from matplotlib.figure import Figure  # not pyplot: always Agg, no window, no state shared with the caller

    scored = np.ones(len(points), bool) if scored is None else scored
    masks = [np.asarray(mask, bool) for mask in (truth_moving, predicted_moving, scored)]
    if any(mask.shape != (len(points),) for mask in masks):
        raise InputError(f"{path}: expected masks of {len(points)} points, got {[len(mask) for mask in masks]}")
    if not extent > 0:
        raise InputError(f"{path}: the extent of a picture must be positive, got {extent} m")

    shown = np.isfinite(points[:, :3]).all(1) & (np.abs(points[:, :2]) < extent).all(1)
    order = np.flatnonzero(shown)[np.argsort(points[shown, 2])]  # walls are drawn over the road
    points, (truth, predicted, scored) = points[order, :3], [mask[order] for mask in masks]
    errors = error_marks(truth, predicted, scored)

    figure = Figure(figsize=(14.1, 5.7), facecolor=PAGE, dpi=130)
    figure.suptitle(title, color=TEXT, fontsize=14, y=0.98, parse_math=False)  # a name may hold "$"
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=MARGIN, right=1 - MARGIN, bottom=0.07, top=0.885, wspace=GAP)
    _panel(left, "truth", points, scored, moving_marks(truth), extent)
    _panel(middle, "prediction", points, np.ones_like(scored), moving_marks(predicted), extent)
    _panel(right, "errors", points, scored, errors, extent)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Title": title})
    write_atomic(path, picture.getvalue())


def read_panels(path: str | Path) -> tuple[str, list[bytes]]:
    """The title of a picture that `bev_picture` wrote, and its panels as PNGs: truth, prediction, errors.

    For pages that are too narrow for three panels side by side.

    Raises: InputError if matplotlib (which brings Pillow) is missing or the file is no such picture.
    """
    need_matplotlib()
    from PIL import Image

    try:
        with Image.open(path) as image:
            title, (width, height) = image.info.get("Title", ""), image.size
            pitch = (1 - 2 * MARGIN) * (1 + GAP) / (3 + 2 * GAP)  # from panel to panel, half a gap on either side
            panels = []
            for i in range(3):
                left = (0.5 - 1.5 * pitch + i * pitch) * width
                panel = io.BytesIO()
                box = round(left), round(TITLE_HEIGHT * height), round(left) + round(pitch * width), height
                image.crop(box).convert("RGB").save(panel, format="png", optimize=True)
                panels.append(panel.getvalue())
            return title, panels
    except (OSError, SyntaxError) as error:  # what Pillow makes of a file that is missing or damaged
        raise InputError(f"{path}: not a picture that kdmos drew ({error})") from error


def need_matplotlib(extra: str = "train") -> None:
    """Raise InputError if matplotlib is missing: for a command to say so before its work, not after.

    extra: What brings it, of the libraries that the command needs.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError(f"pictures need matplotlib: pip install 'kdmos[{extra}]'") from None


class Panel(NamedTuple):
    """One square of `panels_picture`: name, marked points, and bool [N], which points are not dim (None: all)."""

    name: str
    marks: list[Marks]
    bright: np.ndarray | None = None


def panels_picture(
    points: np.ndarray,
    panels: list[Panel],
    title: str,
    extent: float = 50.0,
    size: int = 600,
    trajectory: np.ndarray | None = None,
    now: int = 0,
) -> Image:
    """A scan from above in one or more panels, the sensor in the centre and x (forward) up.

    The points are set as pixels, which is faster than what `bev_picture` does and gives smaller files.

    Args:
        points: float [N, >= 3] = x, y, z in metres, LiDAR frame; non-finite ones are left out.
        panels: At least one; their masks are bool [N].
        title: Stands above the panels.
        extent: Half the side of the square shown, metres. The counts below a panel are of the points shown.
        size: Side of a panel, pixels.
        trajectory: float [S, >= 2], where the sensor was and will be, LiDAR frame of this scan. None: not drawn.
        now: Row of the trajectory that belongs to this scan: what comes after it is dotted.
    Returns: an RGB image, its sides even numbers of pixels, as video wants them.
    """
    from matplotlib.figure import Figure

    shown = np.isfinite(points[:, :3]).all(1) & (np.abs(points[:, :2]) < extent).all(1)
    order = np.flatnonzero(shown)[np.argsort(points[shown, 2], kind="stable")]  # walls are drawn over the road
    points = points[order, :3]
    columns = min(len(panels), MOST_COLUMNS)
    sheet = _Sheet(columns, -(-len(panels) // columns), size, size)
    figure = Figure(figsize=sheet.inches, facecolor=PAGE, dpi=DPI)
    scale = min(1, size / FULL_LETTERS)
    _write_title(figure, sheet, title, scale)
    for i, (name, marks, bright) in enumerate(panels):
        marks = [mark._replace(mask=mark.mask[order]) for mark in marks]
        bright = np.ones(len(order), bool) if bright is None else bright[order]
        axes = figure.add_axes(sheet.box(i))
        _frame(axes, name, extent, scale)
        axes.imshow(
            _dots(points, bright, marks, extent, size), extent=(-extent, extent) * 2, interpolation="nearest", zorder=1
        )
        if trajectory is not None:
            # the line under the marked points would hide the road that it lies on; thin and above, it hides little
            for rows, style in ((slice(now + 1), "-"), (slice(now, None), ":")):
                axes.plot(-trajectory[rows, 1], trajectory[rows, 0], style, color=TRAJECTORY, linewidth=1.2, zorder=2)
        if marks:
            _legend(axes, marks, scale)
    return _render(figure)


@dataclass(frozen=True)
class _Sheet:
    """Where the panels lie on the page: columns x rows of width x height pixels, a title above, legends below each."""

    columns: int
    rows: int
    width: int
    height: int
    GAP, TITLE, NAME, LEGEND = 12, 44, 30, 34  # pixels

    @property
    def pixels(self) -> tuple[int, int]:
        width = self.columns * (self.width + self.GAP) + self.GAP
        height = self.TITLE + self.rows * (self.NAME + self.height + self.LEGEND)
        return width + width % 2, height + height % 2

    @property
    def inches(self) -> tuple[float, float]:
        return self.pixels[0] / DPI, self.pixels[1] / DPI

    @property
    def title(self) -> float:
        """Height of the title, of the page's."""
        return self.TITLE / self.pixels[1]

    def box(self, i: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of panel i, of the page's."""
        row, column = divmod(i, self.columns)
        left = self.GAP + column * (self.width + self.GAP)
        top = self.TITLE + self.NAME + row * (self.NAME + self.height + self.LEGEND)
        width, height = self.pixels
        return left / width, (height - top - self.height) / height, self.width / width, self.height / height


class DriveMap:
    """A whole drive from above, gathered scan by scan: once with all points, once without those that move.

    It holds two values a pixel, however long the drive is.

    Args:
        poses: float64 [S, 4, 4], LiDAR pose of every scan in one fixed frame, metres. The picture is turned so that the
            drive runs across it, from left to right.
        extent: Points farther from their sensor are left out, metres.
        size: Longer side of the map, pixels.
    """

    def __init__(self, poses: np.ndarray, extent: float = 50.0, size: int = 1200) -> None:
        path = poses[:, :2, 3] - poses[0, :2, 3]
        spread, axes = np.linalg.svd(path - path.mean(0), full_matrices=False)[1:]
        across = axes[0] if spread[0] > 1 else poses[0, :2, 0]  # metres; a sensor that stands looks to the right
        across = across * (np.sign(path[-1] @ across) or 1) / np.linalg.norm(across)
        self.extent = extent
        self.turn = np.array([across, [-across[1], across[0]]])  # world x, y -> right, up
        self.path = path @ self.turn.T
        self.origin = poses[0, :2, 3]
        self.low, self.high = self.path.min(0) - extent, self.path.max(0) + extent
        self.metres = (self.high - self.low).max() / (SMOOTH * size)  # of a pixel of the finer grid
        width, height = np.ceil((self.high - self.low) / self.metres / SMOOTH).astype(int) * SMOOTH
        self.height = np.full((height, width), -np.inf, np.float32)  # of the highest point, above the sensor
        self.moving = np.zeros((height, width), bool)

    def add(self, points: np.ndarray, pose: np.ndarray, moving: np.ndarray) -> None:
        """Take a scan.

        Args:
            points: float32 [N, >= 3], LiDAR frame, metres; non-finite ones are left out.
            pose: float64 [4, 4], one of `poses`.
            moving: bool [N].
        """
        near = np.flatnonzero(np.isfinite(points[:, :3]).all(1) & (np.hypot(points[:, 0], points[:, 1]) < self.extent))
        world = points[near, :3] @ pose[:2, :3].T + (pose[:2, 3] - self.origin)
        column, row = ((world @ self.turn.T - self.low) / self.metres).astype(np.int64).T
        inside = (row < len(self.height)) & (column < self.height.shape[1]) & (row >= 0) & (column >= 0)
        row, column, near = row[inside], column[inside], near[inside]
        still = ~moving[near]
        np.maximum.at(self.height, (row[still], column[still]), points[near[still], 2])
        self.moving[row[~still], column[~still]] = True

    def picture(self, title: str) -> Image:
        """Two panels, RGB, as `panels_picture`: all points with the moving ones marked, and what is left."""
        from matplotlib.figure import Figure

        rows, width = self.height.shape[0] // SMOOTH, self.height.shape[1] // SMOOTH
        wide = width >= 1.5 * rows  # such panels lie better below each other
        sheet = _Sheet(1 if wide else 2, 2 if wide else 1, width, rows)
        figure = Figure(figsize=sheet.inches, facecolor=PAGE, dpi=DPI)
        _write_title(figure, sheet, title)
        left, right, bottom, top = self.low[0], self.high[0], self.low[1], self.high[1]
        for i, name in enumerate(("all points", "without the moving points")):
            axes = figure.add_axes(sheet.box(i))
            axes.set_title(name, color=TEXT, fontsize=12, pad=6)
            axes.set(xticks=[], yticks=[], facecolor=PANEL)
            axes.spines[:].set_visible(False)
            axes.imshow(
                self._pixels(i == 0), extent=(left, right, bottom, top), origin="lower", interpolation="nearest"
            )
            axes.plot(*self.path.T, color=TRAJECTORY, linewidth=1.6, label="trajectory")
            if i == 0:
                axes.scatter([], [], s=36, c=MOVING, label="moving")
            bar = max(length for length in SCALE_BARS if length < (right - left) / 5 or length == SCALE_BARS[0])
            start = left + 0.02 * (right - left), bottom + 0.03 * (top - bottom)
            axes.plot([start[0], start[0] + bar], [start[1]] * 2, color=TEXT, linewidth=2)
            axes.text(start[0], start[1], f"{bar:,} m", color=TEXT, fontsize=9, va="bottom")
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=0.2, ncols=2, frameon=False, labelcolor=TEXT
            )
        return _render(figure)

    def _pixels(self, with_moving: bool) -> np.ndarray:
        known = np.isfinite(self.height)
        grey = np.where(known, 255 * brightness(np.where(known, self.height, 0)), 0)
        pixels = np.zeros((*self.height.shape, 4), np.uint8)
        pixels[..., :3] = grey[..., None]
        pixels[..., 3] = known
        if with_moving:
            pixels[self.moving] = (*rgb(MOVING)[0], 1)
        return _averaged(pixels)


def _dots(points: np.ndarray, bright: np.ndarray, marks: list[Marks], extent: float, size: int) -> np.ndarray:
    """The points of one panel as uint8 RGBA [size, size, 4], transparent where there is none."""
    fine = SMOOTH * size
    pixels = np.zeros((fine, fine, 4), np.uint8)
    cell = ((extent - points[:, :2].T) * (fine / (2 * extent))).astype(np.int64).clip(0, fine - 1)  # row, column

    def put(rows: np.ndarray, dot: np.ndarray, colour: np.ndarray) -> None:
        # of points in one pixel the last one shows, as if drawn one after the other
        row, column = (cell[:, rows, None] + dot[:, None]).clip(0, fine - 1)
        pixels[row, column, :3] = colour[:, None]
        pixels[row, column, 3] = 1

    grey = np.round(255 * brightness(points[:, 2], bright)).astype(np.uint8)
    put(np.arange(len(points)), np.indices((SMOOTH, SMOOTH)).reshape(2, -1), np.repeat(grey[:, None], 3, axis=1))
    marked, colour = mixed(marks)
    radius = max(1, round(size / MARK_SHARE))
    dot = np.indices((2 * radius + 1,) * 2).reshape(2, -1) - radius
    put(marked, dot[:, (dot**2).sum(0) <= radius**2 + 1], colour)
    return _averaged(pixels)


def _averaged(pixels: np.ndarray) -> np.ndarray:
    """uint8 [SMOOTH H, SMOOTH W, 4], alpha 0 or 1, as RGBA [H, W, 4], alpha 0..255."""
    total = sum(pixels[i::SMOOTH, j::SMOOTH].astype(np.uint16) for i in range(SMOOTH) for j in range(SMOOTH))
    total[..., :3] //= np.maximum(total[..., 3:], 1)
    total[..., 3] = total[..., 3] * 255 // SMOOTH**2
    return total.astype(np.uint8)


def _write_title(figure, sheet: _Sheet, title: str, scale: float = 1.0) -> None:
    place = {"x": 0.5, "y": 1 - sheet.title / 2, "ha": "center", "va": "center"}
    figure.text(**place, s=title, color=TEXT, fontsize=14 * scale, parse_math=False)  # a name may hold "$"


def _render(figure) -> Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def png(image: Image) -> bytes:
    """A picture of this module as a PNG file, in the colours of `flat`: a third of the size."""
    content = io.BytesIO()
    flat(image).save(content, format="png", optimize=True)
    return content.getvalue()


def flat(image: Image) -> Image:
    """The picture in a palette that is the same for every picture: for PNGs and GIFs."""
    return image.quantize(palette=_palette(), dither=0)


@lru_cache(maxsize=1)
def _palette() -> Image:
    """All greys on the page and on a panel, and each colour in the shades that its edges take there."""
    from PIL import Image

    colours = [PAGE, PANEL, RING, TEXT, MOVING, HIT, MISSED, FALSE_ALARM, NO_TRUTH, TRAJECTORY]
    colours += [colour for *_, colour in RESIDUALS]
    panel, *full = rgb(PANEL, *colours).astype(int)
    shades = [np.linspace(panel, 255, 64), *(np.linspace(panel, colour, 6)[1:] for colour in full)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate([*shades, np.array(full)]).round().astype(np.uint8).tobytes())
    return palette


class Marks(NamedTuple):
    """Points of one colour and what the legend calls them; counted: whether it says how many they are."""

    label: str
    colour: str
    mask: np.ndarray
    counted: bool = True


def moving_marks(moving: np.ndarray) -> list[Marks]:
    """What moves, bool [N], in truth or prediction."""
    return [Marks("moving", MOVING, moving)]


def error_marks(truth: np.ndarray, predicted: np.ndarray, scored: np.ndarray) -> list[Marks]:
    """Where truth and prediction differ, bool [N] each; a prediction where nothing is known is no error."""
    marks = [
        Marks("found", HIT, truth & predicted & scored),
        Marks("missed", MISSED, truth & ~predicted & scored),
        Marks("false alarm", FALSE_ALARM, ~truth & predicted & scored),
    ]
    if (predicted & ~scored).any():
        marks.append(Marks("no truth", NO_TRUTH, predicted & ~scored, counted=False))
    return marks


def residual_marks(residual: np.ndarray) -> list[Marks]:
    """Points that a motion channel, float [N], is not 0 for, by its height in metres."""
    below = np.digitize(residual, [limit for limit, *_ in RESIDUALS[:-1]])
    return [
        Marks(label, colour, (residual > 0) & (below == i), False) for i, (_, label, colour) in enumerate(RESIDUALS)
    ]


def _frame(axes: Axes, name: str, extent: float, scale: float = 1.0) -> None:
    """An empty square: its name, rings of distance, the sensor; its letters are `scale` times their usual size."""
    axes.set_title(name, color=TEXT, fontsize=12 * scale, pad=6)
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xticks=[], yticks=[], facecolor=PANEL)
    axes.spines[:].set_visible(False)
    angle = np.linspace(0, 2 * np.pi, 361)
    for radius in np.arange(RING_STEP, extent, RING_STEP):
        axes.plot(radius * np.sin(angle), radius * np.cos(angle), color=RING, linewidth=0.8, zorder=0)
        axes.text(radius * 0.72, -radius * 0.72, f"{radius:g} m", color=TEXT, fontsize=7 * scale, alpha=0.8, zorder=2)
    axes.plot(0, 0, marker="^", markersize=8 * scale, color="white", markeredgewidth=0, zorder=4)


def _panel(axes: Axes, name: str, points: np.ndarray, bright: np.ndarray, groups: list[Marks], extent: float) -> None:
    """One square: all points in grey by height, on them the groups."""
    _frame(axes, name, extent)
    across, ahead = -points[:, 1], points[:, 0]  # y points left
    axes.scatter(
        across, ahead, s=0.45, c=brightness(points[:, 2], bright), cmap="gray", vmin=0, vmax=1, linewidths=0, zorder=1
    )

    marked, colour = mixed(groups)
    axes.scatter(across[marked], ahead[marked], s=3.5, c=colour / 255, linewidths=0, zorder=3)
    _legend(axes, groups)


def brightness(height: np.ndarray, bright: np.ndarray | bool = True) -> np.ndarray:
    """Brightness, 0..1, of points by their height above the sensor, metres."""
    height = np.clip(np.interp(height, GREY_HEIGHTS, (0, 1)), 0, 1)
    return (GREYS[0] + (GREYS[1] - GREYS[0]) * height) * np.where(bright, 1, DIM)


def mixed(groups: list[Marks]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the marked points in the order to draw them, int64 [M], and their colours, uint8 [M, 3]."""
    group_of = np.full(len(groups[0].mask) if groups else 0, -1)
    for i, group in enumerate(groups):
        group_of[group.mask] = i
    # Mixed order, always the same: where found and missed points overlap, both show in their proportion.
    marked = np.random.default_rng(0).permutation(np.flatnonzero(group_of >= 0))
    return marked, rgb(*(group.colour for group in groups))[group_of[marked]]


def rgb(*colours: str) -> np.ndarray:
    """Colours "#rrggbb" as uint8 [N, 3]."""
    return np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in colours], np.uint8).reshape(-1, 3)


def _legend(axes: Axes, groups: list[Marks], scale: float = 1.0) -> None:
    for group in groups:
        count = f"  {np.count_nonzero(group.mask):,}" if group.counted else ""
        axes.scatter([], [], s=36 * scale**2, c=group.colour, label=group.label + count)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=0.2,
        ncols=len(groups),
        frameon=False,
        labelcolor=TEXT,
        fontsize=9.5 * scale,
        handletextpad=0.1,
        columnspacing=0.7,
    )
