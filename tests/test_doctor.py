"""The doctor's findings on this machine, and on machines that lack something."""

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdmos import __version__, doctor
from kdmos.ops import native


def run_main(*arguments):
    """Exit code of the command."""
    with pytest.raises(SystemExit) as exit:
        doctor.main(list(arguments))
    return exit.value.code


def by_name(findings):
    return {row.what: row for row in findings}


def test_this_machine():
    rows = by_name(doctor.examine())
    assert rows["kdmos"].found == __version__
    assert rows["torch"].found.startswith(torch.__version__)
    built = r"for cpu.*; (AVX.*|NEON|baseline) \(-march=.+\), compiler \d"
    assert re.match(built if native.BUILT else "none .*plain torch is used", rows["native ops"].found)
    assert rows["pytest"].state == "ok"
    assert re.search(r"AVX-512 (yes|no), bf16 (yes|no|not known)$", rows["cpu instructions"].found)
    assert {row.state for row in rows.values()} <= set(doctor.STYLES)
    assert all(row.todo for row in rows.values() if row.state != "ok")


def test_json_and_exit_code(capsys):
    assert run_main("--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["works"] is True and err == ""
    assert {"what", "state", "found", "todo"} == set(report["findings"][0])


def test_a_missing_library_names_its_extra(monkeypatch, capsys):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    rows = by_name(doctor.examine())
    assert rows["matplotlib"].state == "missing" and rows["matplotlib"].todo == "pip install 'kdmos[train]'"
    assert run_main() == 0  # nothing that kdmos cannot do without
    assert "'kdmos[train]'" in capsys.readouterr().out


def test_extras_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    listed = {}
    for extra, lines in extras.items():
        for line in lines:
            listed.setdefault(re.match(r"[\w-]+", line)[0], extra)  # the first one that brings it
    del listed["kdmos"]  # extras of extras
    assert {name: extra for name, (extra, _) in doctor.OPTIONAL.items()} == listed


def test_torch_that_cannot_compute(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(torch, "tensor", fail)
    assert run_main() == 1
    assert "illegal instruction" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(torch, "tensor", lambda _: torch.zeros(2, 2))
    row = by_name(doctor.examine())["torch"]
    assert row.state == "broken" and "came out as" in row.found


def test_torch_that_cannot_be_imported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run_main("--json") == 1
    report = json.loads(capsys.readouterr().out)
    states = {row["what"]: row["state"] for row in report["findings"]}
    assert report["works"] is False and states["torch"] == "broken" and states["pytest"] == "ok"


def test_an_old_torch(monkeypatch):
    for version, state in (("2.9.1+cu128", "note"), ("2.10.0", "ok"), ("3.0.0a0+git1", "ok")):
        monkeypatch.setattr(torch, "__version__", version)
        assert doctor._torch(torch).state == state


def test_gpus(monkeypatch):
    def machine(cuda, names=()):
        devices = SimpleNamespace(
            is_available=lambda: bool(names), device_count=lambda: len(names), get_device_name=lambda i: names[i]
        )
        return SimpleNamespace(cuda=devices, version=SimpleNamespace(cuda=cuda))

    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert doctor._gpu(machine("13.0", ["A", "B"])) == doctor.Finding("gpu", "ok", "A, B")
    assert "nvidia-smi" in doctor._gpu(machine("13.0")).todo
    assert doctor._gpu(machine(None)).found == "none"
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert "CUDA build" in doctor._gpu(machine(None)).todo


@pytest.mark.skipif(not native.BUILT or torch.cuda.is_available(), reason="no native ops, or a GPU that runs them")
def test_cuda_ops_that_load_and_do_not_run(monkeypatch):
    monkeypatch.setattr(native, "DEVICES", frozenset({"cpu", "cuda"}))
    assert by_name(doctor.examine())["native ops"].state == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    row = doctor._native(torch)
    assert row.state == "broken" and "the CUDA ops do not run (" in row.found and "install" in row.todo


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "yet"))
    row = doctor._cache()
    assert row.found.startswith(str(tmp_path / "not" / "yet")) and "GB free" in row.found
    assert not (tmp_path / "not").exists()  # looking creates nothing
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
    assert doctor._cache().state == "note" and "free the disk" in doctor._cache().todo
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert "not writable" in doctor._cache().found


def test_a_system_without_proc(monkeypatch):
    def nothing(_):
        raise FileNotFoundError

    monkeypatch.setattr(doctor.Path, "read_text", nothing)
    model, flags = doctor._cpu_model()
    assert model and flags == set()
    assert doctor._instructions(torch, flags).found.endswith("bf16 not known")


@pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "the CUDA ops are not built"),
        ("no library", r"the CUDA ops do not load \(.*_cuda.so: (file too short|invalid ELF header)\)"),
        ("of another build", "the CUDA ops lack add_rows: they are of another build"),
    ],
)
def test_a_cuda_library_that_cannot_be_used(content, reason, tmp_path, monkeypatch):
    """In the linker's words, when it is loaded and in the row that says what to do."""
    package = tmp_path / "kdmos"
    (package / "ops").mkdir(parents=True)
    (package / "_C.so").touch()
    if content:
        (package / "_cuda.so").write_text(content)
    monkeypatch.setattr(native, "__file__", str(package / "ops/native.py"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if content == "of another build":
        monkeypatch.setattr(native, "registered", lambda key: {"add_rows", "mlp_max"} if key == "CPU" else set())
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    devices, why_not = native._load()
    assert devices == {"cpu"}
    assert re.fullmatch(reason, why_not), why_not
    monkeypatch.setattr(native, "DEVICES", devices)
    monkeypatch.setattr(native, "WHY_NOT", why_not)
    row = doctor._native(torch)
    assert row.state == "note" and why_not in row.found and "nvcc" in row.todo
