"""`kdmos synth`: LiDAR sequences of made-up streets, in the layout of SemanticKITTI."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kdmos.checkpoint import write_atomic
from kdmos.command import Bar, run
from kdmos.data.semantic_kitti import POINT_BYTES, read_labels
from kdmos.data.synthetic.lidar import SensorSettings, load_sensor
from kdmos.data.synthetic.scenes import SCENES
from kdmos.data.synthetic.sequence import SyntheticSequence, Track
from kdmos.data.synthetic.suite import ALL, FIRST_RESERVED_SEED, SUITES, suite_parts
from kdmos.errors import InputError

MANIFEST = "synth.json"  # what a data set was made with
VERSION = 5  # of the streets: another one makes other data from the same seed
FINISHED = ("poses.txt", "calib.txt", "times.txt", "tracks.csv")  # of a sequence, beside its scans
CHUNK = 20  # scans that one process makes of a sequence at a time: a street takes as long to build as a scan to cast
# Camera 0 looks ahead, its x axis to the right and its y axis down, where the sensor is.
CAMERA_FROM_LIDAR = np.array([[0.0, -1.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class SynthSettings:
    """A data set.

    sensor: None: another one for each sequence. sequences: How many, named from 00. scans: In each. compensate: Points
    in the frame of their scan's time, as in KITTI odometry, or each in the frame it was measured in; None: drawn for
    each sequence. drift, jitter: Errors of the poses, see `SyntheticSequence.poses`; the scans do not depend on them.
    scene: What the streets are drawn from, a name of `SCENES`.
    """

    sensor: SensorSettings | None
    seed: int = 0
    sequences: int = 4
    scans: int = 100
    compensate: bool | None = True
    drift: float = 0.0
    jitter: float = 0.0
    scene: str = "street"

    def sequence(self, number: int) -> SyntheticSequence:
        return SyntheticSequence(self.seed, number, self.scans, self.sensor, self.compensate, SCENES[self.scene])


@lru_cache(maxsize=1)  # the street of a long sequence takes longer than a scan
def _sequence(settings: SynthSettings, number: int) -> SyntheticSequence:
    return settings.sequence(number)


def synthesize(output: Path, settings: SynthSettings, workers: int | None = None, progress: bool = False) -> int:
    """Write a data set; scans that an interrupted run has written are kept.

    Args:
        output: Data root; gets sequences/NN/ with velodyne/, labels/, poses.txt, calib.txt, times.txt and tracks.csv.
        settings: What to make.
        workers: Processes; None: one a core.
        progress: Say on stderr how far it is.
    Returns: the number of scans made now.
    Raises: InputError if `output` holds another data set or cannot be written.
    """
    _check_manifest(output, settings)
    tasks = []
    for number in range(settings.sequences):
        missing = [frame for frame in range(settings.scans) if not _complete(_folder(output, number), frame)]
        tasks += [(output, settings, number, missing[i : i + CHUNK]) for i in range(0, len(missing), CHUNK)]
    total = sum(len(frames) for *_, frames in tasks)
    with Bar("synth", total, progress) as bar:
        for done in _each(_make_scans, tasks, workers or os.cpu_count() or 1):
            bar.advance(done)
    for number in range(settings.sequences):
        if not all((_folder(output, number) / name).exists() for name in FINISHED):
            _finish(output, settings, number)
    return total


def _each(function, tasks: list, workers: int):
    """Results of the tasks, as they come."""
    if workers == 1 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, tasks)


def _make_scans(task: tuple[Path, SynthSettings, int, list[int]]) -> int:
    output, settings, number, frames = task
    sequence, folder = _sequence(settings, number), _folder(output, number)
    for frame in frames:
        scan = sequence.scan(frame)
        # the label file last: it says that the scan is whole
        write_atomic(folder / "velodyne" / f"{frame:06d}.bin", scan.points.astype("<f4").tobytes(), durable=False)
        write_atomic(folder / "labels" / f"{frame:06d}.label", scan.labels.astype("<u4").tobytes(), durable=False)
    return len(frames)


def _finish(output: Path, settings: SynthSettings, number: int) -> None:
    """Poses, calibration, times and tracks of a sequence whose scans are there."""
    sequence, folder = _sequence(settings, number), _folder(output, number)
    camera = CAMERA_FROM_LIDAR @ sequence.poses(settings.drift, settings.jitter) @ np.linalg.inv(CAMERA_FROM_LIDAR)
    write_atomic(folder / "poses.txt", "".join(_row(pose) for pose in camera).encode())
    names = [*(f"P{i}" for i in range(4)), "Tr"]  # the projections belong to no camera and are the identity
    matrices = [np.eye(4)] * 4 + [CAMERA_FROM_LIDAR]
    write_atomic(folder / "calib.txt", "".join(f"{n}: {_row(m)}" for n, m in zip(names, matrices)).encode())
    times = "".join(f"{frame * sequence.period:.6e}\n" for frame in range(settings.scans))
    write_atomic(folder / "times.txt", times.encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Track._fields)
    for frame in range(settings.scans):
        labels = read_labels(folder / "labels" / f"{frame:06d}.label", None)
        for track in sequence.tracks(frame, labels):
            writer.writerow([f"{value:.3f}" if isinstance(value, float) else value for value in track])
    write_atomic(folder / "tracks.csv", text.getvalue().encode())


def _row(matrix: np.ndarray) -> str:
    return " ".join(f"{value:.12e}" for value in matrix[:3].ravel()) + "\n"


def _folder(output: Path, number: int) -> Path:
    return output / "sequences" / f"{number:02d}"


def _complete(folder: Path, frame: int) -> bool:
    points, labels = folder / "velodyne" / f"{frame:06d}.bin", folder / "labels" / f"{frame:06d}.label"
    if not (points.exists() and labels.exists()):
        return False
    # no bytes at all are what a power cut leaves of a file that was renamed before it reached the disk
    return points.stat().st_size * 4 == labels.stat().st_size * POINT_BYTES > 0


def _check_manifest(output: Path, settings: SynthSettings) -> None:
    """Scans made otherwise are neither taken for ours nor overwritten; more sequences may be added."""
    path, now = output / MANIFEST, json.loads(json.dumps({"version": VERSION, **asdict(settings)}))
    if path.exists():
        try:
            before = json.loads(path.read_text())
            changed = [key for key in now if key != "sequences" and before.get(key) != now[key]]
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path}: damaged; choose another folder, or delete it") from error
        if changed:
            raise InputError(f"{output}: holds a data set with another {', '.join(changed)}; choose another folder")
    elif (output / "sequences").exists():
        raise InputError(f"{output}: holds sequences that kdmos synth did not make; choose another folder")
    write_atomic(path, json.dumps(now, indent=2).encode())


def synth(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(help="Data root to write; the same command goes on where it stopped.")],
    sequences: Annotated[int, typer.Option(min=1, max=1000, help="How many, named 00, 01, ...")] = 4,
    scans: Annotated[int, typer.Option(min=1, max=100_000, help="In each sequence.")] = 100,
    sensor: Annotated[str, typer.Option(help="hdl64, small, or a YAML of one's own.")] = "hdl64",
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same data.")] = 0,
    compensate: Annotated[
        bool,
        typer.Option("--compensate/--raw", help="Points in the frame of their scan's time, or as they were measured."),
    ] = True,
    drawn: Annotated[
        bool,
        typer.Option(
            "--drawn",
            help="Draw each street's sensor, whether it is compensated or raw, and a factor on its poses' errors.",
        ),
    ] = False,
    drift: Annotated[
        float, typer.Option(min=0, help="Errors of the poses: 1 is 1 cm and 0.05 degrees after a metre.")
    ] = 0.0,
    jitter: Annotated[
        float, typer.Option(min=0, help="Errors of each pose by itself: 1 is 1 cm and 0.05 degrees.")
    ] = 0.0,
    scene: Annotated[str, typer.Option(help=f"What the streets are like: {', '.join(SCENES)}.")] = "street",
    suite: Annotated[
        str | None,
        typer.Option(help=f"Make the benchmark's data instead: {', '.join(SUITES)} or {ALL}; docs/suite.md."),
    ] = None,
    twin: Annotated[bool, typer.Option("--twin", help="With --suite: its validation twin.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core by default.")] = None,
) -> None:
    """Make LiDAR sequences of made-up streets, labelled, in the layout of SemanticKITTI.

    Besides what SemanticKITTI has, each sequence has tracks.csv: class, position, speed and number of points of all
    that moves, scan by scan.
    """
    given = {name for name in context.params if context.get_parameter_source(name).name != "DEFAULT"}
    if suite is not None:
        if fixed := sorted(given - {"output", "suite", "twin", "workers"}):
            raise InputError(f"--suite {suite}: says all of its data itself; leave out --{', --'.join(fixed)}")
        for part in suite_parts(suite, twin):
            _make(part.folder(output), part.settings, workers)
        return
    if twin:
        raise InputError("--twin: is that of a suite; name it with --suite")
    if seed >= FIRST_RESERVED_SEED:
        raise InputError(
            f"--seed {seed}: from {FIRST_RESERVED_SEED} on seeds are those of the benchmark (--suite), whose data no "
            "training may see; choose a smaller one"
        )
    if scene not in SCENES:
        raise InputError(f"--scene {scene}: the scenes are {', '.join(SCENES)}")
    if drawn and given & {"sensor", "compensate"}:
        raise InputError("--drawn: draws the sensor and compensated or raw itself; leave out --sensor and --raw")
    kind = (None, None) if drawn else (load_sensor(sensor), compensate)
    settings = SynthSettings(kind[0], seed, sequences, scans, kind[1], drift, jitter, scene)
    _make(output, settings, workers)


def _make(output: Path, settings: SynthSettings, workers: int | None) -> None:
    made = synthesize(output, settings, workers, progress=True)
    print(f"{output}: {settings.sequences} sequences of {settings.scans} scans, {made} of them made now")


def main(argv: list[str] | None = None) -> None:
    run(synth, "synth", argv)


if __name__ == "__main__":
    main()
