"""Motion channels: what changed in height around each point, over the scans before and after it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kdmos import ops
from kdmos.settings import MotionSettings, ResidualGrid, StudentSettings, TeacherSettings

MAX_STEP = 20.0  # metres from scan to scan: 200 m/s at 10 Hz, 100 m/s at 5 Hz
RUN = 16  # scans whose channels are computed together: enough for the threads of a desktop, 0.1 GB


class MotionStream:
    """Motion channels of a sequence that arrives scan by scan.

    `push` takes a scan and returns the channels that became complete with it; `flush` returns the rest, whose
    missing future channels stay 0. Scans come out in the order they came in. What is kept is bounded: the
    last `history` scans and the `lookahead` unfinished results.

    Source: MotionBEV (RA-L 2023) for the published form; the causal form is ours.
    """

    def __init__(self, settings: MotionSettings | None = None) -> None:
        self.settings = settings or MotionSettings()
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next scan is the first of a sequence."""
        self._window: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.settings.history + 1)
        self._waiting: deque[Tensor] = deque()

    def push(self, points: Tensor, pose: Tensor, finite: bool = False) -> Tensor | None:
        """Take the next scan.

        Args:
            points: float32 [n, >= 3]: x, y, z in metres, LiDAR frame. May be empty (a scan that was lost). A row
                with a non-finite value, be it the remission, takes no part and gets 0.
            pose: [4, 4], world (any fixed frame) from this scan's LiDAR frame.
            finite: Whether all values are known to be finite: on a GPU looking costs some launches.
        Returns: float32 [m, K] of the scan `lookahead` pushes ago, None while there is none.
        """
        points = points if finite else without_non_finite(points)
        self._window.append((points, torch.as_tensor(pose, dtype=torch.float64, device="cpu")))
        self._waiting.append(points.new_zeros(len(points), self.settings.num_channels))
        if self.settings.form == "published":
            self._published()
        else:
            self._causal()
        if len(self._waiting) > self.settings.lookahead:
            return self._waiting.popleft()
        return None

    def flush(self) -> list[Tensor]:
        """The channels of the scans that still wait, and a fresh start."""
        rest = list(self._waiting)
        self.reset()
        return rest

    def _published(self) -> None:
        scans, half = len(self._window), self.settings.num_channels // 2
        if scans < 2 * half:
            return
        lookahead = self.settings.lookahead
        # exactly the scans that wait: the oldest reads its last channel
        windows = {"newer": (half, scans), "older": ((0, half),), "read": (scans - 1 - lookahead, scans)}
        self._residual(**windows, channels=range(lookahead, -1, -1))

    def _causal(self) -> None:
        scans, half = len(self._window), self.settings.num_channels // 2
        older = [(scans - 2 * half - k, scans - half - k) for k in range(self.settings.num_channels)]
        older = tuple(window for window in older if window[0] >= 0)
        if older:
            self._residual(newer=(scans - half, scans), older=older, read=(scans - 1, scans), channels=[0])

    def _residual(self, newer, older, read, channels) -> None:
        """Into the channels of the scans that are read, the last ones that wait."""
        poses = torch.stack([pose for _, pose in self._window])
        transforms = torch.linalg.inv(poses[-1]) @ poses  # into the newest scan's frame
        scans = [points for points, _ in self._window]
        out = list(self._waiting)[read[0] - read[1] :]
        ops.height_residual_into(scans, transforms, self.settings.grid, newer, older, read, out, channels)


def without_non_finite(points: Tensor) -> Tensor:
    """The points, rows with any non-finite value all NaN, which no cell takes."""
    # A finite sum has finite terms: on a CPU the usual scan is not copied. Elsewhere looking would wait for the device.
    if points.device.type == "cpu" and points.sum().isfinite():
        return points
    return points.masked_fill(~points.isfinite().all(1, keepdim=True), torch.nan)


def sequence_channels(scans: Iterable[Tensor], poses: Tensor, settings: MotionSettings) -> Iterator[Tensor]:
    """Motion channels of every scan of a sequence, in order; each scan is taken once, some ahead of its result.

    Args:
        scans: S tensors float32 [n, >= 3], as for `MotionStream`.
        poses: [S, 4, 4].
        settings: Which channels.
    Yields: S of float32 [n, K].
    Raises: what `scans` raises, after the scans that are complete by then.
    """
    num_channels, poses = settings.num_channels, torch.as_tensor(poses, dtype=torch.float64)
    if settings.form != "published":
        stream = MotionStream(settings)
        for points, pose in zip(scans, poses):
            yield stream.push(points, pose)  # a causal scan is complete with itself
        return
    held: list[Tensor] = []  # scans, the K - 1 before the run among them
    waiting: list[Tensor | None] = []  # their channels as far as they are known

    def complete(first: int) -> None:
        """The channels that the held scans give each other; `first` is the frame of held[0]."""
        if len(held) < num_channels:
            return
        windows = torch.stack([poses[f : f + num_channels] for f in range(first, first + len(held) - num_channels + 1)])
        transforms = torch.linalg.inv(windows[:, -1:]) @ windows  # into each window's newest frame
        residual = ops.height_residual_sequence(held, transforms, settings.grid)
        for number, more in enumerate(residual.split([len(scan) for scan in held])):
            # each entry is known from one run at most
            waiting[number] = more if waiting[number] is None else waiting[number].add_(more)

    frame, source, failure = 0, iter(scans), None
    while True:
        try:
            points = without_non_finite(next(source))
        except StopIteration:
            break
        except Exception as error:  # a scan that cannot be read: first what is complete without it
            failure = error
            break
        frame += 1
        held.append(points)
        waiting.append(None)
        if len(held) == num_channels - 1 + RUN:
            complete(frame - len(held))
            done, waiting, held = waiting[:RUN], waiting[RUN:], held[RUN:]
            yield from (_seen_ahead(channels, settings) for channels in done)
    complete(frame - len(held))
    for points, channels in list(zip(held, waiting))[: 1 - num_channels if failure else None]:
        # a sequence shorter than the windows has no channels
        yield points.new_zeros(len(points), num_channels) if channels is None else _seen_ahead(channels, settings)
    if failure:
        raise failure


def _seen_ahead(channels: Tensor, settings: MotionSettings) -> Tensor:
    """Without the channels that need scans beyond the look-ahead."""
    if settings.lookahead < settings.num_channels - 1:
        channels[:, settings.lookahead + 1 :] = 0
    return channels


def motion_channels(
    scans: Sequence[np.ndarray] | Sequence[Tensor],
    poses: np.ndarray | Tensor,
    num_channels: int = 8,
    lookahead: int | None = None,
    form: str = "published",
    grid: ResidualGrid | None = None,
) -> list[np.ndarray] | list[Tensor]:
    """Motion channels of every scan of a sequence.

    Args:
        scans: S arrays or tensors [n, >= 3] = x, y, z in metres, LiDAR frame; non-finite points get 0.
        poses: [S, 4, 4], rigid, one fixed frame from each scan's LiDAR frame.
        num_channels: K, even.
        lookahead: Future scans that may be used, see `MotionSettings`; None: all that the form can use (7 for
            the published form with K = 8).
        form: "published" or "causal".
        grid: The residual grid; None: the published one.
    Returns: S of float32 [n, K], metres; arrays or tensors as `scans`, on the same device.
    Raises: ValueError if the counts or shapes do not fit or a setting is out of range.
    """
    settings = MotionSettings(form, num_channels, lookahead, grid or ResidualGrid())
    if np.shape(poses) != (len(scans), 4, 4):
        raise ValueError(
            f"motion_channels: expected poses [{len(scans)}, 4, 4] for {len(scans)} scans, got {list(np.shape(poses))}"
        )
    tensors = (torch.as_tensor(points, dtype=torch.float32) for points in scans)
    poses = poses if isinstance(poses, Tensor) else torch.from_numpy(np.asarray(poses, dtype=np.float64))
    out = list(sequence_channels(tensors, poses, settings))
    return [done.numpy() for done in out] if len(scans) and isinstance(scans[0], np.ndarray) else out


def warn_of_incomplete(sequence, settings: MotionSettings | StudentSettings | TeacherSettings) -> None:
    """Warn if a sequence lacks frames, or is too short for any scan of it to have all neighbours that are asked for."""
    if sequence.gaps:
        warnings.warn(
            f"sequence {sequence.name} lacks {len(sequence.gaps)} frames; its windows go over the gaps", stacklevel=3
        )
    if len(sequence.frames) <= settings.history + settings.lookahead:
        warnings.warn(
            f"sequence {sequence.name} has {len(sequence.frames)} scans: none has the {settings.history} scans before "
            f"and {settings.lookahead} after it that belong to a whole window",
            stacklevel=3,
        )


def pose_jump(before: np.ndarray, pose: np.ndarray, scans: float = 1.0) -> str | None:
    """What is impossible about the way from one pose to another, None if nothing is.

    Scans on either side of such a jump do not lie in one frame: compared, all that stands would move.

    Args:
        before, pose: [4, 4], LiDAR poses in one fixed frame, metres.
        scans: How many scans apart they are.
    """
    step = float(np.linalg.norm(np.asarray(pose)[:3, 3] - np.asarray(before)[:3, 3]))
    if step <= MAX_STEP * max(scans, 1.0):
        return None
    return f"the pose jumps by {step:.0f} m (possible: {MAX_STEP:g} m from scan to scan)"


def moving_by_rule(residual: Tensor) -> Tensor:
    """The training-free rule: a point moves if at least half of its K channels are non-zero; bool [N]."""
    return (residual != 0).sum(1) * 2 >= residual.shape[1]
