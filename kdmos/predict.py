"""`kdmos predict`: one label per point for every scan of a data set, in the layout the SemanticKITTI tools read."""

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
from rich.progress import Progress

from kdmos.checkpoint import write_atomic
from kdmos.command import run
from kdmos.data.labels import to_raw
from kdmos.data.semantic_kitti import MANIFEST, read_manifest
from kdmos.data.source import ScanSource
from kdmos.errors import InputError
from kdmos.inference import Model, ScanLogits, asked_sequences, choose_device, fingerprint, prepared, sequence_logits
from kdmos.models import SHIPPED, load_model
from kdmos.motion import warn_of_incomplete

CARD = "kdmos/weights/synthetic.md"


class ScanResult(NamedTuple):
    """What the model says of one scan, one row per point of the file.

    predicted: int64 [n], class index; -1 for a non-finite point.
    moving_probability: float32 [n]; 0 for a non-finite point.
    """

    predicted: np.ndarray
    moving_probability: np.ndarray


def predict_sequence(
    model: Model, sequence: ScanSource, device: torch.device | str = "cpu", skip: frozenset[int] = frozenset()
) -> Iterator[tuple[int, ScanResult | InputError | None]]:
    """Classes of every point of a sequence, scan by scan in frame order.

    A scan that cannot be read yields its error and counts as empty in the windows of the others.

    Args:
        model: In eval mode, on `device`.
        sequence: With poses.
        device: Where the ops and the network run.
        skip: Frames whose answer is not needed; None is yielded for them.
    Yields: (frame, result or error).
    Raises: InputError if the poses are missing or wrong.
    """
    for frame, scan in sequence_logits(model, sequence, device, skip):
        yield frame, _result(scan, model.moving) if isinstance(scan, ScanLogits) else scan


def _result(scan: ScanLogits, moving: int) -> ScanResult:
    predicted = np.full(len(scan.finite), -1, np.int64)
    probability = np.zeros(len(scan.finite), np.float32)
    predicted[scan.finite] = scan.logits.argmax(1).cpu().numpy()
    probability[scan.finite] = scan.logits.softmax(1)[:, moving].cpu().numpy()
    return ScanResult(predicted, probability)


def predict_data(
    model: Model,
    sequences: list[ScanSource],
    output: Path,
    device: torch.device | str = "cpu",
    classes: int = 2,
    scores: bool = False,
    manifest: dict | None = None,
) -> tuple[int, list[str]]:
    """Write the predictions of all scans; what an interrupted run has written is kept.

    Args:
        model: In eval mode, on `device`.
        sequences: What to predict.
        output: Gets sequences/<name>/predictions/<frame>.label and, if asked for, <frame>.score.
        device: Where the ops and the network run.
        classes: 2 writes raw ids 9 and 251; 4 writes 250 for movable too.
        scores: Also write the moving probability, float16 per point.
        manifest: What the predictions depend on; another one in `output` is an error.
    Returns: scans that have predictions now, and one line for each scan that could not be used.
    Raises: InputError if `output` holds other predictions, poses are missing, or the disk is full.
    """
    _check_manifest(output, manifest)
    done, lost = 0, []
    total = sum(len(sequence.frames) for sequence in sequences)
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("predict", total=total)
        for sequence in sequences:
            warn_of_incomplete(sequence, model.settings)
            there = frozenset(f for f in sequence.frames if _complete(output, sequence, f, scores))
            if len(there) == len(sequence.frames):  # no need to look at it
                done += len(there)
                progress.advance(task, len(there))
                continue
            non_finite = 0
            for frame, result in predict_sequence(model, sequence, device, there):
                progress.advance(task)
                if isinstance(result, InputError):
                    lost.append(f"{sequence.scan(frame)}: {result}")
                    continue
                done += 1
                if result is None:
                    continue
                non_finite += int((result.predicted < 0).sum())
                path = sequence.prediction_path(output, frame)
                if scores:  # first, so that a label file means that all is there
                    write_atomic(path.with_suffix(".score"), result.moving_probability.astype("<f2").tobytes())
                raw = to_raw(result.predicted, model.classes, classes, model.moving)
                write_atomic(path, raw.astype("<u4").tobytes(), durable=False)
            if non_finite:
                warnings.warn(f"sequence {sequence.name}: {non_finite} non-finite points were labelled 9", stacklevel=2)
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


def made_with(model: Model, checkpoint: str | Path, source: str | Path, classes: int = 2) -> dict:
    """What predictions depend on, for the note beside them."""
    settings = model.settings
    return {
        "source": str(Path(source).resolve()),
        "checkpoint": fingerprint(checkpoint),
        "classes": classes,
        "input": settings.reads,
        "lookahead": settings.lookahead,
        "precision": str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
    }


def _check_manifest(output: Path, manifest: dict | None) -> None:
    """Predictions made otherwise, or by nobody knows what, are neither taken for ours nor overwritten."""
    if manifest is None:
        return
    before = read_manifest(output)
    if before is None and any(output.glob("sequences/*/predictions/*.label")):
        raise InputError(f"{output}: holds predictions that do not say how they were made; choose another --output")
    changed = [key for key in manifest if before is not None and before.get(key) != manifest[key]]
    if changed:
        raise InputError(f"{output}: holds predictions with another {', '.join(changed)}; choose another --output")
    write_atomic(output / MANIFEST, json.dumps(manifest, indent=2).encode())


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
    source: Annotated[Path, typer.Argument(help="SemanticKITTI data root, or one sequence folder with velodyne/.")],
    checkpoint: Annotated[
        Path,
        typer.Option(help="A model: .safetensors, the authors' .pt, synthetic (shipped), or rule (training-free)."),
    ] = Path("synthetic"),
    output: Annotated[Path, typer.Option(help="Folder for the predictions.")] = Path("predictions"),
    sequences: Annotated[str | None, typer.Option(help="Names, e.g. 11,12; all by default.")] = None,
    split: Annotated[str | None, typer.Option(help="train, valid or test instead of names.")] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Also write the moving probability, float16.")] = False,
    classes: Annotated[int, typer.Option(help="2: write 9 and 251; 4: also 250 for movable.")] = 2,
    zip: Annotated[bool, typer.Option("--zip", help="Also pack the labels for the benchmark server.")] = False,
    lookahead: Annotated[
        int | None, typer.Option(help="Future scans to use, if not what the checkpoint was trained with.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Allow another look-ahead than the trained one.")] = False,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> int:
    """Write one label per point for every scan.

    Needs poses.txt and calib.txt in each sequence folder. A scan that cannot be used is listed and the rest goes
    on; the exit code is then 1. The same command goes on where it was interrupted.
    """
    if classes not in (2, 4):
        raise InputError(f"--classes {classes}: 2 (9, 251) or 4 (also 250 for movable)")
    found = asked_sequences(source, sequences, split)
    where = choose_device(device)
    model = prepared(load_model(checkpoint, where, lookahead=lookahead, force=force), precision)
    if str(checkpoint) in SHIPPED:
        print(f"student '{checkpoint}', shipped with kdmos: trained on synthetic scans alone (its card: {CARD})")
    if classes == 4 and "movable" not in model.classes:
        raise InputError(f"--classes 4: {checkpoint} knows only {', '.join(model.classes)}")
    settings = model.settings
    manifest = made_with(model, checkpoint, source, classes)
    done, lost = predict_data(model, found, output, where, classes, scores, manifest)
    print(f"{done} scans labelled in {output} ({settings.reads}, look-ahead {settings.lookahead} scans)")
    if zip:
        print(f"{zip_predictions(output, found)}: the label files, packed")
    for line in lost:
        print(f"not labelled: {line}", file=sys.stderr)
    if lost:
        print(
            f"up to {settings.history} scans before and after each of them had to do without its points",
            file=sys.stderr,
        )
    return 1 if lost else 0


def main(argv: list[str] | None = None) -> None:
    run(predict, "predict", argv)


if __name__ == "__main__":
    main()
