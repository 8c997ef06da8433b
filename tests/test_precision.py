"""What a precision means, on whatever this machine has."""

import subprocess
import sys

import pytest
import torch

from kdmos.precision import products, usable_precision

cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="torch is a CPU build")


def test_tf32_is_float32_on_a_cpu():
    with pytest.warns(UserWarning, match="tf32 is not computed natively on this cpu; staying in float32"):
        assert usable_precision("tf32", "cpu") == torch.float32
    assert usable_precision("tf32", "cuda") == usable_precision("float32", "cuda") == torch.float32


def test_products_without_a_gpu_change_nothing():
    with products(tf32=True):
        assert torch.equal(torch.eye(2) @ torch.eye(2), torch.eye(2))


def told():
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@cuda_build
@pytest.mark.parametrize("tf32", [True, False])
def test_products_are_as_said_and_as_before_after_an_error(tf32):
    before = told()
    with pytest.raises(KeyError), products(tf32):
        assert told() == ("tf32" if tf32 else "ieee",) * 2
        raise KeyError
    assert told() == before


@cuda_build
@pytest.mark.parametrize(
    "setting",
    [
        "backends.cudnn.allow_tf32 = False",
        "backends.cudnn.allow_tf32 = True",
        "backends.cuda.matmul.allow_tf32 = True",
        "set_float32_matmul_precision('high')",
        "backends.fp32_precision = 'tf32'",
        "backends.cudnn.conv.fp32_precision = 'ieee'",
        "backends.cuda.matmul.fp32_precision = 'tf32'",
    ],
)
def test_whatever_a_program_told_torch_before(setting):
    """By its older settings, whose mixture with the newer ones torch refuses to read, or by these."""
    program = f"""
import torch
from kdmos.precision import products

def told():
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision

def older():
    try:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return None

torch.{setting}
before = told(), older()
with products(tf32=False):
    assert told() == ("ieee", "ieee"), told()
assert (told(), older()) == before, (told(), older(), before)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
