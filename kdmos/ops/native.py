"""The compiled ops: loading them, and choosing between them and plain torch."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("native", "reference")
# Ops that have no CUDA kernel: their work is left to torch's convolutions and products on a GPU.
CPU_ALONE = frozenset({"masked_conv", "mlp_max", "winograd_conv"})


def _load() -> tuple[frozenset[str], str]:
    """Devices that have native ops, and why the others have none."""
    package = Path(__file__).parent.parent
    if not list(package.glob("_C.*")):
        return frozenset(), "the native ops are not built"
    try:
        importlib.import_module("kdmos._C")
    except ImportError as error:
        return frozenset(), f"the native ops do not load ({error})"
    if torch.version.cuda is None:
        return frozenset({"cpu"}), ""
    library = package / "_cuda.so"
    if not library.exists():
        return frozenset({"cpu"}), "the CUDA ops are not built"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # what the linker said is its cause in newer torch
        return frozenset({"cpu"}), f"the CUDA ops do not load ({error.__cause__ or error})"
    missing = registered("CPU") - registered("CUDA") - CPU_ALONE
    if missing:  # the libraries are not of one build
        return frozenset({"cpu"}), f"the CUDA ops lack {', '.join(sorted(missing))}: they are of another build"
    return frozenset({"cpu", "cuda"}), ""


def registered(key: str) -> set[str]:
    """Names of the native ops that have a kernel for a dispatch key, "CPU" or "CUDA"."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kdmos::"))
    return {n.removeprefix("kdmos::") for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, key)}


DEVICES, WHY_NOT = _load()
BUILT = bool(DEVICES)
_chosen = "native" if BUILT else "reference"
if WHY_NOT:
    warnings.warn(
        f"kdmos: {WHY_NOT}; plain torch is used instead, several times slower. Install a C++ compiler (for CUDA nvcc "
        "too), then kdmos again with pip's --no-build-isolation; kdmos doctor says what is there",
        stacklevel=2,
    )


class backend:
    """Chooses what the ops run, "native" (compiled) or "reference" (plain torch), from here on; or, used in a `with`
    statement, for its block.

    Native is the default where it is built. On a device without native ops the reference runs in any case.

    Raises: ValueError for another name; RuntimeError for "native" where nothing is built.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
        if name == "native" and not BUILT:
            raise RuntimeError(f"backend 'native': {WHY_NOT}")
        self._before, _chosen = _chosen, name

    def __enter__(self) -> backend:
        return self

    def __exit__(self, *_) -> None:
        global _chosen
        _chosen = self._before


def serves(tensor: Tensor) -> bool:
    """Whether the native ops run on this tensor's device."""
    return _chosen == "native" and tensor.device.type in DEVICES


def instructions() -> str:
    """Instruction set that the CPU ops are built for, as `kdmos doctor` names it; empty where they are not built."""
    return importlib.import_module("kdmos._C").build_info()["instructions"] if BUILT else ""


def multiplies(tensor: Tensor) -> bool:
    """Whether there are native products of matrices for this tensor's type (`csrc/cpu/products.h`).

    On a CPU with AVX-512, of float32 and bfloat16; not of bfloat16 where the processor multiplies matrices of it as a
    whole (AMX): torch is quicker there. Nor while a program is made: it must run elsewhere too.
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or not serves(tensor):
        return False
    if tensor.dtype == torch.bfloat16:
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        return not amx and instructions().startswith("AVX-512 with bf16")
    return tensor.dtype == torch.float32 and instructions().startswith("AVX-512")


def fake(op: str):
    """Decorator: the shapes that a native op returns, for `torch.compile`. Nothing where there are no native ops."""
    return torch.library.register_fake(f"kdmos::{op}") if BUILT else lambda function: function


def differentiate(op: str, backward, setup_context) -> None:
    """Give a native op its gradient."""
    if BUILT:
        torch.library.register_autograd(f"kdmos::{op}", backward, setup_context=setup_context)


def channels_last(image: Tensor) -> Tensor:
    """[B, C, H, W] with memory [B, H, W, C] and no holes, copied only where it is not."""
    return image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def like_channels_last(image: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Empty [B, C, H, W] with memory [B, H, W, C], as the native ops return images."""
    batch, channels, height, width = size
    return image.new_empty(batch, height, width, channels, dtype=dtype or image.dtype).permute(0, 3, 1, 2)
