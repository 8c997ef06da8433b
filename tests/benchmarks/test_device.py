"""The staged run on a GPU machine: its driver on made-up stages, and what its stages compute from what they read."""

import csv
import itertools
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import device, device_ops, device_stages, profiling, rows, timing
from benchmarks.device import Stage
from kdmos.ops import native


def run(tmp_path, stages, budget=100.0):
    """(lines of the summary, whether all went well, the packed files)."""
    out = tmp_path / "out"
    summary, good = device.run_call("A", stages, budget, out, tmp_path / "staging", dict(device.os.environ))
    return summary.splitlines(), good, out


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_no_stage_is_fatal_to_the_next(tmp_path):
    stages = [
        Stage("fails", 20, 1, "echo began; echo oh no >&2; exit 3"),
        Stage("says", 20, 1, "echo 'found: 12 passed'; echo more"),
        Stage("has no gpu", 20, 1, "echo 'found: no GPU'; exit 77"),
        Stage("dies", 20, 1, "kill -SEGV $$"),
        Stage(
            "writes rows",
            20,
            1,
            'echo "a,b" > "$KDMOS_RESULTS/op.csv"; echo w > "$KDMOS_STAGING/keep/w.txt"',
        ),
        Stage("knows its time", 20, 1, 'echo "found: $KDMOS_SECONDS s"'),
    ]
    lines, good, out = run(tmp_path, stages)
    assert not good and len(lines) == 1 + len(stages)
    results = [line[:8].strip() for line in lines[1:]]
    assert results == ["failed", "ok", "no GPU", "failed", "ok", "ok"]
    assert "exit code 3: oh no" in lines[1] and "12 passed" in lines[2] and lines[6].endswith("20 s")
    assert sorted(path.name for path in out.iterdir()) == ["logs-A.tar.gz", "rows-A.tar.gz", "summary-A.txt", "w.txt"]
    assert (out / "summary-A.txt").read_text().splitlines()[1:] == lines[1:]
    assert members(out / "rows-A.tar.gz") == {"rows/op.csv": b"a,b\n"}
    assert b"began\noh no" in members(out / "logs-A.tar.gz")["logs/00-fails.log"]


def test_a_run_without_a_gpu_went_well(tmp_path):
    assert run(tmp_path, [Stage("a", 20, 1, "exit 77"), Stage("b", 20, 1, "true")])[1]


def test_a_stage_that_hangs_is_ended_with_all_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "LEAST", 0)
    monkeypatch.setattr(device, "GRACE", 0.3)
    mark = tmp_path / "mark"
    hangs = Stage("hangs", 1, 0, f"trap '' TERM; (sleep 1.7; touch {mark}) & echo 'found: half'; sleep 60")
    start = time.monotonic()
    lines, good, _ = run(tmp_path, [hangs, Stage("next", 20, 1, "echo 'found: reached'")])
    assert time.monotonic() - start < 3 and not good
    assert lines[1].startswith("timeout") and "half" in lines[1] and "reached" in lines[2]
    time.sleep(0.6)
    assert not mark.exists()


def test_tools_beside_the_path_are_found_after_those_on_it(tmp_path, monkeypatch):
    for version in (2024, 2025):
        (tmp_path / f"ncu-{version}").mkdir()
    monkeypatch.setattr(device, "TOOLS", (f"{tmp_path}/ncu-*", f"{tmp_path}/none"))
    monkeypatch.setattr(device, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "/bin")
    path = device.prepared_environment(tmp_path / "pack")["PATH"]
    assert path.split(":") == ["/bin", f"{tmp_path}/ncu-2025", f"{tmp_path}/ncu-2024"]


def test_everything_is_packed_after_every_stage(tmp_path):
    seen = [Stage(f"number {i}", 20, 1, f"cat {tmp_path}/out/summary-A.txt 2>/dev/null; true") for i in range(3)]
    out = run(tmp_path, seen)[2]
    logs = members(out / "logs-A.tar.gz")
    assert b"number 0" not in logs["logs/00-number-0.log"].split(b"\n", 1)[1]
    assert b"number 1" in logs["logs/02-number-2.log"] and b"number 2" not in logs["logs/02-number-2.log"][200:]


def test_what_is_too_large_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "LOG_BYTES", 1000)
    monkeypatch.setattr(device, "FILE_BYTES", 50_000)
    stages = [
        Stage("talks", 20, 1, "for i in $(seq 2000); do echo line $i; done"),
        Stage("weighs", 20, 1, 'head -c 60000 /dev/urandom > "$KDMOS_STAGING/keep/large.bin"'),
        Stage("draws", 20, 1, 'head -c 60000 /dev/urandom > "$KDMOS_STAGING/more/trace.gz"'),
        Stage("crowds", 20, 1, 'for i in $(seq 9); do echo $i > "$KDMOS_STAGING/keep/a$i"; done'),
    ]
    _, _, out = run(tmp_path, stages)
    log = members(out / "logs-A.tar.gz")["logs/00-talks.log"]
    assert b"line 1\n" in log and log.endswith(b"line 2000\n") and len(log) < 1100
    assert set(members(out / "logs-A.tar.gz")) == {f"logs/0{i}-{s.name}.log" for i, s in enumerate(stages)}
    assert "left out: more/trace.gz" in (out / "summary-A.txt").read_text()
    assert not (out / "large.bin").exists() and len(list(out.iterdir())) == 3 + device.MOST_KEPT
    _, _, out = run(tmp_path, stages[1:2])
    assert "left out: large.bin" in (out / "summary-A.txt").read_text()


def test_caps_shrink_to_what_is_left():
    stages = [Stage("a", 90, 10, ""), Stage("b", 50, 20, ""), Stage("c", None, 30, "")]
    assert device.cap_of(stages, 0, 200) == 90
    assert device.cap_of(stages, 0, 120) == 120 - device.PACKING - 20 - 30
    assert device.cap_of(stages, 1, 80) == 80 - device.PACKING - 30
    assert device.cap_of(stages, 2, 80) == 80 - device.PACKING


def test_a_small_budget_is_shared():
    stages = [Stage("a", 90, 30, ""), Stage("b", 50, 60, "")]
    assert device.fitted(stages, 98) == stages
    small = device.fitted(stages, 45 + device.PACKING)
    assert [device.cap_of(small, i, left) for i, left in ((0, 45 + device.PACKING), (1, 30 + device.PACKING))] == [
        15,
        30,
    ]


def test_a_stage_without_time_is_not_begun(tmp_path):
    lines, good, _ = run(tmp_path, [Stage("late", 60, 1, "touch begun"), Stage("kept", 60, 30, "true")], budget=35)
    assert lines[1].startswith("no time") and lines[2].startswith("ok") and not good


@pytest.mark.parametrize("call", device.PLAN)
def test_the_plan_fits_its_budget(call):
    budget, stages = device.PLAN[call]
    assert sum(stage.keep for stage in stages) + device.PACKING < budget
    assert all(stage.keep >= device.LEAST and (stage.cap is None or stage.cap >= stage.keep) for stage in stages)
    assert len({stage.name for stage in stages}) == len(stages)
    files = (word for stage in stages for word in stage.command.split() if word.startswith("tests/"))
    assert all((device.ROOT / file).exists() for file in files)


# --- rows


def test_rows_without_git_and_beside_other_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "new" / "rows")
    monkeypatch.setenv("KDMOS_RESULTS", str(rows.RESULTS))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("KDMOS_COMMIT", raising=False)
    assert rows.append("op", {"case": "a"}) == rows.append("op", {"case": "b"})
    monkeypatch.setenv("KDMOS_COMMIT", "abc1234")
    other = rows.append("op", {"other": 1})
    assert other.name == "op-2.csv" and rows.append("op", {"other": 2}) == other
    read = {path.name: list(csv.DictReader(path.open())) for path in rows.RESULTS.iterdir()}
    assert [row["commit"] for row in read["op.csv"] + read["op-2.csv"]] == ["unknown"] * 2 + ["abc1234"] * 2


# --- time on a GPU


class FakeGpu:
    """A device that works off what is queued, one after the other, beside the host; time passes when it is told to."""

    def __init__(self, monkeypatch):
        self.host, self.device = 0.0, 0.0
        fake = SimpleNamespace(
            synchronize=self.wait, _sleep=lambda cycles: self.queue(cycles / 2e9), Event=lambda **_: Event(self)
        )
        monkeypatch.setattr(timing.torch, "cuda", fake)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)

    def queue(self, seconds):
        self.device = max(self.device, self.host) + seconds

    def wait(self):
        self.host = max(self.host, self.device)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.device, self.gpu.host)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_python_is_not_in_the_time(monkeypatch):
    gpu, order = FakeGpu(monkeypatch), []

    def work(number):
        gpu.host += 200e-6  # Python
        gpu.queue(30e-6)
        order.append(number)

    timer = timing.OnGpu([lambda number=number: work(number) for number in range(3)])
    assert [timer() for _ in range(3)] == pytest.approx([30e-6] * 3)
    assert order[6:12] == [0, 1, 2, 0, 1, 2]  # none meets its own inputs again in the cache


def test_long_work_is_timed_by_the_host(monkeypatch):
    gpu = FakeGpu(monkeypatch)

    def in_numpy():
        gpu.host += 0.5

    assert timing.OnGpu([in_numpy])() == pytest.approx(0.5)


def test_sets_go_beyond_the_cache():
    assert timing.num_sets("cpu", 1) == 1 and timing.num_sets("cuda", 1 << 30) == 1
    assert timing.num_sets("cuda", 100 << 20) == 3 and timing.num_sets("cuda", 10) == timing.MOST_SETS


# --- what the stages read


def test_kernels_are_counted_and_overlaps_once():
    spans = [("a", 0.0, 10.0), ("b", 5.0, 15.0), ("a", 20.0, 30.0), ("a", 22.0, 24.0)]
    lines = profiling.kernel_table(spans, 2).splitlines()
    assert lines[0].split() == ["15.0", "us,", "12.5", "of", "them", "busy,", "2", "kernels", "and", "copies"]
    assert lines[1].split() == ["11.0", "us", "1.5", "x", "a"] and lines[2].split() == ["5.0", "us", "0.5", "x", "b"]
    assert "0 kernels" in profiling.kernel_table([], 2)


def test_ncu_rows_become_launches():
    names = list(device_stages.METRICS)
    rows = [
        ("0", "void kdmos::(anonymous namespace)::dysample_kernel<float>(const T1 *)", names[0], "nsecond", "12,500"),
        ("0", "void kdmos::(anonymous namespace)::dysample_kernel<float>(const T1 *)", names[1], "%", "61.26"),
        ("1", "add_rows_kernel", names[0], "usecond", "3.4"),
        ("1", "add_rows_kernel", "other", "", "n/a"),
    ]
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    text = "==PROF== Connected\n" + "\n".join([head, *(",".join(f'"{v}"' for v in row) for row in rows)])
    assert device_stages.ncu_table(text) == [
        ("dysample_kernel<float", {"us": 12.5, "dram": 61.3}),
        ("add_rows_kernel", {"us": 3.4}),
    ]
    assert device_stages.ncu_table("==ERROR== no permission") == []


def test_tests_run_file_by_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device_stages, "ROOT", tmp_path)
    monkeypatch.setattr(device_stages, "has_gpu", lambda: True)
    for name, body in (("good", "assert 1"), ("bad", "assert 0"), ("dead", "__import__('os').abort()")):
        (tmp_path / f"test_{name}.py").write_text(f"def test_it():\n    {body}\n")
    assert device_stages.tests(["."]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "1 passed" in last and "1 failed" in last and "test_bad (1)" in last and "test_dead (-6)" in last


def test_rows_in_a_word():
    stream = {"p50_ms": 1.9, "p95_ms": 2, "p99_ms": 3, "residual_ms": "", "network_ms": "", "labels_ms": "", "count": 9}
    assert device_stages.word_about(stream) == "p50 1.9 p95 2 p99 3 ms, 9 scans"
    assert device_stages.word_about({**stream, "network_ms": 1.2}).endswith("ms, network 1.2, 9 scans")
    assert device_stages.word_about({"case": "one", "s_p20": 1, "s": 2, "peak_gib": 3}) == "one: 2 s, 3 GiB"


# --- the ops


@pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
@pytest.mark.parametrize("name", [name for name in device_ops.CASES if name not in device_ops.ONLY_REAL])
def test_cases_are_right_where_they_can_be_told(name, capsys):
    """On the CPU against itself: the case holds together, half types stay within its limits."""
    assert device_ops.check_all([name], 5, device_ops.TINY, "cpu") == 0, capsys.readouterr().out


def test_an_unwritten_value_is_wrong():
    wanted = torch.randn(50, 3)
    holed = wanted.clone()
    holed[7, 1] = np.nan
    assert not device_ops.error(holed, wanted, 0.0) <= 1.0
    assert device_ops.error(wanted, wanted, 0.0) == 0.0
    assert device_ops.error(wanted[1:], wanted, 0.0) == np.inf
    moved = wanted.clone()
    moved[3] += 1
    assert device_ops.error(moved, wanted, 0.02) == 0.0 and device_ops.error(moved, wanted, 0.01) > 0.01
    whole = torch.arange(10)
    assert device_ops.error(whole % 9, whole, 0.0) == pytest.approx(0.1)


@pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
def test_every_cuda_op_has_a_case():
    called = set()

    class Notes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), options=None):
            called.add(str(op))
            return op(*arguments, **(options or {}))

    with Notes():
        for name in itertools.filterfalse(device_ops.ONLY_REAL.__contains__, device_ops.CASES):
            device_ops.forward_and_backward(device_ops.build(name, 1, device_ops.TINY, "float32"))
    called = {name.removeprefix("kdmos.").removesuffix(".default") for name in called if name.startswith("kdmos.")}
    assert set(device_stages.cuda_names(r'm\.impl\("(\w+)"')) <= called
