"""Other people's kernels for the teacher, where they are installed: spconv's convolution, mamba-ssm's scan."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from kdmos import ops
from kdmos.ops import Neighbours

BACKENDS = ("auto", "native", "spconv", "mamba")


def check_backend(name: str) -> None:
    """Raises: ValueError for an unknown name, or one that is not installed."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    if name in ("spconv", "mamba") and not _installed(name):
        package = {"spconv": "spconv", "mamba": "mamba-ssm"}[name]
        raise ValueError(f"backend {name}: {package} is not installed; native needs nothing else")


def uses(name: str, backend: str, device: torch.device) -> bool:
    """Whether "spconv" or "mamba" does the work; "auto" takes them on a GPU, where they are installed."""
    return backend == name or (backend == "auto" and device.type == "cuda" and _installed(name))


def _installed(name: str) -> bool:
    return find_spec({"spconv": "spconv", "mamba": "mamba_ssm"}[name]) is not None


class SpconvVoxels:
    """Voxels as spconv takes them, with the pairs it found for them; does what `ops.submanifold_conv` does.

    Its CPU form has no gradient without CUDA, and where a voxel occurs twice its sums are right on one thread alone.
    """

    def __init__(self, grid: Tensor, sample: Tensor) -> None:
        import spconv.pytorch as spconv

        self.spconv, self.pairs = spconv, {}
        self.indices = torch.cat([sample[:, None], grid], 1).int().contiguous()
        self.shape = (grid.amax(0) + 1).tolist()
        self.num_samples = int(sample.max()) + 1

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        size = weight.shape[4], weight.shape[0]
        layer = self.spconv.SubMConv3d(*size, 3, bias=False, indice_key="level").to(x.device)
        del layer._parameters["weight"]
        layer.weight = weight
        voxels = self.spconv.SparseConvTensor(
            x.contiguous(), self.indices, self.shape, self.num_samples, indice_dict=self.pairs
        )
        return layer(voxels).features + bias


def convolve(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Neighbours | SpconvVoxels) -> Tensor:
    """3x3x3 convolution over occupied voxels, by whoever found their neighbours."""
    if isinstance(neighbours, SpconvVoxels):
        return neighbours.conv(x, weight, bias)
    return ops.submanifold_conv(x, weight, bias, neighbours)


def scan(backend: str, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *rest: Tensor) -> Tensor:
    """`ops.selective_scan` of these arguments, or mamba-ssm's, which takes a sequence at a time, channels first."""
    if not uses("mamba", backend, u.device):
        return ops.selective_scan(u, delta, a, b, c, *rest)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    skip, gate, delta_bias, offsets = rest
    pieces = []
    for part in zip(*(tensor.split(offsets.diff().tolist()) for tensor in (u, delta, b, c, gate))):
        if len(part[0]):
            u1, delta1, b1, c1, gate1 = (tensor.T[None].contiguous() for tensor in part)  # [1, D or S, n]
            y = selective_scan_fn(u1, delta1, a, b1, c1, skip, gate1, delta_bias, delta_softplus=True)
            pieces.append(y[0].T)
    return torch.cat(pieces)
