"""Networks by name, and checkpoints by path."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from kdmos.data.labels import CLASSES
from kdmos.errors import InputError
from kdmos.models import published
from kdmos.models.blocks import DySample
from kdmos.models.rule import Rule
from kdmos.models.student import Student, StudentOutput
from kdmos.models.teacher import Teacher
from kdmos.settings import MotionSettings, PolarGrid, ResidualGrid, StudentSettings, TeacherSettings

WEIGHTS = Path(__file__).parent.parent / "weights"
SHIPPED = {name: WEIGHTS / f"{name}.safetensors" for name in ("synthetic", "synthetic-now")}
SHIPPED_FOR = {  # why one would take it
    "synthetic": "knows the 7 scans after each one, and finds more; synthetic-now answers at once",
    "synthetic-now": "answers each scan at once; synthetic waits for 7 more scans, and finds more",
}

__all__ = [
    "SHIPPED",
    "SHIPPED_FOR",
    "DySample",
    "Rule",
    "Student",
    "StudentOutput",
    "StudentSettings",
    "Teacher",
    "TeacherSettings",
    "build_student",
    "build_teacher",
    "header_of",
    "load_model",
    "load_student",
    "load_teacher",
    "said_of_shipped",
    "save_model",
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
    classes = classes or _classes(num_classes, "student")
    motion = motion or MotionSettings("published", num_channels)
    settings = StudentSettings(name, tuple(classes), None, grid or PolarGrid(), motion)
    return Student(settings)


def build_teacher(
    name: str = "mambamos", num_classes: int = 4, classes: tuple[str, ...] | None = None, **settings
) -> Teacher:
    """A teacher with fresh weights.

    Args:
        name: "mambamos".
        num_classes: 2 (static, moving), 3 (with unlabeled) or 4 (with movable); other counts need `classes`.
        classes: Class names in logit order, one of them "moving".
        settings: Other fields of `TeacherSettings`.
    Raises: ValueError for an unknown name or a count without names.
    """
    return Teacher(TeacherSettings(name, tuple(classes or _classes(num_classes, "teacher")), **settings))


def _classes(num_classes: int, kind: str) -> tuple[str, ...]:
    if num_classes not in CLASSES:
        raise ValueError(f"build_{kind}: name the classes of a {kind} with {num_classes} classes")
    return CLASSES[num_classes]


def save_model(path: str | Path, model: Student | Teacher, dtype: torch.dtype | None = None, **about) -> None:
    """Write a student or teacher as one `.safetensors` whose header makes it usable anywhere.

    Args:
        path: Target file, replaced atomically.
        model: The student or teacher.
        dtype: Of the parameters in the file; float16 halves it. None: as they are.
        about: JSON-able facts for the header: training data, metrics, seed, commit, remission range...
    """
    from kdmos import checkpoint  # here, so that the networks alone need nothing but torch and numpy

    weights = model.state_dict()
    if dtype is not None:  # the statistics of the norms stay as they are: they are few, and their range is wide
        weights |= {key: value.to(dtype) for key, value in model.named_parameters()}
    checkpoint.save(path, weights, header_of(model, about))


def header_of(model: Student | Teacher, about: dict) -> dict:
    """The header of a model's file: JSON-able facts about it, and all that its shape and meaning depend on."""
    settings = asdict(model.settings)
    return {**about, "model": settings.pop("name"), **settings}


def said_of_shipped(name: str) -> str:
    """Which student this is, and why one would take it, in a line."""
    return f"student '{name}', shipped with kdmos: {SHIPPED_FOR[name]}"


def load_student(
    path: str | Path, device: str | torch.device = "cpu", lookahead: int | None = None, force: bool = False
) -> Student | Rule:
    """A student from our `.safetensors` or from the authors' `.pt`, in eval mode; see `load_model`.

    Raises: InputError too if the file holds a teacher.
    """
    model = load_model(path, device, lookahead, force)
    if isinstance(model, Teacher):
        raise InputError(f"{path}: a {model.settings.name} teacher, not a student")
    return model


def load_teacher(path: str | Path, device: str | torch.device = "cpu") -> Teacher:
    """MambaMOS from our `.safetensors` or from the authors' `.pth`, in eval mode; see `load_model`.

    Raises: InputError too if the file holds a student.
    """
    model = load_model(path, device)
    if not isinstance(model, Teacher):
        raise InputError(f"{path}: a student, not a teacher (to learn from it, use load_model)")
    return model


def load_model(
    path: str | Path, device: str | torch.device = "cpu", lookahead: int | None = None, force: bool = False
) -> Student | Rule | Teacher:
    """A student or teacher from our `.safetensors` or from the authors' files, in eval mode.

    By name: "synthetic" and "synthetic-now", students which come with the package and saw synthetic scans alone, the
    first with a look-ahead of 7 scans and the other with none; and "rule", the training-free rule.

    `model.header` holds all that the file says about itself. It is empty for the authors' files: of a student, classes,
    K and upsampler are read off the tensors, and the published grid and look-ahead are assumed; of a teacher, classes,
    depths and widths, and 8 scans and voxels of 0.09 m are assumed.

    Args:
        path: The file.
        device: Where the model goes.
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
    if published.is_teacher(weights):
        settings = _teacher_settings(header, path) if header else published.teacher_settings(weights, str(path))
        if lookahead:
            raise InputError(f"{path}: a teacher, which reads no future scans, not {lookahead}")
        model = Teacher(settings)
    else:
        if published.is_student(weights):
            weights, settings = published.convert(weights, str(path))
        elif "model" in header and "motion" in header:
            settings = _student_settings(header, path)
        else:
            raise InputError(
                f"{path}: not a student, nor a teacher: neither a kdmos header nor the authors' KDMOS, MotionBEV or "
                "MambaMOS layers"
            )
        model = Student(_looking_ahead(settings, lookahead, force, path))
    missing, unexpected, shapes = _compare(model.state_dict(), weights)
    if missing or unexpected or shapes:
        kind = "teacher" if isinstance(model, Teacher) else "student"
        raise InputError(
            f"{path}: does not fit a {model.settings.name} {kind} with {len(model.classes)} classes: "
            f"{len(missing)} tensors missing, {len(unexpected)} unknown, {len(shapes)} of another shape"
            f" (first: {(missing + unexpected + shapes)[0]})"
        )
    model.load_state_dict(weights)
    model.header = header
    return model.to(device).eval()


def _looking_ahead(settings: StudentSettings, lookahead: int | None, force: bool, path: str | Path) -> StudentSettings:
    trained = settings.motion.lookahead
    if lookahead is None or lookahead == trained:
        return settings
    if not force:
        raise InputError(
            f"{path}: was trained with a look-ahead of {trained} scans, not {lookahead}; its accuracy holds for "
            "that alone (force it with force=True, --force)"
        )
    try:
        return replace(settings, motion=replace(settings.motion, lookahead=lookahead))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _tuples(settings: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _teacher_settings(header: dict, path: str | Path) -> TeacherSettings:
    names = {field.name for field in fields(TeacherSettings)} - {"name"}
    try:
        return TeacherSettings(name=header["model"], **{name: _tuples(header)[name] for name in names})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the header does not describe a teacher ({error})") from error


def _student_settings(header: dict, path: str | Path) -> StudentSettings:
    try:
        motion = dict(header["motion"])
        grid = ResidualGrid(**_tuples(motion.pop("grid")))
        return StudentSettings(
            name=header["model"],
            classes=tuple(header["classes"]),
            moving=header["moving"],
            grid=PolarGrid(**_tuples(header["grid"])),
            motion=MotionSettings(**motion, grid=grid),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the header does not describe a student ({error})") from error


def _compare(own: dict, given: dict) -> tuple[list[str], list[str], list[str]]:
    missing = [key for key in own if key not in given]
    unexpected = [key for key in given if key not in own]
    shapes = [key for key in own if key in given and own[key].shape != given[key].shape]
    return missing, unexpected, shapes
