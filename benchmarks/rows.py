"""Rows of results: appended to a CSV with where and with what they were measured."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(os.environ.get("KDMOS_RESULTS") or Path(__file__).parent / "results")


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """What the code is at: $KDMOS_COMMIT, else as git says it, else "unknown"."""
    if named := os.environ.get("KDMOS_COMMIT"):
        return named
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git here
        return "unknown"


def append(name: str, row: dict, device: str = "cpu") -> Path:
    """Append a row to <name>.csv in benchmarks/results, after date, commit, torch version and device.

    $KDMOS_RESULTS names another folder. There a file with other columns is left alone, and <name>-2.csv taken: a run
    on a machine that is at hand for minutes must not end for it.
    Raises: ValueError if the file in benchmarks/results has other columns.
    """
    where = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "device": where,
    }
    columns = [*about, *row]
    RESULTS.mkdir(parents=True, exist_ok=True)
    path, number = RESULTS / f"{name}.csv", 1
    while (found := _columns(path)) not in (None, columns):
        if not os.environ.get("KDMOS_RESULTS"):
            raise ValueError(f"{path}: has the columns {', '.join(found)}, not {', '.join(columns)}")
        number += 1
        path = RESULTS / f"{name}-{number}.csv"
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if found is None:
            writer.writeheader()
        writer.writerow({**about, **row})
    return path


def _columns(path: Path) -> list[str] | None:
    """Those of a file; None where there is none, or nothing in it."""
    if not path.exists():
        return None
    with open(path, newline="") as file:
        return next(csv.reader(file), None)
