"""What a precision means: float32 is float32, unless TF32 is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# TF32: tensors in float32, whose products an NVIDIA GPU rounds to 10 bits after the point before it multiplies.
TF32 = "tf32"
PRECISIONS = {"float32": torch.float32, TF32: torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def usable_precision(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype of a precision, float32 with a warning where the device has no fast way to compute in it.

    Raises: ValueError for an unknown name.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {name!r}")
    dtype, device = PRECISIONS[name], torch.device(device)
    if name == "float32" or (device.type == "cuda" and name != "bfloat16"):
        return dtype
    able = torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type != "cpu" or _cpu_computes_in(name)
    if not able:
        warnings.warn(f"{name} is not computed natively on this {device.type}; staying in float32", stacklevel=2)
    return dtype if able else torch.float32


def uses_tf32(name: str, device: torch.device | str) -> bool:
    """Whether a precision means TF32 on this device."""
    return name == TF32 and torch.device(device).type == "cuda"


def precision_of(model: torch.nn.Module) -> str:
    """The precision that a model computes in, as `PRECISIONS` names it."""
    return TF32 if getattr(model, "tf32", False) else str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")


def _cpu_computes_in(name: str) -> bool:
    flags = {
        "bfloat16": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        "float16": ("_is_amx_fp16_supported",),
    }
    return any(getattr(torch.cpu, flag, lambda: False)() for flag in flags.get(name, ()))


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Whether an NVIDIA GPU multiplies float32 in TF32, inside the block; torch has it on for convolutions by default.

    The choice is the process's: of other threads too, for as long. Without a GPU nothing happens.
    """
    if torch.version.cuda is None:
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with _allowed(cudnn, cudnn.conv, tf32), _allowed(matmul, matmul, tf32):
        yield


@contextmanager
def _allowed(place, op, tf32: bool) -> Iterator[None]:
    """torch has two ways to say it: `allow_tf32` of a place, and a precision of each op, which inherits what is said of
    all ops. Who was told by the second one alone answers no question by the first."""
    precision = op.fp32_precision
    try:
        before = place.allow_tf32
    except RuntimeError:
        before = None
    try:
        if before is not None:
            place.allow_tf32 = tf32
        if (op.fp32_precision == "tf32") != tf32:
            op.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        if before is not None:
            place.allow_tf32 = before
        if op.fp32_precision != precision:
            op.fp32_precision = precision
