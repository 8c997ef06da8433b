"""`kdmos teach`: a teacher's logits for every scan of a data set, cached for `kdmos train` to learn from.

In order: who the teacher is, what the store holds already, the caching, the command.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from kdmos.command import Bar, run
from kdmos.data.semantic_kitti import Sequence
from kdmos.data.teacher_logits import REMEDY, TeacherLogits
from kdmos.errors import InputError
from kdmos.inference import Model, ScanLogits, asked_sequences, choose_device, fingerprint, prepared, sequence_logits
from kdmos.models import Rule, Teacher, load_model
from kdmos.models.teacher import Voting
from kdmos.motion import warn_of_incomplete
from kdmos.precision import precision_of
from kdmos.settings import StudentSettings, TeacherSettings

WINDOW = "window"  # the one entry of a file's settings that is of the scan and not of the teacher
POSE_DIGITS = 6  # metres and entries of the rotation; another machine's linear algebra differs beyond


# --- who the teacher is


def teacher_settings(model: Model, checkpoint: str | Path) -> dict:
    """What identifies a teacher, JSON-able: equal settings give equal logits for equal scans and poses.

    Args:
        model: As loaded, so that a forced look-ahead is in it.
        checkpoint: The file that it was loaded from.
    Returns: `checkpoint` (hash of the file), `model`, `classes`, `moving` and the other settings of the model; of
        MambaMOS `voting` too.
    """
    settings = asdict(model.settings)
    settings["model"] = _model(model)
    del settings["name"]
    if isinstance(model, Teacher):
        settings["voting"] = asdict(model.voting)
    if precision_of(model) != "float32":
        settings["precision"] = precision_of(model)
    return json.loads(json.dumps({"checkpoint": fingerprint(checkpoint), **settings}))  # lists, as read back


def _model(model: Model) -> str:
    return "rule" if isinstance(model, Rule) else model.settings.name


def window_keys(sequence: Sequence, settings: StudentSettings | TeacherSettings) -> dict[int, str]:
    """Hash, for each frame, of what its logits depend on beside the scan: poses and neighbours of its window.

    Of the neighbours, frame number and file size count: a scan that was repaired, or that came later, changes it.
    """
    poses = np.round(sequence.poses(), POSE_DIGITS) + 0.0  # + 0.0: no -0.0
    paths = [sequence.points_path(frame) for frame in sequence.frames]
    sizes = [path.stat().st_size if path.exists() else None for path in paths]  # None: a broken link
    keys = {}
    for index, frame in enumerate(sequence.frames):
        window = slice(max(0, index - settings.history), index + settings.lookahead + 1)
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
    wanted: list[tuple[Sequence, frozenset[int]]],
    settings: dict | None = None,
    window: StudentSettings | TeacherSettings | None = None,
) -> Iterator[tuple[Sequence, int, str | None]]:
    """What is wrong with the stored logits of each scan; the scans are read and hashed, nothing is computed.

    Args:
        store: Logits of one teacher.
        wanted: Frames to look at of each sequence; with poses, if `window` is given.
        settings: The teacher's; None: whatever the first sound file says, the others must agree with it.
        window: Which scans the teacher reads beside its own; None: what they were is not checked.
    Yields: (sequence, frame, fault), None for a sound file of this scan and teacher. A fault begins with the file.
    """
    for sequence, frames in wanted:
        windows = None if window is None else window_keys(sequence, window)
        for frame in sorted(frames):
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


def share_of(sequences: list[Sequence], process: int, processes: int) -> list[tuple[Sequence, frozenset[int]]]:
    """The frames that one of several processes computes: a run of each sequence, whatever is done already.

    No two processes share a frame, and neighbouring scans are read by one process, or two where their runs meet.
    """

    def run(frames: list[int]) -> frozenset[int]:
        bounds = [len(frames) * i // processes for i in (process, process + 1)]
        return frozenset(frames[bounds[0] : bounds[1]])

    return [(sequence, run(list(sequence.frames))) for sequence in sequences]


def teach_data(
    model: Model,
    store: TeacherLogits,
    settings: dict,
    wanted: list[tuple[Sequence, frozenset[int]]],
    device: torch.device | str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> tuple[int, list[str]]:
    """Compute and store the logits of the wanted scans; a file is there whole or not at all, whenever it ends.

    Non-finite points, which a model does not see, get logits of 0: no class is favoured. A warning counts them;
    training leaves such points out.

    Args:
        model: The teacher, in eval mode, on `device`.
        store: Where its logits go, float16 [n, C], one row for each point of the file.
        settings: Of the teacher, see `teacher_settings`; each file also gets the key of its window.
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
        warn_of_incomplete(sequence, model.settings)
        windows, non_finite = window_keys(sequence, model.settings), 0
        for frame, scan in sequence_logits(model, sequence, device, frozenset(sequence.frames) - frames):
            if frame not in frames:
                continue
            if isinstance(scan, ScanLogits):
                logits = np.zeros((len(scan.kept), len(model.classes)), np.float32)
                logits[scan.kept] = scan.logits.cpu().numpy()
                about = {**settings, WINDOW: windows[frame]}
                store.write(sequence.scan(frame), sequence.points_path(frame), logits, about)
                computed += 1
                non_finite += scan.non_finite
            else:
                lost.append(f"{sequence.scan(frame)}: {scan}")
            advance()
        if non_finite:
            warnings.warn(f"sequence {sequence.name}: {non_finite} non-finite points got logits of 0", stacklevel=2)
    return computed, lost


# --- the command


def _process() -> tuple[int, int]:
    """Number of this process, and of how many, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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
    turns: Annotated[int, typer.Option(help="MambaMOS: passes a scan, each with other points.", min=1)] = 1,
    sum_turns: Annotated[
        bool, typer.Option("--sum-turns", help="MambaMOS: add the passes' logits, as its authors do.")
    ] = False,
    newest_points: Annotated[
        bool, typer.Option("--newest-points", help="MambaMOS: voxels by the newest scan's points, not by any scan's.")
    ] = False,
    backend: Annotated[str, typer.Option(help="MambaMOS: auto, native, spconv or mamba.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32, tf32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> int:
    """Cache a teacher's logits for every scan, for `kdmos train distill.logits=... distill.teacher=...`.

    MambaMOS is a teacher, and any student. Needs poses.txt and calib.txt in each sequence folder; labels are not
    looked at. The same command goes on where it was interrupted and computes again what is damaged or belongs to
    another scan. A scan that cannot be read is listed and the rest goes on; the exit code is then 1. Under torchrun
    each process takes its share of the scans, on a GPU of its own where there are some.
    """
    if checkpoint is None and not (verify and name):
        raise InputError("--checkpoint is missing: the teacher (--verify --name NAME alone go without)")
    if name is not None and (not name or name != Path(name).name or name.startswith(".")):
        raise InputError(f"--name '{name}': expected the name of one folder")
    found = asked_sequences(source, sequences, split)
    process, processes = _process()
    if device == "auto" and processes > 1 and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    where = choose_device("cpu" if verify else device)
    model = settings = None
    if checkpoint is not None:
        model = prepared(load_model(checkpoint, where, lookahead=lookahead, force=force), precision)
        voting = Voting(turns, sum_turns, newest_points)
        if isinstance(model, Teacher):
            model.voting = voting
            try:
                model.use_backend(backend)
            except ValueError as error:
                raise InputError(f"--{error}") from error
        elif voting != Voting() or backend != "auto":
            raise InputError(
                f"--turns, --sum-turns, --newest-points, --backend: of MambaMOS, and {checkpoint} is a student"
            )
        settings = teacher_settings(model, checkpoint)
    store = TeacherLogits(output, name or _model(model))
    if not verify:
        refuse_others(store, settings)

    mine = share_of(found, process, processes)
    total, folder = sum(len(frames) for _, frames in mine), output / store.teacher
    faults: list[tuple[Sequence, int, str]] = []
    with Bar("check", total) as bar:
        for sequence, frame, fault in check_scans(store, mine, settings, None if model is None else model.settings):
            bar.advance()
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
    if len(model.classes) == 2:
        warnings.warn("a teacher of two classes: of the losses, kd and ofa can learn from it", stacklevel=2)
    wanted = [(sequence, frozenset(frame for s, frame, _ in faults if s is sequence)) for sequence in found]
    with Bar("teach", len(faults)) as bar:  # what was there already does not count: the time left is that of the rest
        computed, lost = teach_data(model, store, settings, wanted, where, bar.advance)
    print(
        f"{computed} scans computed, {total - len(faults)} were there, in {folder} ({', '.join(model.classes)}; "
        f"{model.settings.reads}, look-ahead {model.settings.lookahead} scans)"
        + (f"; process {process + 1} of {processes}" if processes > 1 else "")
    )
    print(f"learn from them: kdmos train ... distill.logits={output} distill.teacher={store.teacher}")
    for line in lost:
        print(f"no logits: {line}", file=sys.stderr)
    if lost:
        print(
            f"up to {model.settings.history} scans before and after each of them had to do without its points",
            file=sys.stderr,
        )
    return 1 if lost else 0


def main(argv: list[str] | None = None) -> None:
    run(teach, "teach", argv)


if __name__ == "__main__":
    main()
