"""Every op test runs on every backend that is here, the CUDA kernels included: their inputs go there and back.

Where KDMOS_CUDA_ON_HOST names a library of tests/cuda_on_host/build.py, the kernels run on the CPU instead.
"""

import os
from contextlib import ExitStack

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kdmos.ops import native

ON_HOST = {"height_residual": 1, "height_residual_sequence": 1}  # op -> the argument that stays on the CPU


class OnDevice(TorchDispatchMode):
    """Runs the native ops, forward and backward, on another device than that of their tensors.

    What an op writes into its arguments comes back into them. Pinned tensors stay where they are.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.calls = device, 0

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        if op.namespace != "kdmos":
            return op(*arguments, **(options or {}))
        self.calls += 1
        there = tree_map_only(torch.Tensor, self.to_device, list(arguments))
        stays = ON_HOST.get(op._schema.name.split("::")[1])
        if stays is not None:
            there[stays] = arguments[stays]
        out = tree_map_only(torch.Tensor, lambda tensor: tensor.to("cpu"), op(*there, **(options or {})))
        for argument, ours, theirs in zip(op._schema.arguments, arguments, there):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for to, written in zip(tree_leaves(ours), tree_leaves(theirs)):
                    to.copy_(written)
        return out

    def to_device(self, tensor):
        return tensor if tensor.is_pinned() else tensor.to(self.device)


class OnHost(TorchDispatchMode):
    """Runs the CUDA ops' source on the CPU, in place of the native ops."""

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        name = op._schema.name.split("::")[1]
        has_twin = op.namespace == "kdmos" and torch._C._dispatch_has_kernel_for_dispatch_key(
            f"kdmos_host::{name}", "CPU"
        )
        op = getattr(torch.ops.kdmos_host, name) if has_twin else op
        return op(*arguments, **(options or {}))


def backends():
    if library := os.environ.get("KDMOS_CUDA_ON_HOST"):
        torch.ops.load_library(library)
        return ["cuda"]
    return [*native.BACKENDS, *(["cuda"] if "cuda" in native.DEVICES and torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True, params=backends())
def backend(request):
    """The backend in use: "native" (on the CPU), "reference", "cuda"."""
    if request.param != "reference" and not native.BUILT:
        pytest.skip("the native ops are not built")
    with ExitStack() as stack:
        stack.enter_context(native.backend("reference" if request.param == "reference" else "native"))
        if request.param == "cuda":
            stack.enter_context(OnHost() if "KDMOS_CUDA_ON_HOST" in os.environ else OnDevice("cuda"))
        yield request.param


@pytest.fixture
def on_device():
    return OnDevice
