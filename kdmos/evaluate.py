"""`kdmos evaluate`: predictions against labels, counted as the public SemanticKITTI MOS evaluation counts.

In order: what is scored, the counting, the scores, the pictures, the report on a terminal and as a page, the command.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdmos import metrics
from kdmos.command import Bar, listed, run
from kdmos.data.labels import CLASSES, to_classes
from kdmos.data.profile import SensorProfile, profile_of
from kdmos.data.semantic_kitti import (
    SPLIT_NAMES,
    Sequence,
    find_sequences,
    read_labels,
    read_manifest,
    split_frames,
    split_sequences,
)
from kdmos.errors import InputError
from kdmos.motion import MotionStream, moving_by_rule
from kdmos.objects import ObjectTally
from kdmos.odometry import saved_poses
from kdmos.picture import bev_picture, need_matplotlib
from kdmos.report import (
    Facts,
    Figures,
    Method,
    Section,
    build_report,
    circumstances,
    curve_charts,
    plain,
    scan_picture,
    score_blocks,
    training_curves,
    write_report,
)
from kdmos.settings import MotionSettings

NAMES = CLASSES[4]
UNLABELED, STATIC, MOVABLE, MOVING = range(4)
RANGES = (0, 10, 20, 30, 40, 50)  # lower bounds, metres of horizontal distance; the last one is open
RULE = MotionSettings()  # the published channels, K = 8: they look 7 scans ahead
PICTURE_EXTENT = 40.0  # metres; beyond, a moving person is a point or two
FILE_WIDTH = 120  # columns of the report where there is no terminal to ask
RULE_NAME = "training-free rule"


# --- what is scored


class Scored(NamedTuple):
    """A sequence, its frames with labels and predictions, and its frames with labels alone."""

    sequence: Sequence
    frames: list[int]
    missing: list[int]


def find_scored(
    data: str | Path,
    predictions: str | Path,
    asked: Iterable[str] | None = None,
    allow_missing: bool = False,
    frames: frozenset[int] | None = None,
    remission_scale: float = 1.0,
) -> tuple[list[Scored], dict[str, str]]:
    """Sequences to score with their frames, and why others are left out.

    Args:
        data: Data root or bare sequence folder.
        predictions: Folder that holds sequences/<name>/predictions/NNNNNN.label.
        asked: Names of the sequences; None: all that have labels and predictions.
        allow_missing: Leave out labelled scans without a prediction.
        frames: Score these alone; None: all that have labels.
        remission_scale: What brings the remission of the scans to 0..1.
    Returns: sequences and {name: reason}, the latter empty if sequences were asked for.
    Raises: InputError if nothing can be scored, an asked-for sequence cannot, or a file is missing.
    """
    if not Path(predictions).is_dir():
        raise InputError(f"{predictions}: no such folder; kdmos predict writes it")
    scored, left_out = [], {}
    for sequence in find_sequences(data, asked, remission_scale):
        labelled = [frame for frame in _labelled_frames(sequence) if frames is None or frame in frames]
        folder = sequence.prediction_path(predictions, 0).parent
        if not labelled:
            left_out[sequence.name] = f"{sequence.folder / 'labels'}: no labels to score against"
        elif not folder.is_dir():
            left_out[sequence.name] = f"{folder}: no predictions"
        else:
            missing = _missing_frames(sequence, labelled, predictions, allow_missing)
            if len(missing) == len(labelled):
                left_out[sequence.name] = f"{folder}: no predictions"
            else:
                scored.append(Scored(sequence, sorted(set(labelled) - set(missing)), missing))
    if left_out and asked is not None:
        raise InputError(next(iter(left_out.values())))
    if not scored:
        unpredicted = [reason for reason in left_out.values() if reason.endswith("no predictions")]
        raise InputError(
            f"{unpredicted[0]}, nor of another labelled sequence; expected NNNNNN.label files, as kdmos predict writes"
            if unpredicted
            else f"{data}: no sequence has labels/NNNNNN.label, so there is nothing to score against"
        )
    return scored, left_out


def _labelled_frames(sequence: Sequence) -> list[int]:
    return sorted(int(path.stem) for path in (sequence.folder / "labels").glob("*.label") if path.stem.isdecimal())


def _missing_frames(sequence: Sequence, labelled: list[int], predictions: str | Path, allow_missing: bool) -> list[int]:
    """Labelled frames without a prediction; refused unless allowed, for the score is then one of the rest."""
    lost = sorted(set(labelled) - set(sequence.frames))
    if lost:
        raise InputError(
            f"{sequence.points_path(lost[0])}: no such scan, but {sequence.folder / 'labels'} has labels for it "
            f"({len(lost)} of {len(labelled)} label files are without a scan)"
        )
    missing = [frame for frame in labelled if not sequence.prediction_path(predictions, frame).exists()]
    if missing and not allow_missing:
        raise InputError(
            f"{sequence.prediction_path(predictions, missing[0])}: no prediction for labelled scan "
            f"{sequence.scan(missing[0])} ({len(missing)} of {len(labelled)} are missing); predict the whole sequence, "
            "or score the rest with --allow-missing"
        )
    return missing


# --- the counting


class Truth(NamedTuple):
    """What is known of a scan: raw labels uint32 [n], indices into `NAMES` [n] and `RANGES` [n], points [n, 4]."""

    labels: np.ndarray
    classes: np.ndarray
    ring: np.ndarray
    points: np.ndarray


class Tally:
    """Counts of one sequence; those of several add up.

    tables: Confusion tables, int64 [ranges, 4, 4], rows truth.
    objects: Of moving objects, found and false.
    """

    def __init__(self) -> None:
        self.tables = np.zeros((len(RANGES), len(NAMES), len(NAMES)), np.int64)
        self.objects = ObjectTally()

    def add(self, truth: Truth, predicted: np.ndarray) -> None:
        first = truth.ring.astype(np.uint8) * np.uint8(len(NAMES))  # each ring has classes of its own: one pass for all
        table = metrics.confusion(first + truth.classes, first + predicted, len(RANGES) * len(NAMES))
        every = np.arange(len(RANGES))
        self.tables += table.reshape(len(RANGES), len(NAMES), len(RANGES), len(NAMES))[every, :, every]
        self.objects.add(truth.labels, predicted == MOVING, truth.points)

    def unlabeled_is_static(self) -> bool:
        """Whether these labels know no static points: only 0 and moving ones, so that 0 must mean static."""
        points = self.tables.sum((0, 2))
        return bool(points[UNLABELED] and points[MOVING] and not points[STATIC] + points[MOVABLE])

    def count_unlabeled_as_static(self) -> None:
        self.tables[:, STATIC] += self.tables[:, UNLABELED]
        self.tables[:, UNLABELED] = 0
        self.objects.count_unlabeled_as_static()

    def __add__(self, other: Tally) -> Tally:
        total = Tally()
        total.tables, total.objects = self.tables + other.tables, self.objects + other.objects
        return total


def count_sequence(
    scored: Scored, predictions: str | Path, poses: np.ndarray | None, profile: SensorProfile, advance
) -> tuple[Tally, Tally, int]:
    """Read a sequence once: tally of the predictions, tally of the rule, and the frame with most moving points.

    Args:
        scored, predictions: What to read.
        poses: Of its scans, for the rule; None: no rule.
        profile: Of the sensor, for the rule.
        advance: Called after each scan.
    """
    sequence, known, missing = scored.sequence, set(scored.frames), set(scored.missing)
    by_prediction, by_rule, most, fullest = Tally(), Tally(), -1, scored.frames[0]
    stream, waiting = MotionStream(RULE), deque()  # the scans whose channels are not complete

    def score_rule(channels: torch.Tensor) -> None:
        scan = waiting.popleft()
        if scan is not None:
            truth, kept = scan
            found = np.full(len(truth.points), STATIC)
            found[kept] = np.where(moving_by_rule(channels).numpy(), MOVING, STATIC)
            by_rule.add(truth, found)

    # The rule sees scans that are not scored too: they belong to the windows of their neighbours.
    for index, frame in enumerate(scored.frames if poses is None else sequence.frames):
        scan = None
        try:
            points = sequence.read_points(frame)
        except InputError:
            if frame not in missing:
                raise
            points = np.zeros((0, 4), np.float32)  # a scan that kdmos predict could not read either, and took as empty
        for_rule, kept = profile.apply(points)
        if frame in known:
            labels, classes, predicted = read_scan(sequence, frame, predictions, len(points))
            truth = Truth(labels, classes, range_ring(points), points)
            scan = truth, kept
            by_prediction.add(truth, predicted)
            moving = np.count_nonzero(classes == MOVING)
            if moving > most:
                most, fullest = moving, frame
        if poses is not None:
            waiting.append(scan)
            channels = stream.push(torch.from_numpy(for_rule), poses[index])
            if channels is not None:
                score_rule(channels)
        advance()
    for channels in stream.flush():
        score_rule(channels)
    return by_prediction, by_rule, fullest


def read_scan(
    sequence: Sequence, frame: int, predictions: str | Path, num_points: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True label of each point, uint32 [n], its class and the predicted one, uint8 [n], indices into `NAMES`."""
    path, labels = sequence.prediction_path(predictions, frame), sequence.read_labels(frame, num_points)
    truth = to_classes(labels, NAMES, sequence.labels_path(frame))
    return labels, truth, to_classes(read_labels(path, num_points), NAMES, path)


def range_ring(points: np.ndarray) -> np.ndarray:
    """Index into `RANGES` of each point; non-finite ones, which count like all others, go into the last ring."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.searchsorted(RANGES, np.hypot(points[:, 0], points[:, 1]), side="right") - 1


# --- the scores


def evaluate_predictions(
    data: str | Path,
    predictions: str | Path,
    sequences: Iterable[str] | None = None,
    split: str | None = None,
    rule: bool = False,
    pictures: str | Path | None = None,
    frames: Iterable[int] | None = None,
    progress: bool = False,
    allow_missing: bool = False,
) -> dict:
    """Scores of written predictions, in all and per sequence.

    Every point with a label counts, non-finite points too; unlabeled truth does not. Movable is part of static,
    as in the public evaluation, unless the predictions hold movable ids. Numbers in all come from the summed
    counts. (The public tool takes a predicted 250 for unlabeled. Moving IoU is the same either way.)

    Labels of a sequence that hold 0 and moving ids alone, as those of Apollo do, know no static points; there 0 counts
    as static, and the report says so.

    Args:
        data: SemanticKITTI root or bare sequence folder, with labels.
        predictions: Folder that holds sequences/<name>/predictions/NNNNNN.label, raw ids.
        sequences: Names of the sequences to score; None: all that have labels and predictions.
        split: The sequences of this split instead, see `split_sequences`; or, of a data set that divides the scans of
            every sequence, these scans of all sequences or the named ones, see `split_frames`.
        rule: Score beside them the training-free rule, at least half of the published residual channels
            non-zero; needs poses.
        pictures: Folder for a picture per sequence, of the scan with most moving points.
        frames: Frame numbers to draw instead, in each sequence that has them.
        progress: Say on stderr how far it is.
        allow_missing: Score the scans that have predictions where other labelled scans have none.
    Returns: JSON-able dict: `data`, `predictions`, `made_with` (what kdmos predict noted: look-ahead and so on, or
        None), `classes`, `total`, `mean`, `sequences` {name: scores}, `left_out` {name: reason}, `unlabelled_scans`
        {name: count} and `missing_predictions` {name: count of labelled scans without one} of the scored sequences,
        `unlabeled_is_static` [name], `without_instances` [name], `pictures` [path]; with `rule` also `rule`
        {`motion`, `total`, `mean`, `sequences`}. `mean` is over sequences {`moving_iou`, `low` and `high` of its 95 %
        bootstrap interval, `sequences`: how many have a moving IoU}, None if one sequence is scored.
        Scores are `scans`, `points` (with a label), `moving_points`, `moving_iou`, `moving_precision`,
        `moving_recall`, `static_iou` (movable included), `iou` {class: IoU}, `by_range` [{`metres`, `moving_points`,
        `moving_iou`, `moving_precision`, `moving_recall`}] and those of `ObjectTally.scores`; shares in 0..1, None
        where there is nothing to count.
    Raises: InputError naming the file or argument that cannot be used.
    """
    of_split = None if split is None else split_frames(data, split)
    if sequences is not None and split is not None and of_split is None:
        raise InputError("sequences and split exclude each other: give one of them")
    if frames is not None and pictures is None:
        raise InputError("frames says which scans to draw, so it needs pictures, the folder for them")
    if pictures is not None:
        need_matplotlib()  # now, not after the counting
    made_with = read_manifest(predictions)
    profile = profile_of(made_with)
    asked = split_sequences(split) if split is not None and of_split is None else sequences
    scored, left_out = find_scored(data, predictions, asked, allow_missing, of_split, profile.remission_scale)
    frames = None if frames is None else list(frames)
    nowhere = set(frames or ()).difference(*(one.frames for one in scored))
    if nowhere:
        raise InputError(
            f"frame {min(nowhere)}: no scored sequence has labels and a prediction for it, so it cannot be drawn"
        )
    poses = {one.sequence.name: _poses(data, predictions, one.sequence, profile) if rule else None for one in scored}

    by_prediction, by_rule, to_draw, taken_for_static = {}, {}, [], []
    with Bar("evaluate", sum(len(one.sequence.frames if rule else one.frames) for one in scored), progress) as bar:
        for one in scored:
            name = one.sequence.name
            bar.what = f"sequence {name}"
            by_prediction[name], by_rule[name], fullest = count_sequence(
                one, predictions, poses[name], profile, bar.advance
            )
            if by_prediction[name].unlabeled_is_static():
                taken_for_static.append(name)
                by_prediction[name].count_unlabeled_as_static()
                by_rule[name].count_unlabeled_as_static()
            chosen = [fullest] if frames is None else [frame for frame in frames if frame in one.frames]
            to_draw += [(one.sequence, frame) for frame in chosen]

    movable = bool(sum(tally.tables for tally in by_prediction.values())[:, :, MOVABLE].any())
    drawn = [] if pictures is None else [draw(*scan, predictions, pictures) for scan in to_draw]
    report = {
        "data": str(data),
        "predictions": str(predictions),
        "made_with": made_with,
        "classes": ["static", "movable", "moving"] if movable else ["static", "moving"],
        **_scores_of_all(by_prediction, movable),
        "left_out": left_out,
        "unlabelled_scans": {
            s.name: n for s, known, missing in scored if (n := len(s.frames) - len(known) - len(missing))
        },
        "missing_predictions": {s.name: len(missing) for s, _, missing in scored if missing},
        "unlabeled_is_static": taken_for_static,
        "without_instances": [name for name, tally in by_prediction.items() if tally.objects.lacks_instances()],
        "pictures": [str(path) for path in drawn],
    }
    if rule:
        motion = {"form": RULE.form, "num_channels": RULE.num_channels, "lookahead": RULE.lookahead}
        report["rule"] = {"motion": motion, **_scores_of_all(by_rule, movable=False)}
    return report


def _poses(data: str | Path, predictions: str | Path, sequence: Sequence, profile: SensorProfile) -> np.ndarray:
    """Of the scans as the rule gets them, those that kdmos predict used."""
    saved = saved_poses(predictions, data, sequence)
    if saved is None and not sequence.has_poses:
        raise InputError(f"{sequence.folder / 'poses.txt'}: does not exist, and the rule needs poses")
    return profile.apply_to_pose(sequence.poses() if saved is None else saved)


def _scores_of_all(tallies: dict[str, Tally], movable: bool) -> dict:
    sequences = {name: scores(tally, movable) for name, tally in tallies.items()}
    return {
        "total": scores(sum(tallies.values(), start=Tally()), movable),
        "mean": over_sequences(sequences.values()) if len(sequences) > 1 else None,
        "sequences": sequences,
    }


def over_sequences(rows: Iterable[dict]) -> dict:
    """Mean moving IoU of sequences, with its 95 % bootstrap interval over the sequences.

    A sequence in which nothing truly moves has no IoU: one false point would make it 0, none would leave it out.

    Args:
        rows: What `scores` says of each sequence.
    Returns: JSON-able dict: `moving_iou`, `low`, `high` (None where no sequence counts), how many `sequences` count,
        and how many are `left_out`.
    """
    rows = list(rows)
    known = [row["moving_iou"] for row in rows if row["moving_points"]]
    low, high = metrics.bootstrap_interval(known)
    mean = float(np.mean(known)) if known else None
    counts = {"sequences": len(known), "left_out": len(rows) - len(known)}
    return {"moving_iou": mean, "low": _number(low), "high": _number(high), **counts}


def scores(tally: Tally, movable: bool) -> dict:
    """What `evaluate_predictions` says about one tally."""
    four = metrics.ignore_truth(tally.tables.sum(0), UNLABELED)
    three = _movable_is_static(four)
    classes = {"static": STATIC, "movable": MOVABLE, "moving": MOVING}
    shares = metrics.iou(four if movable else three)
    return {
        "scans": tally.objects.scans,
        "points": int(four.sum()),
        **_moving_scores(four),
        "static_iou": _number(metrics.iou(three)[STATIC]),
        "iou": {name: _number(shares[i]) for name, i in classes.items() if movable or i != MOVABLE},
        "by_range": [
            {"metres": [low, high], **_moving_scores(metrics.ignore_truth(table, UNLABELED))}
            for low, high, table in zip(RANGES, (*RANGES[1:], None), tally.tables)
        ],
        **tally.objects.scores(),
    }


def _moving_scores(table: np.ndarray) -> dict:
    return {
        "moving_points": int(table[MOVING].sum()),
        "moving_iou": _number(metrics.moving_iou(table, MOVING)),
        "moving_precision": _number(metrics.precision(table)[MOVING]),
        "moving_recall": _number(metrics.recall(table)[MOVING]),
    }


def _movable_is_static(table: np.ndarray) -> np.ndarray:
    """The same counts, the movable class left empty."""
    merged = table.copy()
    merged[STATIC] += merged[MOVABLE]
    merged[:, STATIC] += merged[:, MOVABLE]
    merged[MOVABLE] = merged[:, MOVABLE] = 0
    return merged


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)  # JSON has no nan


# --- the pictures


def draw(sequence: Sequence, frame: int, predictions: str | Path, folder: str | Path) -> Path:
    """Write `<folder>/<sequence>_<frame>.png` and return its path."""
    points = sequence.read_points(frame)
    _, truth, predicted = read_scan(sequence, frame, predictions, len(points))
    table = metrics.confusion(truth, predicted, len(NAMES))
    title = f"sequence {sequence.name}, scan {frame}:  moving IoU {_percent(metrics.moving_iou(table, MOVING))} %"
    path = Path(folder) / f"{sequence.name}_{frame:0{sequence.width}d}.png"
    bev_picture(path, points, truth == MOVING, predicted == MOVING, title, PICTURE_EXTENT, truth != UNLABELED)
    return path


# --- the report


def print_report(report: dict, console: Console) -> None:
    """The scores as tables: in all, by distance, of objects, by kind of mover."""
    sources = {"predictions": report}
    if "rule" in report:
        sources["rule"] = report["rule"]
    rows = [
        (name, source, part["total"] if name is None else part["sequences"][name])
        for name in [*report["sequences"], *([None] if len(report["sequences"]) > 1 else [])]
        for source, part in sources.items()
    ]
    movable = "movable" in report["classes"]

    headings = ["scans", "scored points", "moving points", "moving IoU", "precision", "recall"]
    headings += ["static + movable IoU", "static IoU", "movable IoU"] if movable else ["static IoU"]
    table = _table("Moving-object segmentation, %", ["sequence", "of"], headings)
    for name, source, row in rows:
        shares = [row[key] for key in ("moving_iou", "moving_precision", "moving_recall", "static_iou")]
        if movable:
            apart = row["iou"] if "movable" in row["iou"] else {}  # the rule does not know movable
            shares += [apart.get("static"), apart.get("movable")]
        counts = (f"{row[key]:,}" for key in ("scans", "points", "moving_points"))
        _add_row(table, name, source, *counts, *map(_percent, shares))
    console.print(table)

    headings = [f"{low}+" if high is None else f"{low}-{high}" for low, high in zip(RANGES, (*RANGES[1:], None))]
    table = _table("Moving IoU by distance, %", ["metres"], headings)
    table.add_row("moving points", *(f"{ring['moving_points']:,}" for ring in report["total"]["by_range"]))
    for source, part in sources.items():
        table.add_row(source, *(_percent(ring["moving_iou"]) for ring in part["total"]["by_range"]))
    console.print(table)

    table = _table("Moving objects", ["sequence", "of"], ["objects", "object recall, %", "false objects a scan"])
    for name, source, row in rows:
        false = row["false_objects_per_scan"]
        found = f"{row['objects']:,}", _percent(row["object_recall"])
        _add_row(table, name, source, *found, "-" if false is None else f"{false:.2f}")
    console.print(table)

    if report["total"]["by_kind"]:
        headings = ["moving points", "recall", "objects", "object recall"]
        table = _table("Kinds of movers, %", ["kind", "of"], headings)
        for kinds in zip(*(part["total"]["by_kind"] for part in sources.values())):
            for source, row in zip(sources, kinds):
                of_points = f"{row['points']:,}", _percent(row["recall"])
                table.add_row(row["kind"], source, *of_points, f"{row['objects']:,}", _percent(row["object_recall"]))
        console.print(table)

    lines = [_mean_in_words(report)] if report["mean"] else []
    if report["made_with"]:
        lines.append("predictions: " + ", ".join(f"{key} {value}" for key, value in report["made_with"].items()))
    lines += [f"not scored: {line}" for line in _not_scored(report)]
    lines += [f"note: {line}" for line in _notes(report)]
    lines += [f"picture: {path}" for path in report["pictures"]]
    if "rule" in report:
        lines.append(f"rule: {_rule_in_words(report)}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(title: str, names: list[str], numbers: list[str]) -> Table:
    table = Table(title=title)
    for i, heading in enumerate(names):
        table.add_column(heading, overflow="fold", no_wrap=i > 0)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _add_row(table: Table, sequence: str | None, *cells: str) -> None:
    """A row of a sequence, or, of None, of all of them."""
    table.add_row("total" if sequence is None else escape(sequence), *cells, style="bold" * (sequence is None))


def _mean_in_words(report: dict) -> str:
    parts = []
    for name, part in (("predictions", report), ("rule", report.get("rule"))):
        if part is not None:
            mean = part["mean"]
            interval = f"{_percent(mean['low'])} to {_percent(mean['high'])}"
            parts.append(f"{name} {_percent(mean['moving_iou'])} ({interval}, n = {mean['sequences']})")
    return f"mean moving IoU of the sequences, % (95 % bootstrap interval): {'; '.join(parts)}"


def _not_scored(report: dict) -> list[str]:
    def scans(n: int, name: str, what: str, lacks: str) -> str:
        return f"{n:,} {what}{'s' if n > 1 else ''} of {name} that {'have' if n > 1 else 'has'} no {lacks}"

    return [
        *(f"{name} ({reason})" for name, reason in report["left_out"].items()),
        *(scans(n, name, "scan", "labels") for name, n in report["unlabelled_scans"].items()),
        *(scans(n, name, "labelled scan", "prediction") for name, n in report["missing_predictions"].items()),
    ]


def _notes(report: dict) -> list[str]:
    lines = [
        f"the labels of {name} are 0 and moving ones alone, so 0 counts as static"
        for name in report["unlabeled_is_static"]
    ]
    if report["without_instances"]:
        names = ", ".join(report["without_instances"])
        lines.append(f"the labels of {names} have no instances, so their objects are not told apart")
    return lines


def _rule_in_words(report: dict) -> str:
    motion = report["rule"]["motion"]
    return (
        f"at least half of the {motion['num_channels']} published residual channels non-zero; looks "
        f"{motion['lookahead']} scans ahead, and finds less in as many scans at either end of a sequence"
    )


def html_report(report: dict, pictures: Iterable[str | Path] = (), curves: dict | None = None) -> str:
    """The page of `kdmos evaluate --report`.

    Args:
        report: What `evaluate_predictions` returned.
        pictures: Of scans, as `bev_picture` wrote them.
        curves: Of the training of what was scored, as `training_curves` returns them.
    Raises: InputError naming a picture that cannot be read.
    """
    total = report["total"]
    methods = [Method("predictions", report, curves or {})]
    if "rule" in report:
        methods.append(Method(RULE_NAME, report["rule"], note=_rule_in_words(report)))
    headline = {
        "moving IoU, %": total["moving_iou"],
        "precision, %": total["moving_precision"],
        "recall, %": total["moving_recall"],
        "object recall, %": total["object_recall"],
        "false objects a scan": plain(total["false_objects_per_scan"]),
    }
    names = list(report["sequences"])
    lead = (
        f"{total['points']:,} labelled points in {total['scans']:,} scans of "
        f"{f'{len(names)} sequences' if len(names) > 1 else f'sequence {names[0]}'}, counted as the public "
        "SemanticKITTI evaluation of moving-object segmentation counts them."
    )
    blocks = [Figures(headline), *score_blocks(methods)]
    if report["mean"]:
        line = _mean_in_words(report)
        blocks.append(f"{line[0].upper()}{line[1:]}.")
    blocks += [f"Not scored: {line}." for line in _not_scored(report)]
    blocks += [f"Note: {line}." for line in _notes(report)]
    sections = [Section("Scores", blocks)]
    if charts := curve_charts(methods):
        sections.append(Section("Learning curves", charts))
    if drawn := [scan_picture(path) for path in pictures]:
        text = "From above, the sensor in the centre, driving direction up; grey points by their height."
        sections.append(Section("Scans", [text, *drawn]))
    words = {"source": "scans", "input": "reads", "form": "motion form", "lookahead": "look-ahead, scans"}
    made_with = {words.get(key, key): value for key, value in (report["made_with"] or {}).items()}
    made_with = made_with or {"made with": "not said by their maker"}
    inputs = {"data": report["data"], "predictions": report["predictions"]}
    sections.append(
        Section(
            "What was run", [Facts(made_with, "The predictions"), Facts({**inputs, **circumstances()}, "This report")]
        )
    )
    return build_report("Moving-object segmentation", lead, sections)


def _percent(share: float | None) -> str:
    return "-" if share is None or np.isnan(share) else f"{100 * share:.1f}"


# --- the command


def evaluate(
    data: Annotated[Path, typer.Argument(help="Data with labels: SemanticKITTI root or one sequence folder.")],
    predictions: Annotated[
        Path, typer.Argument(help="What kdmos predict wrote: sequences/NN/predictions/NNNNNN.label below it.")
    ],
    sequences: Annotated[
        str | None,
        typer.Option(help="Score these, e.g. 08,09. Without: all that have labels and predictions."),
    ] = None,
    split: Annotated[str | None, typer.Option(help=f"Score a whole split: {', '.join(SPLIT_NAMES)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    rule: Annotated[
        bool, typer.Option("--rule", help="Score the training-free rule beside it (half of the residuals non-zero).")
    ] = False,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for a picture per sequence, of its scan with most moving points.")
    ] = None,
    frames: Annotated[str | None, typer.Option(help="Draw these frames instead, e.g. 12,400.")] = None,
    page: Annotated[
        Path | None,
        typer.Option("--report", help="Write scores and pictures as one HTML file that needs nothing else."),
    ] = None,
    training: Annotated[
        Path | None, typer.Option("--run", help="output= folder of the training run whose curves go into the report.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Score what has predictions where other labelled scans have none.")
    ] = False,
) -> None:
    """Score predictions against labels, as the public SemanticKITTI MOS evaluation does."""
    if training is not None and page is None:
        raise InputError("--run says whose learning curves to show, so it needs --report, the page for them")
    if page is not None and page.is_dir():
        raise InputError(f"--report {page}: a folder; name the file to write, such as {page / 'report.html'}")
    curves = None if training is None else training_curves(training)  # now, not after the counting
    with TemporaryDirectory(prefix="kdmos-") as temporary:
        report = evaluate_predictions(
            data,
            predictions,
            listed(sequences, "--sequences"),
            split,
            rule,
            temporary if page is not None and pictures is None else pictures,
            _frame_numbers(frames),
            progress=True,
            allow_missing=allow_missing,
        )
        if page is not None:
            write_report(page, html_report(report, report["pictures"], curves))
    if pictures is None:
        report["pictures"] = []
    if as_json:
        print(json.dumps(report))
    else:
        console = Console()
        print_report(report, console if console.is_terminal else Console(width=FILE_WIDTH))
        if page is not None:
            console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def _frame_numbers(text: str | None) -> list[int] | None:
    names = listed(text, "--frames")
    wrong = [name for name in names or () if not name.isdecimal()]
    if wrong:
        raise InputError(f"--frames '{text}': '{wrong[0]}' is not a frame number")
    return None if names is None else [int(name) for name in names]


def main(argv: list[str] | None = None) -> None:
    run(evaluate, "evaluate", argv)


if __name__ == "__main__":
    main()
