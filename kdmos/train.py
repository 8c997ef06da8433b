"""`kdmos train`: a student on labelled sequences, alone or under a teacher; or a teacher (its part: `train_teacher`).

In order: the data, the model and its losses, what is kept, the run.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from kdmos import __version__, metrics, ops
from kdmos.card import write_card
from kdmos.checkpoint import code_commit, write_atomic
from kdmos.command import fail, run
from kdmos.config import Config, RunConfig, TeacherConfig, dump_config, load_config
from kdmos.data.augment import (
    add_false_motion,
    apply_transforms,
    change_remission,
    draw_false_motion,
    draw_remission,
    draw_sector,
    draw_transform,
    mix_sectors,
)
from kdmos.data.batch import PackedBatch
from kdmos.data.dataset import EpochOrder, MosDataset, ResumableLoader, WindowDataset, step_seed
from kdmos.data.labels import IGNORE
from kdmos.data.motion_cache import MotionCache
from kdmos.data.semantic_kitti import Sequence, drop_static_scans, find_sequences, split_sequences
from kdmos.data.teacher_logits import TeacherLogits
from kdmos.errors import InputError
from kdmos.losses import DISTILLATION, cross_entropy, lovasz_softmax
from kdmos.models import Student, StudentOutput, Teacher, load_student, save_model
from kdmos.motion import moving_by_rule, warn_of_incomplete
from kdmos.precision import TF32, products
from kdmos.settings import STUDENTS, StudentSettings

try:
    import lightning as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Callback, LearningRateMonitor, TQDMProgressBar
    from lightning.pytorch.loggers import TensorBoardLogger
    from torchmetrics.classification import MulticlassConfusionMatrix
except ModuleNotFoundError as error:
    fail("train", f"{error.name} is not installed, and training needs it: pip install 'kdmos[train]'")

ADAM_BETA = 0.99  # second beta: runs of some thousand steps are short for the usual 0.999
STATE, BEST, LAST = "state.ckpt", "best.safetensors", "last.safetensors"

# --- the data


def find_training_sequences(config: RunConfig) -> tuple[list[Sequence], list[Sequence]]:
    """Sequences to train and to validate on, as `config.data` asks for them."""
    data = config.data
    wanted = {"train": data.train, "valid": data.valid}
    if not (data.root / "velodyne").is_dir():  # not one bare sequence folder, which is its own split
        wanted = {split: names or split_sequences(split, data.kitti_road) for split, names in wanted.items()}
    try:
        train, valid = (find_sequences(data.root, names) for names in wanted.values())
    except InputError as error:
        if data.train and data.valid:
            raise
        raise InputError(f"{error}; for sequences of your own set data.train=[...] and data.valid=[...]") from error
    both = {s.name for s in train} & {s.name for s in valid}
    if both:
        warnings.warn(
            f"validating on training sequences ({', '.join(sorted(both))}): no measure of anything new", stacklevel=2
        )
    for sequence in {s.name: s for s in (*train, *valid)}.values():
        if not sequence.has_labels:
            raise InputError(f"{sequence.folder / 'labels'}: sequence {sequence.name} has no labels to learn from")
        missing = [frame for frame in sequence.frames if not sequence.labels_path(frame).exists()]
        if missing:
            raise InputError(
                f"{sequence.labels_path(missing[0])}: missing, and so are {len(missing) - 1} more label files of "
                f"sequence {sequence.name}; training needs one for every scan"
            )
        warn_of_incomplete(sequence, config.model)
    return train, valid


def _check_classes(teacher: TeacherLogits, classes: tuple[str, ...]) -> None:
    """Logits in another order of classes would teach the wrong ones; a store made by hand may not say its order."""
    path, header = next(teacher.headers(), (None, {}))
    settings = header.get("settings")
    theirs = settings.get("classes") if isinstance(settings, dict) else None
    if theirs is not None and list(theirs) != list(classes):
        raise InputError(
            f"{path}: the teacher's classes are {', '.join(map(str, theirs))}, the student's {', '.join(classes)}; "
            "they must be the same in the same order"
        )


class MosData(L.LightningDataModule):
    """Reads what `config.data` names; builds the motion caches first, which a student's run needs."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.train_sequences, self.valid_sequences = find_training_sequences(config)
        sequences = {s.name: s for s in (*self.train_sequences, *self.valid_sequences)}
        self.caches = {}
        if isinstance(config, Config):
            motion = config.student.motion
            self.caches = {name: MotionCache(config.data.cache, s, motion) for name, s in sequences.items()}
        self.scan_list = config.output / "train_scans.txt"

    def prepare_data(self) -> None:
        """On one process: the motion caches, and the list of scans that are kept."""
        for name, cache in self.caches.items():
            cache.build(_counter(f"motion channels of {name}"), self.trainer.strategy.root_device)
        if self.config.data.drop_static_scans is True and not self.scan_list.exists():
            counter = _counter("scans with moving points")
            kept = [s.scan(f) for s in self.train_sequences for f in drop_static_scans(s, progress=counter)]
            lines = [f"{scan.sequence} {scan.frame:06d}\n" for scan in kept]
            write_atomic(self.scan_list, "".join(lines).encode())

    def setup(self, stage: str) -> None:
        drop = self.config.data.drop_static_scans
        listed = self.scan_list if drop is True else drop or None
        frames = {s.name: drop_static_scans(s, listed) if listed else s.frames for s in self.train_sequences}
        train = [(s, f) for s in self.train_sequences for f in frames[s.name]]
        valid = [(s, f) for s in self.valid_sequences for f in s.frames]
        if len(valid) < self.trainer.world_size:
            raise InputError(f"devices: {self.trainer.world_size} processes for {len(valid)} validation scans")
        model = self.config.model
        if isinstance(self.config, TeacherConfig):
            self.train_set, self.valid_set = (
                WindowDataset(scans, model.classes, model.num_scans) for scans in (train, valid)
            )
            return
        self.train_set = MosDataset(train, model.classes, self.caches, self._teacher_of(train))
        self.valid_set = MosDataset(valid, model.classes, self.caches)

    def _teacher_of(self, train: list[tuple[Sequence, int]]) -> TeacherLogits | None:
        """The store of the teacher's logits, which has them for all training scans."""
        distill = self.config.distill
        if distill is None:
            return None
        teacher = TeacherLogits(distill.logits, distill.teacher)
        missing = [scan for s, f in train if not teacher.path(scan := s.scan(f)).exists()]
        if missing:
            raise InputError(
                f"{teacher.path(missing[0])}: no logits of teacher '{distill.teacher}' for {len(missing)} of "
                f"{len(train)} training scans; cache them: kdmos teach {self.config.data.root} --checkpoint FILE "
                f"--output {distill.logits} --name {distill.teacher} (or train with distill=null)"
            )
        _check_classes(teacher, self.config.student.classes)
        return teacher

    def order(self, dataset: MosDataset | WindowDataset, shuffle: bool) -> EpochOrder:
        """The batches of this process."""
        size = self.config.batch_size if shuffle else 1
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return EpochOrder(len(dataset), size, self.config.seed, shuffle, rank, world)

    def _loader(self, dataset: MosDataset | WindowDataset, shuffle: bool) -> ResumableLoader:
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return ResumableLoader(dataset, self.order(dataset, shuffle), self.config.data.workers, pin_memory=on_gpu)

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(self.valid_set, shuffle=False)


# --- the model and its losses


def initial_weights(path: Path, settings: StudentSettings) -> dict[str, Tensor]:
    """The weights of a checkpoint for a student with these settings.

    Its polar grid may have other rings and sectors, and its motion channels another look-ahead: train coarse first.
    Raises: InputError naming all that does not fit.
    """
    student = load_student(path)
    if not isinstance(student, Student):
        raise InputError(f"init={path}: the rule has no weights to start from")

    def facts(of: StudentSettings) -> dict:
        numbers = {"K": of.motion.num_channels, "height bins": of.grid.bins[2]}
        return {"classes": list(of.classes), "moving class": of.moving, **numbers, "upsampler": STUDENTS[of.name]}

    theirs, ours = facts(student.settings), facts(settings)
    wrong = [f"{what} {theirs[what]} instead of {ours[what]}" for what in ours if theirs[what] != ours[what]]
    if wrong:
        raise InputError(f"init={path}: does not fit this run's student: {'; '.join(wrong)}")
    return student.state_dict()


class ModelTraining(L.LightningModule):
    """What the training of a student and of a teacher have in common.

    The randomness of a step follows from (seed, epoch, batch, process) alone, that of the data from
    (seed, epoch, scan): a resumed run repeats what the uninterrupted one would have drawn.
    """

    model: Student | Teacher  # what is trained; each subclass says where it keeps it

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        classes = config.model.classes
        # A model without an unlabeled class has no class to ignore; its unlabeled points carry 255.
        self.ignore_index = classes.index("unlabeled") if "unlabeled" in classes else -100
        self.confusion = MulticlassConfusionMatrix(len(classes))
        # Lowest and highest x, y, z and remission seen: the checkpoint says what sensor it knows.
        self.register_buffer("seen", torch.tensor([[np.inf], [-np.inf]]).repeat(1, 4))

    def words(self, value: dict[str, float]) -> str:
        """What an epoch's line says beside its scores, given all logged values."""
        return self.model.settings.reads

    def begin_step(self, batch: PackedBatch, batch_index: int) -> None:
        """Seed what the step draws, and note what it sees."""
        torch.manual_seed(step_seed(self.config.seed, self.current_epoch, batch_index, self.global_rank))
        low, high = batch.points.aminmax(dim=0)
        self.seen[0].clamp_(max=low)
        self.seen[1].clamp_(min=high)

    def total(self, terms: dict[str, Tensor], batch: PackedBatch, batch_index: int) -> Tensor:
        """The sum of the loss's terms, logged. Raises: InputError if it is not finite."""
        loss = torch.stack(list(terms.values())).sum()
        if not loss.isfinite():
            state = self.config.output / STATE
            before = f"an earlier state is in {state}; " if state.exists() else ""
            values = ", ".join(f"{name} {value.item():g}" for name, value in terms.items())
            scans = ", ".join(map(str, batch.scans))
            raise InputError(
                f"the loss is not finite in epoch {self.current_epoch + 1}, batch {batch_index + 1} ({values}; scans "
                f"{scans}); {before}lower optimizer.lr or look at these scans"
            )
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=batch.num_scans)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=batch.num_scans)
        return loss

    def labelled(self, labels: Tensor) -> Tensor:
        """bool [N], which points count in the scores."""
        return (labels != IGNORE) & (labels != self.ignore_index)

    def on_validation_epoch_end(self) -> None:
        confusion = self.confusion.compute().cpu().numpy()
        self.confusion.reset()
        for name, value in zip(self.model.classes, metrics.iou(confusion)):
            if name != "unlabeled":
                self.log(f"val/iou_{name}", float(value))
        self.log("val/moving_iou", float(metrics.iou(confusion)[self.model.moving]), prog_bar=True)

    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        # Not the trainer's own estimate: that would set up the loader before its resumed state is known.
        batches = len(self.trainer.datamodule.order(self.trainer.datamodule.train_set, shuffle=True))
        return math.ceil(batches / self.config.accumulate)


class Training(ModelTraining):
    """A student, its losses and its optimiser."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        torch.manual_seed(config.seed)
        self.student = Student(config.student)
        if config.init is not None:
            self.student.load_state_dict(initial_weights(config.init, config.student))
        classes = config.student.classes
        self.distillation = self._build_distillation()
        weights = config.class_weights
        if weights is not None and len(weights) != len(classes):
            raise InputError(f"class_weights: {len(weights)} weights for {len(classes)} classes")
        self.class_weights = None if weights is None else torch.tensor(weights)
        self.rule_confusion = MulticlassConfusionMatrix(2)

    @property
    def model(self) -> Student:
        return self.student

    def _build_distillation(self):
        distill = self.config.distill
        if distill is None:
            return None
        options = {"ignore_index": self.ignore_index, **distill.options}
        if distill.loss == "wdcd":
            options.setdefault("moving", self.config.student.moving)
        try:
            loss = DISTILLATION[distill.loss](**options)
            num_classes = len(self.config.student.classes)
            loss(*torch.zeros(2, 1, num_classes), torch.zeros(1, dtype=torch.int64))  # do the classes suit it?
        except (TypeError, ValueError) as error:
            raise InputError(f"distill.options of {distill.loss}: {error}") from error
        return loss

    def losses(self, output: StudentOutput, batch: PackedBatch) -> dict[str, Tensor]:
        """The terms of the total loss by name, already weighted."""
        gridded, num_classes = output.gridded, len(self.student.classes)
        num_voxels = len(gridded.voxels)
        labels = ops.voxel_label(gridded.voxel_rank, batch.labels, num_voxels, num_classes, gridded.by_voxel)
        logits = output.voxel_logits.float()
        terms = {
            "cross_entropy": cross_entropy(logits, labels, self.ignore_index, self.class_weights),
            "lovasz": lovasz_softmax(logits, labels, self.ignore_index),
        }
        if self.distillation is not None:
            points = output.point_logits.float()
            distilled = self.distillation(points, batch.teacher_logits, batch.labels, batch.offsets)
            terms["distillation"] = self.config.distill.gamma * distilled
        return terms

    def training_step(self, batch: PackedBatch, batch_index: int) -> Tensor:
        seed, epoch, augment = self.config.seed, self.current_epoch, self.config.augment
        if len(batch.points) < 2:
            raise InputError(f"scan {batch.scans[0]}: one point is too few for a batch of its own")
        self.begin_step(batch, batch_index)
        transforms = [
            draw_transform(seed, epoch, scan, augment.rotate, augment.flip, augment.translation) for scan in batch.scans
        ]
        changes = [draw_remission(seed, epoch, scan, augment.remission) for scan in batch.scans]
        points = apply_transforms(batch.points, batch.offsets, np.stack(transforms))
        points = change_remission(points, batch.offsets, changes)
        false = [draw_false_motion(seed, epoch, scan, augment.false_motion) for scan in batch.scans]
        still = batch.labels != self.student.moving
        grid = self.student.settings.motion.grid
        residual = add_false_motion(batch.points, batch.offsets, batch.residual, still, grid, false)
        if augment.sectors > 1:
            sectors = [draw_sector(seed, epoch, scan) for scan in batch.scans]
            points, kept, offsets = mix_sectors(points, batch.offsets, residual, ~still, sectors, augment.sectors)
            residual, batch = residual.index_select(0, kept), batch.rows(kept, offsets)
        return self.total(self.losses(self.student(points, batch.offsets, residual), batch), batch, batch_index)

    def validation_step(self, batch: PackedBatch, batch_index: int) -> None:
        predicted = self.student(batch.points, batch.offsets, batch.residual).point_logits.argmax(1)
        labelled = self.labelled(batch.labels)
        truth, predicted = batch.labels[labelled].long(), predicted[labelled]
        self.confusion.update(predicted, truth)
        rule = moving_by_rule(batch.residual[labelled])
        self.rule_confusion.update(rule.long(), (truth == self.student.moving).long())

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        rule = self.rule_confusion.compute().cpu().numpy()
        self.rule_confusion.reset()
        self.log("val/rule_moving_iou", float(metrics.iou(rule)[1]))

    def words(self, value: dict[str, float]) -> str:
        motion = self.student.settings.motion
        # The rule needs half of the published channels.
        has_rule = motion.form == "published" and 2 * (motion.lookahead + 1) >= motion.num_channels
        rule = f"training-free rule {value['val/rule_moving_iou']:.4f}, " if has_rule else ""
        return f"{rule}look-ahead {motion.lookahead} scans"

    def configure_optimizers(self) -> dict:
        setting = self.config.optimizer
        weights, decay = self.student.parameters(), setting.weight_decay
        if setting.kind == "adamw":
            optimizer = torch.optim.AdamW(weights, setting.lr, (setting.momentum, ADAM_BETA), weight_decay=decay)
        else:
            optimizer = torch.optim.SGD(weights, setting.lr, setting.momentum, weight_decay=decay)
        factor = learning_rate_factor(self.steps_per_epoch(), setting.warmup_epochs, setting.decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def learning_rate_factor(steps_per_epoch: int, warmup_epochs: float, decay: float):
    """Factor on the learning rate of optimizer step i (from 0): linear warm-up, then `decay` per epoch, stepwise.

    Source: the schedule of the authors' code.
    """
    warmup = round(steps_per_epoch * warmup_epochs)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return decay ** ((step - warmup) / steps_per_epoch)

    return factor


# --- what is kept


class Keep(Callback):
    """Writes the training state every so many steps and the models worth having, each atomically."""

    def __init__(self, config: RunConfig, about: dict) -> None:
        self.config, self.about, self.best, self.interrupted = config, about, -1.0, False

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"]

    def on_train_batch_end(self, trainer: L.Trainer, module: ModelTraining, outputs, batch, batch_idx: int) -> None:
        # Not between the batches of one optimizer step, whose gradients are in no state, and not after the last
        # batch: a run resumed there would skip the validation.
        step_done = (batch_idx + 1) % self.config.accumulate == 0
        last = batch_idx + 1 == trainer.num_training_batches
        if step_done and not last and trainer.global_step % self.config.save_every == 0:
            self._save_state(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: ModelTraining) -> None:
        value = trainer.callback_metrics["val/moving_iou"].item()
        if np.isnan(value):
            warnings.warn("the validation scans have no moving point: no model can be the best", stacklevel=2)
        if value > self.best:
            self.best = value
            self._save_model(trainer, module, BEST)

    def on_train_epoch_end(self, trainer: L.Trainer, module: ModelTraining) -> None:
        self._save_model(trainer, module, LAST)
        self._save_state(trainer)

    def on_exception(self, trainer: L.Trainer, module: ModelTraining, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            self.interrupted, state = True, self.config.output / STATE
            print(f"--resume goes on from {state}" if state.exists() else f"{state} was not written yet")

    def _save_state(self, trainer: L.Trainer) -> None:
        target = self.config.output / STATE
        temporary = target.with_name(f".{STATE}.part")
        try:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            temporary.unlink(missing_ok=True)
            raise InputError(f"{target}: cannot be written: {error}; the older state stays") from error

    def _save_model(self, trainer: L.Trainer, module: ModelTraining, name: str) -> None:
        values = {k.removeprefix("val/"): v.item() for k, v in trainer.callback_metrics.items() if k[:4] == "val/"}
        seen = module.all_gather(module.seen).view(-1, 2, 4)  # of all processes
        low, high = seen[:, 0].amin(0).tolist(), seen[:, 1].amax(0).tolist()
        if not trainer.is_global_zero:
            return
        about = {
            **self.about,
            "metrics": {name: None if np.isnan(value) else value for name, value in values.items()},
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "sensor": {axis: [low[i], high[i]] for i, axis in enumerate(("x", "y", "z", "remission"))},
        }
        path = self.config.output / name
        save_model(path, module.model, **about)
        write_card(path.with_suffix(".md"), module.model, path.stem, about)


class Report(Callback):
    """One printed line an epoch."""

    def on_train_start(self, trainer: L.Trainer, module: ModelTraining) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, module: ModelTraining) -> None:
        if trainer.is_global_zero:
            value = {name: tensor.item() for name, tensor in trainer.callback_metrics.items()}
            print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  "
                f"loss {value.get('train/loss_epoch', float('nan')):.4f}  "
                f"moving IoU {value['val/moving_iou']:.4f}  "
                f"({module.words(value)})  "
                f"{time.perf_counter() - self.started:.0f} s",
                flush=True,
            )
        self.started = time.perf_counter()


def _counter(what: str):
    """A progress callback that prints on one line."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() or done == total:
            print(f"\r{what}: {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


# --- the run


def _module(config: Config | TeacherConfig) -> ModelTraining:
    if isinstance(config, Config):
        return Training(config)
    from kdmos.train_teacher import TeacherTraining  # here, because it is built upon this module

    return TeacherTraining(config)


def fit(config: Config | TeacherConfig, resume: bool = False) -> ModelTraining:
    """Train as the config says; everything is written to `config.output`.

    Args:
        config: The run.
        resume: Go on from the state in `config.output`.
    Returns: the trained module; what it trained is `.model`.
    Raises: InputError for data or settings that cannot be used, or a loss that is not finite.
    """
    output, state = config.output, config.output / STATE
    if resume and not state.exists():
        raise InputError(f"{state}: no state to resume from; leave --resume out to start the run")
    if not resume and any((output / name).exists() for name in (STATE, BEST, LAST)):
        raise InputError(f"{output}: already holds a run; add --resume to go on with it, or choose another output=")
    data = MosData(config)
    if not state.exists():
        data.scan_list.unlink(missing_ok=True)  # of a run that never came to its first save
    # The state of a resumed run has its weights; where they once began may be gone.
    module = _module(config.model_copy(update={"init": None}) if resume else config)
    resolved = output / "config.yaml"
    if state.exists() and resolved.exists():
        _check_same(load_config(resolved), config, resolved)
    write_atomic(resolved, dump_config(config).encode())

    about = {
        "version": __version__,
        "commit": code_commit(),
        "seed": config.seed,
        "init": config.init and str(config.init),
        "training_data": [sequence.name for sequence in data.train_sequences],
        "validation_data": [sequence.name for sequence in data.valid_sequences],
    }
    if isinstance(config, Config):
        about["distill"] = config.distill and config.distill.model_dump(mode="json")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*|.*smaller than the logging interval.*")
    # The confusion tables are summed over processes already; the training loss is shown for the first process.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    keep = Keep(config, about)
    bar = [TQDMProgressBar()] if sys.stderr.isatty() else []
    try:
        trainer = L.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            strategy="ddp" if config.devices != 1 else "auto",
            precision="32-true" if config.precision == TF32 else config.precision,
            max_epochs=config.epochs,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.gradient_clip,
            callbacks=[keep, Report(), LearningRateMonitor("step"), *bar],
            logger=TensorBoardLogger(output, name="", version="tensorboard"),
            enable_checkpointing=False,
            enable_progress_bar=bool(bar),
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
        )
    except MisconfigurationException as error:  # no GPU, or not so many
        raise InputError(f"accelerator {config.accelerator}, devices {config.devices}: {error}") from error
    try:
        with products(tf32=config.precision == TF32):
            trainer.fit(module, data, ckpt_path=state if resume else None, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C
        if keep.interrupted:
            raise KeyboardInterrupt from None
        raise
    if trainer.is_global_zero:
        what = "student" if isinstance(config, Config) else "teacher"
        kept = {BEST: f"the {what} with the highest moving IoU", LAST: "the last one"}
        print("\n".join(f"{output / name}: {what}" for name, what in kept.items() if (output / name).exists()))
    return module


def _check_same(before: RunConfig, now: RunConfig, path: Path) -> None:
    """A resumed run must be the same run; what does not change its weights may differ."""
    if type(before) is not type(now):
        raise InputError(f"{path}: the run to resume trained another kind of model; use its settings or a new output=")
    free = {"save_every", "output"}
    if isinstance(now, Config):
        free.add("epochs")  # a teacher's learning rate depends on where the run ends
    old, new = (c.model_dump(mode="json", exclude=free) for c in (before, now))
    for settings in (old, new):
        settings["data"].pop("workers")
        settings["data"].pop("cache")
    changed = [key for key in new if old[key] != new[key]]
    if changed:
        raise InputError(
            f"{path}: the run to resume had another {', '.join(changed)}; use its settings or a new output="
        )


def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. data.root=/data optimizer.lr=0.005"),
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file, or the name of one of the project's configs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output=.")] = False,
) -> None:
    """Train or distil a student; or train a teacher, if the config has a key teacher (--config teacher_demo).

    Writes to output=: config.yaml (all settings), best.safetensors (by moving IoU) and last.safetensors (models
    to predict with) with their cards (.md), state.ckpt (to resume from), tensorboard/.
    """
    fit(load_config(config, overrides or []), resume)


def main(argv: list[str] | None = None) -> None:
    run(train, "train", argv)


if __name__ == "__main__":
    main()
