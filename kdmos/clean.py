"""`kdmos clean`: a sequence without its moving points, scan by scan or as one map.

In order: which points stay, the scans, the map, the command.
"""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kdmos.checkpoint import write_atomic
from kdmos.command import Bar, Predictions, Sequences, Source, Topic, listed, run
from kdmos.data.poses import pose_rows
from kdmos.data.semantic_kitti import POINT_BYTES, Sequence, read_manifest
from kdmos.data.source import ScanSource
from kdmos.data.sources import open_sources
from kdmos.errors import InputError
from kdmos.predictions import MOVING, predicted_moving, predicted_sources, true_classes

MANIFEST = "clean.json"  # beside the cleaned sequences: what they were made from
MAPS = (".ply", ".pcd", ".npy")
FIELDS = ("x", "y", "z", "intensity")  # of a map; what the tools that read such files call remission
VOXEL = 0.1  # metres
MERGE_EVERY = 1_000_000  # points, or half as many as the map has, go into it at once: it is sorted each time
AXIS_BITS = 21  # of a voxel's place on each axis: 200 km with voxels of 10 cm
# float32 holds a coordinate to 1 mm up to here, metres; maps of poses that lie beyond are written in float64.
FLOAT32_METRES = 10_000.0


# --- which points stay


def moving_points(
    source: ScanSource, frame: int, num_points: int, predictions: Path | None, threshold: float | None
) -> np.ndarray:
    """Points to remove, bool [n]: by the predictions, or by the source's own labels where `predictions` is None.

    Raises: InputError if the frame has neither.
    """
    if predictions is not None:
        return predicted_moving(source, predictions, frame, num_points, threshold)
    truth = true_classes(source, frame, num_points)
    if truth is None:
        raise InputError(f"{source.where(frame)}: no labels of this scan")
    return truth == MOVING


# --- the scans


def clean_scans(
    sources: list[ScanSource],
    output: Path,
    predictions: Path | None = None,
    threshold: float | None = None,
    manifest: dict | None = None,
) -> tuple[int, int, list[str]]:
    """Write the sequences without their moving points; what an interrupted run has written is kept.

    Args:
        sources: What to clean.
        output: Gets sequences/<name>/ with velodyne/, and labels/, poses.txt, calib.txt and times.txt as far as the
            source has them.
        predictions: Folder of predictions; None: by the labels of the sources.
        threshold: Remove what has at least this moving probability; None: what is labelled so.
        manifest: What the result depends on; another one in `output` is an error.
    Returns: scans that are there now, those written now, and one line for each scan that could not be used.
    Raises: InputError if `output` holds something else or cannot be written.
    """
    _check_manifest(output, manifest)
    done, written, lost = 0, 0, []
    with Bar("clean", sum(len(source.frames) for source in sources)) as bar:
        for source in sources:
            folder = output / "sequences" / source.name
            for frame in source.frames:
                bar.advance()
                scan, label = _files(source, folder, frame)
                if _complete(scan, label):
                    done += 1
                    continue
                try:
                    points = source.read_points(frame)
                    kept = ~moving_points(source, frame, len(points), predictions, threshold)
                    if not kept.any():
                        raise InputError(f"{source.where(frame)}: all of its points move, nothing is left of it")
                    labels = None if label is None else source.read_labels(frame, len(points))
                except InputError as error:
                    lost.append(f"{source.scan(frame)}: {error}")
                    continue
                if labels is not None:  # before the scan, which says that the frame is whole
                    write_atomic(label, labels[kept].astype("<u4").tobytes(), durable=False)
                write_atomic(scan, points[kept].astype("<f4").tobytes(), durable=False)
                done, written = done + 1, written + 1
            _write_poses(source, folder)
    return done, written, lost


def _files(source: ScanSource, folder: Path, frame: int) -> tuple[Path, Path | None]:
    """Where a scan goes, and its labels if the source has them."""
    name = f"{frame:0{source.width}d}"
    has_labels = source.has_labels and source.labels_path(frame).exists()
    return folder / "velodyne" / f"{name}.bin", folder / "labels" / f"{name}.label" if has_labels else None


def _complete(scan: Path, label: Path | None) -> bool:
    # no bytes at all are what a power cut leaves of a file that was renamed before it reached the disk
    if not scan.exists() or scan.stat().st_size == 0:
        return False
    return label is None or (label.exists() and label.stat().st_size * POINT_BYTES == scan.stat().st_size * 4)


def _write_poses(source: ScanSource, folder: Path) -> None:
    """Poses, calibration and times: a sequence's own files, else such files of what the source says."""
    if isinstance(source, Sequence):
        files = {name: source.folder / name for name in ("calib.txt", "times.txt")}
        files["poses.txt"] = source.poses_path  # which may lie elsewhere
        content = {name: file.read_bytes() for name, file in files.items() if file.exists()}
    else:
        content = {}
        # row i is that of frame number i: frames that are missing get the row before theirs, which nothing reads
        row_of = np.searchsorted(source.frames, np.arange(source.frames[-1] + 1), side="right").clip(1) - 1
        if source.has_poses:
            content["poses.txt"] = pose_rows(source.poses()[row_of]).encode()
            content["calib.txt"] = b"Tr: 1 0 0 0 0 1 0 0 0 0 1 0\n"
        stamps = source.stamps()
        if stamps is not None:
            content["times.txt"] = "".join(f"{stamp:.9f}\n" for stamp in stamps[row_of]).encode()
    for name, text in content.items():
        write_atomic(folder / name, text)


def _check_manifest(output: Path, manifest: dict | None) -> None:
    """Sequences made otherwise, or by nobody knows what, are neither taken for ours nor overwritten."""
    if manifest is None:
        return
    path = output / MANIFEST
    if path.exists():
        try:
            before = json.loads(path.read_text())
            changed = [key for key in manifest if before.get(key) != manifest[key]]
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path}: damaged; choose another --output, or delete it") from error
        if changed:
            raise InputError(f"{output}: was cleaned with another {', '.join(changed)}; choose another --output")
    elif (output / "sequences").exists():
        raise InputError(f"{output}: holds sequences that kdmos clean did not write; choose another --output")
    write_atomic(path, json.dumps(manifest, indent=2).encode())


# --- the map


class VoxelMap:
    """Points of which each voxel keeps the first; what it holds is bounded by the number of voxels.

    Args:
        voxel: Side of a voxel, metres.
        origin: float64 [3], where voxels are counted from; the points must lie within a million voxels of it.
    """

    def __init__(self, voxel: float, origin: np.ndarray) -> None:
        self.voxel, self.origin = voxel, origin
        self._keys, self._points = np.zeros(0, np.int64), np.zeros((0, 4))
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, points: np.ndarray) -> None:
        """Take points, float64 [n, 4] = x, y, z, remission, in the frame of the map.

        Raises: InputError if one lies too far out.
        """
        place = np.floor((points[:, :3] - self.origin) / self.voxel)
        half = 1 << (AXIS_BITS - 1)
        if len(place) and np.abs(place).max() >= half:
            raise InputError(
                f"a point lies more than {half * self.voxel:,.0f} m from the start of the map, too far for voxels of "
                f"{self.voxel:g} m; choose a larger --voxel, or a --range if the point is wrong"
            )
        x, y, z = (place.astype(np.int64) + half).T
        self._waiting.append(((x << 2 * AXIS_BITS) | (y << AXIS_BITS) | z, points))
        if sum(len(keys) for keys, _ in self._waiting) > max(MERGE_EVERY, len(self._keys) // 2):
            self._merge()

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._waiting)])
        points = np.concatenate([self._points, *(points for _, points in self._waiting)])
        self._keys, first = np.unique(keys, return_index=True)  # of equal keys the first
        self._points, self._waiting = points[first], []

    def points(self) -> np.ndarray:
        """All points, float64 [m, 4], in the order of their voxels."""
        self._merge()
        return self._points


def clean_map(
    source: ScanSource,
    file: Path,
    voxel: float = VOXEL,
    max_range: float | None = None,
    predictions: Path | None = None,
    threshold: float | None = None,
) -> tuple[int, int, list[str]]:
    """Write the static points of all scans as one map, in the frame of the poses.

    Args:
        source: With poses.
        file: .ply, .pcd (x, y, z, intensity) or .npy (float [m, 4]), replaced as a whole.
        voxel: Side of the voxels of which each keeps one point, metres.
        max_range: Points farther from their sensor are left out, metres; None: none are.
        predictions, threshold: What moves, as for `clean_scans`.
    Returns: points of the map, scans it is made of, and one line for each scan that could not be used.
    Raises: InputError if the poses are missing, no scan can be used, or the file cannot be written.
    """
    poses = source.poses()
    static, lost = VoxelMap(voxel, poses[0, :3, 3]), []
    with Bar("clean", len(source.frames)) as bar:
        for frame, pose in zip(source.frames, poses):
            bar.advance()
            try:
                points = source.read_points(frame)
                kept = ~moving_points(source, frame, len(points), predictions, threshold)
                kept &= np.isfinite(points).all(1)
                if max_range is not None:
                    kept &= np.linalg.norm(points[:, :3], axis=1) <= max_range
                points = points[kept].astype(np.float64)
                points[:, :3] = points[:, :3] @ pose[:3, :3].T + pose[:3, 3]
                static.add(points)
            except InputError as error:
                lost.append(f"{source.scan(frame)}: {error}")
    points = static.points()
    if len(lost) == len(source.frames):
        raise InputError(f"no scan of sequence {source.name} could be used; {lost[0]}")
    near = np.abs(points[:, :3]).max(initial=0) < FLOAT32_METRES
    write_atomic(file, map_file(points.astype(np.float32 if near else np.float64), file.suffix))
    return len(points), len(source.frames) - len(lost), lost


def map_file(points: np.ndarray, suffix: str) -> bytes:
    """Points [m, 4] as a file of that suffix, binary."""
    content = io.BytesIO()
    if suffix == ".npy":
        np.save(content, points)
    elif suffix == ".ply":
        from plyfile import PlyData, PlyElement

        rows = np.rec.fromarrays(points.T, names=FIELDS)
        PlyData([PlyElement.describe(rows, "vertex")]).write(content)
    else:
        from pypcd4 import PointCloud

        PointCloud.from_points(list(points.T), FIELDS, [points.dtype] * 4).save(content)
    return content.getvalue()


def _need_writer(suffix: str) -> None:
    """Raise InputError if the library that writes such files is missing: before the work."""
    try:
        if suffix == ".ply":
            import plyfile  # noqa: F401
        elif suffix == ".pcd":
            import pypcd4  # noqa: F401
    except ImportError as error:
        raise InputError(f"{suffix} files need {error.name}: pip install 'kdmos[files]'") from None


# --- the command


def clean(
    source: Source,
    predictions: Predictions = None,
    output: Annotated[Path | None, typer.Option(help="Data root for the cleaned sequences.")] = None,
    map: Annotated[Path | None, typer.Option(help="Write one map instead: .ply, .pcd or .npy.")] = None,
    truth: Annotated[bool, typer.Option("--truth", help="By the labels of the source, not by predictions.")] = False,
    threshold: Annotated[
        float | None,
        typer.Option(min=0.001, max=1, help="Remove from this moving probability on (kdmos predict --scores)."),
    ] = None,
    sequences: Sequences = None,
    topic: Topic = None,
    voxel: Annotated[
        float | None,
        typer.Option(min=0.001, help="Of a map: each cube of this side keeps one point, metres; 0.1 by default."),
    ] = None,
    max_range: Annotated[
        float | None, typer.Option("--range", help="Of a map: leave out points farther from their sensor, metres.")
    ] = None,
) -> int:
    """Write sequences without their moving points, as scans or as one map.

    The scans are a data set in SemanticKITTI's layout, points and labels in their old order; the same command goes on
    where it was interrupted. A scan without a prediction, or that cannot be read, is listed and the rest goes on; the
    exit code is then 1.
    """
    if (output is None) == (map is None):
        raise InputError("choose one of --output FOLDER, for scans, and --map FILE")
    if (predictions is None) != truth:
        raise InputError("what moves is said by PREDICTIONS or, with --truth, by the labels: give one of them")
    if truth and threshold is not None:
        raise InputError("--threshold is of predictions; --truth has none")
    names = listed(sequences, "--sequences")
    if truth:
        found = open_sources(source, names, topic)
        for one in found:
            if not one.has_labels:
                raise InputError(
                    f"--truth: sequence {one.name} has no labels; name others with --sequences, or predict it"
                )
    else:
        found = predicted_sources(source, names, predictions, topic, scores=threshold is not None)
    if map is not None:
        return _map(found, source, predictions, map, voxel or VOXEL, max_range, threshold)
    if max_range is not None or voxel is not None:
        raise InputError("--voxel and --range are of a --map; scans keep all their static points")
    _refuse_input(output, source, predictions)
    for one in found:
        if isinstance(one, Sequence):
            _refuse_input(output / "sequences" / one.name, one.folder)
    manifest = {
        "source": str(source.resolve()),
        "predictions": None if truth else str(predictions.resolve()),
        "made_with": None if truth else read_manifest(predictions),
        "threshold": threshold,
    }
    done, written, lost = clean_scans(found, output, predictions, threshold, manifest)
    print(f"{done} scans without their moving points in {output}, {written} of them written now")
    return _report(lost)


def _map(
    found: list[ScanSource],
    source: Path,
    predictions: Path | None,
    file: Path,
    voxel: float,
    max_range: float | None,
    threshold: float | None,
) -> int:
    if file.suffix not in MAPS:
        raise InputError(f"--map {file}: expected a name that ends in {', '.join(MAPS)}")
    for option, metres in (("--range", max_range), ("--voxel", voxel)):
        if metres is not None and not 0 < metres < math.inf:
            raise InputError(f"{option} {metres}: expected metres, more than 0")
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise InputError(f"--map is of one sequence; name it with --sequences, one of {names}")
    inputs = [path.resolve() for path in (source, predictions) if path is not None]
    if file.exists() and any(path in (file.resolve(), *file.resolve().parents) for path in inputs):
        raise InputError(f"--map {file}: exists and may be part of the input; choose another place")
    _need_writer(file.suffix)
    points, scans, lost = clean_map(found[0], file, voxel, max_range, predictions, threshold)
    print(f"{file}: {points:,} static points of {scans} scans, one in each voxel of {voxel:g} m")
    return _report(lost)


def _refuse_input(output: Path, *inputs: Path | None) -> None:
    for path in inputs:
        if path is not None and path.resolve() == output.resolve():
            raise InputError(f"{output}: is the input, which is never written over; choose another --output")


def _report(lost: list[str]) -> int:
    for line in lost:
        print(f"left out: {line}", file=sys.stderr)
    return 1 if lost else 0


def main(argv: list[str] | None = None) -> None:
    run(clean, "clean", argv)


if __name__ == "__main__":
    main()
