"""The student on a GPU: what the CPU says, forward, backward, and in the fast form."""

import pytest
import torch
from torch.testing import assert_close

from kdmos.models import build_student
from kdmos.models.fast import FastStudent
from kdmos.settings import PolarGrid

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GRID = PolarGrid(bins=(48, 40, 8))


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


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
