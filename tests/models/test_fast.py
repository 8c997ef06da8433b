"""The student made ready for inference: the same answers, in every precision this machine has."""

import pytest
import torch
from torch.testing import assert_close

from kdmos.models import build_student
from kdmos.models.fast import FastStudent, usable_precision
from kdmos.ops import native
from kdmos.settings import PolarGrid


def trained(name="kdmos", bins=(41, 50, 8), seed=0):
    """A student whose norms have seen something: every statistic and weight is away from its start."""
    torch.manual_seed(seed)
    student = build_student(name, grid=PolarGrid(bins=bins)).eval()
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
            elif isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1):
                module.weight.normal_(std=0.2)
    return student


def scans(lengths=(900, 0, 600), seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(sum(lengths), 4, generator=generator) * torch.tensor([20.0, 20.0, 1.0, 0.1])
    residual = torch.randn(sum(lengths), 8, generator=generator).relu()
    return points, torch.tensor([0, *lengths]).cumsum(0), residual


@pytest.mark.parametrize("backend", native.BACKENDS)
@pytest.mark.parametrize("name", ["kdmos", "motionbev"])
@pytest.mark.parametrize("bins", [(41, 50, 8), (24, 16, 4)])
def test_float32_is_the_student(name, bins, backend):
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


def test_bfloat16_stays_close():
    student, batch = trained(), scans()
    if usable_precision("bfloat16", "cpu") != torch.bfloat16:
        pytest.skip("this CPU does not compute in bfloat16")
    with torch.no_grad():
        expected = student(*batch).point_logits
    out = FastStudent(student, "bfloat16")(*batch).point_logits
    assert out.dtype == torch.float32
    assert (out - expected).abs().mean() < 0.02 * expected.std()


def test_copies_the_weights():
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
    with pytest.raises(ValueError, match=r"precision must be one of \('float32', 'bfloat16', 'float16'\), got 'int8'"):
        usable_precision("int8", "cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.warns(UserWarning, match="bfloat16 is not computed natively on this cpu; staying in float32"):
        assert usable_precision("bfloat16", "cpu") == torch.float32
