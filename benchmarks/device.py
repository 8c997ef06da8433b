"""The staged run on a machine whose GPU is at hand for minutes: what is there, is it right, how fast, and training.

    python3 -m benchmarks.device [--call A|B]        # make gpu; without --call both in turn

What it needs beside the repository lies in gpu_pack/ (`make gpu-pack`): scans, goldens, the native ops built elsewhere,
missing packages. The table below is the whole plan. A stage is a command with a name and a cap in seconds; it may fail,
crash or hang, and the next one runs. Caps shrink to the time that is left of the call's budget (BUDGET=seconds: another
one), less what the stages after it keep for themselves. A command ends with 77 where it needs a GPU and there is none,
after it imported all that it needs.

After every stage everything found so far is packed again, under $OUT or else in runs/gpu, at most 8 files for both
calls: summary-A.txt (a line a stage), logs-A.tar.gz, rows-A.tar.gz (as in benchmarks/results), the student's weights.
A command says what it found on a line "found: ...", puts files for the logs under $KDMOS_STAGING/more and those worth
a file of their own under $KDMOS_STAGING/keep, and has $KDMOS_SECONDS. Standard library alone: it runs before the
packages are there.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
STAGES, OPS, BENCH = (f"{PYTHON} -m benchmarks.device_{name}" for name in ("stages", "ops", "stages bench"))
BF16 = "--device cuda --precision bfloat16"
SCANS = "gpu_pack/realdata/kitti-raw-0005-a"
OP_TESTS = "-k cuda tests/ops"  # of the other backends they run anywhere
MODEL_TESTS = (
    "tests/models/test_student_on_gpu.py tests/models/test_teacher_on_gpu.py tests/test_stream_on_gpu.py "
    "tests/models/test_fast.py tests/test_precision.py"
)


class Stage(NamedTuple):
    """cap: Seconds at most; None: all that is left. keep: Seconds that the stages before it leave for it."""

    name: str
    cap: int | None
    keep: float
    command: str


LOOK = Stage("what is here", 25, 15, f"{STAGES} look")
NATIVE = Stage("native ops", 150, 20, f"{STAGES} native")

PLAN: dict[str, tuple[int, tuple[Stage, ...]]] = {
    # call: seconds in all, stages
    "A": (
        250,
        (
            LOOK,
            NATIVE,
            Stage("streets begun", 20, 5, f"{STAGES} streets --background --workers 6"),
            Stage("ops against the CPU", 60, 30, f"{OPS} smoke"),
            Stage("op tests", 90, 40, f"{STAGES} tests {OP_TESTS}"),
            Stage("model tests", 60, 25, f"{STAGES} tests {MODEL_TESTS}"),
            Stage("memory checks", 70, 30, f"{STAGES} sanitize"),
        ),
    ),
    "B": (
        400,
        (
            LOOK,
            NATIVE,
            Stage("stream", 30, 20, f"{BENCH} bench_stream {SCANS} {BF16} --full-speed --scans 1500 --untimed"),
            Stage("stream by stages", 25, 10, f"{BENCH} bench_stream {SCANS} {BF16} --full-speed --scans 500"),
            Stage("streets begun", 20, 5, f"{STAGES} streets --background --workers 8"),
            Stage("profiles", 35, 20, f"{BENCH} profiling {SCANS} --device cuda --traces $KDMOS_STAGING/more/traces"),
            Stage("ops by events", 60, 30, f"{OPS} time"),
            Stage("kernels by ncu", 60, 30, f"{STAGES} ncu"),
            Stage("step of 1", 30, 10, f"{BENCH} bench_training_step {SCANS} --device cuda"),
            Stage("step of 8", 45, 20, f"{BENCH} bench_training_step {SCANS} --device cuda --batch 8 --rounds 3"),
            Stage("teacher float32", 25, 10, f"{BENCH} bench_teacher {SCANS} --device cuda"),
            Stage("teacher bfloat16", 25, 10, f"{BENCH} bench_teacher {SCANS} {BF16}"),
            Stage("training", None, 100, f"{STAGES} train"),
        ),
    ),
}
# Where a CUDA toolkit has its programs, if they are not on the PATH: nvcc, compute-sanitizer, ncu.
TOOLS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/usr/local/cuda-*/bin")
TOOLS += ("/opt/nvidia/nsight-compute/*", "/usr/local/cuda-*/nsight-compute-*")
PACKING = 8  # seconds kept for the last packing
LEAST = 4  # seconds: with less a stage is not begun
GRACE = 5  # seconds from asking a command to end until it is ended
NO_GPU = 77
LOG_BYTES = 2 << 20  # of a stage's output in the pack: its beginning and its end
MORE_BYTES = 6 << 20  # of a file under more/
FILE_BYTES = 15 << 20  # of one file that goes back
MOST_KEPT = 2  # files under keep/: with two calls' three files each, eight


class Outcome(NamedTuple):
    result: str  # "ok", "failed", "no GPU", "timeout", "no time"
    seconds: float
    found: str


def fitted(stages: Sequence[Stage], budget: float) -> list[Stage]:
    """The stages, keeping less for themselves where the budget is too small for what they would keep."""
    share = min(1.0, max(0.0, budget - PACKING) / max(1, sum(stage.keep for stage in stages)))
    return [stage._replace(keep=stage.keep * share) for stage in stages]


def cap_of(stages: Sequence[Stage], number: int, left: float) -> float:
    """Seconds that stage `number` may take, with `left` seconds for it and all after it."""
    stage, kept = stages[number], sum(stage.keep for stage in stages[number + 1 :])
    free = left - PACKING - kept
    return free if stage.cap is None else min(stage.cap, free)


def run_stage(stage: Stage, cap: float, log: Path, environment: dict[str, str]) -> Outcome:
    """Run the command in a session of its own, of which nothing is left; what makes its own goes on."""
    if cap < LEAST:
        return Outcome("no time", 0.0, f"{cap:.0f} s were left for it")
    start = time.monotonic()
    environment = {**environment, "KDMOS_SECONDS": str(int(cap))}
    with open(log, "wb") as file:
        file.write(f"$ {stage.command}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                ["bash", "-c", stage.command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome("failed", 0.0, str(error))
        late = False
        try:
            process.wait(cap)
        except subprocess.TimeoutExpired:
            late = True
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        _signal(process, signal.SIGKILL)
        process.wait()
    result = "timeout" if late else {0: "ok", NO_GPU: "no GPU"}.get(process.returncode, "failed")
    return Outcome(result, time.monotonic() - start, found_in(log, process.returncode))


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def found_in(log: Path, code: int) -> str:
    """The last line that says what was found, else the last line."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("found: ") for line in lines if line.startswith("found: ")]
    if said:
        return said[-1][:160]
    last = lines[-1] if lines and not lines[-1].startswith("$ ") else "no output"
    return (last if code == 0 else f"exit code {code}: {last}")[:160]


def packed(files: list[tuple[str, bytes]]) -> bytes:
    """A .tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        for name, content in files:
            about = tarfile.TarInfo(name)
            about.size, about.mtime = len(content), int(time.time())
            tar.addfile(about, io.BytesIO(content))
    return buffer.getvalue()


def shortened(content: bytes) -> bytes:
    """Beginning and end of a long log."""
    if len(content) <= LOG_BYTES:
        return content
    return content[: LOG_BYTES // 4] + b"\n[...]\n" + content[-3 * LOG_BYTES // 4 :]


def pack(staging: Path, out: Path, call: str, summary: str) -> None:
    """Write all that is there by now, each file whole or not at all. What stays behind is said in the summary."""
    out.mkdir(parents=True, exist_ok=True)
    read: dict[str, list[tuple[str, bytes]]] = {"logs": [], "more": [], "rows": [], "keep": []}
    for name, files in read.items():
        for path in sorted(path for path in (staging / name).rglob("*") if path.is_file()):
            with contextlib.suppress(FileNotFoundError):  # one that vanished meanwhile
                files.append((str(path.relative_to(staging)), path.read_bytes()))
    logs = [(name, shortened(content)) for name, content in read["logs"]]
    more = [(name, content) for name, content in read["more"] if len(content) <= MORE_BYTES]
    together = {f"logs-{call}.tar.gz": packed(logs + more), f"rows-{call}.tar.gz": packed(read["rows"])}
    if len(together[f"logs-{call}.tar.gz"]) > FILE_BYTES:
        together[f"logs-{call}.tar.gz"], more = packed(logs), []
    together |= {Path(name).name: content for name, content in read["keep"][:MOST_KEPT]}
    large = [name for name, content in together.items() if len(content) > FILE_BYTES]
    stays = [name for name, _ in read["more"] if name not in dict(more)] + [
        name for name, _ in read["keep"][MOST_KEPT:]
    ]
    summary += "".join(f"left out: {name}\n" for name in [*stays, *large])
    together = {name: content for name, content in together.items() if name not in large}
    for name, content in {**together, f"summary-{call}.txt": summary.encode()}.items():
        temporary = out / f".{name}.part"
        temporary.write_bytes(content)
        os.replace(temporary, out / name)


def lines_of(call: str, outcomes: list[tuple[str, Outcome]], seconds: float, budget: float) -> str:
    lines = [f"call {call}: {seconds:.0f} of {budget:.0f} s, {time.strftime('%Y-%m-%d %H:%M:%S')}"]
    lines += [f"{o.result:8}{o.seconds:6.0f} s  {name:20} {o.found}" for name, o in outcomes]
    return "\n".join(lines) + "\n"


def run_call(
    call: str, stages: Sequence[Stage], budget: float, out: Path, staging: Path, environment: dict[str, str]
) -> tuple[str, bool]:
    """Run the stages of a call; the summary, and whether none of them failed."""
    start, outcomes, stages = time.monotonic(), [], fitted(stages, budget)
    shutil.rmtree(staging, ignore_errors=True)
    for name in ("logs", "more", "rows", "keep"):
        (staging / name).mkdir(parents=True)
    environment = {
        **environment,
        "KDMOS_STAGING": str(staging),
        "KDMOS_RESULTS": str(staging / "rows"),
        "PYTHONUNBUFFERED": "1",
    }
    for number, stage in enumerate(stages):
        cap = cap_of(stages, number, budget - (time.monotonic() - start))
        log = staging / "logs" / f"{number:02d}-{stage.name.replace(' ', '-')}.log"
        outcomes.append((stage.name, run_stage(stage, cap, log, environment)))
        summary = lines_of(call, outcomes, time.monotonic() - start, budget)
        print(summary.splitlines()[-1], flush=True)
        try:
            pack(staging, out, call, summary)
        except OSError as error:
            print(f"not packed: {error}", flush=True)
    return summary, all(outcome.result in ("ok", "no GPU") for _, outcome in outcomes)


def prepared_environment(pack_folder: Path) -> dict[str, str]:
    """What the stages see: the packed packages, which are unpacked here, the packed data, CUDA's tools, the commit."""
    environment = dict(os.environ)
    site = ROOT / "runs" / "gpu-site"
    for wheel in sorted((pack_folder / "wheels").glob("*.whl")):
        try:
            with zipfile.ZipFile(wheel) as content:
                content.extractall(site)
        except (OSError, zipfile.BadZipFile) as error:
            print(f"{wheel.name}: not unpacked: {error}", flush=True)
    path = [str(ROOT), str(site), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    tools = [folder for pattern in TOOLS for folder in sorted(glob.glob(pattern), reverse=True)]
    environment["PATH"] = os.pathsep.join([environment.get("PATH", os.defpath), *tools])
    environment.setdefault("KDMOS_SHARED", str(pack_folder))
    named = pack_folder / "commit.txt"
    if "KDMOS_COMMIT" not in environment and named.exists():
        environment["KDMOS_COMMIT"] = named.read_text().strip()
    environment.setdefault("XDG_CACHE_HOME", str(ROOT / "runs" / "gpu-cache"))
    return environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", choices=PLAN, help="default: both in turn")
    given = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu").resolve()
    environment, good, said = prepared_environment(ROOT / "gpu_pack"), True, []
    for call in [given.call] if given.call else PLAN:
        seconds, stages = PLAN[call]
        budget = float(os.environ.get("BUDGET") or seconds)
        staging = ROOT / "runs" / f"gpu-{call}"
        summary, right = run_call(call, stages, budget, out, staging, environment)
        said.append(summary)
        good &= right
    print("\n" + "\n".join(said), end="", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
