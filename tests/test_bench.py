"""The bench command: what it measures, prints and writes."""

import csv
import mmap

import pytest
import torch

from kdmos import bench

pytestmark = pytest.mark.filterwarnings("ignore:sequence .* has 2 scans")


def run_main(*arguments):
    with pytest.raises(SystemExit) as exit:
        bench.main(list(arguments))
    return exit.value.code


def test_one_benchmark_from_nothing(capsys):
    """Without a sequence the scans are made up."""
    assert run_main("--only", "wdcd_loss", "--rounds", "2", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "8 x 120 k points" in " ".join(printed.split())


def test_refuses_what_it_does_not_know(capsys):
    assert run_main("--only", "speed") == 2
    assert "--only speed: the benchmarks are height_residual" in capsys.readouterr().err


def test_rows_are_appended_under_one_header(tmp_path, monkeypatch):
    package = bench.benchmarks_package()
    rows = __import__(f"{package}.rows", fromlist=["rows"])
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    rows.append("op", {"case": "a", "ratio": 2.0})
    rows.append("op", {"case": "b", "ratio": 3.0})
    with open(tmp_path / "op.csv") as file:
        read = list(csv.DictReader(file))
    assert [row["case"] for row in read] == ["a", "b"]
    assert read[0]["torch"] == torch.__version__
    with pytest.raises(ValueError, match=r"op\.csv: has the columns"):
        rows.append("op", {"other": 1})


def test_a_stream_end_to_end(capsys, write_sequence, tmp_path):
    """Each precision that the machine computes in, at both paces; every scan is answered or skipped."""
    module = __import__(f"{bench.benchmarks_package()}.bench_stream", fromlist=["measure"])
    with mmap.mmap(-1, 500 << 20) as block:  # what was before is not the stream's peak
        block.write(b"1" * len(block))
    before = module.peak_of_process()
    found = list(
        module.measure(str(write_sequence(tmp_path / "00")), precisions=("float32",), scans=10, checkpoint="rule")
    )
    assert [row["pace"] for row in found] == list(module.PACES) and found[0]["count"] == 10
    for row in found:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["peak_mib"] > 50
        assert row["lookahead"] == 7 and row["scans"] == "00" and row["peak_mib"] < before - 100
        assert row["network_ms"] > 0 and row["residual_ms"] > 0
    assert found[0]["skipped"] == 0


def test_the_rows_of_a_stream_are_printed_and_kept(capsys, monkeypatch, tmp_path):
    package = bench.benchmarks_package()
    module, rows = (__import__(f"{package}.{name}", fromlist=["x"]) for name in ("bench_stream", "rows"))
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(
        module, "measure", lambda *_, scans, checkpoint: [{"checkpoint": checkpoint, "count": scans, "p50_ms": 1.5}]
    )
    assert run_main("--stream", "--scans", "7", "--append", "--device", "cpu", "--checkpoint", "mine") == 0
    printed = capsys.readouterr().out
    assert "1.5" in printed and "cpu" in printed and "mine, from raw scan" in printed
    with open(tmp_path / "stream.csv") as file:
        assert [row["count"] for row in csv.DictReader(file)] == ["7"]


def test_the_rows_of_a_stream_fit_a_terminal(capsys, monkeypatch):
    """Those of both precisions and paces, with all their figures, in 80 characters."""
    package = bench.benchmarks_package()
    module, rows = (__import__(f"{package}.{name}", fromlist=["x"]) for name in ("bench_stream", "rows"))
    with open(rows.RESULTS / "stream.csv") as file:
        found = [dict(list(row.items())[4:]) for row in csv.DictReader(file)][:4]
    monkeypatch.setattr(module, "measure", lambda *_, **__: found)
    monkeypatch.setenv("COLUMNS", "80")
    assert run_main("--stream") == 0
    printed = capsys.readouterr().out
    assert "…" not in printed and all(row[key] in printed for row in found for key in ("p50_ms", "p99_ms", "peak_mib"))


@pytest.mark.parametrize(
    "given",
    [("--stream", "--only", "dysample"), ("--stream", "--rounds", "3"), ("--scans", "3"), ("--checkpoint", "a")],
)
def test_options_of_the_other_kind_are_refused(capsys, given):
    assert run_main(*given) == 2
    assert "--stream" in capsys.readouterr().err
