"""What `predict`, `teach` and the stream share: which sequences and device, and a model's logits scan by scan."""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdmos import ops
from kdmos.command import listed
from kdmos.data.profile import SensorProfile
from kdmos.data.semantic_kitti import Sequence, find_sequences, split_sequences
from kdmos.data.source import ScanSource
from kdmos.errors import InputError
from kdmos.models import SHIPPED, Rule, Student, Teacher
from kdmos.models.fast import FastStudent, GraphedStudent
from kdmos.motion import MotionStream, pose_jump
from kdmos.ops import native
from kdmos.precision import PRECISIONS, usable_precision, uses_tf32


class ScanLogits(NamedTuple):
    """Logits of one scan; points that the model did not get have none.

    kept: bool [n], which points of the scan are finite and within the sensor's range and field of view.
    non_finite: How many are not finite.
    logits: float32 [kept.sum(), C] on the device, one row for each kept point in the scan's order.
    """

    kept: np.ndarray
    non_finite: int
    logits: torch.Tensor


Model = Student | FastStudent | Rule | Teacher


class WayIn:
    """Scans on their way to the device: copied once, looked at in passing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned: torch.Tensor | None = None  # what the GPU copies from, by itself
        self._copied: torch.cuda.Event | None = None  # when it has

    def take(self, points: np.ndarray | torch.Tensor, most: float) -> tuple[torch.Tensor, int, int]:
        """The scan, float32 [n, 4] on the device, points with a non-finite value all NaN; how many these are; and how
        many of the others have a remission below 0 or above `most`."""
        if isinstance(points, torch.Tensor):
            scan = points.detach().to(torch.float32)
        else:
            with np.errstate(over="ignore"):  # what does not fit into float32 is not finite
                scan = np.asarray(points, np.float32)
            whole = all(step >= 0 and step % scan.itemsize == 0 for step in scan.strides)
            if not whole or not scan.flags.writeable:  # torch shares no such array
                scan = scan.copy()
            scan = torch.from_numpy(scan)
        if len(scan) == 0:
            return torch.zeros(0, 4, device=self.device), 0, 0
        if scan.stride(1) != 1:
            scan = scan.contiguous()
        if self.device.type != "cuda" or scan.is_cuda:
            scan = scan.to(self.device)
            out = torch.empty(scan.shape, device=scan.device)
            return out, *ops.copy_scan(scan, out, most).tolist()
        if self._pinned is None or len(self._pinned) < len(scan):
            self._pinned, self._copied = torch.empty(len(scan), 4, pin_memory=True), torch.cuda.Event()
        self._copied.synchronize()  # the scan before has left
        pinned = self._pinned[: len(scan)]
        counts = ops.copy_scan(scan, pinned, most).tolist()
        out = pinned.to(self.device, non_blocking=True)
        self._copied.record(torch.cuda.current_stream(self.device))
        return out, *counts


class WayOut:
    """Labels on their way from the device: one pass from logits to what a result holds."""

    def __init__(self) -> None:
        self._pinned: tuple[torch.Tensor, torch.Tensor] | None = None  # what the GPU writes to, by itself

    def decide(self, logits: torch.Tensor, moving: int, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels and moving probability, uint32 [n] and float32 [n], of logits float32 [n, C]; waits for the device.

        Args:
            moving: The moving class.
            raw: The label of each class.
        """
        size = len(logits)
        if not logits.is_cuda:
            labels, probability = torch.empty(size, dtype=torch.uint32), torch.empty(size)
            ops.label_points(logits, moving, raw.tolist(), labels, probability)
            return labels.numpy(), probability.numpy()
        if self._pinned is None or len(self._pinned[0]) < size:
            made = (torch.empty(size, dtype=dtype, pin_memory=True) for dtype in (torch.uint32, torch.float32))
            self._pinned = tuple(made)
        labels, probability = (tensor[:size] for tensor in self._pinned)
        ops.label_points(logits, moving, raw.tolist(), labels, probability)
        torch.cuda.current_stream(logits.device).synchronize()
        return labels.numpy().copy(), probability.numpy().copy()  # the next scan overwrites them


def prepared(model: Student | Rule | Teacher, precision: str = "float32") -> FastStudent | Rule | Teacher:
    """The model as inference runs it, a student on a GPU as a CUDA graph.

    Raises: InputError for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"--precision {precision}: one of {', '.join(PRECISIONS)}")
    if isinstance(model, Student):
        weight = model.head.weight
        form = GraphedStudent if weight.is_cuda and native.serves(weight) else FastStudent
        return form(model, precision)
    if isinstance(model, Teacher):
        device = model.seg_head.weight.device
        model.dtype, model.tf32 = usable_precision(precision, device), uses_tf32(precision, device)
    return model


Answer = Callable[[], torch.Tensor]  # computes the logits [n, C] of a scan when called; see also `settled`


def settled(model: Model, logits: torch.Tensor) -> torch.Tensor:
    """The last answer's logits, when the device is done with them: made anew if a graph had no room for the scan."""
    return model.settled(logits) if isinstance(model, GraphedStudent) else logits


class StudentScans:
    """Scans one after the other, to a student; what is kept of them is bounded, on their device.

    `push` takes the next one, all of whose values are finite, and returns the answer for the one `lookahead` before it,
    None while there is none; `flush` returns the answers for those that still wait, and begins anew.
    """

    def __init__(self, student: Student | FastStudent | Rule) -> None:
        self.student, self.motion = student, MotionStream(student.settings.motion)
        self.waiting: deque[torch.Tensor] = deque()

    def _answer(self, residual: torch.Tensor) -> Answer:
        points = self.waiting.popleft()

        def logits() -> torch.Tensor:
            # a graph takes one scan as a whole: no offsets need go to the device
            device = "cpu" if isinstance(self.student, GraphedStudent) else points.device
            offsets = torch.tensor([0, len(points)], device=device)
            return self.student(points, offsets, residual).point_logits

        return logits

    def push(self, points: torch.Tensor, pose: np.ndarray) -> Answer | None:
        self.waiting.append(points)
        residual = self.motion.push(points, pose, finite=True)
        return None if residual is None else self._answer(residual)

    def flush(self) -> list[Answer]:
        return [self._answer(residual) for residual in self.motion.flush()]


class TeacherScans:
    """Scans one after the other, to a teacher, which answers at once; as `StudentScans`."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, size = teacher, teacher.settings.num_scans
        self.scans: deque[torch.Tensor] = deque(maxlen=size)
        self.poses: deque[np.ndarray] = deque(maxlen=size)

    def push(self, points: torch.Tensor, pose: np.ndarray) -> Answer:
        self.scans.append(points)
        self.poses.append(pose)
        scans, poses = list(self.scans), torch.from_numpy(np.stack(self.poses))
        return lambda: self.teacher.point_logits(scans, poses)

    def flush(self) -> list[Answer]:
        self.scans.clear()
        self.poses.clear()
        return []


def scans_to(model: Model) -> StudentScans | TeacherScans:
    """A fresh sequence of scans for a model."""
    return TeacherScans(model) if isinstance(model, Teacher) else StudentScans(model)


@torch.inference_mode()
def sequence_logits(
    model: Model,
    sequence: ScanSource,
    device: torch.device | str = "cpu",
    skip: frozenset[int] = frozenset(),
    profile: SensorProfile | None = None,
) -> Iterator[tuple[int, ScanLogits | InputError | None]]:
    """Logits of a model for the scans of a sequence, in frame order.

    A scan that cannot be read yields its error and counts as empty in the windows of the others; one whose window
    the model cannot use yields an error too. Where the poses jump, windows begin anew, with a warning.

    Args:
        model: In eval mode, on `device`.
        sequence: With poses.
        device: Where the ops and the network run.
        skip: Frames whose answer is not needed; None is yielded for them. They are read where they belong to the
            windows of the others, and the error of one that cannot be read is yielded all the same.
        profile: Of the sensor; None: scans are as the model expects them.
    Yields: (frame, logits, error or None), each frame once.
    Raises: InputError if the poses are missing or wrong.
    """
    profile, settings = profile or SensorProfile(), model.settings
    poses = profile.apply_to_pose(sequence.poses())
    stream = scans_to(model)
    waiting: deque[tuple[int, tuple[np.ndarray, int] | InputError]] = deque()

    def answer(logits: Answer) -> tuple[int, ScanLogits | InputError | None]:
        frame, found = waiting.popleft()
        if isinstance(found, InputError):
            return frame, found
        if frame in skip:
            return frame, None
        try:
            found_logits = logits()
            if found_logits.is_cuda:
                torch.cuda.current_stream(found_logits.device).synchronize()
            return frame, ScanLogits(*found, settled(model, found_logits).float())
        except InputError as error:
            return frame, InputError(f"{sequence.where(frame)}: with the scans before it: {error}")

    wanted = [index for index, frame in enumerate(sequence.frames) if frame not in skip]
    # The answers depend on no scan outside start..stop: `history` before the first one, `lookahead` after the last.
    start = max(0, wanted[0] - settings.history) if wanted else len(sequence.frames)
    stop = wanted[-1] + settings.lookahead + 1 if wanted else len(sequence.frames)
    yield from ((frame, None) for frame in sequence.frames[:start])
    before = None
    for frame, pose in zip(sequence.frames[start:stop], poses[start:stop]):
        jump = before and pose_jump(before[1], pose, frame - before[0])
        before = frame, pose
        if jump:
            warnings.warn(f"{sequence.scan(frame)}: {jump}; what came before is not compared with it", stacklevel=2)
            yield from map(answer, stream.flush())
        try:
            scan = sequence.read_points(frame)
        except InputError as error:
            points, found = np.zeros((0, 4), np.float32), error
        else:
            points, kept = profile.apply(scan)
            found = kept, 0 if kept.all() else np.count_nonzero(~np.isfinite(scan).all(1))
        waiting.append((frame, found))
        logits = stream.push(torch.from_numpy(points).to(device), pose)
        if logits is not None:
            yield answer(logits)
    yield from map(answer, stream.flush())
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
