"""Networks by name, and checkpoints by path."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from kdmos.data.labels import CLASSES
from kdmos.errors import InputError
from kdmos.models import published
from kdmos.models.blocks import DySample
from kdmos.models.rule import Rule
from kdmos.models.student import Student, StudentOutput
from kdmos.settings import MotionSettings, PolarGrid, ResidualGrid, StudentSettings

SHIPPED = {"synthetic": Path(__file__).parent.parent / "weights" / "synthetic.safetensors"}

__all__ = [
    "SHIPPED",
    "DySample",
    "Rule",
    "Student",
    "StudentOutput",
    "StudentSettings",
    "build_student",
    "load_student",
    "save_student",
]


def build_student(
    name: str = "kdmos",
    num_classes: int = 4,
    num_channels: int = 8,
    grid: PolarGrid | None = None,
    classes: tuple[str, ...] | None = None,
    motion: MotionSettings | None = None,
) -> Student:
    """A student with fresh weights.

    Args:
        name: "kdmos" or "motionbev".
        num_classes: 2 (static, moving), 3 (with unlabeled) or 4 (with movable); other counts need `classes`.
        num_channels: K, motion channels; ignored if `motion` is given.
        grid: Polar grid; None: the published one.
        classes: Class names in logit order, one of them "moving".
        motion: Motion settings; None: the published form with all its look-ahead.
    Raises: ValueError for an unknown name or a count without names.
    """
    if classes is None:
        if num_classes not in CLASSES:
            raise ValueError(f"build_student: name the classes of a student with {num_classes} classes")
        classes = CLASSES[num_classes]
    motion = motion or MotionSettings("published", num_channels)
    settings = StudentSettings(name, tuple(classes), None, grid or PolarGrid(), motion)
    return Student(settings)


def save_student(path: str | Path, student: Student, dtype: torch.dtype | None = None, **about) -> None:
    """Write a student as one `.safetensors` whose header makes it usable anywhere.

    Args:
        path: Target file, replaced atomically.
        student: The student.
        dtype: Of the parameters in the file; float16 halves it. None: as they are.
        about: JSON-able facts for the header: training data, metrics, seed, commit, remission range...
    """
    from kdmos import checkpoint  # here, so that the networks alone need nothing but torch and numpy

    settings, weights = asdict(student.settings), student.state_dict()
    if dtype is not None:  # the statistics of the norms stay as they are: they are few, and their range is wide
        weights |= {key: value.to(dtype) for key, value in student.named_parameters()}
    checkpoint.save(path, weights, {**about, "model": settings.pop("name"), **settings})


def load_student(
    path: str | Path, device: str | torch.device = "cpu", lookahead: int | None = None, force: bool = False
) -> Student | Rule:
    """A student from our `.safetensors` or from the authors' `.pt`, in eval mode.

    By name: "synthetic", which comes with the package and saw synthetic scans alone, and "rule", the training-free
    rule.

    `student.header` holds all that the file says about itself (empty for the authors' files, whose classes, K and
    upsampler are read off the tensors, and for which the published grid and look-ahead are assumed).

    Args:
        path: The file.
        device: Where the student goes.
        lookahead: Future scans to use, if not the ones it was trained with.
        force: Allow another look-ahead than the trained one.
    Raises: InputError naming the file and what does not fit, or another look-ahead without `force`.
    """
    from kdmos import checkpoint

    if str(path) == "rule":
        if lookahead not in (None, Rule().settings.motion.lookahead):
            raise InputError("rule: needs all its channels and so its whole look-ahead of 7 scans")
        return Rule().to(device).eval()
    path = SHIPPED.get(str(path), path)
    weights, header = checkpoint.load(path)
    if published.is_published(weights):
        weights, settings = published.convert(weights, str(path))
    elif "model" in header and "motion" in header:
        settings = _settings_of(header, path)
    else:
        raise InputError(f"{path}: not a student: neither a kdmos header nor the authors' KDMOS / MotionBEV layers")
    trained = settings.motion.lookahead
    if lookahead is not None and lookahead != trained:
        if not force:
            raise InputError(
                f"{path}: was trained with a look-ahead of {trained} scans, not {lookahead}; its accuracy holds for "
                "that alone (force it with force=True, --force)"
            )
        try:
            settings = replace(settings, motion=replace(settings.motion, lookahead=lookahead))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
    student = Student(settings)
    missing, unexpected, shapes = _compare(student.state_dict(), weights)
    if missing or unexpected or shapes:
        raise InputError(
            f"{path}: does not fit a {settings.name} student with {len(settings.classes)} classes: "
            f"{len(missing)} tensors missing, {len(unexpected)} unknown, {len(shapes)} of another shape"
            f" (first: {(missing + unexpected + shapes)[0]})"
        )
    student.load_state_dict(weights)
    student.header = header
    return student.to(device).eval()


def _settings_of(header: dict, path: str | Path) -> StudentSettings:
    def tuples(settings: dict) -> dict:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}

    try:
        motion = dict(header["motion"])
        grid = ResidualGrid(**tuples(motion.pop("grid")))
        return StudentSettings(
            name=header["model"],
            classes=tuple(header["classes"]),
            moving=header["moving"],
            grid=PolarGrid(**tuples(header["grid"])),
            motion=MotionSettings(**motion, grid=grid),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the header does not describe a student ({error})") from error


def _compare(own: dict, given: dict) -> tuple[list[str], list[str], list[str]]:
    missing = [key for key in own if key not in given]
    unexpected = [key for key in given if key not in own]
    shapes = [key for key in own if key in given and own[key].shape != given[key].shape]
    return missing, unexpected, shapes
