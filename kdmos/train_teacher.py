"""Training MambaMOS: the part of `kdmos train` for a config with a key `teacher`."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdmos.config import TeacherConfig
from kdmos.data.augment import apply_transforms, draw_window_transform
from kdmos.data.batch import PackedBatch
from kdmos.data.multi_scan import Window, find_voxels, nearest_share, representatives, voxel_batch
from kdmos.errors import InputError
from kdmos.losses import cross_entropy, lovasz_softmax
from kdmos.models import Teacher, load_teacher
from kdmos.settings import TeacherSettings
from kdmos.train import ModelTraining


def initial_weights(path: Path, settings: TeacherSettings) -> dict[str, Tensor]:
    """The weights of a checkpoint for a teacher with these settings. Raises: InputError naming what does not fit."""
    teacher = load_teacher(path)
    free = {"voxel", "drop_path"}  # what the weights do not depend on
    theirs, ours = ({k: v for k, v in asdict(of).items() if k not in free} for of in (teacher.settings, settings))
    wrong = [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if theirs[name] != ours[name]]
    if wrong:
        raise InputError(f"init={path}: does not fit this run's teacher: {'; '.join(wrong)}")
    return teacher.state_dict()


class TeacherTraining(ModelTraining):
    """MambaMOS with the recipe of its authors: cross-entropy and Lovasz loss over the voxels of all scans."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__(config)
        torch.manual_seed(config.seed)
        self.teacher = Teacher(config.teacher)
        try:
            self.teacher.use_backend(config.backend)
        except ValueError as error:
            raise InputError(str(error)) from error
        if config.init is not None:
            self.teacher.load_state_dict(initial_weights(config.init, config.teacher))

    @property
    def model(self) -> Teacher:
        return self.teacher

    def windows(self, batch: PackedBatch, points: Tensor) -> list[Window]:
        bounds = batch.offsets.tolist()
        return [Window(points[a:b].double(), batch.age[a:b].long()) for a, b in pairwise(bounds)]

    def training_step(self, batch: PackedBatch, batch_index: int) -> Tensor:
        seed, epoch, augment = self.config.seed, self.current_epoch, self.config.augment
        self.begin_step(batch, batch_index)
        # 1) each window as a whole, and each of its points
        transforms = [
            draw_window_transform(seed, epoch, scan, augment.rotate, augment.scale, augment.flip)
            for scan in batch.scans
        ]
        points = apply_transforms(batch.points, batch.offsets, np.stack(transforms))
        jitter = augment.jitter * torch.randn_like(points[:, :3]).clamp(-4, 4)
        points = torch.cat([points[:, :3] + jitter, points[:, 3:]], 1)
        # 2) a point of each voxel, of the voxels around a random one
        samples, labels = [], []
        for start, window in zip(batch.offsets.tolist(), self.windows(batch, points)):
            voxels = find_voxels(window, self.teacher.settings.voxel)
            drawn = representatives(window, voxels, generator=torch.default_generator)
            xyz = window.points[drawn, :3]
            kept = nearest_share(xyz, xyz[int(torch.randint(len(xyz), ()))], augment.keep)
            samples.append((window, voxels.grid[kept], drawn[kept]))
            labels.append(batch.labels[start + drawn[kept]])
        # 3) the labels of all scans teach, not only the newest one's
        logits, labels = self.teacher(voxel_batch(samples)).float(), torch.cat(labels).long()
        terms = {
            "cross_entropy": cross_entropy(logits, labels, self.ignore_index),
            "lovasz": lovasz_softmax(logits, labels, self.ignore_index),
        }
        return self.total(terms, batch, batch_index)

    def validation_step(self, batch: PackedBatch, batch_index: int) -> None:
        for start, window in zip(batch.offsets.tolist(), self.windows(batch, batch.points)):
            newest = int((window.age == 0).sum())
            predicted = self.teacher.window_logits(window).argmax(1)
            truth = batch.labels[start : start + newest]
            labelled = self.labelled(truth)
            self.confusion.update(predicted[labelled], truth[labelled].long())

    def configure_optimizers(self) -> dict:
        setting = self.config.optimizer
        blocks = [parameter for name, parameter in self.teacher.named_parameters() if "block" in name]
        others = [parameter for name, parameter in self.teacher.named_parameters() if "block" not in name]
        rates = [setting.lr, setting.block_factor * setting.lr]
        optimizer = torch.optim.AdamW([{"params": others}, {"params": blocks}], weight_decay=setting.weight_decay)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=rates,
            total_steps=max(2, self.steps_per_epoch() * self.config.epochs),
            pct_start=setting.rise,
            div_factor=1 / setting.start,
            final_div_factor=setting.start / setting.end,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
