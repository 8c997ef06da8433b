"""`kdmos predict`: one label per point for every scan of any input, in the layout the SemanticKITTI tools read."""

from __future__ import annotations

import json
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer

from kdmos.checkpoint import write_atomic
from kdmos.command import Bar, Sensor, Source, Topic, listed, run
from kdmos.data.bags import BagScans
from kdmos.data.labels import to_raw
from kdmos.data.poses import poses_from_file
from kdmos.data.profile import SensorProfile, check_remission, differences, load_profile
from kdmos.data.semantic_kitti import MANIFEST, SPLIT_NAMES, read_manifest, split_sequences
from kdmos.data.source import ScanSource, WithPoses
from kdmos.data.sources import open_sources
from kdmos.errors import InputError
from kdmos.inference import Model, ScanLogits, WayOut, choose_device, fingerprint, prepared, sequence_logits
from kdmos.models import SHIPPED, Rule, load_model, said_of_shipped
from kdmos.motion import warn_of_incomplete
from kdmos.odometry import Odometry, odometry_poses, poses_path, saved_poses, write_poses
from kdmos.precision import precision_of

CARDS = "kdmos/weights"


class ScanResult(NamedTuple):
    """What the model says of one scan, one row per point of the file.

    predicted: int64 [n], class index; -1 for a point that the model did not get: a non-finite one, or one outside the
        sensor's range or field of view.
    moving_probability: float32 [n]; 0 for these points.
    non_finite: How many are not finite.
    """

    predicted: np.ndarray
    moving_probability: np.ndarray
    non_finite: int


def predict_sequence(
    model: Model,
    sequence: ScanSource,
    device: torch.device | str = "cpu",
    skip: frozenset[int] = frozenset(),
    profile: SensorProfile | None = None,
) -> Iterator[tuple[int, ScanResult | InputError | None]]:
    """Classes of every point of a sequence, scan by scan in frame order.

    A scan that cannot be read yields its error and counts as empty in the windows of the others.

    Args:
        model: In eval mode, on `device`.
        sequence: With poses.
        device: Where the ops and the network run.
        skip: Frames whose answer is not needed; None is yielded for them.
        profile: Of the sensor; None: scans are as the model expects them.
    Yields: (frame, result or error).
    Raises: InputError if the poses are missing or wrong.
    """
    way_out, classes = WayOut(), np.arange(len(model.classes))
    for frame, scan in sequence_logits(model, sequence, device, skip, profile):
        if not isinstance(scan, ScanLogits):
            yield frame, scan
            continue
        predicted = np.full(len(scan.kept), -1, np.int64)
        probability = np.zeros(len(scan.kept), np.float32)
        predicted[scan.kept], probability[scan.kept] = way_out.decide(scan.logits, model.moving, classes)
        yield frame, ScanResult(predicted, probability, scan.non_finite)


def predict_data(
    model: Model,
    sequences: list[ScanSource],
    output: Path,
    device: torch.device | str = "cpu",
    classes: int = 2,
    scores: bool = False,
    manifest: dict | None = None,
    profile: SensorProfile | None = None,
    frames: frozenset[int] | None = None,
) -> tuple[int, list[str]]:
    """Write the predictions of scans; what an interrupted run has written is kept.

    Args:
        model: In eval mode, on `device`.
        sequences: What to predict.
        output: Gets sequences/<name>/predictions/<frame>.label and, if asked for, <frame>.score.
        device: Where the ops and the network run.
        classes: 2 writes raw ids 9 and 251; 4 writes 250 for movable too.
        scores: Also write the moving probability, float16 per point.
        manifest: What the predictions depend on; another one in `output` is an error.
        profile: Of the sensor; None: scans are as the model expects them.
        frames: Predict these alone, of each sequence, with the whole sequence's scans in their windows; None: all.
    Returns: scans that have predictions now, and one line for each scan that could not be used.
    Raises: InputError if `output` holds other predictions, poses are missing, or the disk is full.
    """
    claim(output, manifest)
    done, lost = 0, []
    wanted = [
        frozenset(sequence.frames if frames is None else frames.intersection(sequence.frames)) for sequence in sequences
    ]
    with Bar("predict", sum(map(len, wanted))) as bar:
        for sequence, asked in zip(sequences, wanted):
            warn_of_incomplete(sequence, model.settings)
            there = frozenset(f for f in asked if _complete(output, sequence, f, scores))
            if there == asked:  # no need to look at it
                done += len(there)
                bar.advance(len(there))
                continue
            non_finite = outside = points = 0
            skip = there | (frozenset(sequence.frames) - asked)
            for frame, result in predict_sequence(model, sequence, device, skip, profile):
                if frame not in asked:
                    continue
                bar.advance()
                if isinstance(result, InputError):
                    lost.append(f"{sequence.scan(frame)}: {result}")
                    continue
                done += 1
                if result is None:
                    continue
                non_finite += result.non_finite
                outside += np.count_nonzero(result.predicted < 0) - result.non_finite
                points += len(result.predicted)
                path = sequence.prediction_path(output, frame)
                if scores:  # first, so that a label file means that all is there
                    write_atomic(path.with_suffix(".score"), result.moving_probability.astype("<f2").tobytes())
                raw = to_raw(result.predicted, model.classes, classes, model.moving)
                write_atomic(path, raw.astype("<u4").tobytes(), durable=False)
            if non_finite:
                warnings.warn(f"sequence {sequence.name}: {non_finite} non-finite points were labelled 9", stacklevel=2)
            if outside:
                share = f"{100 * outside / points:.1f} % of the points"
                print(f"sequence {sequence.name}: {share} lie outside range or field of view and were labelled 9")
    return done, lost


def _complete(output: Path, source: ScanSource, frame: int, scores: bool) -> bool:
    """Whether the answer is there: written whole, as everything is, and as long as the scan where that is known."""
    labels = source.prediction_path(output, frame)
    files = [(labels, 4)] + ([(labels.with_suffix(".score"), 2)] if scores else [])
    if not all(file.is_file() for file, _ in files):
        return False
    num_points = source.num_points(frame)
    counts = {file.stat().st_size / width for file, width in files}
    return len(counts) == 1 if num_points is None else counts == {num_points}


def made_with(model: Model, checkpoint: str | Path, source: str | Path, classes: int = 2, **more) -> dict:
    """What predictions depend on, for the note beside them.

    Args:
        model, checkpoint, source, classes: As for `kdmos predict`.
        more: What differs from the default way: the topic, where poses are from, the sensor's profile; what is None or
            empty is left out.
    """
    settings = model.settings
    return {
        "source": str(Path(source).resolve()),
        "checkpoint": fingerprint(checkpoint),
        "classes": classes,
        "input": settings.reads,
        "lookahead": settings.lookahead,
        "precision": precision_of(model),
        **{key: value for key, value in more.items() if value},
    }


def claim(output: Path, manifest: dict | None) -> None:
    """Note in `output` what its predictions depend on.

    Raises: InputError if it holds predictions made otherwise, or by nobody knows what: they are neither taken for ours
        nor overwritten.
    """
    if manifest is None:
        return
    before, now = read_manifest(output), json.loads(json.dumps(manifest))
    if before is None and any(output.glob("sequences/*/predictions/*.label")):
        raise InputError(f"{output}: holds predictions that do not say how they were made; choose another --output")
    keys = {} if before is None else {**now, **before}
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if changed:
        raise InputError(f"{output}: holds predictions with another {', '.join(changed)}; choose another --output")
    if before is None:
        write_atomic(output / MANIFEST, json.dumps(now, indent=2).encode())


def look_at_first_scan(source: ScanSource, model: Model, profile: SensorProfile, checkpoint: str | Path) -> None:
    """Warn in one line of what in the first readable scan lies far outside what a network was trained on.

    Raises: InputError if its remission is on another scale than the profile says.
    """
    if isinstance(model, Rule):  # was trained on nothing
        return
    for frame in source.frames:
        try:
            points, _ = profile.apply(source.read_points(frame))
        except InputError:  # listed when it is its turn
            continue
        if not len(points):
            continue
        check_remission(points, source.where(frame), profile.remission_scale)
        if found := differences(points, model.header.get("sensor"), profile):
            warnings.warn(
                f"{source.name}: other than what {checkpoint} was trained on: {'; '.join(found)}", stacklevel=2
            )
        return


def own_poses(source: ScanSource, data: Path, output: Path, profile: SensorProfile) -> ScanSource:
    """The source with poses by odometry, from an earlier run with the same output or from the scans."""
    path, poses = poses_path(output, source.name), saved_poses(output, data, source)
    if poses is None:
        print(f"{source.name}: poses from the scans themselves, by odometry (KISS-ICP); kept in {path}")
        with Bar("odometry", len(source.frames)) as bar:
            poses = odometry_poses(source, profile, bar.advance)
        write_poses(path, poses)
    return WithPoses(source, poses)


def zip_predictions(output: Path, sequences: list[ScanSource]) -> Path:
    """Pack the label files for the benchmark server: sequences/NN/predictions/NNNNNN.label in `output`.zip."""
    output = output.resolve()
    target = output.with_name(f"{output.name}.zip")
    temporary = target.with_name(f".{target.name}.part")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for sequence in sequences:
            for frame in sequence.frames:
                path = sequence.prediction_path(output, frame)
                if path.exists():
                    archive.write(path, path.relative_to(output))
    temporary.replace(target)
    return target


def predict(
    source: Source,
    checkpoint: Annotated[
        Path,
        typer.Option(help="A model: .safetensors, the authors' .pt, synthetic or synthetic-now (shipped), or rule."),
    ] = Path("synthetic"),
    output: Annotated[Path, typer.Option(help="Folder for the predictions.")] = Path("predictions"),
    sequences: Annotated[str | None, typer.Option(help="Names, e.g. 11,12; all by default.")] = None,
    split: Annotated[str | None, typer.Option(help=f"A split instead of names: {', '.join(SPLIT_NAMES)}.")] = None,
    topic: Topic = None,
    poses: Annotated[
        Path | None, typer.Option(help="LiDAR poses in KITTI's or TUM's format, instead of those beside the scans.")
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(help="With --poses of a camera or body: a file with its row 'Tr:' from the LiDAR.")
    ] = None,
    odometry: Annotated[
        bool, typer.Option("--odometry", help="Poses from the scans (KISS-ICP), also where there are others.")
    ] = False,
    sensor: Sensor = None,
    scores: Annotated[bool, typer.Option("--scores", help="Also write the moving probability, float16.")] = False,
    classes: Annotated[int, typer.Option(help="2: write 9 and 251; 4: also 250 for movable.")] = 2,
    zip: Annotated[bool, typer.Option("--zip", help="Also pack the labels for the benchmark server.")] = False,
    lookahead: Annotated[
        int | None, typer.Option(help="Future scans to use, if not what the checkpoint was trained with.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Allow another look-ahead than the trained one.")] = False,
    precision: Annotated[str, typer.Option(help="float32, tf32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> int:
    """Write one label per point for every scan.

    Poses are those beside the scans (poses.txt, with calib.txt), else they are found by odometry; docs/input.md has the
    formats. A scan that cannot be used is listed and the rest goes on; the exit code is then 1. The same command goes
    on where it was interrupted.
    """
    if classes not in (2, 4):
        raise InputError(f"--classes {classes}: 2 (9, 251) or 4 (also 250 for movable)")
    if split and sequences:
        raise InputError("--split and --sequences exclude each other")
    if poses is not None and odometry:
        raise InputError("--poses and --odometry exclude each other")
    if calib is not None and poses is None:
        raise InputError("--calib says what the poses of --poses are of, so it needs them")
    profile = SensorProfile() if sensor is None else load_profile(sensor)

    # 1) What is there, and what is to be made of it.
    names = split_sequences(split) if split else listed(sequences, "--sequences")
    found = open_sources(source, names, topic, profile.remission_scale)
    if poses is not None and len(found) > 1:
        raise InputError(f"--poses {poses}: belong to one sequence; choose it with --sequences")
    without = [one for one in found if odometry or (poses is None and not one.has_poses)]
    given = [WithPoses(one, poses_from_file(one, poses, calib)) for one in found] if poses is not None else found
    for one in given:
        if one in without:
            Odometry()  # says what is missing for it, now
        else:
            one.poses()  # all that can be wrong with them, before the first scan
    where = choose_device(device)
    model = prepared(load_model(checkpoint, where, lookahead=lookahead, force=force), precision)
    if str(checkpoint) in SHIPPED:
        card = SHIPPED[str(checkpoint)].with_suffix(".md").name
        print(f"{said_of_shipped(str(checkpoint))}. It was trained on synthetic scans alone ({CARDS}/{card})")
    if classes == 4 and "movable" not in model.classes:
        raise InputError(f"--classes 4: {checkpoint} knows only {', '.join(model.classes)}")
    for one in found:
        look_at_first_scan(one, model, profile, checkpoint)

    # 2) The folder for it, and poses where there are none.
    settings = model.settings
    manifest = made_with(
        model,
        checkpoint,
        source,
        classes,
        topic=found[0].topic if isinstance(found[0], BagScans) else None,
        poses=_said_of_poses(poses, calib, odometry, bool(without)),
        sensor=profile.changes(),
    )
    for one in found if poses is not None else without:
        foreign = poses_path(output, one.name)
        if foreign.exists() and not (read_manifest(output) or {}).get("poses"):
            raise InputError(f"{foreign}: there already, and not by kdmos predict; choose another --output")
    claim(output, manifest)
    ready = [own_poses(one, source, output, profile) if one in without else one for one in given]
    if poses is not None:  # those of odometry are there already
        for one in ready:
            write_poses(poses_path(output, one.name), one.poses())

    # 3) The labels.
    done, lost = predict_data(model, ready, output, where, classes, scores, manifest, profile)
    print(f"{done} scans labelled in {output} ({settings.reads}, look-ahead {settings.lookahead} scans)")
    if zip:
        print(f"{zip_predictions(output, ready)}: the label files, packed")
    for line in lost:
        print(f"not labelled: {line}", file=sys.stderr)
    if lost:
        print(
            f"up to {settings.history} scans before and after each of them had to do without its points",
            file=sys.stderr,
        )
    return 1 if lost else 0


def _said_of_poses(poses: Path | None, calib: Path | None, odometry: bool, some_without: bool) -> str | None:
    """Where the poses are from, for the note beside the predictions; None: from beside the scans."""
    if poses is not None:
        return " and ".join(fingerprint(file) for file in (poses, calib) if file is not None)
    if odometry:
        return "odometry"
    return "odometry where there are none" if some_without else None


def main(argv: list[str] | None = None) -> None:
    run(predict, "predict", argv)


if __name__ == "__main__":
    main()
