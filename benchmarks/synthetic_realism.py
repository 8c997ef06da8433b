"""How much synthetic scans resemble real ones: rows of results/synthetic_realism.csv and docs/synthetic_realism.png.

    python -m benchmarks.synthetic_realism [--seeds 0 1] [--streets 12] [--only streets] [--data ROOT]

The real side is two drives in the folder KDMOS_SHARED (default ../shared), each against synthetic sequences of as
many scans, of which the same frames count:

kitti-raw-0005-a: as recorded (not motion-compensated), with labels in the camera's view. Motion channels are compared
    on the static points of that view, on both sides.
kitti-odometry-00: compensated, without labels and with few movers. Motion channels are compared on all points, with
    streets whose movers were taken away.

The distance of two histograms is the total variation: half the sum of the absolute differences of their shares, 0 for
equal ones, 1 for disjoint ones. The two real drives against each other give the scale.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdmos.data.labels import CLASSES, to_classes
from kdmos.data.semantic_kitti import Sequence, find_sequences
from kdmos.data.synthetic.lidar import SensorSettings, load_sensor
from kdmos.data.synthetic.sequence import SyntheticSequence
from kdmos.errors import InputError
from kdmos.motion import motion_channels, moving_by_rule
from kdmos.settings import MotionSettings
from kdmos.synth import SynthSettings, synthesize

from . import rows

SHARED = Path(os.environ.get("KDMOS_SHARED", Path(__file__).parents[2] / "shared"))
FIGURE = Path(__file__).parents[1] / "docs" / "synthetic_realism.png"
BEAMS = 64
NEAR = 30.0  # metres; beyond, neighbours lie too far apart to tell a surface
IMAGE = (1242, 375)  # pixels, of the camera in whose view KITTI has boxes
RINGS = np.arange(0.0, 80.1, 5.0)  # metres, horizontal
HEIGHTS = np.arange(-3.0, 3.01, 0.1)  # metres above the sensor
REMISSIONS = np.arange(-0.005, 1.0, 0.02)  # two of KITTI's steps of 0.01 each
MAGNITUDES = np.arange(0.3, 4.01, 0.1)  # metres, of non-zero motion channels
HISTOGRAMS = {
    "range": RINGS,
    "height": HEIGHTS,
    "beam": np.arange(BEAMS + 1),
    "remission": REMISSIONS,
    "magnitude": MAGNITUDES,
}
COLUMNS = ("against", "sensor", "source", "streets", "scans", "movers", "statistic", "unit", "real")
COLUMNS += ("synthetic_p10", "synthetic_p50", "synthetic_p90", "pooled")
UNLABELED, MOVING = CLASSES[4].index("unlabeled"), CLASSES[4].index("moving")


class Against(NamedTuple):
    """A real drive, and what the synthetic sequences that it is compared with are like."""

    name: str
    scans: int
    compensate: bool
    movers: bool
    camera: bool  # motion channels count in the camera's view alone


DRIVES = (Against("kitti-raw-0005-a", 16, False, True, True), Against("kitti-odometry-00", 10, True, False, False))


@dataclass
class Drive:
    """Some scans one after the other.

    scans: float32 [n, 4], ring by ring from the top. labels: raw ids uint32 [n], None where unknown.
    poses: [S, 4, 4]. seam: azimuth at which the rings of a scan begin, radians.
    """

    scans: list[np.ndarray]
    labels: list[np.ndarray] | None
    poses: np.ndarray
    seam: float


class Texture(NamedTuple):
    """What neighbours on a surface are like, of points within `NEAR` metres.

    zeros: Share of points without remission. alone: Of the points between two with remission, those without. missing:
    Share of steps along a ring, on one surface, that leave out a ray. noise: of a range, metres.
    """

    zeros: float
    alone: float
    missing: float
    noise: float


@dataclass
class Statistics:
    """Counts over the scans of a drive.

    points: a scan. counts: histogram by name of `HISTOGRAMS`. scored: points whose motion channels count, by ring;
    changed: of these, with a non-zero channel. complete, ruled: the same in scans that have all channels, and of
    these, moving by the rule. movers: moving points of these scans, by whether the rule finds them. moving: share of
    moving points in the view of each scan. texture: mean over the scans.
    """

    points: float
    counts: dict[str, np.ndarray]
    scored: np.ndarray
    changed: np.ndarray
    complete: np.ndarray
    ruled: np.ndarray
    movers: np.ndarray
    moving: np.ndarray
    texture: Texture


def total_variation(first: np.ndarray, second: np.ndarray) -> float:
    """Total variation distance of two histograms, 0..1; counts of any sums."""
    return float(np.abs(first / max(first.sum(), 1e-12) - second / max(second.sum(), 1e-12)).sum() / 2)


def beam_of(points: np.ndarray, seam: float, beams: int = BEAMS) -> np.ndarray:
    """Beam of each point of a scan that is stored ring by ring, 0 the topmost; the last one is `beams` - 1.

    A ring ends where the azimuth falls by more than half a turn. A point beyond the seam on either side, as noise and
    compensation make it, would end it twice: a ring of fewer than three points is none.
    """
    azimuth = (np.arctan2(points[:, 1], points[:, 0]) - seam) % (2 * np.pi)
    ends = np.flatnonzero(np.diff(azimuth) < -np.pi)
    keep = np.diff(ends, prepend=-10) > 2
    ring = np.zeros(len(points), np.int64)
    ring[ends[keep] + 1] = 1
    ring = np.cumsum(ring)
    return np.maximum(ring + beams - 1 - ring[-1], 0)  # beams without any return are those that look into the sky


def in_view(points: np.ndarray, calib: dict[str, np.ndarray]) -> np.ndarray:
    """Points that the left colour camera sees, bool [n]; `calib` as from `read_calib`."""
    u, v, depth = calib["P2"] @ calib["Tr"] @ np.concatenate([points[:, :3].T, np.ones((1, len(points)))])
    ahead = np.maximum(depth, 1e-3)
    inside = (u >= 0) & (u < IMAGE[0] * ahead) & (v >= 0) & (v < IMAGE[1] * ahead)
    return inside & (depth > 0)


def read_calib(path: Path) -> dict[str, np.ndarray]:
    """The camera P2 [3, 4] and Tr, camera from LiDAR [4, 4], of a KITTI calib.txt."""
    rows = {line.split(":")[0]: line.split(":")[1] for line in path.read_text().splitlines() if ":" in line}
    p2, tr = (np.array(rows[key].split(), np.float64).reshape(3, 4) for key in ("P2", "Tr"))
    return {"P2": p2, "Tr": np.concatenate([tr, [[0, 0, 0, 1]]])}


def texture(points: np.ndarray) -> Texture:
    """Of a scan that is stored ring by ring.

    Points count that lie between two others of their ring, a ray away on either side and at much the same range.
    Noise is the median absolute second difference of the ranges, as a standard deviation.
    """
    distance, dark = np.linalg.norm(points[:, :3], axis=1), points[:, 3] == 0
    step = np.abs((np.diff(np.arctan2(points[:, 1], points[:, 0])) + np.pi) % (2 * np.pi) - np.pi)
    rays = step / np.median(step)
    surface = (np.abs(np.diff(distance)) < 0.15) & (distance[1:] < NEAR)
    beside = surface & (rays < 1.5)
    between = beside[1:] & beside[:-1]
    lit = between & ~dark[2:] & ~dark[:-2]
    left_out, steps = surface & (rays >= 1.5) & (rays < 2.5), surface & (rays < 2.5)
    noise = np.abs(np.diff(distance, 2)[between])
    return Texture(
        _share(dark & (distance < NEAR), distance < NEAR),
        _share(dark[1:-1] & lit, lit),
        _share(left_out, steps),
        float(np.median(noise)) / 0.6745 / np.sqrt(6) if len(noise) else float("nan"),
    )


def static_points(labels: np.ndarray, synthetic: bool) -> np.ndarray:
    """Points of a scan that count as static, bool [n].

    Real: labelled so. Synthetic: neither moving nor beside a moving point on the same ring; so mixed pixels and
    ghosts, unlabelled here but not in real data, count.
    """
    classes = to_classes(labels, CLASSES[4], "labels")
    if not synthetic:
        return (classes != MOVING) & (classes != UNLABELED)
    near = classes == MOVING
    near[1:] |= classes[:-1] == MOVING
    near[:-1] |= classes[1:] == MOVING
    return ~near


def statistics(drive: Drive, calib: dict | None = None, synthetic: bool = True, beams: int = BEAMS) -> Statistics:
    """Counts of a drive.

    Args:
        drive: At least one scan; without labels, all points count as static.
        calib: Restricts what concerns motion to the camera's view.
        synthetic: See `static_points`.
        beams: Of the sensor.
    """
    counts = {name: np.zeros(len(edges) - 1) for name, edges in HISTOGRAMS.items()}
    counts["beam"] = np.zeros(beams)
    scored, changed, complete, ruled = np.zeros((4, len(RINGS) - 1))
    settings, moving, movers = MotionSettings(), [], np.zeros(2)
    residuals = motion_channels(drive.scans, drive.poses)
    for i, (points, residual) in enumerate(zip(drive.scans, residuals)):
        distance = np.hypot(points[:, 0], points[:, 1])
        values = {"range": distance, "height": points[:, 2], "remission": points[:, 3]}
        for name, value in values.items():  # what lies beyond an end counts at that end
            edges = HISTOGRAMS[name]
            counts[name] += np.histogram(np.clip(value, edges[0], edges[-1] - 1e-6), edges)[0]
        counts["beam"] += np.bincount(beam_of(points, drive.seam, beams), minlength=beams)

        view = np.ones(len(points), bool) if calib is None else in_view(points, calib)
        static = view.copy()
        if drive.labels is not None:
            static &= static_points(drive.labels[i], synthetic)
            is_moving = to_classes(drive.labels[i], CLASSES[4], "labels") == MOVING
            moving.append(np.count_nonzero(is_moving & view) / max(np.count_nonzero(view), 1))
        nonzero = (residual != 0).any(1) & static
        scored += np.histogram(distance[static], RINGS)[0]
        changed += np.histogram(distance[nonzero], RINGS)[0]
        if settings.history <= i < len(drive.scans) - settings.lookahead:
            complete += np.histogram(distance[static], RINGS)[0]
            rule = moving_by_rule(torch.from_numpy(residual)).numpy()
            ruled += np.histogram(distance[static & rule], RINGS)[0]
            if drive.labels is not None:
                movers += np.bincount(rule[is_moving & view], minlength=2)
        sizes = residual[nonzero]
        counts["magnitude"] += np.histogram(sizes[sizes != 0], MAGNITUDES)[0]
    points = sum(map(len, drive.scans)) / len(drive.scans)
    like = Texture(*np.mean([texture(scan) for scan in drive.scans], 0))
    return Statistics(points, counts, scored, changed, complete, ruled, movers, np.array(moving), like)


def read_drive(sequence: Sequence, scans: int, seam: float) -> Drive:
    """The first scans of a stored sequence."""
    frames = sequence.frames[:scans]
    if len(frames) < scans:
        raise InputError(f"{sequence.folder}: has {len(frames)} scans, {scans} are needed")
    points = [sequence.read_points(frame) for frame in frames]
    labels = [sequence.read_labels(f, len(p)) for f, p in zip(frames, points)] if sequence.has_labels else None
    return Drive(points, labels, sequence.poses()[:scans], seam)


def make_drive(sensor: SensorSettings, seed: int, number: int, against: Against) -> Drive:
    """A synthetic sequence like a real drive."""
    sequence = SyntheticSequence(seed, number, against.scans, sensor, against.compensate)
    if not against.movers:
        sequence.street.movers = []
    scans = [sequence.scan(frame) for frame in range(against.scans)]
    return Drive([scan.points for scan in scans], [scan.labels for scan in scans], sequence.poses(), -np.pi)


def real_folder(name: str) -> Path:
    """Folder of a real drive."""
    folder = SHARED / "realdata" / name
    if not folder.is_dir():
        raise InputError(f"realdata/{name} is not under {SHARED}: set KDMOS_SHARED to the folder that holds realdata/")
    return folder


def _real(against: Against) -> Statistics:
    folder = real_folder(against.name)
    (sequence,) = find_sequences(folder)
    calib = read_calib(folder / "calib.txt") if against.camera else None
    return statistics(read_drive(sequence, against.scans, 0.0), calib, synthetic=False)


def _synthetic(task) -> Statistics:
    against, sensor, street = task
    calib = read_calib(real_folder(against.name) / "calib.txt") if against.camera else None
    stored = isinstance(street, Sequence)
    drive = read_drive(street, against.scans, -np.pi) if stored else make_drive(sensor, *street, against)
    return statistics(drive, calib)


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.sum() / whole.sum()) if whole.sum() else float("nan")


VALUES = {  # name: (of a drive, unit)
    "points": (lambda s: s.points, "points a scan"),
    "nonzero": (lambda s: _share(s.changed, s.scored), "share of static points"),
    "rule": (lambda s: _share(s.ruled, s.complete), "share of static points"),
    "found": (lambda s: _share(s.movers[1], s.movers), "share of moving points"),
    "moving": (lambda s: float(s.moving.mean()) if len(s.moving) else float("nan"), "share of points in view"),
    "zeros": (lambda s: s.texture.zeros, "share of points, to 30 m"),
    "zeros_alone": (lambda s: s.texture.alone, "share of points between two with remission"),
    "missing": (lambda s: s.texture.missing, "share of steps on a surface"),
    "noise": (lambda s: s.texture.noise, "metres"),
}


def compare(real: Statistics, streets: list[Statistics], other: Statistics | None = None) -> list[dict]:
    """Rows: what a drive and the streets have of each number, and how far apart their histograms are.

    Args:
        real: The drive.
        streets: Of the synthetic sequences.
        other: Another real drive.
    Returns: rows with `statistic`, `unit`, `real`, `synthetic_p10`, `synthetic_p50` and `synthetic_p90` over the
        streets, and `pooled`. For a histogram these are distances to `real`: of the `other` drive, of the streets one
        by one, and of their sum.
    """
    table = []

    def add(statistic, unit, of_real, values, pooled=float("nan")):
        about = {"statistic": statistic, "unit": unit, "real": _rounded(of_real)}
        table.append(about | _spread(values) | {"pooled": _rounded(pooled)})

    for name, (value, unit) in VALUES.items():
        if np.isfinite(value(real)):
            add(name, unit, value(real), np.array([value(street) for street in streets]))
    for name in HISTOGRAMS:
        of_real = total_variation(real.counts[name], other.counts[name]) if other else float("nan")
        pooled = total_variation(real.counts[name], sum(street.counts[name] for street in streets))
        distances = [total_variation(real.counts[name], street.counts[name]) for street in streets]
        add(name, "total variation", of_real, np.array(distances), pooled)
    return table


def _spread(values: np.ndarray) -> dict:
    low, middle, high = np.nanpercentile(values, [10, 50, 90]) if np.isfinite(values).any() else [np.nan] * 3
    return {f"synthetic_p{p}": _rounded(v) for p, v in ((10, low), (50, middle), (90, high))}


def _rounded(value: float) -> float | str:
    return "" if not np.isfinite(value) else float(f"{value:.4g}")


# --- figure

REAL_COLOURS, SYNTHETIC = ("#d55e00", "#0072b2"), "#5b6770"


def draw(path: Path, reals: list[Statistics], streets: list[list[Statistics]]) -> None:
    """Write the figure; `reals` and the synthetic streets for each in the order of `DRIVES`."""
    from matplotlib.figure import Figure  # not pyplot: always Agg, no window, no state shared with the caller

    names = [drive.name for drive in DRIVES]
    figure = Figure(figsize=(14.5, 11), dpi=90, layout="constrained")
    axes = figure.subplots(3, 3)
    middles = {name: (edges[1:] + edges[:-1]) / 2 for name, edges in HISTOGRAMS.items()}

    def curves(axis, x, synthetic, reals, which=(0, 1)):
        known = np.isfinite(synthetic).sum(0) * 2 >= len(synthetic)  # in half of the streets
        spread = np.full((3, len(x)), np.nan)
        spread[:, known] = np.nanpercentile(np.stack(synthetic)[:, known], [10, 50, 90], axis=0)
        axis.fill_between(x, spread[0], spread[2], color=SYNTHETIC, alpha=0.25, lw=0)
        axis.plot(x, spread[1], color=SYNTHETIC, lw=1.8, ls="--")
        for i, real in zip(which, reals):
            axis.plot(x, real, color=REAL_COLOURS[i], lw=1.8)
        axis.set_ylim(bottom=0)

    def shares(statistics, name):
        return statistics.counts[name] / max(statistics.counts[name].sum(), 1) * 100

    # 1) What a scan looks like: both drives and the streets with movers.
    for axis, name, title, unit, bins in (
        (axes[0, 0], "range", "points by horizontal range", "metres", "points, rings of 5 m"),
        (axes[0, 1], "height", "points by height above the sensor", "metres", "points, bins of 0.1 m"),
        (axes[1, 0], "remission", "points by remission", "remission", "points, bins of 0.02"),
        (axes[1, 1], "magnitude", "size of the non-zero motion channels", "metres", "channels, bins of 0.1 m"),
    ):
        curves(axis, middles[name], [shares(s, name) for s in streets[0]], [shares(s, name) for s in reals])
        axis.set(title=title, xlabel=unit, ylabel=f"% of the {bins}")
    turns = [[s.counts["beam"] / s.counts["beam"].sum() * s.points for s in side] for side in (streets[0], reals)]
    curves(axes[0, 2], np.arange(len(turns[0][0])), *turns)
    axes[0, 2].set(title="returns by beam", xlabel="beam, from the top down", ylabel="returns a scan")

    # 2) How much moves.
    axis, order = axes[1, 2], sorted(streets[0], key=lambda s: s.moving.mean())
    place = np.arange(1, len(order) + 1)
    mean, low, high = (np.array([f(s.moving) for s in order]) * 100 for f in (np.mean, np.min, np.max))
    axis.errorbar(place, mean, [mean - low, high - mean], fmt="o", color=SYNTHETIC, ms=4, lw=1.2)
    axis.axhspan(*(np.array([reals[0].moving.min(), reals[0].moving.max()]) * 100), color=REAL_COLOURS[0], alpha=0.25)
    axis.axhline(reals[0].moving.mean() * 100, color=REAL_COLOURS[0], lw=1.8)
    axis.set(title="moving points: mean and range by street", xlabel="street, by share")
    axis.set(ylabel="% of the points in the camera's view", xticks=place[:: max(len(place) // 12, 1)])

    # 3) What the motion channels make of what stands still.
    near = RINGS[1:] <= 60  # where they end
    x = middles["range"][near]
    for i, (axis, drive) in enumerate(zip(axes[2], DRIVES)):
        values = [_by_ring(s.changed, s.scored)[near] for s in streets[i]]
        curves(axis, x, values, [_by_ring(reals[i].changed, reals[i].scored)[near]], [i])
        where = "static points in the camera's view" if drive.camera else "all points, no synthetic movers"
        axis.set_title(f"with a non-zero motion channel:\n{where}")
    values = [_by_ring(s.ruled, s.complete)[near] for s in streets[0]]
    curves(axes[2, 2], x, values, [_by_ring(reals[0].ruled, reals[0].complete)[near]], [0])
    axes[2, 2].set_title("moving by the training-free rule:\nstatic points in the camera's view")
    for axis in axes[2]:
        axis.set(xlabel="horizontal range, metres", ylabel="% of these points")

    key = axes[0, 0]
    handles = [key.lines[1], key.lines[2], key.lines[0], key.collections[0]]
    labels = [*names, "synthetic streets: median", "10 % to 90 % of them"]
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=12)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
    figure.savefig(path)


def _by_ring(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Percent; NaN where fewer than 200 points tell."""
    return np.where(whole < 200, np.nan, part / np.maximum(whole, 1) * 100)


# --- speed


def speed_rows(name: str, workers: int, scans: int, runs: int = 3) -> list[dict]:
    """Rows of how fast `kdmos synth` makes two sequences, processes started and files written.

    Scans a second tell what a user waits for, CPU seconds a scan what it costs on a machine that has other work too.
    """
    sensor, found = load_sensor(name), []
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            start, before = time.perf_counter(), _cpu_seconds()
            made = synthesize(Path(folder) / "data", SynthSettings(sensor, seed, 2, scans), workers)
            found.append((made / (time.perf_counter() - start), (_cpu_seconds() - before) / made))
    about = {"source": f"seeds 0 to {runs - 1}", "sensor": Path(name).name, "streets": 2, "scans": scans}
    units = {"speed": f"scans a second, {workers} workers", "cpu": "CPU seconds a scan"}
    return [
        dict.fromkeys(COLUMNS, "") | about | {"statistic": statistic, "unit": unit} | _spread(np.array(values))
        for (statistic, unit), values in zip(units.items(), zip(*found))
    ]


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def street_rows(arguments: argparse.Namespace, sensor: SensorSettings) -> list[dict]:
    """Rows of all streets against both drives, and the figure."""
    reals = [_real(drive) for drive in DRIVES]
    made = [(seed, number) for seed in arguments.seeds for number in range(arguments.streets)]
    sources = find_sequences(arguments.data) if arguments.data else made
    tasks = [(drive, sensor, source) for drive in DRIVES for source in sources]
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(_synthetic, tasks))
    streets = [results[: len(sources)], results[len(sources) :]]
    seeds = "seeds " + " ".join(map(str, arguments.seeds))
    source = arguments.data.resolve().name if arguments.data else seeds
    table = []
    for drive, real, other, synthetic in zip(DRIVES, reals, reversed(reals), streets):
        movers = "yes" if drive.movers or arguments.data else "no"
        about = (drive.name, Path(arguments.sensor).name, source, len(sources), drive.scans, movers)
        table += [dict(zip(COLUMNS, about)) | row for row in compare(real, synthetic, other)]
    draw(FIGURE, reals, streets)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--streets", type=int, default=12, help="of each seed")
    parser.add_argument("--sensor", default="hdl64", help="hdl64, or a YAML of a sensor with 64 beams")
    parser.add_argument("--data", type=Path, help="take these sequences, movers and all, instead of making some")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=("streets", "speed"), help="one half of the work")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except InputError as error:
        parser.exit(1, f"error: {error}\n")


def run(arguments: argparse.Namespace) -> None:
    sensor = load_sensor(arguments.sensor)
    if len(sensor.elevations_of_blocks()) != BEAMS:
        raise InputError(f"--sensor {arguments.sensor}: the real scans are of {BEAMS} beams, so must these be")
    table = []
    if arguments.only != "speed":
        table += street_rows(arguments, sensor)
    if arguments.only != "streets":
        table += speed_rows(arguments.sensor, arguments.workers, 40) + speed_rows("small", arguments.workers, 100)
    for row in table:
        print(*row.values(), sep="  ")
        path = rows.append("synthetic_realism", row)
    print(f"appended to {path}")


if __name__ == "__main__":
    main()
