"""The student made ready for inference: the same answers, in every precision this machine has."""

import sys

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kdmos.data.semantic_kitti import find_sequences
from kdmos.inference import prepared
from kdmos.models import build_student, load_student
from kdmos.models.fast import FastStudent, GraphedStudent
from kdmos.motion import motion_channels
from kdmos.ops import native
from kdmos.precision import usable_precision
from kdmos.settings import PolarGrid


@pytest.fixture
def trained(stirred):
    """trained() -> a student whose norms have seen something: every statistic and weight is away from its start."""

    def make(name="kdmos", bins=(41, 50, 8), seed=0):
        torch.manual_seed(seed)
        return stirred(build_student(name, grid=PolarGrid(bins=bins)))

    return make


def scans(lengths=(900, 0, 600), seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(sum(lengths), 4, generator=generator) * torch.tensor([20.0, 20.0, 1.0, 0.1])
    residual = torch.randn(sum(lengths), 8, generator=generator).relu()
    return points, torch.tensor([0, *lengths]).cumsum(0), residual


@pytest.mark.parametrize("backend", native.BACKENDS)
@pytest.mark.parametrize("name", ["kdmos", "motionbev"])
@pytest.mark.parametrize("bins", [(41, 50, 8), (24, 16, 4)])
def test_float32_is_the_student(name, bins, backend, trained):
    if backend == "native" and not native.BUILT:
        pytest.skip("the native ops are not built")
    student, batch = trained(name, bins), scans()
    with native.backend(backend), torch.no_grad():
        expected = student(*batch).point_logits
        fast = FastStudent(student)
        out = fast(*batch)
    assert out.point_logits.dtype == torch.float32
    assert_close(out.point_logits, expected, rtol=1e-4, atol=1e-4)
    assert (out.point_logits.argmax(1) == expected.argmax(1)).float().mean() > 0.999
    assert (fast.classes, fast.moving, fast.settings) == (student.classes, student.moving, student.settings)


def test_bfloat16_stays_close(trained):
    student, batch = trained(), scans()
    if usable_precision("bfloat16", "cpu") != torch.bfloat16:
        pytest.skip("this CPU does not compute in bfloat16")
    with torch.no_grad():
        expected = student(*batch).point_logits
    out = FastStudent(student, "bfloat16")(*batch).point_logits
    assert out.dtype == torch.float32
    assert (out - expected).abs().mean() < 0.02 * expected.std()


def everywhere(monkeypatch):
    """No cell is said to be background."""
    monkeypatch.setattr("kdmos.ops.cell_distance", lambda occupied, most: occupied.to(torch.uint8).zero_())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["kdmos", "motionbev"])
@pytest.mark.parametrize("bins", [(41, 50, 8), (24, 16, 4), (120, 90, 4)])
def test_keeping_away_from_background_changes_nothing(precision, name, bins, monkeypatch, trained):
    """To the last bit, of a batch with few points in one scan and none in another."""
    fast, batch = FastStudent(trained(name, bins), precision), scans((900, 0, 3))
    batch[2][::2] = 0  # half of the points have no residual
    found = fast(*batch).point_logits
    everywhere(monkeypatch)
    assert torch.equal(found, fast(*batch).point_logits)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_real_scan_without_its_background(precision, realdata, monkeypatch):
    (sequence,) = find_sequences(realdata("kitti-raw-0005-a"))
    clouds = [torch.from_numpy(sequence.read_points(frame)) for frame in sequence.frames[:9]]
    residual = motion_channels(clouds, sequence.poses()[:9], 8)[7]
    batch = clouds[7], torch.tensor([0, len(clouds[7])]), residual
    fast = FastStudent(load_student("synthetic"), precision)
    labels = [fast(*batch).point_logits.argmax(1)]
    everywhere(monkeypatch)
    labels.append(fast(*batch).point_logits.argmax(1))
    assert torch.equal(*labels)
    monkeypatch.setattr("kdmos.ops.can_mask", lambda parts, outputs=16: False)
    labels.append(fast(*batch).point_logits.argmax(1))
    # torch's convolution adds in another order: a point between two classes may change sides
    assert (labels[0] != labels[2]).sum() < 1e-3 * len(labels[0])


def test_copies_the_weights(trained):
    student, batch = trained(), scans()
    fast = FastStudent(student)
    before = fast(*batch).point_logits
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(fast(*batch).point_logits, before)
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_precisions(monkeypatch):
    assert usable_precision("float32", "cpu") == torch.float32
    with pytest.raises(
        ValueError, match=r"precision must be one of \('float32', 'tf32', 'bfloat16', 'float16'\), got 'int8'"
    ):
        usable_precision("int8", "cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.warns(UserWarning, match="bfloat16 is not computed natively on this cpu; staying in float32"):
        assert usable_precision("bfloat16", "cpu") == torch.float32


# --- Of fixed size, as a CUDA graph needs it; here without the graph ----------------------------------


def one_scan(num_points, seed=0):
    return scans((num_points,), seed)


@pytest.mark.parametrize("backend", native.BACKENDS)
@pytest.mark.parametrize("bins", [(41, 50, 8), (24, 16, 4)])
def test_fixed_size_is_the_fast_student(bins, backend, trained):
    """Whatever the scan before left in the buffers; a scan of one point, of none, of all there is room for."""
    if backend == "native" and not native.BUILT:
        pytest.skip("the native ops are not built")
    student = trained(bins=bins)
    with native.backend(backend):
        fast, graphed = FastStudent(student), GraphedStudent(student, capacity=900)
        first = graphed(*one_scan(500)).point_logits
        for seed, num_points in enumerate((900, 1, 899, 0, 20)):
            batch = one_scan(num_points, seed)
            logits = graphed(*batch).point_logits
            assert logits.shape == (num_points, 4)
            if num_points:
                # not bit for bit: the product over all cells has more rows than that over those with points
                assert_close(logits, fast(*batch).point_logits)
            graphed.points[num_points:] = graphed.residual[num_points:] = torch.nan
        assert torch.equal(graphed(*one_scan(500)).point_logits, first)


def test_fixed_size_of_several_scans(trained):
    """The batch with room for more, the scan without a point among them."""
    fast, (points, offsets, residual) = FastStudent(trained()), scans()
    expected = fast(points, offsets, residual)
    padded = [torch.cat([tensor, tensor[:100]]) for tensor in (points, residual)]
    found = fast(padded[0], offsets, padded[1], fixed_size=True)
    assert_close(found.point_logits[: len(points)], expected.point_logits)
    assert not found.voxel_logits[len(expected.voxel_logits) :].any()


def test_larger_scans_and_batches_go_the_ordinary_way(trained):
    student = trained()
    fast, graphed = FastStudent(student), GraphedStudent(student, capacity=900)
    for batch in (one_scan(901), scans((100, 200))):
        assert torch.equal(graphed(*batch).point_logits, fast(*batch).point_logits)
    points, offsets, residual = one_scan(20)
    with pytest.raises(ValueError, match=r"student: expected residual \[20, 8\], got \[1, 8\]"):
        graphed(points, offsets, residual[:1])
    with pytest.raises(ValueError, match=r"student: expected points \[20, 4\], got \[20, 3\]"):
        graphed(points[:, :3], offsets, residual)


def test_real_scans_in_any_order(realdata):
    (sequence,) = find_sequences(realdata("kitti-raw-0005-a"))
    clouds = [torch.from_numpy(sequence.read_points(frame)) for frame in sequence.frames[:9]]
    residuals = motion_channels(clouds, sequence.poses()[:9], 8)
    student = load_student("synthetic")
    fast, graphed = FastStudent(student), GraphedStudent(student)
    for scan, share in ((7, 1), (0, 3), (8, 1)):
        points, residual = clouds[scan][::share].contiguous(), residuals[scan][::share].contiguous()
        batch = (points, torch.tensor([0, len(points)]), residual)
        assert_close(graphed(*batch).point_logits, fast(*batch).point_logits)


@pytest.mark.parametrize("backend", native.BACKENDS)
def test_a_scan_of_more_cells_than_there_is_room_for(backend, trained):
    """Never in silence: no number where one would be wrong, and the right ones when asked."""
    if backend == "native" and not native.BUILT:
        pytest.skip("the native ops are not built")
    student, batch = trained(), one_scan(700)
    with native.backend(backend):
        fast = FastStudent(student)
        expected = fast(*batch)
        cells = len(expected.gridded.cells)
        exact = GraphedStudent(student, capacity=900, max_cells=cells)
        assert_close(exact(*batch).point_logits, expected.point_logits)
        graphed = GraphedStudent(student, capacity=900, max_cells=cells - 1)
        logits = graphed(*batch).point_logits
        assert logits.shape == (700, 4) and logits.isnan().all()
        assert torch.equal(graphed.settled(logits), expected.point_logits)
        few = one_scan(20)
        logits = graphed(*few).point_logits
        assert graphed.settled(logits) is logits
        assert_close(logits, fast(*few).point_logits)
        several = graphed(*scans((100, 200))).point_logits  # goes the ordinary way, without limits
        assert graphed.settled(several) is several


class Refuses(TorchDispatchMode):
    """Fails where the host would wait for a value of the device, or a size depends on one."""

    BAD = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "repeat_interleave.Tensor", "equal")

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        name = str(op)
        assert not any(bad in name for bad in self.BAD) and name != "aten.item.default", name
        indices = arguments[1] if name.startswith("aten.index.Tensor") else []
        assert not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices), name
        return op(*arguments, **(options or {}))


@pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
@pytest.mark.parametrize("name", ["kdmos", "motionbev"])
def test_nothing_is_read_on_the_way(name, monkeypatch, trained):
    """On the way of a GPU, where all rows are one chunk."""
    fast, graphed, batch = FastStudent(trained(name)), GraphedStudent(trained(name), capacity=900), one_scan(700)
    expected = fast(*batch).point_logits
    monkeypatch.setattr(native, "multiplies", lambda tensor: False)
    monkeypatch.setattr(sys.modules["kdmos.ops.mlp_max"], "chunks", lambda start: [(0, len(start) - 1, 0, None)])
    with Refuses():
        logits = graphed(*batch).point_logits
    assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # the product of all rows may round otherwise
    with pytest.raises(AssertionError, match=r"aten\.is_nonzero"), Refuses():
        fast(*batch)


@pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
@pytest.mark.parametrize("name", ["kdmos", "motionbev"])
def test_every_size_is_known_beforehand(name, monkeypatch, trained):
    """With tensors that have a shape and no values: what would read one fails."""
    monkeypatch.setattr(native, "DEVICES", native.DEVICES | {"meta"})
    graphed = GraphedStudent(trained(name).to("meta"), capacity=900)
    points, offsets, residual = (tensor.to("meta") for tensor in one_scan(700))
    assert graphed(points, offsets, residual).point_logits.shape == (700, 4)
    with pytest.raises(RuntimeError, match="data-dependent shape"):
        FastStudent.forward(graphed, points, offsets, residual)


def test_a_cpu_keeps_the_fast_student(trained):
    assert type(prepared(trained())) is FastStudent
