"""`kdmos export`: a student as a file that other runtimes take, checked against the student it was made from."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from torch.export import Dim

from kdmos.card import write_card
from kdmos.checkpoint import FORMAT, HEADER, write_atomic
from kdmos.command import run
from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.source import ScanSource
from kdmos.data.synthetic.lidar import load_sensor
from kdmos.data.synthetic.sequence import SyntheticSequence
from kdmos.errors import InputError
from kdmos.inference import sequence_logits
from kdmos.models import SHIPPED, Rule, Student, Teacher, header_of, load_model
from kdmos.models.exportable import ExportableStudent, OneScan, onnx_inputs
from kdmos.models.fast import FastStudent
from kdmos.ops import native

OPSET = 18  # the first whose ScatterElements takes a maximum
SAME = 0.9999  # share of the points whose class the file must give as kdmos does
SENSOR = "hdl64"  # of the scans made for the check
INPUTS = {  # of the ONNX file -> how many rows it has
    "features": "num_points",
    "residual": "num_points",
    "cell_rank": "num_points",
    "cells": "num_cells",
    "height": "num_points",
}

# points [N, 4] and residual [N, K] -> logits [N, C]
Logits = Callable[[Tensor, Tensor], Tensor]


def onnx_bytes(student: Student) -> bytes:
    """An ONNX file of a student, `ExportableStudent`; the header is JSON under the metadata key "kdmos"."""
    points, residual = _example(student)
    module, example = ExportableStudent(student), onnx_inputs(points, residual, student.settings.grid)
    sizes = {name: Dim(name, min=2) for name in INPUTS.values()}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own inner life
        program = torch.onnx.export(
            module,
            tuple(torch.from_numpy(example[name]) for name in INPUTS),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_shapes=tuple({0: sizes[name]} for name in INPUTS.values()),
            verbose=False,
        )
    model = program.model
    for node in model.graph:
        node.metadata_props.clear()  # where in whose folders each line of code stands
    model.metadata_props[HEADER] = _header(student)
    return program.model_proto.SerializeToString()


def torch_bytes(student: Student) -> bytes:
    """A student as `torch.export` saves it, `FastStudent` with the ops of kdmos as calls; the header is an extra file.

    Raises: InputError where the native ops are not built.
    """
    if not native.serves(student.head.weight):
        raise InputError(f"a .pt2 calls the compiled ops, and here {native.WHY_NOT or 'plain torch was chosen'}")
    points, residual = _example(student)
    num_points = Dim("num_points", min=2)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            OneScan(FastStudent(student)),
            (points, torch.tensor([0, len(points)]), residual),
            dynamic_shapes=({0: num_points}, None, {0: num_points}),
            strict=True,  # the other way takes len() of a tensor for a constant
        )
        sizes = set()
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # where in whose folders each line of code stands
            sizes.update(map(str, getattr(node.meta.get("val"), "shape", ())))
        for symbol in [symbol for symbol in program.range_constraints if str(symbol) not in sizes]:
            del program.range_constraints[symbol]  # left over from tracing twice; loading would warn of it
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={f"{HEADER}.json": _header(student)})
    return content.getvalue()


def _example(student: Student) -> tuple[Tensor, Tensor]:
    """A few points, for tracing."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(64, 4, generator=generator) * torch.tensor([20.0, 20.0, 1.0, 0.1])
    return points, torch.zeros(64, student.settings.motion.num_channels)


def _header(student: Student) -> str:
    return json.dumps({"format": FORMAT, **header_of(student, student.header)}, sort_keys=True)


def onnx_logits(path: Path, student: Student) -> Logits:
    """The ONNX file in onnxruntime, on the CPU."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def logits(points: Tensor, residual: Tensor) -> Tensor:
        (found,) = session.run(["logits"], onnx_inputs(points, residual, student.settings.grid))
        return torch.from_numpy(found)

    return logits


def torch_logits(path: Path, student: Student) -> Logits:
    """The .pt2 file in torch."""
    program = torch.export.load(path).module()
    return lambda points, residual: program(points, torch.tensor([0, len(points)]), residual)


# suffix -> how it is written, how it is run, and the libraries for that
FORMATS = {
    ".onnx": (onnx_bytes, onnx_logits, ("onnx", "onnxscript", "onnxruntime")),
    ".pt2": (torch_bytes, torch_logits, ()),
}


class Comparison:
    """A student that asks its exported file too, and counts where they agree. For `sequence_logits`."""

    def __init__(self, student: Student, exported: Logits) -> None:
        self.student, self.exported, self.settings = FastStudent(student), exported, student.settings
        self.scans = self.points = self.same = 0
        self.difference = 0.0  # the largest of two logits

    def __call__(self, points: Tensor, offsets: Tensor, residual: Tensor):
        output = self.student(points, offsets, residual)
        ours, theirs = output.point_logits, self.exported(points, residual)
        self.scans += 1
        self.points += len(points)
        self.same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        self.difference = max(self.difference, float((ours - theirs).abs().max()))
        return output


class MadeUpScans(ScanSource):
    """A synthetic drive that is nowhere written."""

    has_poses = True

    def __init__(self, num_scans: int) -> None:
        self.name, self.frames = f"a synthetic street ({SENSOR})", tuple(range(num_scans))
        self.drive = SyntheticSequence(0, 0, num_scans, load_sensor(SENSOR))

    def read_points(self, frame: int) -> np.ndarray:
        return self.drive.scan(frame).points

    def poses(self) -> np.ndarray:
        return self.drive.poses()

    def where(self, frame: int) -> str:
        return f"scan {frame} of {self.name}"


def compare(student: Student, exported: Logits, source: ScanSource, num_scans: int) -> Comparison:
    """The student and its exported file on scans from the middle of a source, which have all their neighbours there.

    Raises: InputError if a scan cannot be read.
    """
    comparison = Comparison(student, exported)
    total, settings = len(source.frames), student.settings
    spare = total - settings.history - settings.lookahead - num_scans
    first = settings.history + spare // 2 if spare >= 0 else max(0, (total - num_scans) // 2)
    skipped = frozenset(source.frames) - set(source.frames[first : first + num_scans])
    for _, result in sequence_logits(comparison, source, skip=skipped):
        if isinstance(result, InputError):
            raise result
    return comparison


def export(
    checkpoint: Annotated[str, typer.Argument(help="A student: .safetensors, the authors' .pt, or synthetic.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Its suffix says what: .onnx (the default), .pt2 (torch.export), .md (the card alone)."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Sequence folder with poses to check it on; else synthetic scans.")
    ] = None,
    scans: Annotated[int, typer.Option(min=1, help="How many scans to check it on.")] = 3,
) -> int:
    """Write a student as ONNX or as a torch.export program, and its card beside it.

    The written file is then run on scans beside the student itself; the exit code is 1 if they disagree about the
    class of more than one point in 10,000. What the file takes and gives: docs/deployment.md.
    """
    student = load_model(checkpoint)
    if isinstance(student, Rule):
        raise InputError("rule: has no network to export; it counts the non-zero motion channels of a point")
    if isinstance(student, Teacher):
        raise InputError(f"{checkpoint}: a {student.settings.name} teacher; kdmos export takes students")
    name = Path(checkpoint).stem
    card = SHIPPED[checkpoint].with_suffix(".md").read_text() if checkpoint in SHIPPED else None
    output = output or Path(f"{name}.onnx")
    if output.suffix == ".md":
        print(write_card(output, student, name, text=card))
        return 0
    if output.suffix not in FORMATS:
        raise InputError(f"--output {output}: ends in none of {', '.join(FORMATS)} and .md")
    write, read, libraries = FORMATS[output.suffix]
    for library in libraries:
        if find_spec(library) is None:
            raise InputError(f"{library} is not installed, and {output.suffix} needs it: pip install 'kdmos[export]'")
    if check is None:
        source = MadeUpScans(student.settings.history + scans + student.settings.lookahead)
    else:
        source = find_sequences(check)[0]
        source.poses()  # what can be wrong with them, before the work
    write_atomic(output, write(student))
    print(f"{output}: a {student.settings.name} student, {output.stat().st_size / 1e6:.1f} MB")
    print(write_card(output.with_suffix(".md"), student, name, text=card))
    found = compare(student, read(output, student), source, scans)
    share = found.same / found.points
    print(
        f"checked on {found.scans} of the scans of {source.name}, {found.points} points: the same class for "
        f"{share:.4%}, largest difference of two logits {found.difference:.2g}"
    )
    if share < SAME:
        print(f"{output}: differs from the student for more than one point in 10,000: do not use it", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> None:
    run(export, "export", argv)


if __name__ == "__main__":
    main()
