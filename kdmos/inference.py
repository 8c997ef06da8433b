"""What `predict` and `teach` share: which sequences, on which device, and a student's logits scan by scan."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdmos.command import listed
from kdmos.data.semantic_kitti import Sequence, find_sequences, split_sequences
from kdmos.errors import InputError
from kdmos.models import SHIPPED, Rule, Student
from kdmos.models.fast import PRECISIONS, FastStudent
from kdmos.motion import MotionStream


class ScanLogits(NamedTuple):
    """Logits of one scan; non-finite points have none.

    finite: bool [n], which points of the file are finite.
    logits: float32 [finite.sum(), C] on the device, one row for each finite point in file order.
    """

    finite: np.ndarray
    logits: torch.Tensor


def prepared(student: Student | Rule, precision: str = "float32") -> FastStudent | Rule:
    """The student as inference runs it. Raises: InputError for an unknown precision."""
    if precision not in PRECISIONS:
        raise InputError(f"--precision {precision}: one of {', '.join(PRECISIONS)}")
    return student if isinstance(student, Rule) else FastStudent(student, precision)


@torch.inference_mode()
def sequence_logits(
    student: Student | FastStudent | Rule,
    sequence: Sequence,
    device: torch.device | str = "cpu",
    skip: frozenset[int] = frozenset(),
) -> Iterator[tuple[int, ScanLogits | InputError | None]]:
    """Logits of a student for the scans of a sequence, in frame order.

    A scan that cannot be read yields its error and counts as empty in the motion windows of the others.

    Args:
        student: In eval mode, on `device`.
        sequence: With poses.
        device: Where the ops and the network run.
        skip: Frames whose answer is not needed; None is yielded for them. They are read where they belong to the
            motion windows of the others, and the error of one that cannot be read is yielded all the same.
    Yields: (frame, logits, error or None), each frame once.
    Raises: InputError if the poses are missing or wrong.
    """
    poses, stream = sequence.poses(), MotionStream(student.settings.motion)
    waiting: deque[tuple[int, torch.Tensor, np.ndarray | InputError]] = deque()

    def answer(residual: torch.Tensor) -> tuple[int, ScanLogits | InputError | None]:
        frame, points, finite = waiting.popleft()
        if isinstance(finite, InputError) or frame in skip:
            return frame, finite if isinstance(finite, InputError) else None
        offsets = torch.tensor([0, len(points)], device=points.device)
        return frame, ScanLogits(finite, student(points, offsets, residual).point_logits.float())

    wanted = [index for index, frame in enumerate(sequence.frames) if frame not in skip]
    # The answers depend on no scan outside start..stop: `history` before the first one, `lookahead` after the last.
    start = max(0, wanted[0] - student.settings.motion.history) if wanted else len(sequence.frames)
    stop = wanted[-1] + student.settings.motion.lookahead + 1 if wanted else len(sequence.frames)
    yield from ((frame, None) for frame in sequence.frames[:start])
    for frame, pose in zip(sequence.frames[start:stop], poses[start:stop]):
        try:
            points = sequence.read_points(frame)
            finite = np.isfinite(points).all(1)
        except InputError as error:
            points, finite = np.zeros((0, 4), np.float32), error
        else:
            points = points if finite.all() else points[finite]
        points = torch.from_numpy(points).to(device)
        waiting.append((frame, points, finite))
        residual = stream.push(points, pose)
        if residual is not None:
            yield answer(residual)
    for residual in stream.flush():
        yield answer(residual)
    yield from ((frame, None) for frame in sequence.frames[stop:])


def asked_sequences(source: str | Path, sequences: str | None = None, split: str | None = None) -> list[Sequence]:
    """The sequences that `--sequences` or `--split` name, all without them; their poses are read and right.

    Args:
        source: SemanticKITTI data root, or one sequence folder.
        sequences: Names, "11,12".
        split: "train", "valid" or "test" instead.
    Raises: InputError if both are given, a sequence is missing, or anything is wrong with its poses.
    """
    if split and sequences:
        raise InputError("--split and --sequences exclude each other")
    found = find_sequences(source, split_sequences(split) if split else listed(sequences, "--sequences"))
    for sequence in found:
        sequence.poses()  # all that can be wrong with them, before the first scan
    return found


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU if torch can use one, else the CPU. Raises: InputError for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from error
    return device


def fingerprint(checkpoint: str | Path) -> str:
    """Hash of a checkpoint file (BLAKE2b, 16 bytes in hex), also of a shipped one; "rule" of the rule."""
    checkpoint = Path(SHIPPED.get(str(checkpoint), checkpoint))
    if not checkpoint.is_file():
        return str(checkpoint)
    return hashlib.blake2b(checkpoint.read_bytes(), digest_size=16).hexdigest()
