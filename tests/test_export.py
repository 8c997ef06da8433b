"""Exporting as a user does it: the file gives the student's answers elsewhere, and says what it is."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from kdmos import export
from kdmos.card import MARK
from kdmos.data.semantic_kitti import find_sequences
from kdmos.models import build_student, build_teacher, load_student, save_model
from kdmos.models.exportable import onnx_inputs
from kdmos.models.fast import FastStudent
from kdmos.ops import native
from kdmos.settings import MotionSettings, PolarGrid

pytestmark = pytest.mark.usefixtures("one_thread")
needs_native = pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")

GRID = PolarGrid(bins=(48, 34, 8))
STUDENTS = {
    "kdmos": {"num_classes": 4, "motion": MotionSettings(lookahead=3)},
    "motionbev": {"num_classes": 2, "motion": MotionSettings("causal", 6)},
}


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        export.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_sequence):
    return write_sequence(tmp_path_factory.mktemp("data") / "00", frames=14)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, stirred):
    """checkpoint("kdmos") -> file of a student."""
    folder = tmp_path_factory.mktemp("students")

    def make(name: str):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            student = stirred(build_student(name, grid=GRID, **STUDENTS[name]))
            save_model(path, student, seed=5, metrics={"moving_iou": 0.25})
        return path

    return make


@pytest.fixture(scope="module")
def exported(checkpoint, data, tmp_path_factory):
    """exported("kdmos", ".onnx") -> the file that the command makes of it, and what it prints; once each."""
    made = {}

    def make(name: str, suffix: str):
        if (name, suffix) not in made:
            output, printed = tmp_path_factory.mktemp("exported") / "new" / f"student{suffix}", io.StringIO()
            with contextlib.redirect_stdout(printed):
                assert run(checkpoint(name), "--output", output, "--check", data, "--scans", 2) == 0
            made[name, suffix] = output, printed.getvalue()
        return made[name, suffix]

    return make


def scan(num_points, num_channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num_points, 4, generator=generator) * torch.tensor([20.0, 20.0, 1.0, 0.1])
    return points, torch.randn(num_points, num_channels, generator=generator).relu()


@pytest.mark.parametrize("name", STUDENTS)
def test_onnx(name, checkpoint, exported):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    (output, printed), student = exported(name, ".onnx"), load_student(checkpoint(name))
    assert f"{output}: a {name} student" in printed
    assert "checked on 2 of the scans of 00, " in printed and " the same class for 100.0000%" in printed

    # 1) what it says about itself
    model = onnx.load(output)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    about = json.loads({p.key: p.value for p in model.metadata_props}["kdmos"])
    settings, channels = student.settings, student.settings.motion.num_channels
    assert (about["model"], about["classes"], about["moving"]) == (name, list(student.classes), student.moving)
    assert about["motion"]["form"] == settings.motion.form and about["motion"]["lookahead"] == settings.lookahead
    assert about["grid"]["bins"] == [48, 34, 8] and about["seed"] == 5 and about["format"] == 1
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "features": ["num_points", 9],
        "residual": ["num_points", channels],
        "cell_rank": ["num_points"],
        "cells": ["num_cells"],
        "height": ["num_points"],
        "logits": ["num_points", len(student.classes)],
    }
    # 2) in operations that runtimes have
    reductions = {
        (node.op_type, attribute.s) for node in model.graph.node for attribute in node.attribute
        if attribute.name == "reduction" and attribute.s != b"none"
    }  # fmt: skip
    assert reductions == {("ScatterElements", b"max")}
    assert not {node.op_type for node in model.graph.node} & {"GridSample", "Loop", "If", "NonZero", "Unique"}
    assert str(Path(export.__file__).parent).encode() not in output.read_bytes()
    # 3) scans of any size, one point among them
    session, fast = runtime.InferenceSession(str(output), providers=["CPUExecutionProvider"]), FastStudent(student)
    for num_points in (1500, 2, 1):
        points, residual = scan(num_points, channels)
        (found,) = session.run(["logits"], onnx_inputs(points, residual, GRID))
        expected = fast(points, torch.tensor([0, num_points]), residual).point_logits
        # onnxruntime computes sigmoid and softmax by approximations of its own
        assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)
    card = output.with_suffix(".md").read_text()
    assert card.startswith(f"# {name}\n") and "| moving | 0.250 |" in card


@needs_native
def test_torch_export(checkpoint, exported):
    (output, printed), student = exported("kdmos", ".pt2"), load_student(checkpoint("kdmos"))
    assert "checked on 2 of the scans of 00, " in printed and " the same class for 100.0000%" in printed
    said = {"kdmos.json": ""}
    program = torch.export.load(output, extra_files=said)
    assert json.loads(said["kdmos.json"])["classes"] == list(student.classes)
    calls = {str(node.target) for node in program.graph.nodes}
    assert {"kdmos.polar_grid.default", "kdmos.wrap_around.default", "kdmos.voxel_head.default"} <= calls
    assert not any("mkldnn" in call for call in calls)  # which other machines may not have
    for num_points in (1500, 2, 1):
        points, residual = scan(num_points, student.settings.motion.num_channels)
        offsets = torch.tensor([0, num_points])
        expected = FastStudent(student)(points, offsets, residual).point_logits
        assert_close(program.module()(points, offsets, residual), expected)


@needs_native
def test_a_torch_program_runs_on_its_own(exported):
    """Where nothing of kdmos is imported but its ops; and without a word on the way."""
    output, _ = exported("kdmos", ".pt2")
    code = f"""
import sys, torch, kdmos.ops
torch.set_num_threads(1)
program = torch.export.load({str(output)!r}).module()
print(tuple(program(torch.rand(30, 4), torch.tensor([0, 30]), torch.zeros(30, 8)).shape), "kdmos.models" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(30, 4) False"
    assert done.stderr == ""


def pretend(monkeypatch, suffix, write=lambda student: b"file", read=None):
    monkeypatch.setitem(export.FORMATS, suffix, (write, read, ()))


def test_a_file_that_answers_otherwise_is_refused(checkpoint, data, tmp_path, monkeypatch, capsys):
    student = FastStudent(load_student(checkpoint("kdmos")))

    def off_by(share):
        def logits(points, residual):
            right = student(points, torch.tensor([0, len(points)]), residual).point_logits
            wrong = torch.arange(len(points)) < share * len(points)
            return torch.where(wrong[:, None], -right, right)

        return lambda path, student: logits

    pretend(monkeypatch, ".onnx", read=off_by(0.001))
    arguments = (checkpoint("kdmos"), "--output", tmp_path / "student.onnx", "--check", data)
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert "the same class for 99.8" in captured.out or "the same class for 99.9" in captured.out
    assert "differs from the student for more than one point in 10,000" in captured.err
    pretend(monkeypatch, ".onnx", read=off_by(0))
    assert run(*arguments) == 0


def test_scans_are_made_where_none_are_named(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "SENSOR", "small")
    seen = []

    def read(path, student):
        fast = FastStudent(student)

        def logits(points, residual):
            seen.append((residual != 0).any(0))
            return fast(points, torch.tensor([0, len(points)]), residual).point_logits

        return logits

    pretend(monkeypatch, ".pt2", read=read)
    assert run(checkpoint("kdmos"), "--output", tmp_path / "student.pt2", "--scans", 2) == 0
    printed = capsys.readouterr().out
    assert "2 of the scans of a synthetic street (small), " in printed and "the same class for 100.0000%" in printed
    # look-ahead 3: the first four channels of whole windows, the others 0
    assert [channels.tolist() for channels in seen] == [[True] * 4 + [False] * 4] * 2


@pytest.mark.parametrize(("count", "expected"), [(1, [8]), (3, [7, 8, 9]), (5, [4, 5, 6, 7, 8]), (20, range(14))])
def test_the_scans_with_all_their_neighbours_come_first(count, expected, checkpoint, data):
    """7 scans before and 3 after: of 14 these are 7 to 10."""
    student, (sequence,) = load_student(checkpoint("kdmos")), find_sequences(data)
    asked = []

    def logits(points, residual):
        asked.append(len(points))
        return torch.zeros(len(points), 4)

    found = export.compare(student, logits, sequence, count)
    assert asked == [sequence.num_points(frame) for frame in expected]
    assert (found.scans, found.points) == (len(expected), sum(asked))


def test_a_bad_scan_ends_the_check(checkpoint, write_sequence, tmp_path, monkeypatch, capsys):
    folder = write_sequence(tmp_path / "00", frames=12)
    (folder / "velodyne" / "000007.bin").write_bytes(b"short")
    pretend(monkeypatch, ".onnx", read=lambda path, student: lambda *scan: torch.zeros(len(scan[0]), 4))
    assert run(checkpoint("kdmos"), "--output", tmp_path / "a.onnx", "--check", folder) == 2
    assert "000007.bin" in capsys.readouterr().err


def test_the_card_alone_and_one_that_is_ours_no_more(checkpoint, tmp_path, capsys):
    card = tmp_path / "student.md"
    assert run(checkpoint("kdmos"), "--output", card) == 0
    assert capsys.readouterr().out == f"{card}: its card\n"
    assert "look-ahead | 3 scans: an answer comes 0.3 s late at 10 Hz" in card.read_text()
    card.write_text(card.read_text().replace(MARK, "mine"))
    assert run(checkpoint("kdmos"), "--output", card) == 0
    assert "left as it is" in capsys.readouterr().out and card.read_text().rstrip().endswith("mine")


def test_what_cannot_be_exported_is_one_line(checkpoint, data, tmp_path, monkeypatch, capsys):
    def error(*arguments) -> str:
        assert run(*arguments) == 2
        captured = capsys.readouterr().err
        assert len(captured.strip().splitlines()) == 1
        return captured

    teacher = tmp_path / "teacher.safetensors"
    widths = {"encoder_depths": (1, 1), "encoder_channels": (8, 16), "decoder_depths": (1,), "decoder_channels": (8,)}
    save_model(teacher, build_teacher(**widths))
    monkeypatch.chdir(tmp_path)
    assert "rule: has no network to export" in error("rule")
    assert f"{teacher}: a mambamos teacher; kdmos export takes students" in error(teacher)
    assert "no such checkpoint file" in error(tmp_path / "none.pt")
    student = checkpoint("kdmos")
    assert "--output a.trt: ends in none of .onnx, .pt2 and .md" in error(student, "--output", "a.trt")
    assert "--scans" in error(student, "--scans", 0)
    assert str(tmp_path / "none") in error(student, "--check", tmp_path / "none")
    with native.backend("reference"):
        assert "a .pt2 calls the compiled ops" in error(student, "--output", "a.pt2", "--check", data)
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert "onnxscript is not installed, and .onnx needs it: pip install 'kdmos[export]'" in error(student)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher.safetensors"]


def test_the_shipped_student_keeps_its_card(tmp_path, capsys):
    """It says what no header does: what it was trained on, under which licence."""
    assert run("synthetic", "--output", tmp_path / "card.md") == 0
    card = (tmp_path / "card.md").read_text()
    assert "trained on | synthetic scans alone" in card and "MIT" in card
    assert run("synthetic", "--output", tmp_path / "card.md") == 0
    assert (tmp_path / "card.md").read_text() == card
