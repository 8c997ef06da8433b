"""`kdmos doctor`: what is here, what is missing, and what to do about it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdmos import __version__
from kdmos.command import run

OLDEST_TORCH = (2, 10)
# library -> the extra of pyproject.toml that brings it, and what for
OPTIONAL = {
    "lightning": ("train", "training"),
    "torchmetrics": ("train", "training: scores on the way"),
    "tensorboard": ("train", "training: curves"),
    "matplotlib": ("train", "pictures of kdmos evaluate and view"),
    "kiss-icp": ("odometry", "poses where the data has none"),
    "rosbags": ("bags", "ROS bags and MCAP files"),
    "pypcd4": ("files", "scans as .pcd"),
    "plyfile": ("files", "scans as .ply"),
    "rerun-sdk": ("view", "kdmos view"),
    "imageio": ("view", "films of kdmos view"),
    "imageio-ffmpeg": ("view", "films of kdmos view, MP4"),
    "onnx": ("export", "kdmos export"),
    "onnxscript": ("export", "kdmos export"),
    "onnxruntime": ("export", "kdmos export: its check"),
    "spconv": ("spconv", "the teacher on its convolution"),
    "mamba-ssm": ("mamba", "the teacher on its scan, on a GPU"),
    "pytest": ("dev", "tests"),
    "pytest-cov": ("dev", "tests: coverage"),
    "hypothesis": ("dev", "tests: drawn inputs"),
    "ruff": ("dev", "code style"),
}
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them, x86 and ARM
CACHE_BYTES = 3e9  # motion channels of all labelled SemanticKITTI scans, about 0.1 MB each
STYLES = {"ok": "green", "note": "yellow", "missing": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One row; `state` is "ok", "note" (good to know), "missing" (optional) or "broken" (nothing will run)."""

    what: str
    state: str
    found: str
    todo: str = ""


def examine() -> list[Finding]:
    """All there is to say about this machine, the most basic first. Nothing is changed or downloaded."""
    findings = [
        Finding("kdmos", "ok", __version__),
        Finding("python", "ok", platform.python_version()),
        Finding("platform", "ok", platform.platform()),
    ]
    model, flags = _cpu_model()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings.append(Finding("cpu", "ok", f"{model}, {cores} cores"))
    try:
        import torch
    except Exception as error:  # a broken install fails in many ways, and this is where to learn of it
        todo = "pip install --force-reinstall torch"
        return [*findings, Finding("torch", "broken", f"cannot be imported: {error}", todo), *map(_library, OPTIONAL)]
    findings += [_torch(torch), _instructions(torch, flags), _gpu(torch), _native(torch)]
    return [*findings, *map(_library, OPTIONAL), _cache()]


def _cpu_model() -> tuple[str, set[str]]:
    """Name and instruction flags of the processor; no flags where the system is not Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = dict(re.findall(r"^(model name|flags|Features)\s*: (.*)$", text, re.MULTILINE))
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.machine()), set(flags.split())


def _torch(torch) -> Finding:
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    found = f"{torch.__version__} ({build})"
    try:
        square = torch.tensor([[0.0, 1.0], [2.0, 3.0]]) @ torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        works, reason = square.tolist() == [[2, 3], [6, 11]], f"a small product came out as {square.tolist()}"
    except Exception as error:  # whatever it is, it goes into the row
        works, reason = False, f"a small product failed: {error}"
    if not works:
        return Finding("torch", "broken", f"{found}; {reason}", "pip install --force-reinstall torch")
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Finding("torch", "note", found, f"kdmos is tested from torch {oldest} on: pip install -U torch")
    return Finding("torch", "ok", found)


def _instructions(torch, flags: set[str]) -> Finding:
    bf16 = "not known" if not flags else "yes" if flags & BF16_FLAGS else "no"
    capability = torch.backends.cpu.get_cpu_capability()
    avx512 = "yes" if "AVX512" in capability else "no"
    return Finding("cpu instructions", "ok", f"torch uses {capability}; AVX-512 {avx512}, bf16 {bf16}")


def _gpu(torch) -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("gpu", "ok", ", ".join(names))
    if torch.version.cuda:
        return Finding("gpu", "note", "none that torch can use", "see nvidia-smi: driver missing or too old? Else: CPU")
    if shutil.which("nvidia-smi"):
        return Finding("gpu", "note", "NVIDIA driver, but torch is a CPU build", "install a CUDA build: pytorch.org")
    return Finding("gpu", "note", "none", "nothing: everything runs on the CPU, training slowly")


def _native(torch) -> Finding:
    with warnings.catch_warnings():  # what it would warn of stands in the row
        warnings.simplefilter("ignore")
        from kdmos.ops import native
    again = "then install kdmos again with pip's --no-build-isolation"
    if not native.BUILT:
        found = f"none ({native.WHY_NOT}): plain torch is used, several times slower"
        return Finding("native ops", "note", found, f"install a C++ compiler (gcc or clang), {again}")
    from kdmos import _C

    built = _C.build_info()
    found = f"for {' and '.join(sorted(native.DEVICES))}; {built['instructions']} (-march={built['arch']}), "
    found += f"compiler {built['compiler']}"
    if torch.version.cuda and "cuda" not in native.DEVICES:
        return Finding("native ops", "note", f"{found}; {native.WHY_NOT}", f"install the CUDA toolkit (nvcc), {again}")
    if "cuda" in native.DEVICES and torch.cuda.is_available():
        try:
            torch.ops.kdmos.sort_by_cell(torch.zeros(1, dtype=torch.int64, device="cuda"), 1)[0].tolist()
        except Exception as error:  # built for other GPUs, above all
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            todo = "install kdmos again on this machine, with pip's --no-build-isolation"
            return Finding("native ops", "broken", f"{found}; the CUDA ops do not run ({reason})", todo)
    return Finding("native ops", "ok", found)


def _library(name: str) -> Finding:
    extra, purpose = OPTIONAL[name]
    try:
        return Finding(name, "ok", f"{metadata.version(name)}, for {purpose}")
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", f"for {purpose}", f"pip install 'kdmos[{extra}]'")


def _cache() -> Finding:
    from kdmos.data.motion_cache import default_cache  # needs torch

    folder = default_cache()
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    found = f"{folder}, {free / 1e9:.1f} GB free"
    if not os.access(there, os.W_OK):
        return Finding("cache folder", "note", f"{folder}, not writable", "set XDG_CACHE_HOME to a folder that is")
    if free < CACHE_BYTES:
        todo = f"SemanticKITTI needs {CACHE_BYTES / 1e9:.0f} GB: free the disk, or set XDG_CACHE_HOME"
        return Finding("cache folder", "note", found, todo)
    return Finding("cache folder", "ok", found)


def print_findings(findings: list[Finding], console: Console) -> None:
    table = Table("what", "state", "found", "what to do", title="kdmos doctor")
    for row in findings:
        # escape: "kdmos[train]" is no markup
        table.add_row(row.what, f"[{STYLES[row.state]}]{row.state}[/]", escape(row.found), escape(row.todo))
    console.print(table)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Say what is installed, what is built, and what to do about the rest. Exit code 1 if torch does not work."""
    findings = examine()
    works = all(row.state != "broken" for row in findings)
    if as_json:
        print(json.dumps({"works": works, "findings": [asdict(row) for row in findings]}))
    else:
        console = Console()
        print_findings(findings, console if console.is_terminal else Console(width=120))
    return 0 if works else 1


def main(argv: list[str] | None = None) -> None:
    run(doctor, "doctor", argv)


if __name__ == "__main__":
    main()
