"""Training as a user runs it: loss goes down, a killed run resumes to the same weights, what is wrong is said."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from kdmos import train
from kdmos.config import load_config
from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.teacher_logits import TeacherLogits
from kdmos.errors import InputError
from kdmos.models import load_student

SMALL = ["student.grid.bins=[48,32,8]", "batch_size=2", "epochs=2", "optimizer.warmup_epochs=0.5", "save_every=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_sequence):
    """One bare sequence folder of 10 scans."""
    return write_sequence(tmp_path_factory.mktemp("data") / "00", frames=10)


def config(data: Path, output: Path, *more: str):
    return load_config(None, [*SMALL, f"data.root={data}", f"output={output}", "data.workers=0", *more])


def weights(output: Path) -> dict:
    return torch.load(output / train.STATE, weights_only=True)["state_dict"]


def assert_same_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train.fit(config(data, output))
    return output


def test_a_run_leaves_what_it_promises(uninterrupted, data):
    student = load_student(uninterrupted / train.LAST)
    about = student.header
    assert about["training_data"] == ["00"]
    assert about["seed"] == 0
    assert about["epoch"] == 2 and about["step"] == 10
    assert set(about["metrics"]) >= {"moving_iou", "rule_moving_iou", "iou_static"}
    low, high = about["sensor"]["remission"]
    scans = [sequence.read_points(frame) for sequence in find_sequences(data) for frame in sequence.frames]
    assert low == min(scan[:, 3].min() for scan in scans) and high == max(scan[:, 3].max() for scan in scans)
    saved = yaml.safe_load((uninterrupted / "config.yaml").read_text())
    assert saved["seed"] == 0 and saved["student"]["grid"]["bins"] == [48, 32, 8]
    assert list((uninterrupted / "tensorboard").glob("events*"))
    assert load_student(uninterrupted / train.BEST).settings == student.settings
    for name in (train.BEST, train.LAST):
        card = (uninterrupted / name).with_suffix(".md").read_text()
        assert card.startswith(f"# {name.partition('.')[0]}\n") and "| trained on | sequence 00 |" in card
    assert not list(uninterrupted.glob(".*.part"))


DIES = """
import os, signal, sys
from kdmos import train
from kdmos.config import load_config

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
name, epoch, index, sent = sys.argv[1].split()
step = getattr(train.Training, name)

def dying_step(self, batch, batch_index):
    if (self.current_epoch, batch_index) == (int(epoch), int(index)):
        os.kill(os.getpid(), getattr(signal, sent))
    return step(self, batch, batch_index)

setattr(train.Training, name, dying_step)
sys.argv[1:] = sys.argv[2:]
train.main()
"""


def killed(at: str, settings: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", DIES, at, *settings], capture_output=True, text=True, env=os.environ)


@pytest.mark.parametrize(
    "at",
    [
        "training_step 0 3 SIGKILL",
        "training_step 1 0 SIGKILL",
        "training_step 1 4 SIGKILL",
        "validation_step 0 2 SIGKILL",
    ],
)
def test_killed_anywhere_and_resumed_is_the_uninterrupted_run(at, data, tmp_path, uninterrupted):
    settings = [*SMALL, f"data.root={data}", f"output={tmp_path / 'run'}", "data.workers=2"]
    dead = killed(at, settings)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    before = torch.load(tmp_path / "run" / train.STATE, weights_only=True)["global_step"]
    assert 0 < before < 10
    train.fit(load_config(None, settings), resume=True)
    assert_same_weights(weights(tmp_path / "run"), weights(uninterrupted))
    for name in (train.BEST, train.LAST):
        one, other = load_student(tmp_path / "run" / name), load_student(uninterrupted / name)
        assert_same_weights(one.state_dict(), other.state_dict())
        assert one.header["metrics"] == other.header["metrics"]


def test_no_state_is_saved_between_the_batches_of_one_optimizer_step(data, tmp_path):
    settings = [*SMALL, "accumulate=2", "save_every=1", f"data.root={data}", "data.workers=0"]
    assert killed("training_step 1 3 SIGKILL", [*settings, f"output={tmp_path / 'run'}"]).returncode == -signal.SIGKILL
    train.fit(load_config(None, [*settings, f"output={tmp_path / 'run'}"]), resume=True)
    train.fit(load_config(None, [*settings, f"output={tmp_path / 'whole'}"]))
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_ctrl_c_says_how_to_go_on(data, tmp_path):
    stopped = killed("training_step 0 3 SIGINT", [*SMALL, f"data.root={data}", f"output={tmp_path}", "data.workers=0"])
    assert stopped.returncode == 130, stopped.stderr
    assert f"--resume goes on from {tmp_path / train.STATE}" in stopped.stdout
    assert stopped.stderr.strip().splitlines()[-1] == "kdmos train: interrupted; what was finished is kept"


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_accumulated_steps_and_a_resumed_longer_run(kind, data, tmp_path):
    more = ("accumulate=2", "augment.flip=false", "augment.sectors=2", f"optimizer.kind={kind}")
    train.fit(config(data, tmp_path / "run", *more))
    train.fit(config(data, tmp_path / "run", *more, "epochs=3"), resume=True)
    train.fit(config(data, tmp_path / "whole", *more, "epochs=3"))
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert torch.load(tmp_path / "run" / train.STATE, weights_only=True)["global_step"] == 9  # 3 of 5 batches an epoch


def test_adamw_steps_by_its_learning_rate(data, tmp_path):
    """Its first steps move a weight by the learning rate at most, and by nearly that whatever the gradient's size."""
    settings = ["optimizer.kind=adamw", "optimizer.lr=0.001", "optimizer.weight_decay=0", "optimizer.warmup_epochs=0"]
    settings += ["batch_size=8", "epochs=1", "augment.remission=0.5", "augment.false_motion=1"]
    module = train.fit(config(data, tmp_path / "run", *settings))
    before = train.Training(module.config).student.state_dict()
    steps = module.trainer.global_step
    for name, parameter in module.student.named_parameters():
        moved = (parameter.detach() - before[name]).abs()
        assert moved.max() <= 0.001 * steps * 1.01, name
        if parameter.ndim > 1:  # a bias in front of a norm has no gradient
            assert moved.max() > 0.0005, name


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(uninterrupted, data):
    with pytest.raises(InputError, match="already holds a run; add --resume"):
        train.fit(config(data, uninterrupted))
    with pytest.raises(InputError, match="no state to resume from"):
        train.fit(config(data, uninterrupted / "nothing"), resume=True)
    with pytest.raises(InputError, match="had another optimizer"):
        train.fit(config(data, uninterrupted, "optimizer.lr=0.5"), resume=True)


@pytest.mark.parametrize("loss", ["wdcd", "dkd", "kd", "logit_std_kd", "ofa"])
def test_distillation_reads_the_store(loss, data, tmp_path):
    (sequence,) = find_sequences(data)
    store = TeacherLogits(tmp_path / "logits", "oracle")
    rng = np.random.default_rng(0)
    for frame in sequence.frames:
        logits = rng.normal(size=(len(sequence.read_points(frame)), 4))
        store.write(sequence.scan(frame), sequence.points_path(frame), logits, {})
    settings = [f"distill.logits={tmp_path / 'logits'}", "distill.teacher=oracle", f"distill.loss={loss}", "epochs=1"]
    module = train.fit(config(data, tmp_path / "run", *settings))
    assert module.trainer.callback_metrics["train/distillation"] > 0
    store.path(sequence.scan(3)).unlink()
    with pytest.raises(InputError, match=r"000003\.safetensors: no logits of teacher 'oracle' for 1 of 10"):
        train.fit(config(data, tmp_path / "other", *settings))


def test_a_teacher_with_its_classes_in_another_order_is_refused(data, tmp_path):
    (sequence,) = find_sequences(data)
    store = TeacherLogits(tmp_path / "logits", "mixed")
    swapped = {"classes": ["static", "unlabeled", "movable", "moving"]}
    for frame in sequence.frames:
        logits = np.zeros((len(sequence.read_points(frame)), 4))
        store.write(sequence.scan(frame), sequence.points_path(frame), logits, swapped)
    settings = [f"distill.logits={tmp_path / 'logits'}", "distill.teacher=mixed", "epochs=1"]
    with pytest.raises(InputError, match="teacher's classes are static, unlabeled, movable, moving"):
        train.fit(config(data, tmp_path / "run", *settings))


def test_two_classes_train_without_an_unlabeled_one_and_refuse_wdcd(data, tmp_path):
    classes = "student.classes=[static, moving]"
    module = train.fit(config(data, tmp_path / "run", classes, "student.name=motionbev", "epochs=1"))
    assert module.student.moving == 1
    with pytest.raises(InputError, match="with two classes"):
        train.fit(config(data, tmp_path / "other", classes, "distill.teacher=any"))


def test_unknown_loss_options_are_named(data, tmp_path):
    with pytest.raises(InputError, match=r"distill.options of kd: .*bogus"):
        train.fit(config(data, tmp_path / "run", "distill={loss: kd, options: {bogus: 1}}"))
    with pytest.raises(InputError, match="2 weights for 4 classes"):
        train.fit(config(data, tmp_path / "run", "class_weights=[1, 2]"))


def test_a_loss_that_is_not_finite_stops_with_the_batch_named(data, tmp_path):
    with pytest.raises(InputError, match=r"not finite in epoch \d, batch \d \(.*scans 00/0000\d\d"):
        train.fit(config(data, tmp_path / "run", "optimizer.lr=1e30", "optimizer.warmup_epochs=0"))


def test_mixed_precision(data, tmp_path):
    module = train.fit(config(data, tmp_path / "run", "precision=bf16-mixed", "epochs=1", "gradient_clip=1"))
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_drop_static_scans_writes_the_list_it_trains_on(data, tmp_path):
    module = train.fit(config(data, tmp_path / "run", "data.drop_static_scans=true", "epochs=1"))
    kept = (tmp_path / "run" / "train_scans.txt").read_text().split()
    assert len(kept) == 2 * len(module.trainer.datamodule.train_set)
    spaced = tmp_path / "a drive"
    spaced.symlink_to(data)
    train.fit(config(spaced, tmp_path / "spaced", "data.drop_static_scans=true", "epochs=1"))
    assert "a drive 000000" in (tmp_path / "spaced" / "train_scans.txt").read_text()
    (tmp_path / "list.txt").write_text("00 000004\n00 000007\n")
    listed = train.fit(config(data, tmp_path / "other", f"data.drop_static_scans={tmp_path / 'list.txt'}", "epochs=1"))
    assert [frame for _, frame in listed.trainer.datamodule.train_set.scans] == [4, 7]


def test_splits_of_a_data_root(data, tmp_path, write_sequence):
    for name in ("04", "08"):
        write_sequence(tmp_path / "root" / "sequences" / name, frames=2)
    settings = load_config(None, [f"data.root={tmp_path / 'root'}"])
    with pytest.raises(InputError, match="no sequence 00"):  # the training split is not all there
        train.find_training_sequences(settings)
    chosen = load_config(None, [f"data.root={tmp_path / 'root'}", "data.train=['04']"])
    training, validation = train.find_training_sequences(chosen)
    assert [s.name for s in training] == ["04"] and [s.name for s in validation] == ["08"]
    (tmp_path / "root" / "sequences" / "04" / "labels" / "000001.label").unlink()
    with pytest.raises(InputError, match=r"000001\.label: missing, .* every scan"):
        train.find_training_sequences(chosen)
    (tmp_path / "root" / "sequences" / "04" / "labels" / "000000.label").unlink()
    with pytest.raises(InputError, match="sequence 04 has no labels"):
        train.find_training_sequences(chosen)


def test_the_command_line(data, tmp_path):
    """One real process: exit code, printed lines, an error in one line."""
    command = [sys.executable, "-m", "kdmos.train", *SMALL, "epochs=1", f"data.root={data}", f"output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"epoch 1/1  loss \d\.\d+  moving IoU .* look-ahead 7 scans", done.stdout)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1].startswith(f"kdmos train: {tmp_path}: already holds a run")


def test_two_epochs_on_a_real_drive_lower_the_loss(realdata, tmp_path, capsys):
    """A sixteenth of the published cells, to be quick."""
    settings = [f"data.root={realdata('kitti-raw-0005-a')}", f"output={tmp_path / 'run'}", "data.workers=2"]
    settings += ["student.grid.bins=[120,90,32]", "epochs=2", "batch_size=1", "distill=null"]
    train.fit(load_config("semantic_kitti", [*settings, "data.drop_static_scans=false"]))
    printed = capsys.readouterr().out
    first, second = (float(value) for value in re.findall(r"loss (\d+\.\d+)", printed))
    assert second < first
    rule = float(re.search(r"training-free rule (\d\.\d+)", printed).group(1))
    assert 0.3 < rule < 0.5  # in 16 scans, most lack some of the channels: 7 before and 7 after
    print(json.dumps({"loss": [first, second], "rule": rule}))


def test_a_run_starts_from_the_weights_of_a_coarser_one(uninterrupted, data, tmp_path):
    first = tmp_path / "first.safetensors"
    first.write_bytes((uninterrupted / train.LAST).read_bytes())
    finer = ["student.grid.bins=[64,40,8]", "student.motion.lookahead=3", f"init={first}", "epochs=1"]
    settings = config(data, tmp_path / "run", *finer)
    assert_same_weights(train.Training(settings).student.state_dict(), load_student(first).state_dict())
    train.fit(settings)
    student = load_student(tmp_path / "run" / train.LAST)
    assert student.settings == settings.student
    assert student.header["init"] == str(first)
    # The state has the weights: a resumed run needs the file no more.
    first.unlink()
    train.fit(config(data, tmp_path / "run", *finer, "epochs=2"), resume=True)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("student.grid.bins=[48,32,6]", "height bins 8 instead of 6"),
        ("student.motion.num_channels=6", "K 8 instead of 6"),
        ("student.name=motionbev", "upsampler dysample instead of transposed"),
        (
            "student.classes=[unlabeled, static, moving]",
            r"classes \['unlabeled', 'static', 'movable', 'moving'\] instead of \['unlabeled', 'static', 'moving'\]; "
            "moving class 3 instead of 2",
        ),
        ("student.moving=2", "moving class 3 instead of 2"),
    ],
)
def test_weights_that_do_not_fit_are_refused(other, difference, uninterrupted, data, tmp_path):
    init = uninterrupted / train.LAST
    with pytest.raises(InputError, match=rf"^init={init}: does not fit this run's student: {difference}$"):
        train.fit(config(data, tmp_path, other, f"init={init}"))
    assert not list(tmp_path.iterdir())


def test_a_start_that_is_no_student_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="no such checkpoint file"):
        train.fit(config(data, tmp_path, f"init={tmp_path / 'nothing.safetensors'}"))
    with pytest.raises(InputError, match="init=rule: the rule has no weights to start from"):
        train.fit(config(data, tmp_path, "init=rule"))
