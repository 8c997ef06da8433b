"""How every command runs: `python -m kdmos.X` and `kdmos X` alike, with one clear line for what went wrong."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdmos.errors import InputError

INTERRUPTED = 130  # what typer makes of Ctrl-C

# What several commands take.
Source = Annotated[
    Path,
    typer.Argument(
        help="Folder of .bin, .npy, .pcd or .ply scans; ROS bag or MCAP file; SemanticKITTI data root or sequence."
    ),
]
Predictions = Annotated[
    Path | None, typer.Argument(help="What kdmos predict wrote: sequences/NN/predictions/NNNNNN.label below it.")
]
Sequences = Annotated[str | None, typer.Option(help="Names, e.g. 08,09; all by default.")]
Topic = Annotated[str | None, typer.Option(help="Of a bag: its PointCloud2 topic, if it has several.")]
Sensor = Annotated[
    Path | None, typer.Option(help="YAML: height, range, field_of_view, elevation, remission_scale; docs/input.md.")
]


def run(command: Callable, name: str, argv: list[str] | None = None) -> None:
    """Parse `argv` for `command` (a typer function), run it and exit: 0, 1 (done, with losses), 2 (cannot be done).

    A command returns None or its exit code. `KDMOS_DEBUG=1` shows the whole traceback of an input error.
    """
    keep_memory()
    warnings.formatwarning = lambda message, *_, **__: f"kdmos {name}: warning: {message}\n"
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    try:
        code = app(args=argv, prog_name=f"kdmos {name}", standalone_mode=False)
    except (InputError, OSError) as error:
        if os.environ.get("KDMOS_DEBUG") == "1":
            raise
        fail(name, str(error))
    except Exception as error:  # click's usage errors have no common base that typer exports
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        fail(name, f"{message()} (kdmos {name} --help)")
    if code == INTERRUPTED:
        fail(name, "interrupted; what was finished is kept", code)
    sys.exit(code or 0)


def keep_memory() -> None:
    """Have the C library keep freed memory for the next scan or step.

    Giving it back means fetching it again page by page, which takes longer than many an op that fills it.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own ...
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: ... and nothing is given back


class Bar:
    """How far long work is, on stderr: a bar in a terminal, elsewhere a line every half a minute.

        with Bar("predict", len(scans)) as bar:
            ...
            bar.advance()

    The time left is that of the rest at the speed so far: what was there already belongs in neither.

    Args:
        what: The work, a word or two; `bar.what` may change on the way.
        total: Steps, scans mostly.
        show: Whether to show anything.
    """

    SECONDS = 30.0  # between two lines

    def __init__(self, what: str, total: int, show: bool = True) -> None:
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.what, self.total, self.done, self.lines = what, total, 0, show and not console.is_terminal
        self.progress = Progress(*columns, console=console, disable=not show or self.lines, transient=True)
        self.task = self.progress.add_task(what, total=total)

    def __enter__(self) -> Bar:
        self.progress.__enter__()
        self.start = self.said = time.monotonic()
        return self

    def __exit__(self, *error) -> None:
        self.progress.__exit__(*error)

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        self.progress.update(self.task, advance=steps, description=self.what)
        now = time.monotonic()
        if self.lines and now - self.said >= self.SECONDS and 0 < self.done < self.total:
            self.said = now
            left = timedelta(seconds=round((now - self.start) / self.done * (self.total - self.done)))
            print(f"{self.what}: {self.done} of {self.total}, about {left} left", file=sys.stderr, flush=True)


def listed(text: str | None, option: str) -> list[str] | None:
    """ "08, 09" -> ["08", "09"], each once. Raises: InputError for an empty name."""
    if text is None:
        return None
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in names:
        raise InputError(f"{option} '{text}': expected a list like 08,09")
    return names


def fail(name: str, message: str, code: int = 2) -> None:
    """Print one line and exit."""
    print(f"kdmos {name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
