"""The students: the authors' outputs and gradients, their checkpoints, ours, and grids of other sizes."""

import json
import os
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.testing import assert_close

from kdmos import checkpoint, ops
from kdmos.errors import InputError
from kdmos.losses import WDCD, cross_entropy, lovasz_softmax
from kdmos.models import DySample, Student, build_student, load_student, published, save_model
from kdmos.models.blocks import CircularConv2d, DropBlock2d, Dropout
from kdmos.settings import MotionSettings, PolarGrid, ResidualGrid, StudentSettings

SMALL = PolarGrid(bins=(41, 24, 8))
KEYS = {"kdmos": "a3_kdmos_state_dict_keys.json", "motionbev": "a3_motionbev_nclass4_state_dict_keys.json"}


@pytest.fixture(scope="module")
def frames(golden):
    """Scans 7 and 11 packed: points, offsets, the authors' residual channels and labels."""
    with np.load(golden("a1_residual.npz")) as file:
        splits = np.cumsum(file["n_points"])[:-1]
        points, residual = (np.split(file[name], splits) for name in ("scans", "residual"))
    with np.load(golden("a2_polar.npz")) as file:
        labels = np.concatenate([file["f07_point_label"], file["f11_point_label"]])[:, 0]
    return {
        "points": torch.from_numpy(np.concatenate([points[7], points[11]])),
        "offsets": torch.tensor([0, len(points[7]), len(points[7]) + len(points[11])]),
        "residual": torch.from_numpy(np.concatenate([residual[7], residual[11]])),
        "labels": torch.from_numpy(labels),
    }


@pytest.fixture(scope="module")
def a3(golden):
    with np.load(golden("a3_student.npz")) as file:
        return dict(file)


@pytest.fixture
def authors(golden):
    return load_student(golden("student_state_dict.pt"))


@pytest.fixture(scope="module")
def key_lists(golden):
    """name of the student -> the authors' key -> shape, and their number of parameters."""
    lists = {name: json.loads(golden(file).read_text()) for name, file in KEYS.items()}
    return {
        name: ({key: tuple(spec[:-1]) for key, spec in content["keys"].items()}, content["n_params"])
        for name, content in lists.items()
    }


def our_names(theirs):
    """Our name of each of the authors' tensors that lives: the mapping hands the very tensors through."""
    ours, _ = published.convert(theirs, "the authors' file")
    name_of = {id(tensor): name for name, tensor in ours.items()}
    return {key: name_of[id(tensor)] for key, tensor in theirs.items() if id(tensor) in name_of}


def made_up(shapes, seed=0):
    """Tensors for the authors' keys; variances positive, counters integer."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(7)
        elif key.endswith("running_var"):
            weights[key] = torch.rand(shape, generator=generator) + 0.5
        else:
            weights[key] = torch.randn(shape, generator=generator) * 0.1
    return weights


def relative_error(actual, expected):
    """Norm of the difference over the norm of what is expected."""
    expected = torch.as_tensor(expected).double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def lively(student, seed=0):
    """Weights and statistics under which every layer matters, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in student.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.weight.data *= 2  # torch's default would let the signal fade
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
            module.running_var += 0.5 * torch.rand(module.running_var.shape, generator=generator)
        if isinstance(module, DySample):
            module.offset.weight.data = torch.randn(module.offset.weight.shape, generator=generator) * 0.1
    return student.eval()


def small_student(name="kdmos", seed=0, grid=SMALL, **settings):
    torch.manual_seed(seed)
    return lively(build_student(name, grid=grid, **settings), seed)


def random_scan(num_points, num_channels=8, seed=0):
    """Points, some beyond the grid, and sparse residuals."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num_points, 4, generator=generator) * torch.tensor([20.0, 20.0, 1.5, 0.3])
    residual = torch.randn(num_points, num_channels, generator=generator)
    return points, residual * (torch.rand(residual.shape, generator=generator) < 0.2)


# --- The authors' student ----------------------------------------------------------------------------


@torch.no_grad()
def test_logits_equal_the_authors(authors, frames, a3):
    lengths = frames["offsets"].diff().tolist()
    logits = authors.point_logits(frames["points"].split(lengths), frames["residual"].split(lengths))
    assert [len(scan) for scan in logits] == a3["split"].tolist()
    logits, expected = torch.cat(logits), torch.from_numpy(a3["point_logits"])
    # 11 convolutions one after another, in another order of summation than theirs: 2e-7 seen.
    assert_close(logits, expected, rtol=0, atol=1e-4)
    assert (logits.argmax(1).numpy() == a3["pred"]).mean() >= 0.9999


@torch.no_grad()
def test_training_mode_equals_the_authors(authors, frames, golden):
    """Batch statistics and their running means; Dropout and DropBlock off, as in the golden.

    torch sums the variance of a channels-last batch norm over 345 600 mostly empty cells in float32, per thread: the
    golden itself is 3.1e-3 (norm of the difference over norm) away from a run in float64. On two threads, as it was
    made, ours meets it within 4e-5, on one within 3.4e-3; so the logits get a loose bound and the statistics, whose
    largest difference is 4e-5 on any number of threads, a close one.
    """
    with np.load(golden("a3_student_trainmode.npz")) as file:
        expected = dict(file)
    authors.train()
    for module in authors.modules():
        if isinstance(module, DropBlock2d | torch.nn.Dropout):
            module.eval()
    logits = authors(frames["points"], frames["offsets"], frames["residual"]).point_logits
    wanted = torch.from_numpy(expected["point_logits"])
    assert relative_error(logits, wanted) < 0.01
    assert (logits.argmax(1) == wanted.argmax(1)).float().mean() > 0.995

    names = our_names(torch.load(golden("student_state_dict.pt"), weights_only=True))
    buffers = dict(authors.named_buffers())
    statistics = {key.removeprefix("buf__"): value for key, value in expected.items() if key.startswith("buf__")}
    assert len(statistics) == 50
    for key, value in statistics.items():
        assert relative_error(buffers[names[key]], value) < 1e-3, key


def test_gradients_equal_the_authors(authors, frames, a3, golden):
    """The whole objective in eval mode: CE + Lovasz on voxels + 0.3 WDCD on points.

    Empty cells are equal up to rounding, and max pooling sends its gradient to one of them: to which one depends on
    the order of float32 sums, that is on the number of threads. On two, as the golden was made, the largest relative
    error of a parameter's gradient is 6e-5; on one it is 3.5e-3, and so it is against a run in float64.
    """
    labels = frames["labels"]
    output = authors(frames["points"], frames["offsets"], frames["residual"])
    voxel_labels = ops.voxel_label(output.gridded.voxel_rank, labels, len(output.gridded.voxels), 4)
    teacher = torch.from_numpy(a3["teacher_logits"])
    segmentation = cross_entropy(output.voxel_logits, voxel_labels) + lovasz_softmax(output.voxel_logits, voxel_labels)
    distillation = WDCD("authors")(output.point_logits, teacher, labels)
    total = segmentation + 0.3 * distillation
    assert abs(segmentation.item() - a3["loss_seg"]) < 1e-5
    # Their NCKD, three times in the sum, carries 1e-5 of the constant that ours leaves out.
    assert abs(distillation.item() - (3 * a3["loss_nckd"] + a3["loss_tckd"])) < 1e-4
    assert abs(total.item() - a3["loss_total"]) < 1e-4

    total.backward()
    names = our_names(torch.load(golden("student_state_dict.pt"), weights_only=True))
    parameters = dict(authors.named_parameters())
    errors = {}
    for key, norm in zip(json.loads(a3["grad_names"].tobytes()), a3["grad_norms"]):
        if key.endswith(" [none]"):  # the layers that their forward never uses
            assert published.DEAD.search(key)
            continue
        gradient = parameters.pop(names[key]).grad
        error = abs(gradient.double().norm().item() - norm) / norm
        if f"grad__{key}" in a3:
            error = max(error, relative_error(gradient, a3[f"grad__{key}"]))
        errors[key] = error
    assert not parameters
    assert max(errors.values()) < 0.01, max(errors, key=errors.get)
    assert np.median(list(errors.values())) < 1e-3


@pytest.mark.parametrize("name", KEYS)
def test_every_key_of_the_authors_has_its_place(key_lists, name):
    shapes, num_parameters = key_lists[name]
    names = our_names(made_up(shapes))
    dead = shapes.keys() - names.keys()
    assert all(published.DEAD.search(key) for key in dead)
    own = {key: tuple(tensor.shape) for key, tensor in build_student(name).state_dict().items()}
    assert {names[key]: shapes[key] for key in names} == own
    assert len(names) == len(own)  # no two of theirs in one place
    # what never lived: attention layers, and DySample's constant start (a buffer)
    attention = [key for key in dead if not key.endswith("init_pos")]
    assert sum(int(np.prod(shapes[key])) for key in attention) == 5512
    assert sum(p.numel() for p in build_student(name).parameters()) == num_parameters - 5512


@pytest.mark.parametrize(("name", "num_parameters"), [("kdmos", 4_031_366), ("motionbev", 4_364_518)])
def test_parameter_counts(name, num_parameters):
    assert sum(p.numel() for p in build_student(name).parameters()) == num_parameters - 5_512


# --- The head at occupied voxels only ----------------------------------------------------------------


def test_objective_equals_that_of_the_dense_head():
    """In float64: every voxel through the 1x1 convolution, empty ones unlabeled; same losses, same gradients."""
    student = small_student().double()
    scans = [random_scan(300, seed=1), random_scan(450, seed=2)]
    points, residual = (torch.cat(parts).double() for parts in zip(*scans))
    offsets = torch.tensor([0, 300, 750])
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (750,), generator=generator)
    teacher = torch.randn(750, 4, generator=generator, dtype=torch.float64)

    seen = []
    student.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    output = student(points, offsets, residual)
    grid = output.gridded
    voxel_labels = ops.voxel_label(grid.voxel_rank, labels, len(grid.voxels), 4)

    dense = student.head(seen[0]).unflatten(1, (SMALL.bins[2], 4))  # [B, Z, C, R, A]
    dense = dense.permute(0, 3, 4, 1, 2).flatten(0, 3)
    dense_labels = torch.zeros(len(dense), dtype=torch.uint8)
    dense_labels[grid.voxels] = voxel_labels
    assert len(dense) > 10 * len(grid.voxels)

    def objective(voxel_logits, voxel_labels, point_logits):
        return torch.stack(
            [
                cross_entropy(voxel_logits, voxel_labels),
                lovasz_softmax(voxel_logits, voxel_labels),
                WDCD("authors")(point_logits, teacher, labels),
            ]
        )

    ours = objective(output.voxel_logits, voxel_labels, output.point_logits)
    expected = objective(dense, dense_labels, dense[grid.voxels][grid.voxel_rank])
    assert_close(ours, expected)
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(ours.sum(), parameters, retain_graph=True)
    wanted = torch.autograd.grad(expected.sum(), parameters)
    assert all(gradient.any() for gradient in gradients)
    for gradient, dense_gradient in zip(gradients, wanted):
        assert_close(gradient, dense_gradient)


# --- Sizes, batches, edges ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bins", "classes", "num_channels"),
    [
        ("kdmos", (41, 24, 8), ("unlabeled", "static", "moving"), 4),
        ("motionbev", (41, 24, 8), ("static", "moving"), 2),
        ("kdmos", (41, 401, 5), ("unlabeled", "static", "movable", "moving"), 8),
        ("motionbev", (33, 47, 2), ("moving", "static"), 6),
        ("kdmos", (16, 16, 3), ("static", "moving"), 8),
    ],
)
@torch.no_grad()
def test_other_grids_classes_and_channels(name, bins, classes, num_channels):
    student = small_student(name, classes=classes, num_channels=num_channels, grid=PolarGrid(bins=bins))
    assert student.classes == classes
    assert student.moving == classes.index("moving")
    points, residual = random_scan(500, num_channels)
    (logits,) = student.point_logits([points], [residual])
    assert logits.shape == (500, len(classes))
    assert torch.isfinite(logits).all()
    assert logits.std(0).min() > 1e-3  # points do differ
    # Points of one voxel have one answer.
    rank = ops.polar_grid(points, torch.tensor([0, 500]), student.settings.grid).voxel_rank
    first = torch.zeros(rank.max() + 1, dtype=torch.int64).scatter_reduce(
        0, rank, torch.arange(500), "amin", include_self=False
    )
    assert torch.equal(logits, logits[first[rank]])


@pytest.mark.parametrize("name", KEYS)
@torch.no_grad()
def test_a_batch_equals_its_scans(name):
    student = small_student(name)
    scans = [random_scan(400, seed=1), random_scan(1, seed=2), random_scan(700, seed=3)]
    together = student.point_logits(*zip(*scans))
    for logits, (points, residual) in zip(together, scans):
        assert_close(logits, student.point_logits([points], [residual])[0])


@pytest.mark.parametrize("where", [0, 1])
def test_a_scan_without_points_in_the_batch(where):
    student = small_student()
    points, residual = random_scan(300)
    nothing = (points[:0], residual[:0])
    batch = [(points, residual)]
    batch.insert(where, nothing)
    with torch.no_grad():
        logits = student.point_logits(*zip(*batch))
        assert [len(scan) for scan in logits] == [0 if scan == where else 300 for scan in range(2)]
        assert_close(logits[1 - where], student.point_logits([points], [residual])[0])
    # and it can be trained with
    student.train()
    torch.cat(student.point_logits(*zip(*batch))).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


@torch.no_grad()
def test_the_order_of_the_points_does_not_matter():
    student = small_student()
    points, residual = random_scan(400)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    (logits,), (shuffled,) = (student.point_logits([points[i]], [residual[i]]) for i in (torch.arange(400), order))
    assert_close(shuffled, logits[order])


@torch.no_grad()
def test_residuals_and_remission_matter():
    student = small_student()
    points, residual = random_scan(400)
    (logits,) = student.point_logits([points], [residual])
    for changed in (student.point_logits([points], [residual * 0]), student.point_logits([points * 0.9], [residual])):
        assert (changed[0] - logits).abs().max() > 1e-3


def test_refuses_what_does_not_fit():
    student = small_student()
    points, residual = random_scan(10)
    with pytest.raises(ValueError, match=r"student: expected residual \[10, 8\], got \[10, 4\]"):
        student.point_logits([points], [residual[:, :4]])
    with pytest.raises(ValueError, match=r"student: expected residual \[10, 8\], got \[9, 8\]"):
        student.point_logits([points], [residual[1:]])
    with pytest.raises(ValueError, match=r"polar_grid: expected points \[N, 4\].*is remission missing"):
        student.point_logits([points[:, :3]], [residual])
    with pytest.raises(ValueError, match="student: the batch has no point"):
        student.point_logits([points[:0]], [residual[:0]])


def test_build_refuses_other_settings():
    with pytest.raises(ValueError, match=r"student must be one of .*got 'mos4d'"):
        build_student("mos4d")
    with pytest.raises(ValueError, match="name the classes of a student with 5 classes"):
        build_student(num_classes=5)
    with pytest.raises(ValueError, match='one of the classes must be "moving"'):
        build_student(classes=("a", "b"))
    with pytest.raises(ValueError, match="needs 16 x 16 cells"):
        build_student(grid=PolarGrid(bins=(480, 15, 32)))
    with pytest.raises(ValueError, match="num_channels must be even"):
        build_student(num_channels=3)
    with pytest.raises(ValueError, match="moving class 4 is not among the 4 classes"):
        StudentSettings(moving=4)


@pytest.mark.parametrize(("num_classes", "moving"), [(2, 1), (3, 2), (4, 3)])
def test_usual_class_lists(num_classes, moving):
    student = build_student(num_classes=num_classes, grid=SMALL)
    assert (len(student.classes), student.moving) == (num_classes, moving)
    assert student.head.out_channels == 8 * num_classes


def test_the_rule_stands_in_for_a_student():
    rule = load_student("rule")
    points, residual = torch.zeros(3, 4), torch.tensor([[0.5, -1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).repeat(1, 2)
    residual[1, 4:] = 0  # three of eight
    logits = rule(points, torch.tensor([0, 3]), residual).point_logits
    assert (logits.argmax(1) == rule.moving).tolist() == [True, False, False]
    assert rule.classes == ("static", "moving")
    with pytest.raises(InputError, match="rule: needs all its channels"):
        load_student("rule", lookahead=0)


# --- Blocks ------------------------------------------------------------------------------------------


def test_circular_convolution_wraps_phi_and_ends_rho():
    torch.manual_seed(0)
    layer = CircularConv2d(3, 4).double()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    assert_close(layer(x.roll(2, 3)), layer(x).roll(2, 3))
    around = torch.cat([x[..., -1:], x, x[..., :1]], 3)
    assert_close(layer(x), F.conv2d(F.pad(around, (0, 0, 1, 1)), layer.weight, layer.bias))


def test_dropblock_drops_squares_of_all_channels():
    torch.manual_seed(0)
    layer = DropBlock2d()
    x = torch.ones(4, 3, 200, 200)
    assert layer.eval()(x) is x
    out = layer.train()(x)
    kept = out != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))  # one mask for all channels
    assert not torch.equal(kept[0], kept[1])  # but one for each scan
    # What is kept is rescaled by its share: the mean stays.
    assert_close(out.mean(), torch.tensor(1.0))
    assert out.unique().numel() == 2
    # A pixel stays if none of the 49 around it is a seed, each with 0.5 / 49. The 40 000 pixels of a mask make
    # about 800 independent squares, so the share of four masks has a deviation of about 0.01.
    inner = kept[:, :1, 3:-3, 3:-3].float().mean().item()
    assert inner == pytest.approx((1 - 0.5 / 49) ** 49, abs=0.04)
    # Nothing but 7 x 7 squares: erosion, then dilation, changes nothing away from the border.
    dropped = 1 - kept[:, :1].float()
    opened = F.max_pool2d(F.pad(-F.max_pool2d(-dropped, 7, stride=1), (6, 6, 6, 6)), 7, stride=1)
    assert torch.equal(opened[..., 6:-6, 6:-6], dropped[..., 6:-6, 6:-6])


def test_dropblock_gradient_and_limits():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 30, dtype=torch.float64, requires_grad=True)
    out = DropBlock2d()(x)
    out.sum().backward()
    assert_close(x.grad * x, out)
    assert DropBlock2d(probability=0.0)(x) is x
    torch.manual_seed(0)
    single = DropBlock2d(probability=0.5, block=1)(torch.ones(1, 1, 100, 100))
    assert (single == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)  # four deviations
    assert torch.isfinite(DropBlock2d(probability=49.0)(x)).all()  # nothing is kept


# --- The authors' checkpoints ------------------------------------------------------------------------


def test_two_class_motionbev_file(key_lists, tmp_path):
    """As MotionBEV publishes it: no unlabeled and no movable class; a full forward works."""
    shapes = key_lists["motionbev"][0] | {
        "BEV_model.network.outc.conv.weight": (64, 32, 1, 1),
        "BEV_model.network.outc.conv.bias": (64,),
    }
    weights = made_up(shapes)
    torch.save(weights, tmp_path / "motionbev.pt")
    student = load_student(tmp_path / "motionbev.pt")
    assert student.settings == StudentSettings(name="motionbev", classes=("static", "moving"))
    assert student.moving == 1
    assert not student.training
    assert student.header == {}
    state = student.state_dict()
    for key, name in our_names(weights).items():
        assert torch.equal(state[name], weights[key]), key
    with torch.no_grad():
        (logits,) = student.point_logits(*([part] for part in random_scan(100)))
    assert logits.shape == (100, 2)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("num_classes", "classes"),
    [(3, ("unlabeled", "static", "moving")), (4, ("unlabeled", "static", "movable", "moving"))],
)
def test_classes_channels_and_upsampler_are_read_off(key_lists, tmp_path, num_classes, classes):
    shapes = key_lists["kdmos"][0] | {
        "BEV_model.network.outc.conv.weight": (32 * num_classes, 32, 1, 1),
        "BEV_model.network.outc.conv.bias": (32 * num_classes,),
        "BEV_model.network.res_inc.conv.1.conv1.0.weight": (16, 4, 3, 3),
    }
    for key in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"BEV_model.network.res_inc.conv.0.{key}"] = (4,)
    torch.save(made_up(shapes), tmp_path / "student.pt")
    student = load_student(tmp_path / "student.pt")
    assert student.settings == StudentSettings("kdmos", classes, motion=MotionSettings(num_channels=4))
    assert student.settings.motion.lookahead == 3


def test_prefixes_and_numpy_scalars_beside_the_weights(key_lists, tmp_path):
    weights = made_up(key_lists["kdmos"][0])
    torch.save(weights, tmp_path / "plain.pt")
    expected = load_student(tmp_path / "plain.pt").state_dict()
    wrapped = {f"module.{key}": tensor for key, tensor in weights.items()}
    beside = {"epoch": 7, "best": np.float64(0.5), "step": np.int64(3), "lr": np.float32(0.1), "done": np.bool_(True)}
    for name, content in {
        "module.pt": wrapped,
        "pointcept.pth": {"state_dict": wrapped, "epoch": np.int64(5), "best_metric_value": np.float64(0.7)},
        "nested.pt": {"model": weights, "optimizer": {"lr": 0.1}, **beside},
    }.items():
        torch.save(content, tmp_path / name)
        state = load_student(tmp_path / name).state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items()), name
    for legacy in (False, True):
        torch.save({"state_dict": weights, **beside}, tmp_path / "old.pt", _use_new_zipfile_serialization=not legacy)
        assert load_student(tmp_path / "old.pt").settings.name == "kdmos"


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_execute_code_is_refused(key_lists, tmp_path):
    trap = tmp_path / "trap"
    content = {"state_dict": made_up(key_lists["kdmos"][0]), "hyper": Evil(trap)}
    torch.save(content, tmp_path / "zip.pt")
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(content, protocol=2))
    for name in ("zip.pt", "legacy.pt", "pickle.pt"):
        with pytest.raises(InputError, match=rf"{name}: not loaded, because reading it could execute code"):
            load_student(tmp_path / name)
    with pytest.raises(InputError, match=r"mkdir"):
        load_student(tmp_path / "zip.pt")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"BEV_model.network.down2.mpconv.1.conv1.0.weight": None},
            r"1 tensors missing, 0 unknown, 0 of another shape \(first: unet\.appearance\.blocks\.2\.0\.conv\.weight\)",
        ),
        (
            {"BEV_model.network.CGM9.fuse_feature2.weight": (2, 32, 3, 3)},
            r"0 tensors missing, 1 unknown, 0 of another shape \(first: unet\.attention\.9\.gate\.weight\)",
        ),
        (
            {"fea_compression.0.weight": (16, 256)},
            r"0 tensors missing, 0 unknown, 1 of another shape \(first: compress\.weight\)",
        ),
        ({"BEV_model.network.mamba.weight": (3,)}, r"key BEV_model\.network\.mamba\.weight belongs to no layer"),
        ({"something.else": (3,)}, r"key something\.else belongs to no layer"),
        ({"BEV_model.network.outc.conv.weight": None}, r"the tensor for head\.weight is missing"),
        ({"BEV_model.network.res_inc.conv.0.weight": None}, r"the tensor for unet\.motion\.norm\.weight is missing"),
        ({"BEV_model.network.outc.conv.weight": (100, 32, 1, 1)}, "the head has 100 channels, which is not 32 heights"),
    ],
)
def test_authors_files_that_do_not_fit_are_refused(key_lists, tmp_path, change, message):
    shapes = {key: shape for key, shape in (key_lists["kdmos"][0] | change).items() if shape is not None}
    torch.save(made_up(shapes), tmp_path / "student.pt")
    with pytest.raises(InputError, match=r"student\.pt: .*" + message):
        load_student(tmp_path / "student.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"<html>",
        bytes(100),
        b"PK\x03\x04",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"student{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"student\.\w+: not "):
        load_student(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_authors_file_is_refused(key_lists, tmp_path, legacy):
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    shapes = dict(list(key_lists["kdmos"][0].items())[:20])
    torch.save(made_up(shapes), whole, _use_new_zipfile_serialization=not legacy)
    content = whole.read_bytes()
    for share in (0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
        part.write_bytes(content[: int(share * len(content))])
        with pytest.raises(InputError, match=r"part\.pt: "):
            load_student(part)


def test_files_without_a_student_are_refused(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: not a student"):
        load_student(tmp_path / "other.pt")
    for name, content in {"number.pt": 3, "list.pt": [torch.zeros(2)], "numbers.pt": {"epoch": 3}}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(InputError, match=rf"{name}: holds no state_dict"):
            load_student(tmp_path / name)
    for missing in (tmp_path / "nothing.pt", tmp_path / "nothing.safetensors"):
        with pytest.raises(InputError, match="no such checkpoint file"):
            load_student(missing)
    with pytest.raises(InputError, match="a folder; name a file in it"):
        load_student(tmp_path)
    (tmp_path / "state.ckpt").touch()
    with pytest.raises(InputError, match="a training state, to resume from"):
        load_student(tmp_path / "state.ckpt")


# --- Our checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEYS)
@torch.no_grad()
def test_round_trip(tmp_path, name):
    grid = PolarGrid(rho=(1.0, 40.3), phi=(-1.1, 1.3), z=(-3.3, 1.7), bins=(41, 24, 8))
    motion = MotionSettings("causal", 4, grid=ResidualGrid(rows=90, columns=120, z=(-3.0, 1.0), min_height=0.3))
    student = small_student(name, classes=("unlabeled", "moving", "static"), motion=motion, grid=grid)
    points, residual = random_scan(300, 4)
    expected = student.point_logits([points], [residual])[0]
    path = tmp_path / "made" / "student.safetensors"
    save_model(path, student, seed=3, metrics={"moving_iou": 0.7}, data=["00", "01"])
    assert [file.name for file in path.parent.iterdir()] == ["student.safetensors"]

    loaded = load_student(path)
    assert loaded.settings == student.settings
    assert (loaded.classes, loaded.moving) == (("unlabeled", "moving", "static"), 1)
    assert not loaded.training
    assert torch.equal(loaded.point_logits([points], [residual])[0], expected)
    assert loaded.header["model"] == name
    assert (loaded.header["seed"], loaded.header["metrics"], loaded.header["data"]) == (
        3,
        {"moving_iou": 0.7},
        ["00", "01"],
    )
    settings = json.loads(json.dumps(asdict(student.settings)))
    assert {key: loaded.header[key] for key in settings if key != "name"} == {
        key: value for key, value in settings.items() if key != "name"
    }
    # once more, over the old file
    header = {key: value for key, value in loaded.header.items() if key in ("seed", "metrics", "data")}
    save_model(path, loaded, **header)
    again = load_student(path)
    assert again.header == loaded.header
    assert again.settings == student.settings


def test_moving_class_of_another_name(tmp_path):
    settings = StudentSettings(classes=("still", "mover", "rest"), moving=1, grid=SMALL)
    save_model(tmp_path / "student.safetensors", Student(settings))
    student = load_student(tmp_path / "student.safetensors")
    assert student.settings == settings
    assert student.moving == 1


def test_another_lookahead_has_to_be_forced(tmp_path):
    path = tmp_path / "student.safetensors"
    save_model(path, small_student())
    assert load_student(path, lookahead=7).settings.motion.lookahead == 7
    with pytest.raises(InputError, match=r"student\.safetensors: was trained with a look-ahead of 7 scans, not 3"):
        load_student(path, lookahead=3)
    assert load_student(path, lookahead=3, force=True).settings.motion.lookahead == 3
    with pytest.raises(InputError, match=r"student\.safetensors: .*lookahead must lie in 0\.\.7"):
        load_student(path, lookahead=8, force=True)


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "student.safetensors"
    save_model(path, small_student())
    content = path.read_bytes()
    for length in (0, 4, 8, 100, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"student\.safetensors: not a whole safetensors file"):
            load_student(path)


def test_our_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "student.safetensors"
    save_model(path, small_student())
    weights, header = checkpoint.load(path)
    del header["format"]

    def refused(message, weights=weights, header=header):
        checkpoint.save(path, weights, header)
        with pytest.raises(InputError, match=r"student\.safetensors: " + message):
            load_student(path)

    without = {key: tensor for key, tensor in weights.items() if key != "compress.bias"}
    refused(r"does not fit a kdmos student with 4 classes: 1 tensors missing.*first: compress\.bias", without)
    refused(r".*1 unknown.*first: extra", weights | {"extra": torch.zeros(1)})
    refused(r".*1 of another shape.*first: compress\.bias", weights | {"compress.bias": torch.zeros(31)})
    refused(r"does not fit a motionbev student", header=header | {"model": "motionbev"})
    refused(r"the header does not describe a student", header=header | {"model": "mos4d"})
    refused(r"the header does not describe a student", header=header | {"grid": {"bins": [41, 24, 8], "colour": 1}})
    refused(r"the header does not describe a student", header=header | {"motion": {}})
    refused(
        r"the header does not describe a student .*classes", header={k: v for k, v in header.items() if k != "classes"}
    )
    refused(r"not a student", header={"about": "something else"})
    refused(r"format 99 is newer than this kdmos", header=header | {"format": 99})
    save_file({"layer.weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"student\.safetensors: not a student"):
        load_student(path)


# --- What the blocks do quicker than torch's own layers ------------------------------------------------


def test_weights_and_features_are_channels_last():
    student = small_student()
    seen = []
    student.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    points, residual = random_scan(300)
    student.point_logits([points], [residual])
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    convolutions = [m for m in student.modules() if isinstance(m, CircularConv2d)]
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in convolutions)


def test_dropout_drops_half_and_doubles_the_rest():
    torch.manual_seed(0)
    x = torch.ones(1, 4, 50, 50, requires_grad=True)
    out = Dropout()(x)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert abs(out.mean().item() - 1) < 0.05  # 10,000 draws: five standard deviations
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out)
    assert Dropout().eval()(x) is x
