"""Weights on disk: our safetensors with a header that says all, and the files of others, read without executing."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import subprocess
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from kdmos.errors import InputError

FORMAT = 1
HEADER = "kdmos"  # the one metadata key; its value is JSON


def write_atomic(path: str | Path, content: bytes, durable: bool = True) -> None:
    """Write a file whole or not at all: to a temporary neighbour, then renamed.

    Args:
        path: Target; folders are made.
        content: What it holds.
        durable: Wait until it is on the disk: for what cannot be computed again.
    Raises: InputError naming the file and the reason (a full disk, no permission); an old file stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def save(path: str | Path, weights: dict[str, Tensor], header: dict) -> None:
    """Write weights and their header as one `.safetensors` file, atomically.

    Args:
        path: Target file.
        weights: Tensors by name; any device.
        header: JSON-able description; `format` is added.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    metadata = {HEADER: json.dumps({"format": FORMAT, **header}, sort_keys=True)}
    write_atomic(path, to_safetensors(tensors, metadata))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Weights and header of a checkpoint; the header is empty for a file that is not ours.

    Reads our `.safetensors`, and `.pt` / `.pth` files of others: a state_dict, or a dict that holds one under
    `state_dict` or `model` beside numbers; a `module.` prefix is dropped. Nothing in the file is executed.

    Raises: InputError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder; name a file in it, such as best.safetensors" if path.is_dir() else "no such checkpoint file"
        raise InputError(f"{path}: {what}")
    if path.suffix == ".ckpt":
        raise InputError(f"{path}: a training state, to resume from; the students are the .safetensors beside it")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = json.loads(metadata.get(HEADER, "{}"))
        except (SafetensorError, ValueError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error})") from error
        if header.get("format", FORMAT) > FORMAT:
            raise InputError(f"{path}: format {header['format']} is newer than this kdmos, which reads {FORMAT}")
        return weights, header
    return _load_foreign(path), {}


def _load_foreign(path: Path) -> dict[str, Tensor]:
    # Training frameworks store numpy numbers and arrays beside the weights. These types only rebuild such values;
    # taken from a value itself, because numpy 1 and 2 keep them in modules of different names.
    rebuild_scalar, rebuild_array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    kinds = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "U1")
    known = [rebuild_scalar, rebuild_array, np.dtype, np.ndarray, *(type(np.dtype(kind)) for kind in kinds)]
    for function in (rebuild_scalar, rebuild_array):
        known += [(function, f"{module}.multiarray.{function.__name__}") for module in ("numpy.core", "numpy._core")]
    try:
        with torch.serialization.safe_globals(known):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needed is None:
            raise InputError(f"{path}: not a torch file, or a damaged one") from error
        raise InputError(
            f"{path}: not loaded, because reading it could execute code ({needed[1]}); save a plain state_dict instead"
        ) from error
    except Exception as error:  # a damaged file breaks the reader in a dozen ways, each with another exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a whole torch file ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {}
    if isinstance(content, dict):
        tensors = {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no state_dict (a dict of tensors)")
    return tensors


def code_commit() -> str | None:
    """The commit this code is at, if it lies in a git checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        top, commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:2]
        return commit if Path(top) == here.parent else None  # not of a project that this package lies in
    except (OSError, subprocess.CalledProcessError):
        return None
