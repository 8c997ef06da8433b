"""Labels for scans as they come from a sensor: `MosStream`, and `BackgroundStream`, which runs one in a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdmos.data.labels import to_raw
from kdmos.data.poses import rigid_fault
from kdmos.data.profile import SensorProfile, differences, load_profile
from kdmos.data.semantic_kitti import MAX_ODD_SHARE, MAX_REMISSION
from kdmos.errors import InputError
from kdmos.inference import Answer, Model, WayIn, WayOut, choose_device, prepared, scans_to, settled
from kdmos.models import SHIPPED, Rule, load_model, said_of_shipped
from kdmos.motion import pose_jump
from kdmos.smoothing import BayesFilter

PERIODS = 20  # intervals between stamps that say what is usual ...
ENOUGH_PERIODS = 5  # ... once there are so many
GAP = 1.5  # usual intervals; a longer one means that scans are missing
# Late scans in a row, with stamps that ascend, after which not they are wrong but the stamp that they are late to: the
# clock was set back, or one stamp lay far in the future. A network that mixes up scans does not delay so many.
CLOCK_SET = 5


@dataclass(frozen=True)
class Result:
    """What the model says of one scan, one row per point in the order they came in.

    scan_id: Number of the scan, from 0; counts every `push`, and what was skipped, since the last `reset`.
    stamp: As it was given, seconds.
    late_by: Scans that came after it before it was answered.
    labels: uint32 [n], raw SemanticKITTI ids: 251 moving, 9 everything else (250 movable, with `classes=4`).
    moving_probability: float32 [n]; 0 for points that were not used.
    pose: float64 [4, 4], of the LiDAR in the fixed frame: as it was given, or from odometry; None if there is none.
    notes: What was wrong with the scan or how it came, one sentence each.
    seconds: Where the time went, by stage, if the stream is `timed`.
    """

    scan_id: int
    stamp: float | None
    late_by: int
    labels: np.ndarray
    moving_probability: np.ndarray
    pose: np.ndarray | None
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] | None = None


@dataclass
class _Waiting:
    """A scan on its way through; its answer is there once its look-ahead is."""

    scan_id: int
    stamp: float | None
    pose: np.ndarray | None = None
    size: int = 0  # n, its points
    points: Tensor | None = None  # [m, 4], those that are used; empty if none can be
    used: np.ndarray | None = None  # bool [n]; None: all
    answer: Answer | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def drop_points(self) -> None:
        self.points, self.used = self.points[:0], np.zeros(self.size, bool)


class MosStream:
    """Labels of scans that arrive one by one: the same as `kdmos predict` writes for the sequence and its poses.

    What is kept is bounded: the window and the scans that still wait for their look-ahead, on the device. Bad input
    never ends it: a scan that cannot be used is answered with 9 and a note, and counts as empty in the windows of the
    others. Not thread-safe by itself, see `BackgroundStream`.

    Args:
        checkpoint: A file or name as for `load_model`, or a model in eval mode; "synthetic-now" answers each scan at
            once, "synthetic" waits for seven more and finds more. `about` says which it is and why one would take it.
        device: "auto", "cpu", "cuda" ...; where window and network are. A model given as such stays where it is.
        precision: "float32", "tf32", "bfloat16" or "float16", see `kdmos.precision`.
        lookahead, form: What the caller counts on; refused unless the checkpoint was trained so.
        classes: 2 gives 9 and 251; 4 also 250 for movable.
        smoothing: Scans over which the moving probability is fused, see `BayesFilter`; 0: not at all.
        sensor: How the LiDAR differs from the one that the student knows: a profile, or the YAML of one. Points out of
            its range or field of view are labelled 9.
        timed: Measure the stages, waiting for the device after each.
    Raises: InputError for a checkpoint, device, precision, look-ahead or form that does not fit.
    """

    def __init__(
        self,
        checkpoint: str | Path | Model = "synthetic-now",
        device: str | torch.device = "auto",
        precision: str = "float32",
        lookahead: int | None = None,
        form: str | None = None,
        classes: int = 2,
        smoothing: int = 0,
        sensor: SensorProfile | str | Path | None = None,
        timed: bool = False,
    ) -> None:
        if isinstance(checkpoint, torch.nn.Module):
            self.model, checkpoint = prepared(checkpoint, precision), type(checkpoint).__name__
        else:
            self.model = prepared(load_model(checkpoint, choose_device(str(device)), lookahead), precision)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.device = tensors[0].device if tensors else choose_device(str(device))
        settings = self.model.settings
        waits = f"answers after {settings.lookahead} more scans" if settings.lookahead else "answers each scan at once"
        self.about = said_of_shipped(str(checkpoint)) if str(checkpoint) in SHIPPED else f"{checkpoint}: {waits}"
        trained = getattr(getattr(settings, "motion", None), "form", None)
        for name, asked, is_so in (("look-ahead", lookahead, settings.lookahead), ("form", form, trained)):
            if asked is not None and asked != is_so:
                raise InputError(f"{checkpoint}: was trained with {name} {is_so}, not {asked}")
        class_indices = np.arange(len(self.model.classes))
        # the label of each class, and of none
        self._raw = to_raw(class_indices, self.model.classes, classes, self.model.moving)
        self._unused = to_raw(np.array([-1]), self.model.classes, classes, self.model.moving)
        self.classes, self.timed = classes, timed
        self._way_in, self._way_out = WayIn(self.device), WayOut()
        self.smoothing = BayesFilter(smoothing) if smoothing else None
        self.profile = sensor if sensor is None or isinstance(sensor, SensorProfile) else load_profile(sensor)
        self.reset()

    @property
    def lookahead(self) -> int:
        """Scans after its own that a result waits for."""
        return self.model.settings.lookahead

    def reset(self) -> None:
        """Forget everything: the next scan is the first one. What still waits is dropped; `flush` answers it."""
        self._scans = scans_to(self.model)
        self._waiting: deque[_Waiting] = deque()
        self._count = self._skipped = 0
        self._stamp: float | None = None  # of the newest scan that has one
        self._late: list[float] = []  # stamps of the late scans since then, as far as they ascend
        self._periods: deque[float] = deque(maxlen=PERIODS)
        self._pose: np.ndarray | None = None  # of the newest scan that has one ...
        self._elapsed = 0.0  # ... and how many scans ago, by the stamps, that was
        self._has_poses: bool | None = None  # whether scans come with poses; None before the first one
        self._odometry = None
        self._compared = isinstance(self.model, Rule)  # which was trained on nothing
        if self.smoothing:
            self.smoothing.reset()

    @torch.inference_mode()
    def push(
        self, points: np.ndarray | Tensor, pose: np.ndarray | Tensor | None = None, stamp: float | None = None
    ) -> Result | None:
        """Take the next scan; its data is copied.

        Args:
            points: float [n, 4] = x, y, z (metres, LiDAR frame), remission (0..1).
            pose: [4, 4] or its upper [3, 4], rigid: any fixed frame from this scan's LiDAR frame. If the first scan
                comes without, poses are those of odometry; else a scan without one cannot be used.
            stamp: Seconds. A scan that is not later than the one before it takes no part and is answered at once; the
                fifth such scan in a row whose stamps ascend says that the clock was set back.
        Returns: The result of the scan `lookahead` scans ago, None while there is none.
        Raises: InputError if odometry is needed and kiss-icp is missing; TypeError or ValueError for what is no array
            of numbers. Nothing else.
        """
        new = _Waiting(self._count, None if stamp is None else float(stamp))
        self._count += 1
        if self._skipped:
            new.notes.append(f"{self._skipped} scans before it were skipped")
            self._skipped = 0
        with self._stage("input", new):
            new.size, new.points, new.used = self._read(points, new.notes)
        if self._is_late(new):  # in no window: it would stand where another time is meant
            new.drop_points()
            return self._result(new)
        with self._stage("odometry", new):
            new.pose = self._read_pose(pose, points, new)
        if new.pose is None:
            new.drop_points()
        else:
            jump = self._pose is not None and pose_jump(self._pose, new.pose, self._elapsed)
            if jump:
                new.notes.append(f"{jump}; what came before is not compared with it")
                self._complete(self._scans.flush())
            self._pose, self._elapsed = new.pose, 0.0
        if not self._compared and len(new.points):
            self._compare(new)
        self._waiting.append(new)
        with self._stage("residual", new):
            answer = self._scans.push(new.points, np.eye(4) if self._pose is None else self._of_points(self._pose))
        if answer is not None:
            self._complete([answer])
        return self._result(self._waiting.popleft()) if self._waiting[0].answer else None

    @torch.inference_mode()
    def flush(self) -> list[Result]:
        """The results of the scans that still wait, with what is known by now, and a fresh start (`reset`)."""
        self._complete(self._scans.flush())
        results = [self._result(self._waiting.popleft()) for _ in range(len(self._waiting))]
        self.reset()
        return results

    def skip(self, scans: int = 1) -> None:
        """Scans that will not come, right before the next one, whose result says so."""
        self._count += scans
        self._elapsed += scans
        self._skipped += scans

    # --- a scan comes in

    def _read(self, points: np.ndarray | Tensor, notes: list[str]) -> tuple[int, Tensor, np.ndarray | None]:
        """How many points there are, those that can be used, copied to the device, and which these are, if not all.

        What is wrong with the rest is noted.
        """
        shape = tuple(np.shape(points))
        size = shape[0] if shape else 0
        nothing = size, torch.zeros(0, 4, device=self.device), np.zeros(size, bool)
        if len(shape) != 2 or shape[1] != 4:
            notes.append(f"expected points [n, 4] = x, y, z, remission, got {list(shape)}: it is left out")
            return nothing
        kept = None
        if self.profile is not None:
            points, kept = self.profile.apply(points.numpy(force=True) if isinstance(points, Tensor) else points)
        scan, num_bad, num_odd = self._way_in.take(points, MAX_REMISSION)
        num_kept = len(scan) - num_bad
        if num_kept == 0:
            what = f"none of its {size} points can be used" if size else "the scan is empty"
            notes.append(f"{what}: it is left out")
            return nothing
        if num_bad:
            finite = scan[:, 0].isfinite()
            scan, finite = scan[finite], finite.cpu().numpy()
            if kept is None:
                kept = finite
            else:
                kept[kept] = finite
        if num_odd > MAX_ODD_SHARE * num_kept:
            low, high = (float(bound(scan[:, 3])) for bound in (torch.min, torch.max))
            advice = "remission_scale in a sensor's profile (sensor=)"
            notes.append(
                f"the 4th column runs from {low:g} to {high:g}, expected remission, 0..1 ({advice}): it is left out"
            )
            return nothing
        if num_bad and self.profile is None:
            notes.append(f"{num_bad} of its {size} points are not finite and are labelled 9")
        return size, scan, None if num_kept == size else kept

    def _compare(self, first: _Waiting) -> None:
        """Note what of the first scan lies far outside what the model was trained on."""
        found = differences(
            first.points.cpu().numpy(), self.model.header.get("sensor"), self.profile or SensorProfile()
        )
        if found:
            first.notes.append(f"other than what the model was trained on: {'; '.join(found)}")
        self._compared = True

    def _is_late(self, new: _Waiting) -> bool:
        """Whether the scan is not later than the one before it. Otherwise its stamp counts, and a gap is noted."""
        usual = float(np.median(self._periods)) if len(self._periods) >= ENOUGH_PERIODS else None
        elapsed = 1.0
        if new.stamp is not None and not np.isfinite(new.stamp):
            new.notes.append(f"the stamp {new.stamp} is taken as unknown")
            new.stamp = None
        if new.stamp is not None and self._stamp is not None:
            period = new.stamp - self._stamp
            if period <= 0 and not self._clock_was_set(new.stamp):
                how = "repeats that of the scan before it" if period == 0 else f"is {-period:.3f} s before the last one"
                new.notes.append(f"the stamp {new.stamp:.3f} s {how}: the scan takes no part")
                return True
            if period <= 0:
                new.notes.append(f"the clock seems to have been set back by {-period:.3f} s: stamps count from here")
                elapsed = CLOCK_SET
            else:
                if usual is not None and period > GAP * usual:
                    elapsed = period / usual
                    new.notes.append(f"{period:.3f} s since the scan before it, where {usual:.3f} s are usual")
                self._periods.append(period)
            self._late.clear()
        self._stamp = self._stamp if new.stamp is None else new.stamp
        self._elapsed += elapsed
        return False

    def _clock_was_set(self, stamp: float) -> bool:
        """Whether this late scan is the one of many that ascend."""
        if self._late and stamp <= self._late[-1]:
            self._late.clear()
        self._late.append(stamp)
        return len(self._late) == CLOCK_SET

    def _read_pose(
        self, pose: np.ndarray | Tensor | None, points: np.ndarray | Tensor, new: _Waiting
    ) -> np.ndarray | None:
        """The scan's pose as it was given or from odometry; None, with a note, for a scan that cannot be used."""
        if self._has_poses is None:
            self._has_poses = pose is not None
        if not self._has_poses:
            if pose is not None:
                new.notes.append("its pose is not used, because the scans before it came without")
            return self._odometry_pose(points, new) if len(new.points) else None
        if pose is None:
            new.notes.append("it has no pose: it is left out")
            return None
        pose = np.asarray(pose.numpy(force=True) if isinstance(pose, Tensor) else pose, np.float64)
        fault = rigid_fault(pose)
        if fault:
            new.notes.append(f"its pose {fault}: it is left out")
            return None
        whole = np.eye(4)
        whole[: len(pose)] = pose
        return whole

    def _odometry_pose(self, points: np.ndarray | Tensor, new: _Waiting) -> np.ndarray:
        if self._odometry is None:
            from kdmos.odometry import Odometry

            self._odometry = Odometry()
        points = points.numpy(force=True) if isinstance(points, Tensor) else points
        return self._odometry.push(points if new.used is None else points[new.used], new.stamp)

    def _of_points(self, pose: np.ndarray) -> np.ndarray:
        """The pose of the points as the network gets them."""
        return pose if self.profile is None else self.profile.apply_to_pose(pose)

    # --- a result goes out

    def _complete(self, answers: list[Answer]) -> None:
        """Give the oldest scans without an answer theirs."""
        for waiting, answer in zip((waiting for waiting in self._waiting if waiting.answer is None), answers):
            waiting.answer = answer

    def _result(self, scan: _Waiting) -> Result:
        labels, probability = self._unused.repeat(scan.size), np.zeros(scan.size, np.float32)
        if len(scan.points):
            try:
                with self._stage("network", scan):
                    logits = scan.answer().float()
                with self._stage("labels", scan):
                    found = self._decide(logits, scan)
                    if scan.used is None:
                        labels, probability = found
                    else:
                        labels[scan.used], probability[scan.used] = found
            except InputError as error:  # a window that a teacher cannot take
                scan.notes.append(f"with the scans before it: {error}")
        return Result(
            scan.scan_id,
            scan.stamp,
            self._count - 1 - scan.scan_id,
            labels,
            probability,
            scan.pose,
            tuple(scan.notes),
            scan.seconds if self.timed else None,
        )

    def _decide(self, logits: Tensor, scan: _Waiting) -> tuple[np.ndarray, np.ndarray]:
        """Label and moving probability of each point, uint32 [m] and float32 [m]."""
        moving = self.model.moving
        found = self._way_out.decide(logits, moving, self._raw)
        whole = settled(self.model, logits)
        if whole is not logits:  # which had no room in the graph
            logits = whole
            found = self._way_out.decide(logits, moving, self._raw)
        if not self.smoothing:
            return found
        probability = torch.as_tensor(found[1], device=self.device)
        fused = self.smoothing.update(scan.points, self._of_points(scan.pose), probability)
        logits[:, moving] = -torch.inf  # the likeliest of the others, where it does not move
        classes = torch.where(fused > 0.5, moving, logits.argmax(1))
        return self._raw[classes.cpu().numpy()], fused.cpu().numpy()

    @contextmanager
    def _stage(self, name: str, scan: _Waiting):
        if not self.timed:
            yield
            return
        start = self._now()
        yield
        scan.seconds[name] = self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class BackgroundStream:
    """A stream in a thread of its own: scans are given in one thread, results are taken in another.

    ::

        stream = BackgroundStream(MosStream("student.safetensors"))
        stream.put(points, pose, stamp)    # in the sensor's thread; `close` after the last one
        for result in stream.results():    # in another one
            ...

    Args:
        stream: Belongs to this object from now on.
        waiting: Scans that may wait to be taken up.
        drop: If as many wait already, the oldest of them is skipped, as a robot wants it. False: `put` waits instead,
            as one wants it for a recording.
    """

    RESULTS = 64  # that wait to be taken; then scans wait, or are skipped

    def __init__(self, stream: MosStream, waiting: int = 2, drop: bool = True) -> None:
        if waiting < 1:
            raise ValueError(f"BackgroundStream: at least one scan must be able to wait, got {waiting}")
        self.stream, self.waiting, self.drop = stream, waiting, drop
        self._scans: deque[tuple] = deque()
        self._skipped, self._closed = 0, False
        self._changed = threading.Condition()
        self._results: queue.Queue = queue.Queue(self.RESULTS)
        threading.Thread(target=self._run, name="kdmos stream", daemon=True).start()

    def put(
        self, points: np.ndarray | Tensor, pose: np.ndarray | Tensor | None = None, stamp: float | None = None
    ) -> None:
        """Give the next scan, see `MosStream.push`; its data is copied.

        Raises: RuntimeError after `close`, or if the thread has ended with an error.
        """
        scan = points.clone() if isinstance(points, Tensor) else np.array(points), pose, stamp
        with self._changed:
            while not self.drop and len(self._scans) >= self.waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                raise RuntimeError("BackgroundStream: closed, takes no more scans")
            if len(self._scans) >= self.waiting:
                self._scans.popleft()
                self._skipped += 1
            self._scans.append(scan)
            self._changed.notify_all()

    def results(self) -> Iterator[Result]:
        """Results in the order of their scans, until the stream is closed and all scans are answered.

        Raises: what ended the stream's thread.
        """
        while isinstance(result := self._results.get(), Result):
            yield result
        self._results.put(result)  # the end is the end for whoever asks again, too
        if result is not None:
            raise result

    def close(self) -> None:
        """No more scans. What was given is answered still."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _next(self) -> tuple | None:
        """The oldest scan that waits, None after the last one."""
        with self._changed:
            while not self._scans and not self._closed:
                self._changed.wait()
            if self._skipped:
                self.stream.skip(self._skipped)
                self._skipped = 0
            scan = self._scans.popleft() if self._scans else None
            self._changed.notify_all()
            return scan

    def _run(self) -> None:
        try:
            while (scan := self._next()) is not None:
                result = self.stream.push(*scan)
                if result is not None:
                    self._results.put(result)
            for result in self.stream.flush():
                self._results.put(result)
            self._results.put(None)
        except Exception as error:
            self.close()
            self._results.put(error)
