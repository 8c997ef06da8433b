"""Rows of results: appended to a CSV with where and with what they were measured."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def append(name: str, row: dict, device: str = "cpu") -> Path:
    """Append a row to results/<name>.csv, after date, commit, torch version and device.

    Raises: ValueError if the file has other columns.
    """
    commit = subprocess.run(
        ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    where = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "device": where,
    }
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    if not new:
        with open(path, newline="") as file:
            columns = next(csv.reader(file))
        if columns != [*about, *row]:
            raise ValueError(f"{path}: has the columns {', '.join(columns)}, not {', '.join([*about, *row])}")
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, [*about, *row])
        if new:
            writer.writeheader()
        writer.writerow({**about, **row})
    return path
