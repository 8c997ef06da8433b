"""One scan from above as a picture: what moves, what was predicted to, and where the two differ."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from kdmos.checkpoint import write_atomic
from kdmos.errors import InputError

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
    errors = [
        ("found", HIT, truth & predicted & scored),
        ("missed", MISSED, truth & ~predicted & scored),
        ("false alarm", FALSE_ALARM, ~truth & predicted & scored),
    ]
    if (predicted & ~scored).any():
        errors.append(("no truth", NO_TRUTH, predicted & ~scored))

    figure = Figure(figsize=(14.1, 5.7), facecolor=PAGE, dpi=130)
    figure.suptitle(title, color=TEXT, fontsize=14, y=0.98, parse_math=False)  # a name may hold "$"
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=MARGIN, right=1 - MARGIN, bottom=0.07, top=0.885, wspace=GAP)
    _panel(left, "truth", points, scored, [("moving", MOVING, truth)], extent)
    _panel(middle, "prediction", points, np.ones_like(scored), [("moving", MOVING, predicted)], extent)
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


def need_matplotlib() -> None:
    """Raise InputError if matplotlib is missing: for a command to say so before its work, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'kdmos[train]'") from None


def _panel(axes, name: str, points: np.ndarray, bright: np.ndarray, groups: list, extent: float) -> None:
    """One square: rings of distance, all points in grey by height, on them the groups (label, colour, mask)."""
    axes.set_title(name, color=TEXT, fontsize=12, pad=6)
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xticks=[], yticks=[], facecolor=PANEL)
    axes.spines[:].set_visible(False)
    angle = np.linspace(0, 2 * np.pi, 361)
    for radius in np.arange(RING_STEP, extent, RING_STEP):
        axes.plot(radius * np.sin(angle), radius * np.cos(angle), color=RING, linewidth=0.8, zorder=0)
        axes.text(radius * 0.72, -radius * 0.72, f"{radius:g} m", color=TEXT, fontsize=7, alpha=0.8, zorder=2)
    axes.plot(0, 0, marker="^", markersize=8, color="white", markeredgewidth=0, zorder=4)

    across, ahead = -points[:, 1], points[:, 0]  # y points left
    height = np.clip(np.interp(points[:, 2], GREY_HEIGHTS, (0, 1)), 0, 1)
    grey = (GREYS[0] + (GREYS[1] - GREYS[0]) * height) * np.where(bright, 1, DIM)
    axes.scatter(across, ahead, s=0.45, c=grey, cmap="gray", vmin=0, vmax=1, linewidths=0, zorder=1)

    colour = np.full(len(points), "", dtype="U7")
    for label, own, mask in groups:
        colour[mask] = own
        count = "" if own == NO_TRUTH else f"  {np.count_nonzero(mask):,}"
        axes.scatter([], [], s=36, c=own, label=label + count)
    marked = np.flatnonzero(colour != "")
    # Mixed order, always the same: where found and missed points overlap, both show in their proportion.
    marked = np.random.default_rng(0).permutation(marked)
    axes.scatter(across[marked], ahead[marked], s=3.5, c=colour[marked], linewidths=0, zorder=3)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=0.2,
        ncols=len(groups),
        frameon=False,
        labelcolor=TEXT,
        fontsize=9.5,
        handletextpad=0.1,
        columnspacing=0.7,
    )
