"""`kdmos view`: scans with their truth, predictions and motion channels, in a viewer, as pictures or as a film.

In order: what is known of a scan, what is drawn of it, the rerun viewer, the film, the command.
"""

from __future__ import annotations

import io
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer

from kdmos import picture
from kdmos.checkpoint import write_atomic
from kdmos.command import Bar, Predictions, Sensor, Sequences, Source, Topic, listed, run
from kdmos.data.profile import SensorProfile, load_profile, profile_of
from kdmos.data.semantic_kitti import read_manifest
from kdmos.data.source import ScanSource, WithPoses
from kdmos.data.sources import open_sources
from kdmos.errors import InputError
from kdmos.inference import Model, choose_device, prepared
from kdmos.models import load_model
from kdmos.motion import sequence_channels
from kdmos.picture import DriveMap, Panel, error_marks, moving_marks, need_matplotlib, panels_picture, residual_marks
from kdmos.predict import predict_sequence
from kdmos.predictions import MOVING, UNLABELED, predicted_moving, predicted_sources, true_classes
from kdmos.settings import MotionSettings

if TYPE_CHECKING:
    from PIL.Image import Image

EXTRA = "pip install 'kdmos[view]'"
NEEDS = {  # what a picture can show -> what it takes
    "scan": (),
    "truth": ("labels",),
    "prediction": ("predictions",),
    "errors": ("labels", "predictions"),
    "residual": ("poses",),
    "channels": ("poses",),
}
CURVES = (  # over the scans: entity, name, colour
    ("moving/truth", "true", picture.MOVING),
    ("moving/prediction", "predicted", picture.HIT),
    ("iou", "moving IoU", picture.HIT),
)
EPOCH = 1e8  # stamps beyond it, 1973, are dates; below, seconds since the start


# --- what is known of a scan


@dataclass(frozen=True)
class Drive:
    """A source, the frames of it to show, and float64 [len(source.frames), 4, 4], its poses where they are known."""

    source: ScanSource
    frames: tuple[int, ...]
    poses: np.ndarray | None


@dataclass(frozen=True)
class Shown:
    """A scan and what is known of it.

    index: Its place among the frames of its source.
    points: float32 [n, 4].
    truth: uint8 [n], classes, where the source has labels; without a label file all points are unlabeled.
    predicted: bool [n], moving points.
    residual: float32 [n, K], motion channels.
    """

    frame: int
    index: int
    points: np.ndarray
    truth: np.ndarray | None
    predicted: np.ndarray | None
    residual: np.ndarray | None

    @property
    def moving_iou(self) -> float | None:
        """None where it cannot be said: no truth, no prediction, or nothing moves in either."""
        if self.truth is None or self.predicted is None:
            return None
        scored, moving = self.truth != UNLABELED, self.truth == MOVING
        either = np.count_nonzero((moving | self.predicted) & scored)
        return np.count_nonzero(moving & self.predicted) / either if either else None


def shown_scans(
    drive: Drive,
    labels: bool,
    predictions: Path | None = None,
    model: Model | None = None,
    motion: MotionSettings | None = None,
    device: torch.device | str = "cpu",
    profile: SensorProfile | None = None,
) -> Iterator[Shown | InputError]:
    """The scans of a drive with all that is asked for, in frame order; the error of one that cannot be used.

    Args:
        drive: Which scans.
        labels: Read its labels.
        predictions: Folder of predictions to read.
        model: Predict with it on the way instead; needs poses.
        motion: Compute these motion channels; needs poses.
        device: Where the model is.
        profile: Of the sensor, for model and channels; None: scans are as they are expected. Points are shown as read.
    """
    source, wanted = _ReadOnce(drive.source, drive.poses), frozenset(drive.frames)
    predicted = iter(())
    if model is not None:
        answers = predict_sequence(model, source, device, frozenset(source.frames) - wanted, profile)
        predicted = (answer for frame, answer in answers if frame in wanted)
    residuals = iter(()) if motion is None else _residuals(source, wanted, motion, profile or SensorProfile())
    for frame in drive.frames:
        # all are advanced, whatever becomes of this frame
        answer, residual = next(predicted, None), next(residuals, None)
        try:
            if isinstance(answer, InputError):
                raise answer
            points = source.read_points(frame)
            truth = true_classes(source, frame, len(points)) if labels else None
            if labels and truth is None:
                truth = np.full(len(points), UNLABELED, np.uint8)
            moving = None if answer is None else answer.predicted == model.moving
            if predictions is not None:
                moving = predicted_moving(source, predictions, frame, len(points))
        except InputError as error:
            yield error
        else:
            yield Shown(frame, source.frames.index(frame), points, truth, moving, residual)
        source.forget(frame)


class _ReadOnce(WithPoses):
    """A source that keeps what it has read until it is forgotten.

    The prediction, the channels and the picture ask for the same scans, some ahead of the others; a bag, which is read
    forward, would begin anew each time.
    """

    def __init__(self, source: ScanSource, poses: np.ndarray | None) -> None:
        super().__init__(source, poses)
        self._kept: dict[int, np.ndarray | InputError] = {}

    def read_points(self, frame: int) -> np.ndarray:
        if frame not in self._kept:
            try:
                self._kept[frame] = self.source.read_points(frame)
            except InputError as error:
                self._kept[frame] = error
        if isinstance(self._kept[frame], InputError):
            raise self._kept[frame]
        return self._kept[frame]

    def forget(self, last: int) -> None:
        """All scans up to this one."""
        self._kept = {frame: kept for frame, kept in self._kept.items() if frame > last}


def _residuals(
    source: ScanSource, wanted: frozenset[int], motion: MotionSettings, profile: SensorProfile
) -> Iterator[np.ndarray]:
    """Motion channels of some frames of a source with poses, 0 at points that the profile leaves out; a scan that
    cannot be read counts as empty."""
    # The channels of a scan depend on `history` scans before it and `lookahead` after it, on no others.
    start = max(0, source.frames.index(min(wanted)) - motion.history)
    stop = source.frames.index(max(wanted)) + motion.lookahead + 1
    frames, used = source.frames[start:stop], {}

    def scans() -> Iterator[torch.Tensor]:
        for frame in frames:
            try:
                points, used[frame] = profile.apply(source.read_points(frame))
            except InputError:  # it is listed where it is shown
                points, used[frame] = np.zeros((0, 4), np.float32), np.zeros(0, bool)
            yield torch.from_numpy(points)

    poses = profile.apply_to_pose(source.poses()[start:stop])
    for frame, channels in zip(frames, sequence_channels(scans(), poses, motion)):
        kept = used.pop(frame)
        if frame in wanted:
            residual = np.zeros((len(kept), motion.num_channels), np.float32)
            residual[kept] = channels.numpy()
            yield residual


# --- what is drawn of it


def panels_of(shown: Shown, names: tuple[str, ...], motion: MotionSettings | None) -> dict[str, Panel]:
    """The panels of a scan: those of `NEEDS` that are named, "channels" as channel_0, channel_1, ..."""
    panels = {}
    scored = None if shown.truth is None else shown.truth != UNLABELED
    for name in names:
        if name == "scan":
            panels[name] = Panel("scan", [])
        elif name == "truth":
            panels[name] = Panel("truth", moving_marks(shown.truth == MOVING), scored)
        elif name == "prediction":
            panels[name] = Panel("prediction", moving_marks(shown.predicted))
        elif name == "errors":
            panels[name] = Panel("errors", error_marks(shown.truth == MOVING, shown.predicted, scored), scored)
        elif name == "residual":
            panels[name] = Panel("strongest residual", residual_marks(shown.residual.max(1)))
        else:
            for k, channel in enumerate(shown.residual.T):
                ahead = f", {k} scan{'s' if k > 1 else ''} ahead" if motion.form == "published" and k else ""
                panels[f"channel_{k}"] = Panel(f"channel {k}{ahead}", residual_marks(channel))
    return panels


def _panel_names(asked: list[str] | None, known: set[str]) -> tuple[str, ...]:
    """What the pictures show: what is asked for, else what labels and predictions allow."""
    if asked is None:
        usual = [name for name in ("truth", "prediction", "errors") if known.issuperset(NEEDS[name])]
        return tuple(usual or ["scan"])
    for name in asked:
        if name not in NEEDS:
            raise InputError(f"--panels: no panel '{name}'; there are {', '.join(NEEDS)}")
        lacking = [need for need in NEEDS[name] if need not in known]
        if lacking:
            raise InputError(f"--panels {name}: needs {' and '.join(lacking)}, which are not known for all sequences")
    return tuple(asked)


def draw(
    drive: Drive, shown: Shown, names: tuple[str, ...], motion: MotionSettings | None, extent: float, size: int
) -> Image:
    """The picture of a scan: its panels, and the trajectory where the poses are known."""
    panels = list(panels_of(shown, names, motion).values())
    title, trajectory = f"sequence {drive.source.name}, scan {shown.frame}", None
    if "errors" in names and shown.moving_iou is not None:
        title += f":  moving IoU {100 * shown.moving_iou:.1f} %"
    if drive.poses is not None:
        trajectory = (np.linalg.inv(drive.poses[shown.index]) @ drive.poses)[:, :2, 3]
    return panels_picture(shown.points, panels, title, extent, size, trajectory, shown.index)


# --- the rerun viewer


class Rerun:
    """Drives as rerun recordings, one each: for the viewer, which is started, or as a file.

    Args:
        file: The .rrd; None: the viewer.
        names: What is shown of a scan beside its points.
        motion: The motion channels, where they are shown.
    """

    def __init__(self, file: Path | None, names: tuple[str, ...], motion: MotionSettings | None) -> None:
        try:
            import rerun
        except ImportError:
            raise InputError(f"the viewer needs rerun: {EXTRA}") from None
        self.rerun, self.names, self.motion = rerun, names, motion
        self.file, self.recording = file, None
        self.temporary = None if file is None else file.with_name(f".{file.name}.{os.getpid()}.part")

    def __enter__(self) -> Rerun:
        return self

    def begin(self, drive: Drive) -> None:
        """Start the recording of a drive: what does not change, and how it is laid out."""
        rerun, source = self.rerun, drive.source
        if self.recording is not None:
            self.recording.disconnect()
        self.stamps = source.stamps()
        self.recording = rerun.RecordingStream("kdmos")
        try:
            if self.file is None:
                self.recording.spawn()
            else:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.recording.save(self.temporary)
        except RuntimeError as error:  # rerun's own, of any kind
            raise InputError(f"{self.file or 'the rerun viewer'}: {error}") from error
        self.recording.send_recording_name(f"sequence {source.name}")
        self.recording.send_blueprint(self._blueprint())
        self._log("world", rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        if drive.poses is not None:
            path = [drive.poses[:, :3, 3]]
            line = rerun.LineStrips3D(path, colors=picture.rgb(picture.TRAJECTORY), radii=rerun.Radius.ui_points(1.5))
            self._log("world/trajectory", line, static=True)
        for entity, name, colour in CURVES:
            self._log(entity, rerun.SeriesLines(colors=picture.rgb(colour), names=name), static=True)

    def add(self, drive: Drive, shown: Shown) -> None:
        """Log a scan."""
        rerun = self.rerun
        self.recording.set_time("frame", sequence=shown.frame)
        if self.stamps is not None:
            stamp = float(self.stamps[shown.index])
            self.recording.set_time("stamp", **({"timestamp": stamp} if stamp > EPOCH else {"duration": stamp}))
        if drive.poses is not None:
            pose = drive.poses[shown.index]
            self._log("world/lidar", rerun.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3]))
        finite = np.isfinite(shown.points[:, :3]).all(1)
        grey = np.round(255 * picture.brightness(shown.points[finite, 2])).astype(np.uint8)
        self._log_points("scan", shown.points[finite], np.repeat(grey[:, None], 3, axis=1), 1.0)
        # Only the points that something is said of, larger, over the scan: a copy of it for each would be ten times
        # the data.
        for name, panel in panels_of(shown, self.names, self.motion).items():
            rows, colours = picture.mixed(panel.marks)
            kept = finite[rows]
            self._log_points(name, shown.points[rows[kept]], colours[kept], 2.5)
        truth = None if shown.truth is None else np.count_nonzero(shown.truth == MOVING)
        predicted = None if shown.predicted is None else np.count_nonzero(shown.predicted)
        for (entity, *_), value in zip(CURVES, (truth, predicted, shown.moving_iou)):
            if value is not None:
                self._log(entity, rerun.Scalars(value))

    def _log(self, entity: str, content, static: bool = False) -> None:
        self.recording.log(entity, content, static=static)

    def _log_points(self, name: str, points: np.ndarray, colours: np.ndarray, radius: float) -> None:
        radii = self.rerun.Radius.ui_points(radius)
        self._log(f"world/lidar/{name}", self.rerun.Points3D(points[:, :3], colors=colours, radii=radii))

    def _blueprint(self):
        """A view for each thing that is shown, the telling one first; below them the curves over the scans."""
        import rerun.blueprint as layout

        from_behind = layout.EyeControls3D(position=(-25, 0, 14), look_target=(8, 0, 0), eye_up=(0, 0, 1))
        panels = layout.SelectionPanel(state="collapsed"), layout.TimePanel(state="collapsed")

        def view(name: str, origin: str, *entities: str, hidden: tuple[str, ...] = ()):
            return layout.Spatial3DView(
                name=name,
                origin=origin,
                contents=["world/trajectory", "world/lidar/scan", *(f"world/lidar/{entity}" for entity in entities)],
                overrides={f"world/lidar/{entity}": layout.EntityBehavior(visible=False) for entity in hidden},
                background=picture.rgb(picture.PAGE)[0],
                eye_controls=from_behind if origin == "world/lidar" else None,
            )

        order = [name for name in ("errors", "prediction", "truth", "residual") if name in self.names]
        tabs = [view(name, "world/lidar", name) for name in order if name != "residual"]
        if self.motion is not None:
            channels = tuple(f"channel_{k}" for k in range(self.motion.num_channels))
            tabs.append(view("residual", "world/lidar", "residual", *channels, hidden=channels))
        tabs.append(view("from a fixed point", "world", *order[:1]))
        if not {"truth", "prediction"} & set(self.names):
            return layout.Blueprint(layout.Tabs(*tabs), *panels)
        curves = [layout.TimeSeriesView(name="moving points", origin="moving")]
        if "errors" in self.names:
            curves.append(layout.TimeSeriesView(name="moving IoU", origin="iou"))
        shown = layout.Vertical(layout.Tabs(*tabs), layout.Horizontal(*curves), row_shares=[4, 1])
        return layout.Blueprint(shown, *panels)

    def __exit__(self, kind, *_) -> None:
        if self.recording is None:
            return
        self.recording.disconnect()  # waits until all is written
        if self.file is None:
            return
        if kind is None:
            self.temporary.replace(self.file)
        else:
            self.temporary.unlink(missing_ok=True)


# --- the film


class Film:
    """Pictures one after the other as .mp4 (H.264) or .gif, written whole or not at all.

    Args:
        file: By its suffix.
        fps: Pictures a second.
    Raises: InputError for another suffix, or if what writes it is missing.
    """

    def __init__(self, file: Path, fps: float) -> None:
        self.file, self.fps, self.images, self.writer = file, fps, [], None
        self.temporary = file.with_name(f".{file.stem}.{os.getpid()}.part{file.suffix}")
        if file.suffix not in (".mp4", ".gif"):
            raise InputError(f"--film {file}: expected a name that ends in .mp4 or .gif")
        if file.suffix == ".mp4":
            try:
                import imageio_ffmpeg  # noqa: F401
                from imageio.v2 import get_writer
            except ImportError:
                raise InputError(f"films as .mp4 need imageio and imageio-ffmpeg: {EXTRA}") from None
            self.open = get_writer

    def __enter__(self) -> Film:
        return self

    def append(self, image: Image) -> None:
        if self.file.suffix == ".gif":
            self.images.append(picture.flat(image))
            return
        if self.writer is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.writer = self.open(self.temporary, fps=self.fps, codec="libx264", quality=7, macro_block_size=2)
        self.writer.append_data(np.asarray(image))

    def __exit__(self, kind, *_) -> None:
        if self.writer is not None:
            self.writer.close()
        if kind is not None:
            self.temporary.unlink(missing_ok=True)
        elif self.writer is not None:
            self.temporary.replace(self.file)
        elif self.images:
            content = io.BytesIO()
            first, *rest = self.images
            first.save(content, "gif", save_all=True, append_images=rest, duration=1000 / self.fps, loop=0)
            write_atomic(self.file, content.getvalue())


# --- the command


def view(
    source: Source,
    predictions: Predictions = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Predict on the way instead: a model, as for kdmos predict.")
    ] = None,
    sequences: Sequences = None,
    topic: Topic = None,
    sensor: Sensor = None,
    frames: Annotated[
        str | None, typer.Option(help="A:B, from frame number A to before B; A: and :B are open; A is one frame.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write a .rrd for the rerun viewer instead of opening it.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Folder for a PNG of each scan.")] = None,
    film: Annotated[Path | None, typer.Option(help="Write a film, .mp4 or .gif.")] = None,
    map: Annotated[
        Path | None, typer.Option(help="Write a PNG of the whole drive from above, with and without what moves.")
    ] = None,
    panels: Annotated[
        str | None, typer.Option(help=f"What pictures and films show, of {', '.join(NEEDS)}; by default what is known.")
    ] = None,
    extent: Annotated[float, typer.Option(help="Half the side of the square shown in pictures, metres.")] = 40.0,
    size: Annotated[int, typer.Option(min=100, max=4000, help="Side of a panel, pixels.")] = 600,
    fps: Annotated[float, typer.Option(min=0.1, max=100, help="Scans a second of the film.")] = 10.0,
    device: Annotated[str, typer.Option(help="For --checkpoint: auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> int:
    """Show scans from all sides in the rerun viewer, or from above in pictures and films.

    Labels, poses and stamps are shown where the source has them. Without --save, --pictures, --film or --map the
    viewer opens. A scan that cannot be shown is listed and the rest goes on; the exit code is then 1.
    """
    in_viewer = not (save or pictures or film or map)
    if in_viewer and not _has_display():
        raise InputError(
            "no display to open the viewer on; choose --save FILE.rrd (open it elsewhere with rerun FILE.rrd), "
            "--pictures FOLDER, --film FILE.mp4 or --map FILE.png"
        )
    if predictions is not None and checkpoint is not None:
        raise InputError("PREDICTIONS and --checkpoint exclude each other: predictions are read, or made on the way")
    if predictions is not None and sensor is not None:
        raise InputError("PREDICTIONS and --sensor exclude each other: predictions know what they were made with")
    for option, file, suffix in (("--save", save, ".rrd"), ("--map", map, ".png")):
        if file is not None and file.suffix != suffix:
            raise InputError(f"{option} {file}: expected a name that ends in {suffix}")
    if panels is not None and not (pictures or film):
        raise InputError("--panels says what --pictures and --film show, so it needs one of them")
    if not 0 < extent < math.inf:
        raise InputError(f"--extent {extent}: expected metres, more than 0")
    if pictures or film or map:
        need_matplotlib("view")

    names = listed(sequences, "--sequences")
    if predictions is None:
        profile = SensorProfile() if sensor is None else load_profile(sensor)
        found = open_sources(source, names, topic, profile.remission_scale)
    else:
        found = predicted_sources(source, names, predictions, topic)
        profile = profile_of(read_manifest(predictions))
    if (save or map) and len(found) > 1:
        there = ", ".join(one.name for one in found)
        raise InputError(f"--save and --map are of one sequence; name it with --sequences, one of {there}")
    drives = _drives(found, frames)
    known = {"predictions"} if predictions is not None or checkpoint is not None else set()
    if all(drive.source.has_labels for drive in drives):
        known.add("labels")
    if all(drive.poses is not None for drive in drives):
        known.add("poses")
    if map is not None and ("poses" not in known or not known & {"labels", "predictions"}):
        raise InputError(f"--map {map}: needs poses, and predictions or labels to say what moves")
    if checkpoint is not None and "poses" not in known:
        raise InputError(
            f"--checkpoint {checkpoint}: needs poses, which are not known for all sequences; kdmos predict finds them, "
            "and what it writes is shown as PREDICTIONS"
        )
    flat = _panel_names(listed(panels, "--panels"), known) if pictures or film else ()
    in_3d = tuple(name for name in NEEDS if name != "scan" and known.issuperset(NEEDS[name]))
    in_3d = in_3d if save or in_viewer else ()

    where = choose_device(device)
    model = None if checkpoint is None else prepared(load_model(checkpoint, where))
    motion = None
    if {"residual", "channels"} & {*flat, *in_3d}:
        # what the model sees, else the published channels; a teacher sees none
        settings = None if model is None else model.settings
        motion = getattr(settings, "motion", None) or MotionSettings()
    scans = partial(
        shown_scans,
        labels="labels" in known,
        predictions=predictions,
        model=model,
        motion=motion,
        device=where,
        profile=profile,
    )

    lost, done = [], 0
    with ExitStack() as outputs:
        viewer = outputs.enter_context(Rerun(save, in_3d, motion)) if save or in_viewer else None
        writer = outputs.enter_context(Film(film, fps)) if film else None
        bar = outputs.enter_context(Bar("view", sum(len(drive.frames) for drive in drives)))
        for drive in drives:
            name, width = drive.source.name, drive.source.width
            if viewer:
                viewer.begin(drive)
            if map:
                rows = [drive.source.frames.index(frame) for frame in drive.frames]
                canvas = DriveMap(drive.poses[rows], extent, 2 * size)
            for frame, shown in zip(drive.frames, scans(drive)):
                bar.advance()
                if isinstance(shown, InputError):
                    lost.append(f"{drive.source.scan(frame)}: {shown}")
                    continue
                done += 1
                if viewer:
                    viewer.add(drive, shown)
                if flat:
                    image = draw(drive, shown, flat, motion, extent, size)
                if pictures:
                    write_atomic(pictures / f"{name}_{frame:0{width}d}.png", picture.png(image), durable=False)
                if writer:
                    writer.append(image)
                if map:
                    moving = shown.truth == MOVING if shown.predicted is None else shown.predicted
                    canvas.add(shown.points, drive.poses[shown.index], moving)
            if map:
                title = f"sequence {name}, scans {drive.frames[0]} to {drive.frames[-1]}"
                write_atomic(map, picture.png(canvas.picture(title)))
        if not done:
            raise InputError(f"no scan could be shown; {lost[0]}")
    for output in filter(None, (save, pictures, film, map)):
        print(f"{output}: {done} scan{'s' if done > 1 else ''}")
    for line in lost:
        print(f"not shown: {line}", file=sys.stderr)
    return 1 if lost else 0


def _has_display() -> bool:
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _drives(found: list[ScanSource], frames: str | None) -> list[Drive]:
    """The frames to show of each source; sources without one of them are left out."""
    match = re.fullmatch(r"(\d*):(\d*)|(\d+)", "0:" if frames is None else frames.strip())
    if match is None:
        raise InputError(f"--frames '{frames}': expected A:B, A:, :B or A, such as 100:200")
    first, last, single = match.groups()
    low = int(single or first or 0)
    high = low + 1 if single else int(last) if last else None
    drives = []
    for source in found:
        chosen = tuple(frame for frame in source.frames if frame >= low and (high is None or frame < high))
        if chosen:
            drives.append(Drive(source, chosen, source.poses() if source.has_poses else None))
    if not drives:
        there = "; ".join(f"{one.name} has {one.frames[0]} to {one.frames[-1]}" for one in found)
        raise InputError(f"--frames {frames}: no scan has such a number; sequence {there}")
    return drives


def main(argv: list[str] | None = None) -> None:
    run(view, "view", argv)


if __name__ == "__main__":
    main()
