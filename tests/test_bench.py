"""The bench command: what it measures, prints and writes."""

import csv

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
