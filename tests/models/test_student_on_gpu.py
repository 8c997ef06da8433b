"""The student on a GPU: what the CPU says, forward, backward, and in the fast form."""

import pytest
import torch
from torch.testing import assert_close

from kdmos.models import build_student
from kdmos.models.fast import FastStudent, GraphedStudent
from kdmos.ops import native
from kdmos.precision import products
from kdmos.settings import PolarGrid

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GRID = PolarGrid(bins=(48, 40, 8))


@pytest.fixture(autouse=True)
def full_precision():
    """Of the plain student, which multiplies as torch is told to; the fast form takes care of itself."""
    with products(tf32=False):
        yield


def batch(device):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3000, 4, generator=generator) * torch.tensor([15.0, 15.0, 1.0, 0.1])
    residual = torch.randn(3000, 8, generator=generator).relu()
    return [tensor.to(device) for tensor in (points, torch.tensor([0, 1000, 1000, 3000]), residual)]


@pytest.mark.parametrize("name", ["kdmos", "motionbev"])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_cpu(name, training):
    gradients = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        student = build_student(name, grid=GRID).train(training)
        for module in student.modules():  # what is drawn differs between devices
            if type(module).__name__ in ("Dropout", "DropBlock2d"):
                module.eval()
        student.to(device)
        logits = student(*batch(device)).point_logits
        assert logits.device.type == device
        logits.square().mean().backward()
        gradients.append([logits.detach().cpu(), *(p.grad.cpu() for p in student.parameters())])
    for ours, wanted in zip(*reversed(gradients)):
        assert_close(ours, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item() + 1e-7)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1), ("float16", 0.02)])
def test_fast_form(precision, tolerance):
    torch.manual_seed(0)
    student = build_student("kdmos", grid=GRID).eval()
    with torch.no_grad():
        expected = student(*batch("cpu")).point_logits
    logits = FastStudent(student.to("cuda"), precision)(*batch("cuda")).point_logits.cpu()
    assert_close(logits, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_float32_is_float32_whatever_torch_is_told():
    torch.manual_seed(0)
    student = build_student("kdmos", grid=GRID).eval().cuda()
    with products(tf32=True):
        logits = FastStudent(student)(*batch("cuda")).point_logits
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # as it was
    assert torch.equal(logits, FastStudent(student)(*batch("cuda")).point_logits)
    rounded = FastStudent(student, "tf32")(*batch("cuda")).point_logits
    assert not torch.equal(logits, rounded)
    assert_close(rounded, logits, rtol=0, atol=0.02 * logits.abs().max().item())


def test_another_stream():
    torch.manual_seed(0)
    student, stream = build_student("kdmos", grid=GRID).eval().cuda(), torch.cuda.Stream()
    with torch.no_grad():
        expected = student(*batch("cuda")).point_logits
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            logits = student(*batch("cuda")).point_logits
    stream.synchronize()
    assert_close(logits, expected)


needs_native = pytest.mark.skipif("cuda" not in native.DEVICES, reason="the CUDA ops are not built")


def one_scan(num_points, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num_points, 4, generator=generator) * torch.tensor([15.0, 15.0, 1.0, 0.1])
    residual = torch.randn(num_points, 8, generator=generator).relu()
    return [tensor.cuda() for tensor in (points, torch.tensor([0, num_points]), residual)]


@needs_native
@pytest.mark.parametrize("name", ["kdmos", "motionbev"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1), ("float16", 0.02)])
def test_graph(name, precision, tolerance):
    """Scan after scan as without the graph, larger and smaller ones; each answer stays when the next one comes.

    Only to rounding: the product over all rows has other tiles.
    """
    torch.manual_seed(0)
    student = build_student(name, grid=GRID).eval().cuda()
    fast, graphed = FastStudent(student, precision), GraphedStudent(student, precision, capacity=3000)
    lengths, found, wanted = (2000, 3000, 1, 2999, 20, 3001, 2000), [], []
    for seed, num_points in enumerate(lengths):  # the last but one is beyond the capacity
        found.append(graphed(*one_scan(num_points, seed)).point_logits)
        wanted.append(fast(*one_scan(num_points, seed)).point_logits)
        graphed.points[num_points:] = graphed.residual[num_points:] = torch.nan
    assert graphed.graph is not None
    for ours, expected in zip(found, wanted):
        assert ours.shape == expected.shape
        assert_close(ours, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@needs_native
def test_graph_replays_alike():
    """The same scan, before and after another: bit for bit."""
    torch.manual_seed(0)
    graphed = GraphedStudent(build_student("kdmos", grid=GRID).eval().cuda(), capacity=3000)
    first, _, again = (graphed(*one_scan(num_points, 0)).point_logits for num_points in (2000, 3000, 2000))
    assert torch.equal(first, again)


@needs_native
def test_graph_on_another_stream():
    torch.manual_seed(0)
    student, stream = build_student("kdmos", grid=GRID).eval().cuda(), torch.cuda.Stream()
    fast, graphed, batch = FastStudent(student), GraphedStudent(student, capacity=3000), one_scan(2000, 0)
    expected = fast(*batch).point_logits
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        logits = graphed(*batch).point_logits
    stream.synchronize()
    assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@needs_native
def test_fixed_size_does_not_wait_for_the_device():
    torch.manual_seed(0)
    graphed = GraphedStudent(build_student("kdmos", grid=GRID).eval().cuda(), capacity=3000)
    graphed(*one_scan(2000, 0))
    batch = one_scan(1000, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed(*batch)
        graphed._of_capacity()
    finally:
        torch.cuda.set_sync_debug_mode("default")
