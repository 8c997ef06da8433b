"""Results as one HTML file that needs nothing else: scores of methods side by side, learning curves, pictures.

In order: what a report is made of, tables and charts of methods, what was run, the page, how each block is written.

    methods = [Method("rule", result["rule"]), Method("student", result, training_curves("runs/mine"))]
    sections = [Section("A real drive", [*score_blocks(methods), scan_picture("pictures/00_000007.png")])]
    write_report("report.html", build_report("Students compared", "On one drive.", sections))
"""

from __future__ import annotations

import base64
import itertools
import math
import numbers
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path

import numpy as np
import torch

from kdmos import __version__
from kdmos.checkpoint import write_atomic
from kdmos.errors import InputError
from kdmos.picture import read_panels

NOTHING = "\N{EN DASH}"  # where there is nothing to count
COLOURS = 6  # curves of more methods begin again with the first colour
CURVE_POINTS = 240  # more than a chart has pixels to tell apart on a phone
CURVES = {  # tags that `kdmos train` writes: (heading, whether a share)
    "val/moving_iou": ("Moving IoU on the validation scans, %", True),
    "train/loss_epoch": ("Training loss, mean of an epoch", False),
}


# --- what a report is made of: blocks, in sections


class Plain(float):
    """A cell that is no share: shown as it is, with two decimals."""


def plain(value: float | None) -> Plain | None:
    """A number, or None, as such a cell."""
    return None if value is None else Plain(value)


@dataclass(frozen=True)
class Table:
    """Rows under headings, the first column naming the row; columns of numbers are aligned to the right.

    A cell is text, an int (a count), a float (a share in 0..1, shown in percent), a `Plain` number, None or NaN (shown
    as a dash), or a list of such numbers, one a seed (shown as mean and standard deviation).

    caption: Stands above it.
    head: Headings, one a column.
    rows: Cells, as many a row as there are headings; neighbours of one name share it.
    best: Columns of numbers whose highest one is set in bold.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence]
    best: Sequence[int] = ()


@dataclass(frozen=True)
class Figures:
    """A few numbers to be read first: {what: cell of a `Table`}."""

    values: dict


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and what it is, such as a setting and its value. caption: stands above them."""

    values: dict
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """Images side by side, below each other on a phone: panels [(alternative text, PNG)], and a caption."""

    panels: Sequence[tuple[str, bytes]]
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """Curves over training steps.

    caption: What is drawn.
    curves: [(name, colour, runs)]: colour >= 0 counts through the palette, runs are lists of (step, value); those of
        one method, one a seed, share its name and colour. Values that are not finite are left out.
    share: Whether values are in 0..1 and shown in percent.
    """

    caption: str
    curves: Sequence[tuple[str, int, Sequence[Sequence[tuple[int, float]]]]]
    share: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and what follows it: blocks of the kinds above; a string is a paragraph, charts in a row share it."""

    title: str
    blocks: Sequence[Table | Figures | Facts | Picture | Chart | str]


# --- methods side by side


@dataclass(frozen=True)
class Method:
    """Something that predicts, and what is known of it.

    name: Stands in each row and legend.
    scores: What `evaluate_predictions` returned, or its "rule" part; or a list of them, one a seed.
    curves: What `training_curves` returned; or a list, one a seed.
    note: What one should know of it, in a sentence.
    """

    name: str
    scores: dict | list[dict] | None = None
    curves: dict | list[dict] = field(default_factory=dict)
    note: str = ""

    def score(self, pick: Callable[[dict], object]):
        """`pick` of its scores as a cell: one value, or a list of them where seeds differ."""
        values = [pick(scores) for scores in _listed(self.scores)]
        return values[0] if values and all(value == values[0] for value in values) else values or None


def _listed(one_or_more) -> list:
    return one_or_more if isinstance(one_or_more, list) else [one_or_more] if one_or_more else []


def score_blocks(methods: Sequence[Method]) -> list:
    """Scores of methods on the same data: in all, by distance, by kind, per sequence of several; the notes."""
    scored = [method for method in methods if method.scores]
    if not scored:
        return []
    blocks = [score_table(scored), range_table(scored)]
    if _kinds(scored):
        blocks.append(kind_table(scored))
    if len(_sequence_names(scored)) > 1:
        blocks.append(sequence_table(scored))
    if any(len(_listed(method.scores)) > 1 for method in scored):
        blocks.append("± is the standard deviation over the seeds; a number without it is the same for all.")
    notes = {method.name: method.note for method in scored if method.note}
    return [*blocks, Facts(notes)] if notes else blocks


def score_table(methods: Sequence[Method], caption: str = "All scans together, %") -> Table:
    """Moving IoU, precision, recall, static IoU and what they are of; a row a method."""
    head, picks, shares = _score_columns(methods)
    rows = [[method.name, *(method.score(lambda s, p=pick: p(s["total"])) for pick in picks)] for method in methods]
    return Table(caption, ["method", *head], rows, best=range(1, 1 + shares))


def sequence_table(methods: Sequence[Method], caption: str = "Each sequence, %") -> Table:
    """The same, a row a sequence and method."""
    head, picks, _ = _score_columns(methods)

    def find(scores: dict, name: str) -> dict | None:
        return scores["sequences"].get(name)

    return _grouped_table(caption, "sequence", _sequence_names(methods), methods, head, picks, find)


def kind_table(methods: Sequence[Method], caption: str = "Kinds of movers, %") -> Table:
    """Recall of points and of objects of all sequences; a row a kind of mover and method."""
    head = ["recall", "object recall", "objects", "moving points"]
    picks = [lambda row, key=key: row[key] for key in ("recall", "object_recall", "objects", "points")]

    def find(scores: dict, kind: str) -> dict | None:
        return next((row for row in scores["total"]["by_kind"] if row["kind"] == kind), None)

    return _grouped_table(caption, "kind", _kinds(methods), methods, head, picks, find)


def _grouped_table(caption, first: str, names: Iterable[str], methods: Sequence[Method], head, picks, find) -> Table:
    """A row a name and method, the latter left out where there is one; dashes where `find(scores, name)` is None."""
    rows = []
    for name in names:
        for method in methods:
            known = all(find(scores, name) is not None for scores in _listed(method.scores))
            cells = [method.score(lambda s, p=pick, name=name: p(find(s, name))) if known else None for pick in picks]
            rows.append([name, method.name, *cells])
    if len(methods) == 1:
        return Table(caption, [first, *head], [row[:1] + row[2:] for row in rows])
    return Table(caption, [first, "method", *head], rows)


def _kinds(methods: Iterable[Method]) -> list[str]:
    rows = (row for m in methods for scores in _listed(m.scores) for row in scores["total"]["by_kind"])
    return list(dict.fromkeys(row["kind"] for row in rows))


def _sequence_names(methods: Iterable[Method]) -> list[str]:
    return list(dict.fromkeys(name for m in methods for scores in _listed(m.scores) for name in scores["sequences"]))


def _score_columns(methods: Iterable[Method]) -> tuple[list[str], list[Callable[[dict], object]], int]:
    """Headings, what to pick from a row of scores for each, and how many of them are shares."""
    columns: dict[str, Callable[[dict], object]] = {
        "moving IoU": lambda row: row["moving_iou"],
        "precision": lambda row: row["moving_precision"],
        "recall": lambda row: row["moving_recall"],
        "static IoU": lambda row: row["static_iou"],
    }
    if any("movable" in scores["total"]["iou"] for method in methods for scores in _listed(method.scores)):
        columns["static + movable IoU"] = columns.pop("static IoU")
        columns["static IoU"] = lambda row: row["iou"]["static"] if "movable" in row["iou"] else None
        columns["movable IoU"] = lambda row: row["iou"].get("movable")
    columns["object recall"] = lambda row: row["object_recall"]
    shares = len(columns)
    columns["false objects a scan"] = lambda row: plain(row["false_objects_per_scan"])
    columns["objects"] = lambda row: row["objects"]
    columns["scored points"] = lambda row: row["points"]
    columns["of them moving"] = lambda row: row["moving_points"]
    columns["scans"] = lambda row: row["scans"]
    return list(columns), list(columns.values()), shares


def range_table(methods: Sequence[Method], caption: str = "Moving IoU by distance, %") -> Table:
    """Moving IoU of all sequences by horizontal distance; a row a method."""
    first = _listed(methods[0].scores)[0]["total"]["by_range"]
    ends = [ring["metres"] for ring in first]
    bins = [f"{low} m +" if high is None else f"{low}{NOTHING}{high} m" for low, high in ends]
    shares = {
        m.name: [m.score(lambda s, i=i: s["total"]["by_range"][i]["moving_iou"]) for i in range(len(bins))]
        for m in methods
    }
    return breakdown(caption, bins, shares, [ring["moving_points"] for ring in first])


def breakdown(
    caption: str, bins: Sequence[str], shares: dict[str, Sequence], counts: Sequence[int], of: str = "moving points"
) -> Table:
    """A score in bins: of distance, of object speed.

    Args:
        caption: Stands above the table.
        bins: Their names, e.g. "0–2 m/s".
        shares: {method: a cell per bin}, see `Table`.
        counts: What lies in each bin, in the last row under the name `of`.
    """
    rows = [[name, *cells] for name, cells in shares.items()]
    best = range(1, 1 + len(bins)) if len(rows) > 1 else ()
    return Table(caption, ["", *bins], [*rows, [of, *counts]], best)


def curve_charts(methods: Sequence[Method], tags: dict[str, tuple[str, bool]] = CURVES) -> list[Chart]:
    """A chart for each of the tags {tag: (caption, whether a share)} that is known of a method; one colour each."""
    charts = []
    for tag, (caption, share) in tags.items():
        curves = []
        for colour, method in enumerate(methods):
            runs = [run[tag] for run in _listed(method.curves) if run.get(tag)]
            if runs:
                curves.append((method.name, colour, runs))
        if curves:
            charts.append(Chart(caption, curves, share))
    return charts


def training_curves(run: str | Path) -> dict[str, list[tuple[int, float]]]:
    """What a training run logged: {tag: [(optimizer step, value)]}, sorted by step.

    Steps that a resumed run repeated are there once, as repeated.

    Args:
        run: Folder that `kdmos train` wrote (its output=).
    Raises: InputError if there are no curves in it or tensorboard is missing.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise InputError("learning curves need tensorboard: pip install 'kdmos[train]'") from None
    folder = Path(run) / "tensorboard"
    if not any(folder.glob("events.out.tfevents.*")):
        raise InputError(f"{folder}: no learning curves; expected the output= folder of a kdmos train run")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: sorted({event.step: event.value for event in events.Scalars(tag)}.items()) for tag in tags}


def scan_picture(path: str | Path, caption: str | None = None) -> Picture:
    """A picture that `bev_picture` wrote, panel by panel. caption: None for the title it was drawn with.

    Raises: InputError naming the file if it is no such picture.
    """
    title, panels = read_panels(path)
    caption = title if caption is None else caption
    kinds = ("the true moving points", "the predicted moving points", "points found, missed and false alarms")
    return Picture([(f"Bird's-eye view of {kind}; {caption}", png) for kind, png in zip(kinds, panels)], caption)


# --- what was run


def command_line() -> str:
    """The command of this process as one would type it."""
    program = Path(sys.argv[0])
    if program.parent == Path(__file__).parent and program.stem != "__main__":
        words = ["python", "-m", f"kdmos.{program.stem}"]
    else:
        words = ["kdmos" if program.stem == "__main__" else program.name]
    return shlex.join([*words, *sys.argv[1:]])


def circumstances() -> dict[str, str]:
    """Command line, versions, machine and date, for `Facts`."""
    versions = {"kdmos": __version__, "Python": platform.python_version(), "torch": torch.__version__}
    versions["numpy"] = np.__version__
    return {
        "command": command_line(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }


# --- the page


def build_report(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole HTML page: no script, nothing from outside, all text escaped.

    Args:
        title: Heading of the page.
        lead: The paragraph below it: what was found.
        sections: What follows; from four on, there are links to them.
    """
    links = [f'<li><a href="#part{i}">{escape(section.title)}</a></li>' for i, section in enumerate(sections)]
    parts = []
    for i, section in enumerate(sections):
        content = "\n".join(_blocks(section.blocks))
        parts.append(f'<section id="part{i}">\n<h2>{escape(section.title)}</h2>\n{content}\n</section>')
    contents = f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>' if len(sections) > 3 else ""
    return PAGE.format(title=escape(title), lead=escape(lead), style=STYLE, contents=contents, content="\n".join(parts))


def write_report(path: str | Path, html: str) -> None:
    """Write the page whole or not at all. Raises: InputError naming a file that cannot be written."""
    write_atomic(path, html.encode(errors="replace"))  # a file name may hold what is no Unicode


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{lead}</p>
{contents}
</header>
<main>
{content}
</main>
</body>
</html>
"""

# Curves: blue, vermilion, green, purple, brown, grey, told apart by the colour-blind in both schemes.
STYLE = """
:root {
  --page: #fff; --ink: #1b1f24; --soft: #59636e; --line: #dfe3e7; --wash: #f5f7f8; --shade: #0000001c;
  --c0: #0067a8; --c1: #c94f00; --c2: #00805d; --c3: #9c4683; --c4: #7a5c00; --c5: #59636e;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #0d1117; --ink: #e3e8ee; --soft: #97a3b0; --line: #2a323c; --wash: #151b23; --shade: #000a;
    --c0: #5db7ee; --c1: #ff8d51; --c2: #3ccb9c; --c3: #e09cc6; --c4: #e0c040; --c5: #a5b0bb;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; max-width: 66rem; padding: 2.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; letter-spacing: -0.015em; text-wrap: balance; }
h2 { margin: 3rem 0 1rem; font-size: 1.25rem; line-height: 1.3; letter-spacing: -0.01em; }
p { margin: 0.75rem 0; max-width: 44rem; }
header p { font-size: 1.0625rem; color: var(--soft); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 1rem 0 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: 0.25rem 0; }
a { color: var(--c0); text-underline-offset: 0.2em; text-decoration-thickness: 1px; }
figure { margin: 1.75rem 0; }
figcaption { margin-bottom: 0.5rem; font-size: 0.9375rem; font-weight: 600; line-height: 1.4; }

.scroll {
  overflow-x: auto; border-top: 1px solid var(--line); border-bottom: 1px solid var(--line);
  background: linear-gradient(to left, var(--page) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 0.75rem 100% no-repeat scroll;
}
.scroll:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.9375rem; line-height: 1.35; }
th, td { padding: 0.5rem 0.75rem; text-align: left; vertical-align: baseline; }
th:last-child, td:last-child { padding-right: 0.25rem; }
tbody th, tbody td { border-top: 1px solid var(--line); }
thead th { font-size: 0.8125rem; font-weight: 500; color: var(--soft); vertical-align: bottom; }
tbody th {
  position: sticky; left: 0; min-width: 7rem; max-width: 14rem; padding-left: 0.25rem; background: var(--page);
  font-weight: 500; overflow-wrap: anywhere;
}
thead th:first-child { position: sticky; left: 0; padding-left: 0.25rem; background: var(--page); }
.number { text-align: right; white-space: nowrap; }
thead .long { white-space: normal; }
.spread { color: var(--soft); font-size: 0.8125em; font-weight: 400; }

.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.5rem 0; }
.figures div { display: flex; flex-direction: column-reverse; }
.figures dt { font-size: 0.875rem; color: var(--soft); }
.figures dd { margin: 0; font-size: 1.875rem; font-weight: 600; line-height: 1.2; letter-spacing: -0.02em; }
.facts { display: grid; grid-template-columns: fit-content(32%) minmax(0, 1fr); gap: 0.375rem 1.25rem; }
.facts { margin: 0; font-size: 0.9375rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }

.panels, .charts { display: grid; grid-template-columns: minmax(0, 1fr); }
.panels { gap: 0.25rem; border-radius: 0.5rem; overflow: hidden; background: #0d1117; }
.panels img { display: block; width: 100%; max-width: 100%; height: auto; }
.charts { gap: 0 2.5rem; }
.chart { margin: 0.75rem 0 0.5rem; }
.chart svg { display: block; width: 100%; max-width: 36rem; height: auto; font-size: 12px; }
.chart text { fill: var(--soft); }
.chart line { stroke: var(--line); }
.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .one-of { stroke-width: 1.5; opacity: 0.75; }
.legend { display: flex; flex-wrap: wrap; gap: 0.125rem 1.25rem; margin: 0.5rem 0 0; padding: 0; list-style: none; }
.legend { font-size: 0.875rem; }
.legend i { display: inline-block; width: 1.125rem; height: 0.1875rem; margin-right: 0.4rem; vertical-align: 0.25em; }
.legend i { border-radius: 1px; }
.legend b { font-weight: 600; }
COLOUR_RULES
@media (min-width: 44rem) {
  body { padding: 4rem 2rem 6rem; }
  h1 { font-size: 2.25rem; }
  .panels { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0; }
  .panels.n1 { grid-template-columns: minmax(0, 1fr); }
  .charts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media print {
  @page { margin: 16mm; }
  html { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll { overflow: visible; background: none; }
  th, td { padding: 0.3rem 0.4rem; }
  .panels { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .charts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .panels, .legend i { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
}
""".replace(
    "COLOUR_RULES",
    "\n".join(
        f".s{i} {{ stroke: var(--c{i}); }} .s{i} circle {{ fill: var(--c{i}); }} .k{i} {{ background: var(--c{i}); }}"
        for i in range(COLOURS)
    ),
)


# --- how each block is written


def _blocks(blocks: Sequence) -> Iterable[str]:
    charts = []
    for block in [*blocks, ""]:
        if isinstance(block, Chart):
            charts.append(_chart(block))
            continue
        if charts:
            yield '<div class="charts">\n' + "\n".join(charts) + "\n</div>"
            charts = []
        if isinstance(block, str):
            yield f"<p>{escape(block)}</p>" if block else ""
        else:
            yield WRITE[type(block)](block)


def _cell(value) -> str:
    """HTML of a cell of a `Table`."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, (list, tuple)):
        known = [one for one in value if not _unknown(one)]
        if len(known) < 2:
            return _cell(known[0]) + f' <span class="spread">(1 of {len(value)})</span>' if known else NOTHING
        number = "{:.1f}" if isinstance(known[0], numbers.Integral) else "{:.1%}"
        number = "{:.2f}" if isinstance(known[0], Plain) else number
        mean, spread = (number.format(f(known)).rstrip("%") for f in (statistics.fmean, statistics.stdev))
        part = f" ({len(known)} of {len(value)})" if len(known) < len(value) else ""
        return f'{mean} <span class="spread">± {spread}{part}</span>'
    if _unknown(value):
        return NOTHING
    if isinstance(value, Plain):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, numbers.Integral) else f"{100 * value:.1f}"


def _unknown(value) -> bool:
    return value is None or not math.isfinite(value)


def _table(table: Table) -> str:
    columns = list(zip(*table.rows)) or [()] * len(table.head)
    number = [i > 0 and not any(isinstance(cell, str) for cell in column) for i, column in enumerate(columns)]
    best = {(i, row) for i in table.best for row in _highest(columns[i])}

    def tag(name: str, i: int, content: str, more: str = "", long: bool = False) -> str:
        kinds = ["number"] * number[i] + ["long"] * long
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{name}{more}{kind}>{content}</{name}>"

    head = "".join(
        tag("th", i, escape(text), ' scope="col"', len(text) > 12) if text else tag("td", i, "")
        for i, text in enumerate(table.head)
    )
    rows = []
    for r, row in enumerate(table.rows):
        cells = [f"<strong>{_cell(value)}</strong>" if (i, r) in best else _cell(value) for i, value in enumerate(row)]
        others = "".join(tag("td", i, cell) for i, cell in enumerate(cells) if i > 0)
        if r > 0 and row[0] == table.rows[r - 1][0]:
            rows.append(others)  # a name stands once beside all its rows
            continue
        span = len(list(itertools.takewhile(lambda other, name=row[0]: other[0] == name, table.rows[r:])))
        scope = f' scope="rowgroup" rowspan="{span}"' if span > 1 else ' scope="row"'
        rows.append(tag("th", 0, cells[0], scope) + others)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    caption = escape(table.caption)
    return (
        f'<figure>\n<figcaption>{caption}</figcaption>\n<div class="scroll" role="region" tabindex="0" '
        f'aria-label="{caption}">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n'
        "</div>\n</figure>"
    )


def _highest(column: Sequence) -> list[int]:
    """Rows of the highest share, means where there are seeds; none where nothing is compared."""
    values = {}
    for row, cell in enumerate(column):
        known = [x for x in (cell if isinstance(cell, (list, tuple)) else [cell]) if not _unknown(x)]
        if known and not isinstance(known[0], numbers.Integral):
            values[row] = round(statistics.fmean(known), 3)  # as it is shown
    return [row for row in values if values[row] == max(values.values())] if len(set(values.values())) > 1 else []


def _figures(figures: Figures) -> str:
    pairs = "".join(f"<div><dt>{escape(k)}</dt><dd>{_cell(value)}</dd></div>" for k, value in figures.values.items())
    return f'<dl class="figures">{pairs}</dl>'


def _facts(facts: Facts) -> str:
    pairs = "\n".join(
        f"<dt>{escape(str(name))}</dt><dd>{NOTHING if value is None else escape(str(value))}</dd>"
        for name, value in facts.values.items()
    )
    caption = f"<figcaption>{escape(facts.caption)}</figcaption>\n" if facts.caption else ""
    return f'<figure>\n{caption}<dl class="facts">\n{pairs}\n</dl>\n</figure>'


def _picture(picture: Picture) -> str:
    images = "\n".join(
        f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for alt, png in picture.panels
    )
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>\n" if picture.caption else ""
    return f'<figure>\n{caption}<div class="panels n{len(picture.panels)}">\n{images}\n</div>\n</figure>'


# A chart's own units: as wide as a phone and half a desktop page, so that 12 px of text are readable on both.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 240, 40, 12, 10, 40


def _chart(chart: Chart) -> str:
    scale = 100 if chart.share else 1
    curves = [
        (name, colour % COLOURS, [[(x, scale * y) for x, y in _thinned(run)] for run in runs])
        for name, colour, runs in chart.curves
    ]
    points = [point for _, _, runs in curves for run in runs for point in run] or [(0, 0)]
    x_high = max(1, *(x for x, _ in points))
    y_ticks = _ticks(min(0, *(y for _, y in points)), max(y for _, y in points))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[str, str]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / x_high
        down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_low) / (y_high - y_low)
        return f"{across:.1f}", f"{down:.1f}"

    parts = []
    for y in y_ticks:
        _, down = place(0, y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"></line>')
        parts.append(f'<text x="{LEFT - 6}" y="{down}" dy="0.35em" text-anchor="end">{y:g}</text>')
    for x in (x for x in _ticks(0, x_high) if x <= x_high):
        across, _ = place(x, 0)
        parts.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(x)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">optimizer steps</text>')
    legend, spoken = [], []
    for name, colour, runs in curves:
        several = " one-of" if len(runs) > 1 else ""
        for run in runs:
            line = " ".join(",".join(place(x, y)) for x, y in run)
            end = "".join(f'<circle cx="{x}" cy="{y}" r="3"></circle>' for x, y in (place(*p) for p in run[-1:]))
            parts.append(
                f'<g class="s{colour}"><polyline class="{several.strip()}" points="{line}"></polyline>{end}</g>'
            )
        last = [run[-1][1] for run in runs if run]
        at_end = f"{statistics.fmean(last):.{1 if chart.share else 2}f}" if last else NOTHING
        legend.append(f'<li><i class="k{colour}"></i>{escape(name)} <b>{at_end}</b></li>')
        spoken.append(f"{name} ends at {at_end}")
    caption = escape(chart.caption)
    return (
        f'<figure class="chart">\n<figcaption>{caption}</figcaption>\n'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{caption}: {escape("; ".join(spoken))}">\n'
        + "\n".join(parts)
        + f'\n</svg>\n<ul class="legend">{"".join(legend)}</ul>\n</figure>'
    )


def _thinned(run: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most `CURVE_POINTS` points, each the mean of as many neighbours; the last one stays itself."""
    known = [(x, y) for x, y in run if math.isfinite(y)]
    if len(known) <= CURVE_POINTS:
        return known
    parts = np.array_split(np.array(known[:-1]), CURVE_POINTS - 1)
    return [tuple(part.mean(0).tolist()) for part in parts] + known[-1:]


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, in steps of 1, 2 or 5 times a power of ten."""
    rough = max(high - low, 1e-9) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), max(math.ceil(high / step - 1e-9), math.floor(low / step) + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _short(number: float) -> str:
    return f"{number / 1000:g}k" if number >= 10_000 else f"{number:g}"


WRITE = {Table: _table, Figures: _figures, Facts: _facts, Picture: _picture}
