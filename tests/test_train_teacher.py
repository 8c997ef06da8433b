"""Training MambaMOS as a user runs it: what it learns from, its recipe, and a killed run that goes on."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from kdmos import train
from kdmos.config import TeacherConfig, load_config
from kdmos.data.augment import draw_window_transform
from kdmos.data.batch import ScanId
from kdmos.data.dataset import WindowDataset
from kdmos.data.semantic_kitti import find_sequences
from kdmos.errors import InputError
from kdmos.models import build_teacher, load_teacher, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [
    "teacher={num_scans: 3, voxel: 0.5, encoder_depths: [1, 1], encoder_channels: [8, 16], decoder_depths: [1], "
    "decoder_channels: [8]}",
    "epochs=2",
    "save_every=2",
    "data.workers=0",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_sequence):
    """One bare sequence folder of 6 scans."""
    return write_sequence(tmp_path_factory.mktemp("data") / "00", frames=6)


def config(data, output, *more):
    return load_config(None, [*SMALL, f"data.root={data}", f"output={output}", *more])


def test_a_killed_run_goes_on_to_the_same_weights(data, tmp_path):
    settings = [*SMALL, f"data.root={data}", "batch_size=2"]
    code = """
import os, signal, sys, torch
torch.set_num_threads(1)
from kdmos import train, train_teacher
step = train_teacher.TeacherTraining.training_step
def dying_step(self, batch, batch_index):
    if (self.current_epoch, batch_index) == (1, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_index)
train_teacher.TeacherTraining.training_step = dying_step
train.main()
"""
    arguments = [*settings, f"output={tmp_path / 'run'}"]
    assert subprocess.run([sys.executable, "-c", code, *arguments], env=os.environ).returncode == -9
    train.fit(load_config(None, arguments), resume=True)
    train.fit(load_config(None, [*settings, f"output={tmp_path / 'whole'}"]))
    one, other = (load_teacher(tmp_path / name / train.LAST) for name in ("run", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    assert one.header["step"] == 6 and one.header["training_data"] == ["00"]
    assert 0 <= one.header["metrics"]["moving_iou"] <= 1
    with pytest.raises(InputError, match="the run to resume had another epochs"):
        train.fit(load_config(None, [*arguments, "epochs=3"]), resume=True)


def test_the_recipe(data, tmp_path):
    """Two groups of parameters, one cycle of the learning rate; as the authors' config says."""
    module = train.fit(config(data, tmp_path / "run", "batch_size=3"))
    optimizer = module.trainer.optimizers[0]
    assert type(optimizer).__name__ == "AdamW"
    others, blocks = optimizer.param_groups
    names = {id(parameter): name for name, parameter in module.teacher.named_parameters()}
    assert all("block" in names[id(p)] for p in blocks["params"])
    assert not any("block" in names[id(p)] for p in others["params"])
    assert len(others["params"]) + len(blocks["params"]) == len(names)
    setting = module.config.optimizer
    assert (setting.lr, setting.weight_decay, others["weight_decay"]) == (1.6e-4, 0.005, 0.005)
    assert others["max_lr"] == pytest.approx(1.6e-4) and blocks["max_lr"] == pytest.approx(1.6e-5)
    assert others["initial_lr"] == pytest.approx(1.6e-5) and others["min_lr"] == pytest.approx(1.6e-8)


def test_windows_and_their_labels(data):
    (sequence,) = find_sequences(data)
    classes = ("unlabeled", "static", "movable", "moving")
    dataset = WindowDataset([(sequence, frame) for frame in sequence.frames], classes, 3)
    for index, frames in ((4, [4, 3, 2]), (1, [1, 0, 0]), (0, [0, 0, 0])):
        item, sizes = dataset[index], [len(sequence.read_points(frame)) for frame in frames]
        assert np.array_equal(np.bincount(item["age"]), sizes)
        newest = sequence.read_points(frames[0])
        assert np.array_equal(item["points"][: len(newest)], newest)
        assert len(item["labels"]) == sum(sizes) and item["scan"] == sequence.scan(frames[0])
        raw = [sequence.read_labels(frame, None) & 0xFFFF for frame in frames]
        assert np.array_equal(item["labels"] == 3, np.concatenate(raw) > 250)


def test_transforms_are_a_function_of_the_scan():
    scan = ScanId("00", 3)
    assert np.array_equal(draw_window_transform(0, 1, scan), draw_window_transform(0, 1, scan))
    assert not np.array_equal(draw_window_transform(0, 1, scan), draw_window_transform(0, 2, scan))
    factors, turned = [], 0
    for epoch in range(300):
        matrix = draw_window_transform(0, epoch, scan, rotate=0.5, scale=(0.9, 1.1))[:, :3]
        factor = abs(np.linalg.det(matrix)) ** (1 / 3)
        assert np.allclose(matrix @ matrix.T, factor**2 * np.eye(3))
        factors.append(factor)
        turned += not np.allclose(np.abs(matrix), factor * np.eye(3))
    assert 0.9 <= min(factors) < 0.91 and 1.09 < max(factors) <= 1.1
    assert 120 < turned < 180
    still = draw_window_transform(0, 0, scan, rotate=0, scale=(1, 1), flip=False)
    assert np.array_equal(still, np.eye(3, 4))


def test_the_loss_goes_down(data, tmp_path):
    module = train.fit(config(data, tmp_path, "epochs=12", "optimizer={lr: 0.01, block_factor: 1.0}", "batch_size=1"))
    values = module.trainer.callback_metrics
    assert values["train/loss_epoch"] < 1.2  # it starts at 2.0
    assert values["val/moving_iou"] >= 0


def test_init(data, tmp_path):
    settings = config(data, tmp_path / "run").teacher
    torch.manual_seed(5)
    save_model(tmp_path / "begin.safetensors", build_teacher(**_fields(settings)))
    module = train._module(
        config(data, tmp_path / "run", f"init={tmp_path / 'begin.safetensors'}", "teacher.voxel=0.4")
    )
    begin = load_teacher(tmp_path / "begin.safetensors").state_dict()
    assert all(torch.equal(begin[key], value) for key, value in module.teacher.state_dict().items())
    with pytest.raises(InputError, match=r"does not fit this run's teacher: num_scans 3 instead of 5"):
        train._module(config(data, tmp_path / "run", f"init={tmp_path / 'begin.safetensors'}", "teacher.num_scans=5"))


def _fields(settings):
    names = ("num_scans", "voxel", "encoder_depths", "encoder_channels", "decoder_depths", "decoder_channels")
    return {name: getattr(settings, name) for name in names}


def test_config_errors():
    assert isinstance(load_config("mambamos"), TeacherConfig)
    for override, message in (
        ("teacher.voxels=0.1", r"unknown key teacher\.voxels; did you mean voxel"),
        ("distill.loss=wdcd", r"unknown key distill"),
        ("optimizer.momentum=0.9", r"unknown key optimizer\.momentum"),
        ("teacher.decoder_depths=[1]", r"teacher"),
        ("augment.keep=0", r"augment\.keep"),
    ):
        with pytest.raises(InputError, match=message):
            load_config("mambamos", [override])


def test_a_students_run_is_not_resumed_as_a_teachers(data, tmp_path):
    train.fit(config(data, tmp_path, "epochs=1"))
    with pytest.raises(InputError, match="trained another kind of model"):
        train.fit(load_config(None, [f"data.root={data}", f"output={tmp_path}"]), resume=True)
