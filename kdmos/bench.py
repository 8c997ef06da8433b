"""`kdmos bench`: this package against plain torch and numpy on this machine, op by op and end to end."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kdmos.command import listed, run
from kdmos.errors import InputError
from kdmos.inference import choose_device

BENCHMARKS = (
    "height_residual",
    "polar_grid",
    "polar_scatter",
    "dysample",
    "wdcd_loss",
    "selective_scan",
    "student",
    "training_step",
)


def benchmarks_package() -> str:
    """Where benchmarks/ is: inside an installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    if (here / "benchmarks").is_dir():
        return "kdmos.benchmarks"
    sys.path.insert(0, str(here.parent))
    return "benchmarks"


def bench(
    sequence: Annotated[
        Path | None, typer.Argument(help="Sequence folder with labels and 16 scans; default: synthetic scans.")
    ] = None,
    only: Annotated[str | None, typer.Option(help=f"Some of {', '.join(BENCHMARKS)}.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[
        int | None, typer.Option(help="Runs of either side, in turns, after 3 to warm up; 15 by default.", min=1)
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="Add the rows to benchmarks/results/*.csv.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Instead: latency from raw scan to labels, scan by scan.")
    ] = False,
    scans: Annotated[
        int | None, typer.Option(help="With --stream: how many, after 20 to warm up; 100 by default.", min=1)
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="With --stream: a model, as for kdmos predict; synthetic by default.")
    ] = None,
) -> None:
    """Compare speed with the authors' arrangement in plain torch and numpy; or measure a stream end to end.

    Both sides run in turns in one process; medians. "limit" is the least time the work can take here, by the measured
    copy bandwidth or the rate of a matrix product, and how much of our time that is.
    """
    if stream and (only is not None or rounds is not None):
        raise InputError("--only and --rounds are of the comparison op by op; --stream has --scans")
    if not stream and (scans is not None or checkpoint is not None):
        raise InputError("--scans and --checkpoint are of --stream; the comparison op by op has --rounds")
    rounds = rounds or 15
    wanted = listed(only, "--only") or list(BENCHMARKS)
    unknown = [name for name in wanted if name not in BENCHMARKS]
    if unknown:
        raise InputError(f"--only {', '.join(unknown)}: the benchmarks are {', '.join(BENCHMARKS)}")
    device = choose_device(device).type
    package, console = benchmarks_package(), Console()
    rows, timing = (import_module(f"{package}.{name}") for name in ("rows", "timing"))
    folder = None if sequence is None else str(sequence)
    if stream:
        bench_stream(
            import_module(f"{package}.bench_stream").measure(
                folder, device, scans=scans or 100, checkpoint=checkpoint or "synthetic"
            ),
            rows,
            device,
            append,
            console,
        )
        return
    table = Table(
        "benchmark",
        "case",
        "plain",
        "kdmos",
        "ratio",
        "limit",
        "of it",
        title=f"kdmos against plain torch and numpy, {device}",
    )
    for name in wanted:
        module = import_module(f"{package}.bench_{name}")
        arguments = Namespace(sequence=folder, device=device)
        if name == "training_step":
            found = module.measure(folder, device, rounds)
        else:
            found = (timing.compare(case, device, rounds) for case in module.cases(arguments))
        for row in found:
            times = [f"{row[f'{side}_ms']:.2f} ms" for side in ("baseline", "kdmos")]
            limits = [f"{row['limit_ms']:.2f} ms", f"{row['share_of_limit']:.0%}"] if "limit_ms" in row else ["", ""]
            table.add_row(name, row["case"], *times, f"{row['ratio']:.1f}x", *limits)
            console.print(f"{name}: {row['case']}: {row['ratio']:.1f}x")
            if append:
                rows.append(name, row, device)
    console.print(table)


def bench_stream(found: Iterable[dict], rows: ModuleType, device: str, append: bool, console: Console) -> None:
    """Print the rows of benchmarks/bench_stream.py as columns, each as it comes with --append."""
    runs = []
    for row in found:
        runs.append(row)
        if append:
            rows.append("stream", row, device)
    table = Table(title=f"{runs[0]['checkpoint']}, from raw scan to labels in memory", show_header=False)
    for _ in ("name", *runs):
        table.add_column(overflow="fold")  # no figure is cut off, however narrow the terminal
    table.add_row("device", *[device] * len(runs))
    for key in runs[0]:
        table.add_row(key.replace("_", " "), *(str(run[key]) for run in runs))
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    run(bench, "bench", argv)


if __name__ == "__main__":
    main()
