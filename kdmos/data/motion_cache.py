"""Motion channels of whole sequences on disk: computed once, so that training may read scans in any order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open

from kdmos.checkpoint import write_atomic
from kdmos.data.semantic_kitti import Sequence
from kdmos.errors import InputError
from kdmos.motion import sequence_channels
from kdmos.settings import MotionSettings

FORMAT = 1  # of the files; part of the key


def default_cache() -> Path:
    """Folder of the motion caches when no other is named."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kdmos" / "motion"


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors.values():
        digest.update(np.ascontiguousarray(tensor))
    return digest.hexdigest()


class MotionCache:
    """All K channels of every scan of one sequence; `lookahead` only masks them on reading.

    About 2 % of the entries are not 0, so a scan stores the points that have one, a bit per channel, and the
    values. The folder's name ends in a hash of form, K, residual grid, poses and the scan files' names, sizes
    and times: anything that changes the channels is another folder, and a stale one is never read.
    """

    def __init__(self, root: str | Path | None, sequence: Sequence, settings: MotionSettings) -> None:
        self.sequence, self.settings = sequence, settings
        full = MotionSettings(settings.form, settings.num_channels, None, settings.grid)
        self._full = full
        key = hashlib.blake2b(repr((FORMAT, sorted(asdict(full).items()))).encode(), digest_size=8)
        key.update(sequence.poses().tobytes())
        for frame in sequence.frames:
            path = sequence.points_path(frame)
            stat = path.stat()
            key.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        self.folder = Path(root or default_cache()) / f"{sequence.name}-{full.form}-{key.hexdigest()}"

    def path(self, frame: int) -> Path:
        return self.folder / f"{frame:06d}.safetensors"

    def missing(self) -> list[int]:
        """Frames that are not there yet."""
        there = {entry.name for entry in os.scandir(self.folder)} if self.folder.is_dir() else set()
        return [frame for frame in self.sequence.frames if self.path(frame).name not in there]

    def build(self, progress: Callable[[int, int], None] | None = None, device: str | torch.device = "cpu") -> None:
        """Compute what is missing; what an interrupted build has written stays.

        Args:
            progress: Called with (frames done, frames to do).
            device: Where the op runs.
        Raises: InputError naming a scan that cannot be read or a disk that is full.
        """
        missing = self.missing()
        if not missing:
            return
        frames, poses = self.sequence.frames, self.sequence.poses()
        # Channels of a scan depend on `history` scans before it and, in the published form, as many after it.
        start = max(0, frames.index(missing[0]) - self._full.history)
        stop = min(len(frames), frames.index(missing[-1]) + self._full.history + 1)
        wanted, done = set(missing), 0
        scans = (torch.from_numpy(self.sequence.read_points(frame)).to(device) for frame in frames[start:stop])
        for frame, channels in zip(frames[start:stop], sequence_channels(scans, poses[start:stop], self._full)):
            if frame in wanted:
                self._write(frame, channels.cpu().numpy())
                done += 1
                if progress:
                    progress(done, len(missing))

    def _write(self, frame: int, channels: np.ndarray) -> None:
        point = np.flatnonzero(channels.any(1)).astype(np.int32)
        used = channels[point] != 0
        tensors = {"point": point, "channel": np.packbits(used, axis=1), "value": channels[point][used]}
        header = {"num_points": str(len(channels)), "checksum": _checksum(tensors)}
        write_atomic(self.path(frame), safetensors.numpy.save(tensors, header), durable=False)

    def read(self, frame: int, num_points: int) -> np.ndarray:
        """Channels of a scan, float32 [num_points, K]; those above the look-ahead are 0.

        Raises: InputError if the file is missing, damaged or of another length.
        """
        path, num_channels = self.path(frame), self.settings.num_channels
        try:
            with safe_open(path, framework="np") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("point", "channel", "value")}
            if header.get("checksum") != _checksum(tensors):
                raise ValueError("its content does not match its checksum")
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{path}: damaged motion cache ({error}); delete {path.parent}, it is remade") from error
        if header["num_points"] != str(num_points):
            raise InputError(
                f"{path}: motion cache of {header['num_points']} points, the scan has {num_points}; "
                f"delete {path.parent}, it is remade"
            )
        point, channel, value = tensors.values()
        block = np.zeros((len(point), num_channels), np.float32)
        block[np.unpackbits(channel, axis=1, count=num_channels).astype(bool)] = value
        if self.settings.form == "published":
            block[:, self.settings.lookahead + 1 :] = 0
        channels = np.zeros((num_points, num_channels), np.float32)
        channels[point] = block
        return channels
