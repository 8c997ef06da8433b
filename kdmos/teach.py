"""`kdmos teach`: a teacher's logits for every scan of a data set, cached for `kdmos train` to learn from.

In order: who the teacher is, what the store holds already, the caching, the command.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdmos.command import run
from kdmos.data.semantic_kitti import Sequence
from kdmos.data.teacher_logits import REMEDY, TeacherLogits
from kdmos.errors import InputError
from kdmos.inference import ScanLogits, asked_sequences, choose_device, fingerprint, prepared, sequence_logits
from kdmos.models import Rule, Student, load_student
from kdmos.motion import warn_of_incomplete
from kdmos.settings import MotionSettings

WINDOW = "window"  # the one entry of a file's settings that is of the scan and not of the teacher
POSE_DIGITS = 6  # metres and entries of the rotation; another machine's linear algebra differs beyond


# --- who the teacher is


def teacher_settings(student: Student | Rule, checkpoint: str | Path) -> dict:
    """What identifies a teacher, JSON-able: equal settings give equal logits for equal scans and poses.

    Args:
        student: As loaded, so that a forced look-ahead is in it.
        checkpoint: The file that it was loaded from.
    Returns: `checkpoint` (hash of the file), `model`, `classes`, `moving`, `grid` and `motion`, the settings of both.
    """
    settings = asdict(student.settings)
    settings["model"] = _model(student)
    del settings["name"]
    return json.loads(json.dumps({"checkpoint": fingerprint(checkpoint), **settings}))  # lists, as read back


def _model(student: Student | Rule) -> str:
    return "rule" if isinstance(student, Rule) else student.settings.name


def window_keys(sequence: Sequence, motion: MotionSettings) -> dict[int, str]:
    """Hash, for each frame, of what its logits depend on beside the scan: poses and neighbours of its motion window.

    Of the neighbours, frame number and file size count: a scan that was repaired, or that came later, changes it.
    """
    poses = np.round(sequence.poses(), POSE_DIGITS) + 0.0  # + 0.0: no -0.0
    paths = [sequence.points_path(frame) for frame in sequence.frames]
    sizes = [path.stat().st_size if path.exists() else None for path in paths]  # None: a broken link
    keys = {}
    for index, frame in enumerate(sequence.frames):
        window = slice(max(0, index - motion.history), index + motion.lookahead + 1)
        key = hashlib.blake2b(poses[window].tobytes(), digest_size=8)
        key.update(repr((frame, sequence.frames[window], sizes[window])).encode())
        keys[frame] = key.hexdigest()
    return keys


# --- what the store holds already


def refuse_others(store: TeacherLogits, settings: dict) -> None:
    """Raise InputError if any file under the store's name, of whatever sequence, is of a teacher with other settings.

    Only headers are read. A file without a readable one is of nobody: it is computed again if its scan is asked for.
    """
    for path, header in store.headers():
        if header["teacher"] != store.teacher:
            raise InputError(f"{path}: holds logits of a teacher named '{header['teacher']}'; choose another --name")
        differs = _differences(settings, header["settings"])
        if differs:
            raise InputError(f"{path}: holds logits of another teacher ({differs}); choose another --name")


def _differences(settings: dict, found: dict) -> str:
    """What tells two teachers apart, "" if nothing does."""
    if not isinstance(found, dict):
        return "settings that are no dict"
    keys = dict.fromkeys((*settings, *found))
    differs = [key for key in keys if key != WINDOW and settings.get(key) != found.get(key)]
    return f"with another {', '.join(differs)}" if differs else ""


def check_scans(
    store: TeacherLogits,
    sequences: list[Sequence],
    settings: dict | None = None,
    motion: MotionSettings | None = None,
) -> Iterator[tuple[Sequence, int, str | None]]:
    """What is wrong with the stored logits of each scan; the scans are read and hashed, nothing is computed.

    Args:
        store: Logits of one teacher.
        sequences: With poses, if `motion` is given.
        settings: The teacher's; None: whatever the first sound file says, the others must agree with it.
        motion: The teacher's motion channels; None: what their windows were made of is not checked.
    Yields: (sequence, frame, fault), None for a sound file of this scan and teacher. A fault begins with the file.
    """
    for sequence in sequences:
        windows = None if motion is None else window_keys(sequence, motion)
        for frame in sequence.frames:
            scan = sequence.scan(frame)
            try:
                found = store.verify(scan, sequence.points_path(frame))["settings"]
            except InputError as error:
                yield sequence, frame, str(error).removesuffix(f"; {REMEDY}")
                continue
            settings = found if settings is None else settings
            fault = None
            if differs := _differences(settings, found):
                fault = f"{store.path(scan)}: logits of another teacher ({differs})"
            elif windows is not None and found.get(WINDOW) != windows[frame]:
                fault = f"{store.path(scan)}: logits from other poses or neighbouring scans than there are now"
            yield sequence, frame, fault


# --- the caching


def teach_data(
    student: Student | Rule,
    store: TeacherLogits,
    settings: dict,
    wanted: list[tuple[Sequence, frozenset[int]]],
    device: torch.device | str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> tuple[int, list[str]]:
    """Compute and store the logits of the wanted scans; a file is there whole or not at all, whenever it ends.

    Non-finite points, which a student does not see, get logits of 0: no class is favoured. A warning counts them;
    training leaves such points out.

    Args:
        student: The teacher, in eval mode, on `device`.
        store: Where its logits go, float16 [n, C], one row for each point of the file.
        settings: Of the teacher, see `teacher_settings`; each file also gets the key of its motion window.
        wanted: Frames to compute of each sequence.
        device: Where the ops and the network run.
        advance: Called after each wanted scan.
    Returns: scans computed, and one line for each wanted scan that cannot be read.
    Raises: InputError if logits are not finite in float16, poses are missing, or the disk is full.
    """
    computed, lost = 0, []
    for sequence, frames in wanted:
        if not frames:  # no need to look at it
            continue
        warn_of_incomplete(sequence, student.settings.motion)
        windows, non_finite = window_keys(sequence, student.settings.motion), 0
        for frame, scan in sequence_logits(student, sequence, device, frozenset(sequence.frames) - frames):
            if frame not in frames:
                continue
            if isinstance(scan, ScanLogits):
                logits = np.zeros((len(scan.finite), len(student.classes)), np.float32)
                logits[scan.finite] = scan.logits.cpu().numpy()
                about = {**settings, WINDOW: windows[frame]}
                store.write(sequence.scan(frame), sequence.points_path(frame), logits, about)
                computed += 1
                non_finite += int((~scan.finite).sum())
            else:
                lost.append(f"{sequence.scan(frame)}: {scan}")
            advance()
        if non_finite:
            warnings.warn(f"sequence {sequence.name}: {non_finite} non-finite points got logits of 0", stacklevel=2)
    return computed, lost


# --- the command


def _progress() -> Progress:
    # Only what is done counts, not what was there already: the time left is that of the work left.
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def teach(
    source: Annotated[Path, typer.Argument(help="SemanticKITTI data root, or one sequence folder with velodyne/.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The teacher: .safetensors, the authors' .pt, or rule. Only --verify goes without."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Folder of the teacher below --output; by default the model: kdmos, motionbev.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of all teachers' logits.")] = Path("logits"),
    sequences: Annotated[str | None, typer.Option(help="Names, e.g. 00,01; all by default.")] = None,
    split: Annotated[str | None, typer.Option(help="train, valid or test instead of names.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute nothing: check the file of every scan; exit code 1 if one fails.")
    ] = False,
    lookahead: Annotated[
        int | None, typer.Option(help="Future scans to use, if not what the checkpoint was trained with.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Allow another look-ahead than the trained one.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> int:
    """Cache a teacher's logits for every scan, for `kdmos train distill.logits=... distill.teacher=...`.

    Any student is a teacher. Needs poses.txt and calib.txt in each sequence folder; labels are not looked at. The same
    command goes on where it was interrupted and computes again what is damaged or belongs to another scan. A scan
    that cannot be read is listed and the rest goes on; the exit code is then 1.
    """
    if checkpoint is None and not (verify and name):
        raise InputError("--checkpoint is missing: the teacher (--verify --name NAME alone go without)")
    if name is not None and (not name or name != Path(name).name or name.startswith(".")):
        raise InputError(f"--name '{name}': expected the name of one folder")
    found = asked_sequences(source, sequences, split)
    where = choose_device("cpu" if verify else device)
    student = None
    if checkpoint is not None:
        student = prepared(load_student(checkpoint, where, lookahead=lookahead, force=force))
    settings = None if student is None else teacher_settings(student, checkpoint)
    motion = None if student is None else student.settings.motion
    store = TeacherLogits(output, name or _model(student))
    if not verify:
        refuse_others(store, settings)

    total, folder = sum(len(sequence.frames) for sequence in found), output / store.teacher
    faults: list[tuple[Sequence, int, str]] = []
    with _progress() as progress:
        task = progress.add_task("check", total=total)
        for sequence, frame, fault in check_scans(store, found, settings, motion):
            progress.advance(task)
            if fault is not None:
                faults.append((sequence, frame, fault))
    if verify:
        for _, _, fault in faults:
            print(fault)
        print(f"{total - len(faults)} of {total} scans have sound logits in {folder}; {len(faults)} missing or wrong")
        return 1 if faults else 0

    unfit = [fault for sequence, frame, fault in faults if store.path(sequence.scan(frame)).exists()]
    if unfit:
        warnings.warn(f"{len(unfit)} of the files there do not fit and are computed again: {unfit[0]}", stacklevel=2)
    if len(student.classes) == 2:
        warnings.warn("a teacher of two classes: of the losses, kd and ofa can learn from it", stacklevel=2)
    wanted = [(sequence, frozenset(frame for s, frame, _ in faults if s is sequence)) for sequence in found]
    with _progress() as progress:
        task = progress.add_task("teach", total=len(faults))
        computed, lost = teach_data(student, store, settings, wanted, where, lambda: progress.advance(task))
    print(
        f"{computed} scans computed, {total - len(faults)} were there, in {folder} ({', '.join(student.classes)}; "
        f"{motion.form} motion channels, look-ahead {motion.lookahead} scans)"
    )
    print(f"learn from them: kdmos train ... distill.logits={output} distill.teacher={store.teacher}")
    for line in lost:
        print(f"no logits: {line}", file=sys.stderr)
    if lost:
        print(
            f"the motion channels of up to {motion.history} scans before and after each of them lack its points",
            file=sys.stderr,
        )
    return 1 if lost else 0


def main(argv: list[str] | None = None) -> None:
    run(teach, "teach", argv)


if __name__ == "__main__":
    main()
