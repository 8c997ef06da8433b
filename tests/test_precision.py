"""What a precision means, on whatever this machine has."""

import subprocess
import sys

import pytest
import torch

from kdmos.precision import precision_of, products, usable_precision, uses_tf32

cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="torch is a CPU build")


def test_tf32_is_float32_on_a_cpu():
    with pytest.warns(UserWarning, match="tf32 is not computed natively on this cpu; staying in float32"):
        assert usable_precision("tf32", "cpu") == torch.float32
    assert usable_precision("tf32", "cuda") == usable_precision("float32", "cuda") == torch.float32


def test_what_a_model_computes_in():
    """TF32 is told from float32: predictions of one are not continued with the other."""
    model = torch.nn.Identity()
    assert precision_of(model) == "float32"  # the rule has no type
    model.dtype, model.tf32 = usable_precision("tf32", "cuda"), uses_tf32("tf32", "cuda")
    assert precision_of(model) == "tf32"
    model.dtype, model.tf32 = torch.bfloat16, uses_tf32("bfloat16", "cuda")
    assert precision_of(model) == "bfloat16"
    assert not uses_tf32("tf32", "cpu")  # where it is float32


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
        assert [said == "tf32" for said in told()] == [tf32, tf32]
        raise KeyError
    assert told() == before


TOLD = """
import torch
from kdmos.precision import products

conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
{told}
told = lambda: (conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision, matmul.fp32_precision)
is_tf32 = lambda: {{conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32"}}
before = told()
for tf32 in (False, True):
    with products(tf32):
        assert is_tf32() == {{tf32}}, told()
        with products(not tf32):
            assert is_tf32() == {{not tf32}}, told()
        assert is_tf32() == {{tf32}}, told()
    assert told() == before, (told(), before)
"""


@cuda_build
@pytest.mark.parametrize(
    "told",
    [
        "",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cudnn.fp32_precision = 'tf32'",
        "conv.fp32_precision = 'ieee'",
        "matmul.fp32_precision = 'tf32'",
    ],
)
def test_products_are_as_said_however_torch_was_told_before(told):
    done = subprocess.run([sys.executable, "-c", TOLD.format(told=told)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
