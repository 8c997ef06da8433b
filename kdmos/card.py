"""The model card: what a checkpoint says about itself, for people."""

from __future__ import annotations

import math
from pathlib import Path

from kdmos.checkpoint import write_atomic
from kdmos.models import Student, Teacher
from kdmos.settings import STUDENTS, MotionSettings, PolarGrid

RATE = 10.0  # scans a second, of the sensors that this is written for
UPSAMPLING = {"dysample": "DySample", "transposed": "transposed convolution"}
MANY = 12  # names that are still listed one by one
MARK = "<!-- kdmos writes this page anew with the model; without this line it is left as it is. -->"


def write_card(
    path: Path, model: Student | Teacher, name: str, header: dict | None = None, text: str | None = None
) -> str:
    """Write a model's card, but not over one that people have made their own; a line that says what was done.

    Args:
        path: Target file.
        model, name, header: See `model_card`.
        text: The card, where people have written it already, as that of the shipped student.
    """
    if path.exists() and MARK not in path.read_text(errors="replace"):
        return f"{path}: left as it is, because kdmos did not write it"
    card = model_card(model, name, header) if text is None else f"{text.rstrip()}\n\n{MARK}\n"
    write_atomic(path, card.encode())
    return f"{path}: its card"


def model_card(model: Student | Teacher, name: str, header: dict | None = None) -> str:
    """A page of Markdown about a model; what its header does not say is left out.

    Args:
        model: A student or teacher.
        name: What it is called, for the title.
        header: What is known of it besides its settings, as `save_model` takes it; None: what its file says. Empty for
            the authors' files, of which the card says what is assumed.
    """
    header = model.header if header is None else header
    kind = "teacher" if isinstance(model, Teacher) else "student"
    rows = {**_network(model, kind), **(_window(model) if kind == "teacher" else _student(model)), **_history(header)}
    rows["licence"] = (
        "not stated in the file. It may be bound by that of the training data (SemanticKITTI: CC BY-NC-SA) and of the "
        "weights it began from; ask whoever trained it"
    )
    lines = [f"# {name}", "", f"Moving-object segmentation of LiDAR scans: a `{model.settings.name}` {kind}.", ""]
    lines += _table(("", ""), rows)
    if not header:
        assumed = (
            "scans in a window and the size of a voxel"
            if kind == "teacher"
            else "polar grid, form and grids of the motion channels, and look-ahead"
        )
        lines += ["", f"The file has no header: classes and widths are read off its tensors; {assumed} are assumed "]
        lines[-1] += "to be the published ones."
    scores = sorted(header.get("metrics", {}).items(), key=lambda score: "moving" not in score[0])
    scores = {_score(key): f"{value:.3f}" for key, value in scores if value is not None}
    if scores:
        lines += ["", *_table(("on the validation sequences", "IoU"), scores)]
    return "\n".join([*lines, "", MARK, ""])


def _table(head: tuple[str, str], rows: dict[str, str]) -> list[str]:
    cells = [f"| {key} | {value} |" for key, value in rows.items()]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(cell.replace("\n", " ") for cell in cells)]


def _score(key: str) -> str:
    """`iou_movable` -> movable; `rule_moving_iou` -> moving, by the training-free rule."""
    if key == "rule_moving_iou":
        return "moving, by the training-free rule"
    return key.removeprefix("iou_").removesuffix("_iou")


def _network(model: Student | Teacher, kind: str) -> dict[str, str]:
    settings = model.settings
    count = sum(parameter.numel() for parameter in model.parameters())
    how = f", upsampling by {UPSAMPLING[STUDENTS[settings.name]]}" if kind == "student" else ""
    return {
        "network": f"{settings.name} {kind}{how}; {count:,} parameters",
        "classes": ", ".join(settings.classes) + f" (moving: number {settings.moving})",
    }


def _span(low: float, high: float, unit: str = "m") -> str:
    return f"{low:.4g} to {high:.4g} {unit}".strip()


def _student(model: Student) -> dict[str, str]:
    grid, motion = model.settings.grid, model.settings.motion
    residual = motion.grid
    return {
        "polar grid": f"{' x '.join(map(str, grid.bins))} (range, yaw, height): {_polar_extent(grid)}",
        "motion channels": f"K = {motion.num_channels} of the {motion.form} form",
        "their grid": f"{residual.rows} x {residual.columns} (yaw, range): up to {residual.max_range:g} m, "
        f"z {_span(*residual.z)}; heights of {_span(residual.min_height, residual.max_height)}, "
        f"ratio {residual.min_ratio:g}",
        "look-ahead": _lookahead(motion),
        "history": f"{_scans(motion.history)} before the one in question",
    }


def _polar_extent(grid: PolarGrid) -> str:
    full = math.isclose(grid.phi[1] - grid.phi[0], 2 * math.pi)
    yaw = "all round" if full else _span(*(math.degrees(angle) for angle in grid.phi), "degrees")
    return f"{_span(*grid.rho)} away, {yaw}, z {_span(*grid.z)}"


def _scans(number: int) -> str:
    return f"{number} scan{'' if number == 1 else 's'}"


def _lookahead(motion: MotionSettings) -> str:
    if motion.lookahead == 0:
        return "none: an answer needs no scan after its own"
    late = motion.lookahead / RATE
    return f"{_scans(motion.lookahead)}: an answer comes {late:g} s late at {RATE:g} Hz"


def _window(model: Teacher) -> dict[str, str]:
    settings = model.settings
    return {
        "reads": f"{_scans(settings.num_scans)}, the last of which it labels; voxels of {settings.voxel:g} m",
        "look-ahead": "none",
    }


def _history(header: dict) -> dict[str, str]:
    """What the header says of data and training, in words."""
    rows = {}
    if sensor := header.get("sensor"):
        metres = [f"{axis} {_span(*sensor[axis])}" for axis in ("x", "y", "z") if axis in sensor]
        remission = [f"remission {_span(*sensor['remission'], '')}"] if "remission" in sensor else []
        rows["saw in training"] = ", ".join(metres + remission)
    for key, what in (("training_data", "trained on"), ("validation_data", "validated on")):
        if header.get(key):
            rows[what] = _sequences(header[key])
    if header.get("init"):
        rows["began from"] = f"`{header['init']}`"
    if "distill" in header:
        rows["distilled"] = _distilled(header["distill"])
    for key in ("epoch", "step", "seed"):
        if header.get(key) is not None:
            rows[key] = str(header[key])
    if header.get("version"):
        rows["made by"] = f"kdmos {header['version']}"
        if header.get("commit"):
            rows["made by"] += f", commit {header['commit'][:12]}"
    return rows


def _sequences(names: list[str]) -> str:
    if len(names) > MANY:
        return f"{len(names)} sequences, {names[0]} to {names[-1]}"
    return f"sequence{'' if len(names) == 1 else 's'} {', '.join(names)}"


def _distilled(distill: dict | None) -> str:
    if distill is None:
        return "no: it learnt from the labels alone"
    options = "".join(f", {key} {value}" for key, value in distill.get("options", {}).items())
    return f"from the teacher `{distill['teacher']}` by {distill['loss']}{options}, weight {distill['gamma']:g}"
