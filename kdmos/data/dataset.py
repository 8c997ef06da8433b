"""What training reads: a scan with its motion channels, or a window of scans, and labels; and an order that resumes."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kdmos.data.batch import collate
from kdmos.data.labels import to_classes
from kdmos.data.motion_cache import MotionCache
from kdmos.data.multi_scan import gather_window
from kdmos.data.semantic_kitti import Sequence
from kdmos.data.teacher_logits import TeacherLogits
from kdmos.errors import InputError


class MosDataset(Dataset):
    """Labelled scans of some sequences. Only reads: everything else runs on the step's device.

    Args:
        scans: (sequence, frame) of each item.
        classes: Class names of the model.
        caches: Motion cache of each sequence, by its name.
        teacher: Store of teacher logits, or None.
    Items: dict of `scan`, and numpy `points` float32 [n, 4], `residual` float32 [n, K], `labels` uint8 [n] and,
        with a teacher, `teacher_logits` float16 [n, C]; non-finite points are left out of all.
    Raises: InputError naming the file that cannot be used.
    """

    def __init__(
        self,
        scans: list[tuple[Sequence, int]],
        classes: tuple[str, ...],
        caches: dict[str, MotionCache],
        teacher: TeacherLogits | None = None,
    ) -> None:
        self.scans, self.classes, self.caches, self.teacher = scans, classes, caches, teacher

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> dict:
        sequence, frame = self.scans[index]
        scan, points = sequence.scan(frame), sequence.read_points(frame)
        raw = sequence.read_labels(frame, len(points))
        sample = {
            "points": points,
            "residual": self.caches[sequence.name].read(frame, len(points)),
            "labels": to_classes(raw, self.classes, sequence.labels_path(frame)),
        }
        if self.teacher is not None:
            path = sequence.points_path(frame)
            sample["teacher_logits"] = self.teacher.read(scan, path, len(points), len(self.classes), points)
        finite = np.isfinite(points).all(1)
        if not finite.all():
            sample = {name: column[finite] for name, column in sample.items()}
        return {"scan": scan, **sample}


class WindowDataset(Dataset):
    """Labelled scans of some sequences, each with those before it: what a teacher learns from.

    Args:
        scans: (sequence, frame) of each item.
        classes: Class names of the model.
        num_scans: Scans of a window.
    Items: dict of `scan`, and numpy `points` float32 [n, 4] in the newest scan's frame, its own first, `age` uint8 [n]
        and `labels` uint8 [n]; non-finite points are left out.
    Raises: InputError naming the file that cannot be used.
    """

    def __init__(self, scans: list[tuple[Sequence, int]], classes: tuple[str, ...], num_scans: int) -> None:
        self.scans, self.classes, self.num_scans = scans, classes, num_scans

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> dict:
        sequence, frame = self.scans[index]
        place = sequence.frames.index(frame)
        first = max(0, place + 1 - self.num_scans)
        scans, labels = [], []
        for other in sequence.frames[first : place + 1]:
            points = sequence.read_points(other)
            raw = sequence.read_labels(other, len(points))
            finite = np.isfinite(points).all(1)
            scans.append(torch.from_numpy(points[finite]))
            labels.append(to_classes(raw, self.classes, sequence.labels_path(other))[finite])
        window = gather_window(scans, torch.from_numpy(sequence.poses()[first : place + 1]), self.num_scans)
        return {
            "scan": sequence.scan(frame),
            "points": window.points.float().numpy(),
            "age": window.age.to(torch.uint8).numpy(),
            "labels": np.concatenate([labels[max(0, len(labels) - 1 - age)] for age in range(self.num_scans)]),
        }


class EpochOrder:
    """Batches of indices in an order that is a function of (seed, epoch), split over `world` processes.

    A last, smaller batch is kept. Shuffled (training), every process gets as many scans: the first ones are
    repeated where they do not divide.
    """

    def __init__(self, length: int, batch_size: int, seed: int, shuffle: bool, rank: int = 0, world: int = 1) -> None:
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world, self.epoch = rank, world, 0
        self.resumed = (0, 0)  # in this epoch, so many batches were done before

    @property
    def sampler(self) -> EpochOrder:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _mine(self) -> list[int]:
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
            order = np.resize(order, math.ceil(self.length / self.world) * self.world)
        return order[self.rank :: self.world].tolist()

    def __len__(self) -> int:
        return math.ceil(len(self._mine()) / self.batch_size)

    @property
    def done(self) -> int:
        """Batches of this epoch that come from before the run was resumed."""
        epoch, batches = self.resumed
        return batches if epoch == self.epoch else 0

    def __iter__(self) -> Iterator[list[int]]:
        mine = self._mine()
        return iter([mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)][self.done :])


class ResumableLoader(DataLoader):
    """A loader that, resumed in the middle of an epoch, reads only what is left of it.

    Its state is the epoch and how many batches were handed out; the order itself follows from (seed, epoch).
    """

    def __init__(
        self, dataset: MosDataset | WindowDataset, order: EpochOrder, workers: int, pin_memory: bool = False
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
        )
        self.order, self.handed_out = order, 0

    def __iter__(self) -> Iterator:
        self.handed_out = self.order.done
        try:
            for batch in super().__iter__():
                self.handed_out += 1
                yield batch
        except InputError as error:
            # Frames in the traceback keep the workers alive, and torch waits 5 s for each.
            traceback.clear_frames(error.__traceback__)
            self._iterator = None
            # A worker's message comes wrapped in its own traceback and ends it.
            raise InputError(str(error).rpartition("kdmos.errors.InputError: ")[2].strip()) from None

    def state_dict(self) -> dict:
        return {"epoch": self.order.epoch, "handed_out": self.handed_out}

    def load_state_dict(self, state: dict) -> None:
        self.order.resumed = (state["epoch"], state["handed_out"])


def step_seed(seed: int, epoch: int, batch: int, rank: int = 0) -> int:
    """Seed of the network's randomness (dropout) in one step: a function of its place in the run."""
    return int(np.random.SeedSequence([seed, epoch, batch, rank]).generate_state(1, np.uint64)[0] >> 1)
