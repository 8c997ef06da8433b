"""`kdmos suite`: checkpoints on the synthetic benchmark, made, predicted and scored in one go.

In order: the models and what they predict, the scores, the whole run, the table on a terminal, the page, the command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Printed

from kdmos import __version__
from kdmos.checkpoint import code_commit, write_atomic
from kdmos.command import Bar, run
from kdmos.data.profile import SensorProfile
from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.synthetic.suite import ALL, SUITE_VERSION, SUITES, Part, suite_parts
from kdmos.evaluate import (
    FILE_WIDTH,
    MOVABLE,
    MOVING,
    STATIC,
    UNLABELED,
    Tally,
    count_sequence,
    draw,
    find_scored,
    over_sequences,
    read_scan,
    scores,
)
from kdmos.inference import Model, choose_device, fingerprint, prepared
from kdmos.models import SHIPPED, load_model
from kdmos.picture import need_matplotlib
from kdmos.precision import precision_of
from kdmos.predict import made_with, predict_data
from kdmos.report import (
    NOTHING,
    Facts,
    Figures,
    Method,
    Picture,
    Section,
    Table,
    build_report,
    circumstances,
    kind_table,
    plain,
    range_table,
    scan_picture,
    write_report,
)
from kdmos.synth import VERSION, synthesize

PAGE = "suite.html"


# --- the models and what they predict


class Competitor(NamedTuple):
    """name: Of its folder and file of results. checkpoint: As it was asked for. model: Ready to predict."""

    name: str
    checkpoint: str
    model: Model

    def facts(self) -> dict:
        """What its scores depend on, JSON-able."""
        settings = self.model.settings
        return {
            "checkpoint": self.checkpoint,
            "fingerprint": fingerprint(self.checkpoint),
            "input": settings.reads,
            "lookahead": settings.lookahead,
            "precision": precision_of(self.model),
            "header": self.model.header,
        }


def competitors(checkpoints: Iterable[str], precision: str, device: torch.device) -> list[Competitor]:
    """The models of some checkpoints, each once.

    A file's name has a hash of its content, and a precision other than float32 belongs to the name.
    """
    found = {}
    for checkpoint in map(str, checkpoints):
        model = prepared(load_model(checkpoint, device), precision)
        by_name = checkpoint in SHIPPED or checkpoint == "rule"
        name = checkpoint if by_name else f"{Path(checkpoint).stem}-{fingerprint(checkpoint)[:8]}"
        if precision_of(model) != "float32":
            name += f"-{precision_of(model)}"
        found.setdefault(name, Competitor(name, checkpoint, model))
    return list(found.values())


def predict_part(part: Part, output: Path, competitor: Competitor, device: torch.device) -> Path:
    """The folder of a model's predictions of the scans of a part that count, made where they are not there yet.

    Raises: InputError if the folder holds others.
    """
    data, folder = part.folder(output), part.folder(output / "predictions" / competitor.name)
    profile = SensorProfile(height=part.settings.sensor.height)
    versions = {"suite_version": SUITE_VERSION, "synth_version": VERSION}  # of the scans, which may be made anew
    manifest = made_with(competitor.model, competitor.checkpoint, data, sensor=profile.changes(), **versions)
    sequences = find_sequences(data, part.sequences)
    predict_data(competitor.model, sequences, folder, device, manifest=manifest, profile=profile, frames=part.scored)
    return folder


# --- the scores


def count_part(part: Part, output: Path, predictions: Path, progress: bool = False) -> dict[str, Tally]:
    """What is counted of each sequence of a part, by its name."""
    scored, _ = find_scored(part.folder(output), predictions, part.sequences, frames=part.scored)
    with Bar("evaluate", sum(len(one.frames) for one in scored), progress) as bar:
        return {
            one.sequence.name: count_sequence(one, predictions, None, SensorProfile(), bar.advance)[0] for one in scored
        }


def summary(tallies: Iterable[Tally]) -> dict:
    """Scores of the sequences of a part or of a suite.

    Returns: JSON-able dict: `mean`, see `kdmos.evaluate.over_sequences`, and `total`, of all their points and objects
        what `evaluate_predictions` gives of one sequence, and `false_points_per_scan`.
    """
    tallies = list(tallies)
    total = sum(tallies, start=Tally())
    row = scores(total, movable=False)
    false_points = int(total.tables[:, [STATIC, MOVABLE], MOVING].sum())
    return {
        "mean": over_sequences(scores(tally, movable=False) for tally in tallies),
        "total": {**row, "false_points_per_scan": false_points / row["scans"]},
    }


def score_suites(counted: dict[Part, dict[str, Tally]]) -> dict:
    """Scores by suite and part, JSON-able.

    Returns: {suite: {`mean`, `total`, `parts`: {name: {`tests`, `mean`, `total`, `sequences`}}}}; see
        `summary`; `sequences` are what `evaluate_predictions` gives of each.
    """
    suites: dict[str, dict] = {}
    for suite in dict.fromkeys(part.suite for part in counted):
        of_suite = {part: tallies for part, tallies in counted.items() if part.suite == suite}
        suites[suite] = summary(tally for tallies in of_suite.values() for tally in tallies.values())
        suites[suite]["parts"] = {
            part.name: {
                "tests": part.tests,
                **summary(tallies.values()),
                "sequences": {name: scores(tally, movable=False) for name, tally in tallies.items()},
            }
            for part, tallies in of_suite.items()
        }
    return suites


def worst_scan(part: Part, output: Path, predictions: Path, folder: Path) -> Picture:
    """A picture of the scan with most points that are falsely found or missed.

    Args:
        part, output, predictions: Whose scans.
        folder: For the file that it is drawn into.
    """
    most = -1
    for sequence in find_sequences(part.folder(output), part.sequences):
        for frame in sorted(part.scored):
            _, truth, predicted = read_scan(sequence, frame, predictions, sequence.num_points(frame))
            wrong = np.count_nonzero(((truth == MOVING) != (predicted == MOVING)) & (truth != UNLABELED))
            if wrong > most:
                most, worst = wrong, (sequence, frame)
    picture = scan_picture(draw(*worst, predictions, folder))
    return Picture(picture.panels, f"{part.name}, {picture.caption}; {most:,} points wrong")


# --- the whole run


def run_suite(
    output: Path,
    parts: list[Part],
    checkpoints: Iterable[str | Path],
    precision: str = "float32",
    device: str = "cpu",
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, dict]:
    """Make the data, predict and score it; what an earlier run has made or predicted is used.

    Args:
        output: Gets <suite>/<part>/ (the data), predictions/<checkpoint>/<suite>/<part>/, results/<checkpoint>.json and
            suite.html. The last two are of these parts alone.
        parts: What to score, see `suite_parts`.
        checkpoints: Files, or names of what comes with kdmos; on the page, scans are drawn with the first one's labels.
        precision, device: What all of them compute in, and where.
        workers: Processes that make data; None: one a core.
        progress: Say on stderr how far it is.
    Returns: results by name of the checkpoint, JSON-able: `suite_version`, `twin` (whether of the validation twin),
        `synth_version`, `kdmos_version`, `commit` (None where it is not known), `checkpoint` {`checkpoint`,
        `fingerprint`, `input`, `lookahead`, `precision`, `header`}, `parts` {suite/name: settings of the data} and
        `suites`, see `score_suites`.
    Raises: InputError for a checkpoint that cannot be used, or a folder that holds other data or predictions.
    """

    def say(part: Part, what: str) -> None:
        if progress:
            print(f"{part.suite}/{part.name}: {what}", file=sys.stderr, flush=True)

    need_matplotlib()  # now, not after the scores
    where = choose_device(device)
    models = competitors(checkpoints, precision, where)  # what is wrong with one of them, now
    for part in parts:
        say(part, "data")
        synthesize(part.folder(output), part.settings, workers, progress)
    results, pictures = {}, {}
    with TemporaryDirectory(prefix="kdmos-") as temporary:
        for one in models:
            counted = {}
            for part in parts:
                say(part, one.name)
                predictions = predict_part(part, output, one, where)
                counted[part] = count_part(part, output, predictions, progress)
                if one is models[0]:
                    pictures[part] = worst_scan(part, output, predictions, Path(temporary) / part.suite / part.name)
            results[one.name] = {
                "suite_version": SUITE_VERSION,
                "twin": any(part.is_twin for part in parts),
                "synth_version": VERSION,
                "kdmos_version": __version__,
                "commit": code_commit(),
                "checkpoint": one.facts(),
                "parts": {f"{part.suite}/{part.name}": asdict(part.settings) for part in parts},
                "suites": score_suites(counted),
            }
            write_atomic(output / "results" / f"{one.name}.json", json.dumps(results[one.name], indent=2).encode())
    write_report(output / PAGE, html_page(results, pictures))
    return results


# --- the table on a terminal


def print_table(results: dict[str, dict], console: Console) -> None:
    """A row a part, below each suite's own, and the checkpoints side by side."""
    title = "Mean moving IoU, % (95 % interval); object recall, %; false objects a scan"
    table = Printed(title=title, box=SIMPLE_HEAD, collapse_padding=True)  # room for three checkpoints
    table.add_column("part", no_wrap=True)
    for name in results:
        table.add_column(name, justify="right", overflow="fold")
        table.add_column("found", justify="right")
        table.add_column("false", justify="right")
    for suite, name in _rows(results):
        cells = [text for result in results.values() for text in _cells(_of(result, suite, name))]
        table.add_row(suite if name is None else f"  {name}", *cells, style="bold" if name is None else None)
    console.print(table)


def _rows(results: dict[str, dict]) -> list[tuple[str, str | None]]:
    """Suites and parts in order; None: all of a suite, where it has several parts or its part another name."""
    rows = []
    for suite, scored in next(iter(results.values()))["suites"].items():
        rows.append((suite, None))
        rows += [(suite, name) for name in scored["parts"] if list(scored["parts"]) != [suite]]
    return rows


def _of(result: dict, suite: str, name: str | None) -> dict:
    return result["suites"][suite] if name is None else result["suites"][suite]["parts"][name]


def _cells(scored: dict) -> tuple[str, str, str]:
    mean, total = scored["mean"], scored["total"]
    iou, found = mean["moving_iou"], total["object_recall"]
    return (
        "-" if iou is None else f"{100 * iou:.1f} ({100 * mean['low']:.1f}-{100 * mean['high']:.1f})",
        "-" if found is None else f"{100 * found:.1f}",
        f"{total['false_objects_per_scan']:.2f}",
    )


# --- the page


def html_page(results: dict[str, dict], pictures: dict[Part, Picture]) -> str:
    """suite.html: tables of each suite, the worst scan of each part, and what was run."""
    first = next(iter(results.values()))
    sections = []
    for suite, scored in first["suites"].items():
        parts = {part.name: part for part in pictures if part.suite == suite}
        methods = [Method(name, result["suites"][suite]) for name, result in results.items()]
        blocks = [
            Figures({f"{method.name}, moving IoU, %": method.scores["mean"]["moving_iou"] for method in methods}),
            _suite_table(results, suite),
            _left_out(scored),
            range_table(methods),
            kind_table(methods),
            Facts({name: part.tests for name, part in parts.items()}, "The parts"),
            f"Of each part, the scan with most points wrong, as labelled by {next(iter(results))}:",
            *(pictures[part] for part in parts.values()),
        ]
        sections.append(Section(suite, blocks))
    facts = [
        Facts({key: value for key, value in result["checkpoint"].items() if key != "header"}, name)
        for name, result in results.items()
    ]
    sections.append(Section("What was run", [*facts, Facts(circumstances(), "This page")]))
    which = "validation twin of the synthetic benchmark" if first["twin"] else "synthetic benchmark"
    lead = (
        f"Version {first['suite_version']} of the {which}. Moving IoU is the mean over sequences, with its "
        "95 % bootstrap interval; the other scores are of all sequences together."
    )
    return build_report("Moving-object segmentation of synthetic scans", lead, sections)


def _suite_table(results: dict[str, dict], suite: str) -> Table:
    """All scores of a suite, a row a part and checkpoint."""
    head = ["part", "checkpoint", "moving IoU", "95 % interval", "precision", "recall", "object recall"]
    head += ["false objects a scan", "false points a scan"]
    rows = []
    for _, name in [row for row in _rows(results) if row[0] == suite]:
        for checkpoint, result in results.items():
            scored = _of(result, suite, name)
            mean, total = scored["mean"], scored["total"]
            iou = mean["moving_iou"]
            interval = NOTHING if iou is None else f"{100 * mean['low']:.1f}{NOTHING}{100 * mean['high']:.1f}"
            shares = [total[key] for key in ("moving_precision", "moving_recall", "object_recall")]
            false = [plain(total[f"false_{what}_per_scan"]) for what in ("objects", "points")]
            rows.append([name or f"all of {suite}", checkpoint, iou, interval, *shares, *false])
    return Table("Each part, %", head, rows)


def _left_out(scored: dict) -> str:
    """Which sequences have no IoU, in a sentence; empty if all have."""
    parts = {name: part["mean"]["left_out"] for name, part in scored["parts"].items()}
    told = [f"{count} of {name}" for name, count in parts.items() if count]
    return f"Nothing moves in these sequences, which have no IoU: {', '.join(told)}." if told else ""


# --- the command


def suite(
    output: Annotated[Path, typer.Argument(help="Folder for all of it; the same command goes on where it stopped.")],
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="A model as kdmos predict takes it: a file, synthetic, rule; several, each with --checkpoint."
        ),
    ] = None,
    suite: Annotated[str, typer.Option(help=f"{', '.join(SUITES)} or {ALL}.")] = ALL,
    twin: Annotated[
        bool, typer.Option("--twin", help="The validation twin instead, other streets of the same kinds: to choose on.")
    ] = False,
    precision: Annotated[str, typer.Option(help="float32, tf32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that make the data; one a core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Score checkpoints on the synthetic benchmark: make its data, predict, evaluate, compare.

    Without --checkpoint it is the student that comes with kdmos. docs/suite.md says what the parts are and how they are
    scored. Results go to results/, and with pictures to suite.html.
    """
    parts = suite_parts(suite, twin)
    results = run_suite(output, parts, checkpoint or ["synthetic"], precision, device, workers, progress=True)
    if as_json:
        print(json.dumps(results))
        return
    console = Console()
    print_table(results, console if console.is_terminal else Console(width=FILE_WIDTH))
    print(f"{output / PAGE}: tables and pictures; {output / 'results'}: all scores")


def main(argv: list[str] | None = None) -> None:
    run(suite, "suite", argv)


if __name__ == "__main__":
    main()
