"""MambaMOS: the authors' outputs and gradients, their checkpoints and ours, and the logits of a scan's points."""

import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos import checkpoint
from kdmos.data.multi_scan import VoxelBatch, find_voxels, gather_window, representatives, voxel_batch
from kdmos.errors import InputError
from kdmos.inference import prepared
from kdmos.models import (
    Teacher,
    build_student,
    build_teacher,
    load_model,
    load_student,
    load_teacher,
    published,
    save_model,
)
from kdmos.models.teacher import (
    Block,
    DropPath,
    Level,
    MotionAwareStateSpaceModel,
    Sequences,
    Voting,
    along_sequences,
)
from kdmos.settings import PolarGrid, TeacherSettings

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "num_scans": 3,
    "voxel": 0.5,
    "encoder_depths": (1, 2, 1),
    "encoder_channels": (8, 16, 16),
    "decoder_depths": (1, 1),
    "decoder_channels": (8, 16),
}
AUTHORS = "a7_mambamos_small_state_dict.pt"
STILL = torch.eye(4, dtype=torch.float64)


@pytest.fixture(scope="module")
def a7(golden):
    with np.load(golden("a7_mambamos_small.npz")) as file:
        return {name: file[name] for name in file.files if name != "config_json"}


@pytest.fixture(scope="module")
def authors_batch(a7):
    """Two samples of 700 and 520 voxels, four scans each."""
    grid, features, ends = (torch.from_numpy(a7[name]) for name in ("grid_coord", "feat", "offset"))
    batch = VoxelBatch(grid.long(), features, F.pad(ends, (1, 0)))
    np.testing.assert_array_equal(batch.time[:, None], a7["tn"])
    return batch


@pytest.fixture
def authors(golden):
    return load_teacher(golden(AUTHORS))


def small_teacher(seed=0, **settings):
    """Weights and statistics under which every layer matters, in eval mode."""
    torch.manual_seed(seed)
    teacher = build_teacher(**(SMALL | settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
            module.running_var.fill_(0.3)
        if isinstance(module, torch.nn.LayerNorm):
            module.bias.data += 0.2 * torch.randn(module.bias.shape, generator=generator)
    return teacher


def random_scans(num_scans=3, num_points=150, seed=0):
    """Scans and poses of a LiDAR that drives 0.4 m a scan; about half of the 0.5 m voxels hold several points."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([3.0, 3.0, 0.5, 0.3])
    scans = [torch.randn(num_points + i, 4, generator=generator) * spread for i in range(num_scans)]
    poses = STILL.repeat(num_scans, 1, 1)
    poses[:, 0, 3] = 0.4 * torch.arange(num_scans)
    return scans, poses


def random_batch(sizes=(120, 90), num_scans=3, side=16, seed=0):
    """Random voxels, each once, sorted as `find_voxels` leaves them."""
    generator = torch.Generator().manual_seed(seed)
    places = [torch.randperm(side**3, generator=generator)[:size].sort().values for size in sizes]
    place, total = torch.cat(places), sum(sizes)
    grid = torch.stack([place // side**2, place // side % side, place % side], 1)
    age = torch.randint(num_scans, (total, 1), generator=generator).float()
    features = torch.cat([torch.randn(total, 4, generator=generator), age], 1)
    return VoxelBatch(grid, features, F.pad(torch.tensor(sizes).cumsum(0), (1, 0)))


def sample_of(batch, index):
    rows = slice(batch.offsets[index], batch.offsets[index + 1])
    grid = batch.grid[rows]
    return VoxelBatch(grid, batch.features[rows], torch.tensor([0, len(grid)]))


def packed(*samples):
    parts = [torch.cat([getattr(sample, name) for sample in samples]) for name in ("grid", "features")]
    sizes = torch.tensor([len(sample.grid) for sample in samples])
    return VoxelBatch(*parts, F.pad(sizes.cumsum(0), (1, 0)))


def relative_error(actual, expected):
    """Norm of the difference over the norm of what is expected."""
    expected = torch.as_tensor(expected).double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


# --- The authors' MambaMOS ---------------------------------------------------------------------------


@torch.no_grad()
def test_logits_and_every_stage_equal_the_authors(authors, authors_batch, a7):
    seen = {}
    authors.backbone.embedding.register_forward_hook(lambda module, inputs, output: seen.update(embedding=output))
    for branch in (authors.backbone.enc, authors.backbone.dec):
        for name, stage in branch.items():
            last = [block for block in stage.values() if isinstance(block, Block)][-1]

            def keep(module, inputs, output, name=name):
                seen[name] = output
                level = inputs[1]
                for ours, theirs in ((level.time, "tn"), (level.grid, "grid_coord"), (level.sample, "batch")):
                    prefix = "stable_" if theirs == "tn" else ""  # the places are the same under any order
                    expected = a7[f"{prefix}act_{name}_{theirs}"]
                    np.testing.assert_array_equal(ours.numpy().reshape(expected.shape), expected, name)

            last.register_forward_hook(keep)
    logits = authors(authors_batch)
    assert list(seen) == ["embedding", *(f"enc{s}" for s in range(5)), *(f"dec{s}" for s in (3, 2, 1, 0))]
    for name, features in seen.items():
        # 17 blocks one after another, in another order of summation than theirs: 3e-6 seen on values of size 1
        expected = torch.from_numpy(a7[f"stable_act_{name}_feat"])
        assert_close(features, expected, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert_close(logits, torch.from_numpy(a7["stable_seg_logits"]), rtol=0, atol=1e-4)  # as above; 1e-6 seen
    assert_close(logits, authors(authors_batch), rtol=0, atol=0)  # the same again


def test_the_state_space_block_equals_the_authors(golden):
    """Forward, and the gradients of its input and of each weight."""
    with np.load(golden("a7_mssm_block.npz")) as file:
        block = {name: torch.from_numpy(file[name]) for name in file.files}
    sizes = F.pad(block["blk_offset"], (1, 0)).diff()
    level = Level(
        block["blk_grid_coord"].long(),
        torch.arange(2).repeat_interleave(sizes),
        block["blk_tn"][:, 0].long(),
        block["blk_serialized_code"],
        depth=10,
        num_samples=2,
        num_times=4,
    )
    assert torch.equal(level.along(2).order, block["blk_serialized_order"][2])
    mssm = MotionAwareStateSpaceModel(16)
    weights = {name.removeprefix("blk_w__mamba."): value for name, value in block.items() if "_w__" in name}
    mssm.load_state_dict(weights)
    x = block["blk_feat_in"].requires_grad_()
    out = mssm(x, level.along(2), level.scans_along(2))
    assert_close(out, block["blk_feat_out"], rtol=0, atol=1e-4)  # float32 sums along 90 voxels in another order
    out.backward(block["blk_grad_y"])
    gradients = {"x": x.grad, **{name: parameter.grad for name, parameter in mssm.named_parameters()}}
    for name, gradient in gradients.items():
        expected = block["blk_grad_x" if name == "x" else f"blk_gw__mamba.{name}"]
        assert relative_error(gradient, expected) < 1e-3, name  # as above, and sums over all voxels


def test_every_tensor_of_the_published_teacher(golden):
    content = json.loads(golden("a7_mambamos_full_state_dict_keys.json").read_text())
    teacher = build_teacher()
    own = {key: [*tensor.shape, str(tensor.dtype)] for key, tensor in teacher.state_dict().items()}
    assert own == content["keys"]
    assert sum(p.numel() for p in teacher.parameters()) == content["n_params"] == 49_204_647
    assert teacher.settings == TeacherSettings()
    assert (teacher.classes, teacher.moving) == (("unlabeled", "static", "movable", "moving"), 3)
    config, settings = content["config"], teacher.settings
    assert (settings.num_scans, list(settings.curves)) == (config["gather_num"], config["order"])
    assert (settings.mlp_ratio, settings.drop_path) == (config["mlp_ratio"], config["drop_path"])
    # what the tensors say is what they were made from
    assert published.teacher_settings(teacher.state_dict(), "the published one") == settings


# --- Its parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(7,), (1,), (5, 9, 9), (9, 8, 1, 7), (0, 4, 0, 6, 0), (2, 1, 3)])
def test_convolutions_end_with_their_sequence(sizes):
    """As the authors do: all sequences in a rectangle as long as the longest, filled up with `padding`."""
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(3, 3, 5, groups=3, padding=2).double()
    x, padding = (torch.randn(*shape, 3, dtype=torch.float64, requires_grad=True) for shape in ((sum(sizes),), ()))
    offsets = F.pad(torch.tensor(sizes).cumsum(0), (1, 0))

    filled = [
        torch.cat([part, padding.expand(max(sizes) - len(part), 3)]) for part in x.split(list(sizes))
    ]  # [S, longest, 3]
    expected = conv(torch.stack(filled).transpose(1, 2)).transpose(1, 2)
    expected = torch.cat([row[:size] for row, size in zip(expected, sizes)])
    out = along_sequences(x, conv, padding, offsets)
    assert_close(out, expected)
    to_out = torch.randn(out.shape, dtype=torch.float64)
    inputs = [x, padding, *conv.parameters()]
    for gradient, wanted in zip(
        torch.autograd.grad(out, inputs, to_out, materialize_grads=True),
        torch.autograd.grad(expected, inputs, to_out, materialize_grads=True),
    ):
        assert_close(gradient, wanted)


def level_by_hand():
    """Two samples: five voxels of scans 0, 2, 0, 1, 0 and two of scan 1; codes of two curves."""
    grid = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 1], [2, 0, 0], [3, 3, 3], [0, 0, 0], [0, 0, 2]])
    sample = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    codes = torch.stack([grid @ torch.tensor([16, 4, 1]), -(grid @ torch.tensor([16, 4, 1])) + 63])
    return Level(grid, sample, torch.tensor([0, 2, 0, 1, 0, 1, 1]), codes + 64 * sample, 2, 2, 3)


def test_orders_along_curves_by_hand():
    level = level_by_hand()
    forwards, backwards = level.along(0), level.along(1)
    assert forwards.order.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert backwards.order.tolist() == [4, 3, 2, 1, 0, 6, 5]
    assert backwards.inverse.tolist() == [4, 3, 2, 1, 0, 6, 5]
    assert forwards.offsets.tolist() == backwards.offsets.tolist() == [0, 5, 7]
    scans = level.scans_along(1)  # rows of 4, 3, 2, 1, 0, 6, 5, whose scans are 0, 1, 0, 2, 0, 1, 1
    assert scans.order.tolist() == [0, 2, 4, 1, 3, 5, 6]
    assert scans.offsets.tolist() == [0, 3, 4, 5, 5, 7, 7]
    assert scans.inverse.tolist() == [0, 3, 1, 4, 2, 5, 6]
    assert level.along(1) is backwards and level.scans_along(1) is scans  # once for all blocks


def test_larger_voxels_by_hand():
    """The first child in a voxel says which scan it is of."""
    level = level_by_hand()
    level.codes = torch.tensor([[0, 1, 7, 32, 63, 64, 66], [7, 6, 0, 32, 1, 64, 90]])
    above, parent = level.halved()
    assert parent.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert above.grid.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert above.sample.tolist() == [0, 0, 0, 1]
    assert above.time.tolist() == [0, 1, 0, 1]
    assert above.codes.tolist() == [[0, 4, 7, 8], [0, 4, 0, 8]]
    assert (above.depth, above.num_samples, above.num_times) == (1, 2, 3)
    once, _ = above.halved()
    assert (once.depth, once.grid.tolist(), once.sample.tolist()) == (0, [[0, 0, 0]] * 2, [0, 1])
    twice, parent = once.halved()  # one voxel a sample: nothing is left to halve
    assert (twice.depth, len(twice.grid), parent.tolist()) == (0, 2, [0, 1])


def test_sequences_know_the_way_back():
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    sequences = Sequences.of(order, torch.tensor([5, 0, 15]))
    assert torch.equal(order[sequences.inverse], torch.arange(20))
    assert torch.equal(sequences.inverse[order], torch.arange(20))
    assert sequences.offsets.tolist() == [0, 5, 5, 20]


def test_drop_path_leaves_out_voxels():
    torch.manual_seed(0)
    layer, x = DropPath(0.3), torch.ones(20000, 4)
    assert layer.eval()(x) is x
    assert DropPath(0.0).train()(x) is x
    out = layer.train()(x)
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert_close(out.unique(), torch.tensor([0, 1 / 0.7]))
    assert (out[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.016)  # five deviations


def test_drop_path_grows_with_depth():
    teacher = build_teacher(**SMALL, drop_path=0.3)

    def probabilities(branch):
        return [m.probability for m in branch.modules() if isinstance(m, DropPath)]

    assert probabilities(teacher.backbone.enc) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert probabilities(teacher.backbone.dec) == pytest.approx([0.3, 0])  # the coarsest stage goes first


# --- Batches -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_sample_twice_in_a_batch_is_answered_twice_the_same():
    teacher, batch = small_teacher(), random_batch((150,))
    alone = teacher(batch)
    assert_close(teacher(packed(batch, batch, batch)), alone.repeat(3, 1))


@torch.no_grad()
def test_the_longest_sample_does_not_depend_on_the_others():
    """The largest grid, the most voxels, and the most of each scan: nothing is padded on its account."""
    teacher, batch = small_teacher(), random_batch((150, 60))
    batch.features[:150, 4] = torch.arange(150) % 3
    batch.features[150:, 4] = torch.arange(60) % 3
    batch.grid[0], batch.grid[149] = 0, 15
    alone = teacher(sample_of(batch, 0))
    assert_close(teacher(batch)[:150], alone)
    swapped = packed(sample_of(batch, 1), sample_of(batch, 0))
    assert_close(teacher(swapped)[60:], alone)
    assert_close(teacher(swapped)[:60], teacher(batch)[150:])


@torch.no_grad()
def test_a_shorter_sample_depends_on_the_length_of_the_others_alone():
    teacher, batch = small_teacher(), random_batch((150, 60))
    other = random_batch((150, 60), seed=1)
    other.features[:150, 4] = batch.features[:150, 4]  # as many voxels of each scan
    together = teacher(packed(sample_of(other, 0), sample_of(batch, 1)))
    assert (together[:150] - teacher(batch)[:150]).abs().max() > 1e-3
    assert_close(together[150:], teacher(batch)[150:])


@torch.no_grad()
def test_one_voxel_and_one_scan_will_do():
    for sizes in ((1,), (1, 1), (1, 40)):
        for num_scans in (1, 3):
            logits = small_teacher()(random_batch(sizes, num_scans))
            assert logits.shape == (sum(sizes), 4)
            assert torch.isfinite(logits).all()


@torch.no_grad()
def test_every_feature_and_the_place_matter():
    teacher, batch = small_teacher(), random_batch()
    logits = teacher(batch)
    for column in range(5):
        features = batch.features.clone()
        features[:, column] = (features[:, column] + 1) % 3
        assert (teacher(VoxelBatch(batch.grid, features, batch.offsets)) - logits).abs().max() > 1e-3, column
    mirrored = VoxelBatch(15 - batch.grid, batch.features, batch.offsets)
    assert (teacher(mirrored) - logits).abs().max() > 1e-3


# --- Training ----------------------------------------------------------------------------------------


def test_every_parameter_learns():
    torch.manual_seed(0)
    teacher = build_teacher(**SMALL).train()
    before = {name: value.clone() for name, value in teacher.named_buffers()}
    logits = teacher(random_batch())
    F.cross_entropy(logits, torch.arange(len(logits)) % 4).backward()
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    assert all(not torch.equal(value, before[name]) for name, value in teacher.named_buffers())


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    teacher, batch = build_teacher(**SMALL).train(), random_batch()
    labels, losses = (batch.features[:, 0] > 0).long() * 2 + 1, []
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.005)
    for _ in range(12):
        loss = F.cross_entropy(teacher(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_curves_change_places_in_training_alone(monkeypatch):
    teacher, batch, drawn = small_teacher(), random_batch(), []
    permutation = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **options: drawn.append(n) or permutation(n, **options))
    with torch.no_grad():
        logits = teacher(batch)
        assert not drawn
        assert torch.equal(teacher(batch), logits)
        teacher.backbone.shuffle_in_inference = True
        torch.manual_seed(1)
        shuffled = teacher(batch)
        assert drawn == [4, 4]  # after each pooling
        assert (shuffled - logits).abs().max() > 1e-4
        # no other order of the curves than this one: the same again
        monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
        assert torch.equal(teacher(batch), logits)
    teacher.backbone.shuffle_in_inference = False
    monkeypatch.setattr(torch, "randperm", lambda n, **options: drawn.append(n) or permutation(n, **options))
    teacher.train()(batch)
    assert drawn == [4] * 4


# --- Precision ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_bfloat16_stays_near():
    teacher = small_teacher()
    scans, poses = random_scans()
    expected = teacher.point_logits(scans, poses)
    teacher.dtype = torch.bfloat16
    logits = teacher.point_logits(scans, poses)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, expected)
    assert relative_error(logits, expected) < 0.05  # 8 bits, through six blocks


@torch.no_grad()
def test_float64_agrees():
    teacher, batch = small_teacher(), random_batch()
    logits = teacher(batch)
    wide = teacher.double()(VoxelBatch(batch.grid, batch.features.double(), batch.offsets))
    assert wide.dtype == torch.float64
    assert_close(logits, wide.float(), rtol=0, atol=1e-4)  # six blocks in float32, on values of size 1


def test_training_under_autocast():
    torch.manual_seed(0)
    teacher = build_teacher(**SMALL).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = teacher(random_batch())
    logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == p.dtype for p in teacher.parameters())


@torch.no_grad()
def test_the_precision_is_that_of_inference(monkeypatch):
    monkeypatch.setattr("kdmos.precision._cpu_computes_in", lambda dtype: True)
    assert prepared(small_teacher(), "bfloat16").dtype == torch.bfloat16
    assert prepared(small_teacher()).dtype == torch.float32
    with pytest.raises(InputError, match="--precision int8"):
        prepared(small_teacher(), "int8")


# --- The logits of a scan's points -------------------------------------------------------------------


@torch.no_grad()
def test_points_get_the_logits_of_their_voxels():
    teacher = small_teacher()
    scans, poses = random_scans()
    logits = teacher.point_logits(scans, poses)
    assert (logits.shape, logits.dtype) == ((len(scans[-1]), 4), torch.float32)
    window = gather_window(scans, poses, 3)
    voxels = find_voxels(window, 0.5)
    assert len(voxels.voxel[: len(scans[-1])].unique()) < len(scans[-1])  # several points in one
    drawn = representatives(window, voxels, generator=torch.Generator().manual_seed(0))
    of_voxel = teacher(voxel_batch([(window, voxels.grid, drawn)]))
    assert torch.equal(logits, of_voxel[voxels.voxel[: len(scans[-1])]])
    assert torch.equal(logits, teacher.point_logits(scans, poses))


@torch.no_grad()
def test_scans_too_old_do_not_count_and_missing_ones_are_replaced():
    teacher = small_teacher()
    scans, poses = random_scans(5)
    assert torch.equal(teacher.point_logits(scans, poses), teacher.point_logits(scans[2:], poses[2:]))
    repeated = teacher.point_logits([scans[0], scans[0], scans[1]], poses[[0, 0, 1]])
    assert torch.equal(teacher.point_logits(scans[:2], poses[:2]), repeated)
    assert (repeated - teacher.point_logits([scans[2], scans[0], scans[1]], poses[[2, 0, 1]])).abs().max() > 1e-4


@torch.no_grad()
def test_the_world_may_lie_anywhere():
    teacher = small_teacher()
    scans, poses = random_scans()
    turn = torch.tensor([[0.0, -1, 0, 100], [1, 0, 0, -50], [0, 0, 1, 7], [0, 0, 0, 1]], dtype=torch.float64)
    assert_close(teacher.point_logits(scans, turn @ poses), teacher.point_logits(scans, poses))


@torch.no_grad()
def test_the_order_of_points_in_voxels_of_their_own_does_not_matter():
    """Voxels hold one point each here. Of several, another one would stand for its voxel, which is documented."""
    teacher = small_teacher()
    batch = random_batch((150,))
    cloud = torch.cat([(batch.grid - 8) * 0.5 + 0.2, batch.features[:, 3:4]], 1)
    scans = [cloud[age::3] for age in range(3)]
    logits = teacher.point_logits(scans, STILL.repeat(3, 1, 1))
    assert logits.std(0).min() > 1e-3
    orders = [torch.randperm(50, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    shuffled = teacher.point_logits([scan[order] for scan, order in zip(scans, orders)], STILL.repeat(3, 1, 1))
    assert torch.equal(shuffled, logits[orders[-1]])


def test_a_newest_scan_without_points_or_far_ones_is_refused():
    teacher = small_teacher()
    scans, poses = random_scans()
    with pytest.raises(ValueError, match="teacher: the newest scan has no point"):
        teacher.point_logits([*scans[:2], scans[2][:0]], poses)
    with torch.no_grad():  # others may be empty
        assert torch.isfinite(teacher.point_logits([scans[0][:0], scans[1][:0], scans[2]], poses)).all()
    scans[1][3, 0] = 1e6
    with pytest.raises(ValueError, match=r"m apart do not fit 65536 voxels of 0\.5 m"):
        teacher.point_logits(scans, poses)


# --- Voxels with several points: the logits are the remission of the point that stood ------------------


@pytest.fixture
def echo(monkeypatch):
    """answers(**voting) -> remissions: of newest points 1, 2, 3 in one voxel, 4 alone, 5 with an older 50."""
    monkeypatch.setattr(Teacher, "forward", lambda self, batch: batch.features[:, 3:4].repeat(1, 4))
    newest = torch.tensor([[0.1, 0.1, 0, 1], [0.2, 0.2, 0, 2], [0.3, 0.3, 0, 3], [1.1, 0, 0, 4], [2.1, 0, 0, 5]])
    older = torch.tensor([[0.4, 0.4, 0, 10.0], [2.2, 0.1, 0, 50], [3.1, 0, 0, 60]])
    teacher = build_teacher(**SMALL | {"num_scans": 2}).eval()

    def answers(**voting):
        teacher.voting = Voting(**voting)
        logits = teacher.point_logits([older, newest], STILL.repeat(2, 1, 1))
        assert torch.equal(logits, logits[:, :1].expand(5, 4))
        return logits[:, 0]

    return answers


def test_points_are_drawn_from_all_scans(echo):
    one = echo()
    assert one.tolist() == echo(turns=1, total=True).tolist()  # the same at each call
    assert one[0] == one[1] == one[2] and one[0] in (1, 2, 3, 10)
    assert one[3] == 4 and one[4] in (5, 50)
    many = echo(turns=40)
    assert many.tolist() == [1, 2, 3, 4, 5]  # each stood, and what it answered counts alone
    total = echo(turns=40, total=True)
    stood = total / torch.arange(1.0, 6)
    assert torch.equal(stood, stood.round()) and stood[3] == 40
    assert (stood[:3] >= 3).all() and stood[:3].sum() < 40 and 10 < stood[4] < 30


def test_the_newest_scans_points_in_turns(echo):
    """A point that stood gets its own mean, one that never stood that of its voxel."""
    assert echo(newest=True).tolist() == [1, 1, 1, 4, 5]
    assert echo(turns=2, newest=True).tolist() == [1, 2, 1.5, 4, 5]
    for turns in (3, 4, 8):
        assert echo(turns=turns, newest=True).tolist() == [1, 2, 3, 4, 5]


def test_totals_grow_with_the_turns_a_point_stood(echo):
    assert echo(turns=2, total=True, newest=True).tolist() == [1, 2, 3, 8, 10]  # the third: the voxel's 1 + 2
    assert echo(turns=4, total=True, newest=True).tolist() == [2, 2, 3, 16, 20]


# --- The authors' checkpoints ------------------------------------------------------------------------


def test_pointcepts_file(authors, golden, tmp_path):
    """Below `state_dict`, with a prefix, beside numpy numbers: nothing in it is executed."""
    weights = torch.load(golden(AUTHORS), weights_only=True)
    wrapped = {f"module.{key}": tensor for key, tensor in weights.items()}
    content = {
        "state_dict": wrapped,
        "epoch": np.int64(5),
        "best_metric_value": np.float64(0.7),
        "optimizer": {"lr": 1},
    }
    torch.save(content, tmp_path / "model_best.pth")
    teacher = load_teacher(tmp_path / "model_best.pth")
    assert teacher.header == {} and not teacher.training
    assert teacher.settings == TeacherSettings(
        encoder_depths=(1, 2, 1, 4, 1),
        encoder_channels=(16, 16, 24, 24, 32),
        decoder_depths=(2, 1, 1, 1),
        decoder_channels=(16, 16, 24, 24),
    )
    state = teacher.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in weights.items())
    assert load_model(tmp_path / "model_best.pth").settings == teacher.settings

    trap = tmp_path / "trap"
    torch.save({"state_dict": wrapped, "hook": Evil(trap)}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth: not loaded, because reading it could execute code"):
        load_teacher(tmp_path / "evil.pth")
    assert not trap.exists()


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("num_classes", "classes"),
    [(2, ("static", "moving")), (3, ("unlabeled", "static", "moving"))],
)
def test_classes_widths_and_ratio_are_read_off(tmp_path, num_classes, classes):
    shape = {
        "encoder_depths": (1, 3),
        "encoder_channels": (24, 40),
        "decoder_depths": (2,),
        "decoder_channels": (12,),
        "mlp_ratio": 1.5,
    }
    teacher = build_teacher(num_classes=num_classes, **shape)
    torch.save(teacher.half().state_dict(), tmp_path / "teacher.pth")
    loaded = load_teacher(tmp_path / "teacher.pth")
    assert loaded.settings == TeacherSettings(classes=classes, **shape)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded(random_batch((30,))).shape == (30, num_classes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seg_head.bias": None}, r"does not fit a mambamos teacher with 4 classes: 1 tensors missing.*seg_head\.bias"),
        ({"backbone.enc.enc0.block0.norm1.1.weight": (3,)}, r"0 tensors missing, 1 unknown, 0 of another shape"),
        ({"backbone.dec.dec0.up.proj.0.bias": (3,)}, r"0 tensors missing, 0 unknown, 1 of another shape"),
        ({"seg_head.weight": (7, 8)}, "looks like MambaMOS, but its tensors do not fit together"),
        ({"backbone.enc.enc0.block0.mlp.0.fc1.weight": None}, r"its tensors do not fit together .*fc1\.weight"),
        ({"backbone.enc.enc1.block0.mlp.0.fc2.bias": None}, "its tensors do not fit together"),
        ({"backbone.dec.dec1.block0.mlp.0.fc2.bias": None}, "its tensors do not fit together"),
        ({"seg_head.weight": None}, "not a student, nor a teacher"),
    ],
)
def test_authors_files_that_do_not_fit_are_refused(tmp_path, change, message):
    weights = build_teacher(**SMALL).state_dict()
    weights |= {key: None if shape is None else torch.zeros(shape) for key, shape in change.items()}
    torch.save({key: tensor for key, tensor in weights.items() if tensor is not None}, tmp_path / "teacher.pth")
    with pytest.raises(InputError, match=r"teacher\.pth: .*" + message):
        load_teacher(tmp_path / "teacher.pth")


# --- Our checkpoints ---------------------------------------------------------------------------------


@torch.no_grad()
def test_round_trip(tmp_path):
    odd = {
        "classes": ("unlabeled", "moving", "static", "parked", "sky"),
        "num_scans": 5,
        "voxel": 0.35,
        "curves": ("hilbert-trans", "z"),
        "encoder_depths": (2, 1, 3),
        "encoder_channels": (12, 20, 36),
        "decoder_depths": (1, 2),
        "decoder_channels": (20, 12),
        "mlp_ratio": 2.6,
        "drop_path": 0.1,
    }
    teacher = small_teacher(**odd)
    scans, poses = random_scans(5, 60)
    expected = teacher.point_logits(scans, poses)
    path = tmp_path / "made" / "teacher.safetensors"
    save_model(path, teacher, seed=3, data=["00"])
    assert [file.name for file in path.parent.iterdir()] == ["teacher.safetensors"]
    loaded = load_teacher(path)
    assert loaded.settings == teacher.settings == TeacherSettings(**odd, moving=1)
    assert (loaded.classes, loaded.moving, loaded.training) == (odd["classes"], 1, False)
    assert torch.equal(loaded.point_logits(scans, poses), expected)
    assert (loaded.header["model"], loaded.header["seed"], loaded.header["data"]) == ("mambamos", 3, ["00"])
    settings = json.loads(json.dumps(asdict(teacher.settings)))
    del settings["name"]
    assert {key: loaded.header[key] for key in settings} == settings
    save_model(path, loaded, torch.float16)  # once more, over the old file, at half its size
    again = load_teacher(path)
    assert again.settings == teacher.settings
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert relative_error(again.point_logits(scans, poses), expected) < 0.01  # weights of 11 bits


def test_students_and_teachers_are_told_apart(golden, tmp_path):
    save_model(tmp_path / "teacher.safetensors", build_teacher(**SMALL))
    save_model(tmp_path / "student.safetensors", build_student(grid=PolarGrid(bins=(16, 16, 2))))
    with pytest.raises(InputError, match=r"teacher\.safetensors: a mambamos teacher, not a student"):
        load_student(tmp_path / "teacher.safetensors")
    with pytest.raises(InputError, match=r"small_state_dict\.pt: a mambamos teacher, not a student"):
        load_student(golden(AUTHORS))
    with pytest.raises(InputError, match=r"student\.safetensors: a student, not a teacher"):
        load_teacher(tmp_path / "student.safetensors")
    for name in ("synthetic", "rule"):
        with pytest.raises(InputError, match=rf"{name}: a student, not a teacher"):
            load_teacher(name)
    assert isinstance(load_model(tmp_path / "teacher.safetensors"), Teacher)
    assert not isinstance(load_model(tmp_path / "student.safetensors"), Teacher)
    assert load_model(tmp_path / "teacher.safetensors", lookahead=0).settings.lookahead == 0
    for force in (False, True):
        with pytest.raises(InputError, match="a teacher, which reads no future scans, not 3"):
            load_model(tmp_path / "teacher.safetensors", lookahead=3, force=force)


def test_our_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_model(path, build_teacher(**SMALL))
    weights, header = checkpoint.load(path)
    del header["format"]

    def refused(message, weights=weights, header=header):
        checkpoint.save(path, weights, header)
        with pytest.raises(InputError, match=r"teacher\.safetensors: " + message):
            load_teacher(path)

    refused(r".*1 tensors missing.*seg_head\.bias", {key: w for key, w in weights.items() if key != "seg_head.bias"})
    refused(r".*1 unknown.*first: extra", weights | {"extra": torch.zeros(1)})
    refused(r".*1 of another shape.*seg_head\.bias", weights | {"seg_head.bias": torch.zeros(5)})
    refused(r"does not fit a mambamos teacher with 4 classes", header=header | {"encoder_channels": [8, 16, 24]})
    refused(r"the header does not describe a teacher", header=header | {"model": "mos4d"})
    refused(r"the header does not describe a teacher", header=header | {"encoder_depths": [1, 2]})
    refused(r"the header does not describe a teacher", header=header | {"moving": 4})
    refused(r"the header does not describe a teacher .*peano", header=header | {"curves": ["peano"]})
    refused(r"the header does not describe a teacher .*voxel", header={k: v for k, v in header.items() if k != "voxel"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"teacher\.safetensors: not a whole safetensors file"):
        load_teacher(path)


def test_build_refuses_other_settings():
    with pytest.raises(ValueError, match="teacher must be mambamos, got 'mos4d'"):
        build_teacher("mos4d")
    with pytest.raises(ValueError, match="name the classes of a teacher with 5 classes"):
        build_teacher(num_classes=5)
    with pytest.raises(ValueError, match='one of the classes must be "moving"'):
        build_teacher(classes=("a", "b"))
    with pytest.raises(ValueError, match="moving class 4 is not among the 4 classes"):
        TeacherSettings(moving=4)
    for wrong in ({"encoder_depths": (1, 2)}, {"decoder_depths": (1,)}, {"decoder_channels": (8, 16, 16)}):
        with pytest.raises(ValueError, match="teacher: needs two encoder_depths or more, as many encoder_channels"):
            build_teacher(**SMALL | wrong)
    for wrong in ({"num_scans": 0}, {"voxel": 0.0}, {"curves": ()}, {"drop_path": 1.0}, {"drop_path": -0.1}):
        with pytest.raises(ValueError, match="teacher: num_scans, voxel and curves must be positive"):
            build_teacher(**SMALL | wrong)
    lone = {"encoder_depths": (1,), "encoder_channels": (8,), "decoder_depths": (), "decoder_channels": ()}
    with pytest.raises(ValueError, match="teacher: needs two encoder_depths or more"):  # a decoder gives the answer
        build_teacher(**lone)
    with pytest.raises(ValueError, match=r"teacher: curves must be among .*, got peano"):
        build_teacher(**SMALL | {"curves": ("z", "peano")})


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_usual_class_lists(num_classes):
    teacher = build_teacher(num_classes=num_classes, **SMALL)
    assert (len(teacher.classes), teacher.classes[teacher.moving]) == (num_classes, "moving")
    assert (teacher.settings.lookahead, teacher.settings.history) == (0, 2)


# --- other people's kernels


def two_samples(seed=0):
    """A batch of two samples with 300 voxels each, no voxel twice."""
    generator = torch.Generator().manual_seed(seed)
    grids = [torch.randperm(12**3, generator=generator)[:300].sort().values for _ in range(2)]
    grid = torch.cat([torch.stack([g // 144, g // 12 % 12, g % 12], 1) for g in grids])
    age = torch.randint(0, 3, (600, 1), generator=generator).float()
    features = torch.cat([grid * 0.1, torch.rand(600, 1, generator=generator), age], 1)
    return VoxelBatch(grid, features, torch.tensor([0, 300, 600]))


def small_settings():
    return TeacherSettings(
        num_scans=3,
        encoder_depths=(1, 1),
        encoder_channels=(16, 16),
        decoder_depths=(1,),
        decoder_channels=(16,),
    )


@torch.no_grad()
def test_spconv_gives_the_same_logits():
    pytest.importorskip("spconv.pytorch")
    torch.manual_seed(0)
    teacher, batch = Teacher(small_settings()).eval(), two_samples()
    ours = teacher(batch)
    teacher.use_backend("spconv")
    assert_close(teacher(batch), ours, atol=1e-5, rtol=1e-5)  # it sums the offsets in another order


@torch.no_grad()
def test_mamba_ssm_gets_its_own_layout(monkeypatch):
    """Its package needs a GPU: here a stand-in with its signature, which recurs as it documents."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
        state, out = torch.zeros(*u.shape[:2], A.shape[1]), []
        for t in range(u.shape[2]):
            state = (delta[:, :, t, None] * A).exp() * state + (delta * u)[:, :, t, None] * B[:, None, :, t]
            out.append((state * C[:, None, :, t]).sum(2))
        return (torch.stack(out, 2) + D[:, None] * u) * torch.nn.functional.silu(z)

    calls = []
    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = lambda *args, **more: calls.append(args[0].shape) or selective_scan_fn(*args, **more)
    package = types.ModuleType("mamba_ssm")
    package.__spec__ = importlib.machinery.ModuleSpec("mamba_ssm", None)
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", types.ModuleType("mamba_ssm.ops"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    teacher, batch = Teacher(small_settings()).eval(), two_samples()
    ours = teacher(batch)
    assert not calls  # "auto" takes it on a GPU alone
    teacher.use_backend("mamba")
    assert_close(teacher(batch), ours, atol=1e-5, rtol=1e-5)  # float32 sums in another order
    assert calls[:2] == [(1, 32, 300)] * 2


def test_a_backend_that_is_not_there_is_refused():
    teacher = Teacher(small_settings())
    with pytest.raises(ValueError, match="backend must be one of"):
        teacher.use_backend("cuda")
    if importlib.util.find_spec("mamba_ssm") is None:
        with pytest.raises(ValueError, match="backend mamba: mamba-ssm is not installed"):
            teacher.use_backend("mamba")
