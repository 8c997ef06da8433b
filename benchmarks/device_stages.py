"""The stages of `device.py` that are no benchmark of their own.

python -m benchmarks.device_stages look | native | sources | streets | tests | bench | sanitize | ncu | train

Each imports what it needs before it says that there is no GPU, so that a missing package shows without one.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import importlib
import importlib.util
import io
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "gpu_pack"
STREETS = ROOT / "runs" / "gpu-streets"
RUN = ROOT / "runs" / "gpu-train"
WEIGHTS = Path("kdmos/weights/synthetic.safetensors")  # as the header of what starts from them names them
SCANS = PACK / "realdata" / "kitti-raw-0005-a"
STAGING = Path(os.environ.get("KDMOS_STAGING", ROOT / "runs" / "gpu-stage"))
NO_GPU = 77
NEEDED = ("numpy", "pydantic", "yaml", "safetensors", "typer", "rich", "lightning", "torchmetrics", "tensorboard")
NEEDED += ("matplotlib", "pytest", "hypothesis")  # beside torch
IMPORTS = ("losses", "models", "models.fast", "motion", "stream", "inference", "train", "synth", "data.multi_scan")
TOGETHER = 8  # test files
STREET_SCANS, STREET_SEED, STREET_ERRORS = 60, 3, 0.8  # of other seeds than the streets of the students that ship
STREETS_A_TIME, MOST_STREETS, LEAST_STREETS = 12, 180, 12
VALID = ("00", "01")
TRAIN_RESERVE = 25  # seconds of a training stage in which the weights are scored and put away


def found(text: str, code: int = 0) -> int:
    print(f"found: {text}", flush=True)
    return code


def seconds_left() -> float:
    """Of the stage, when it begins."""
    return float(os.environ.get("KDMOS_SECONDS", 3600))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def said_by(*command: str) -> str:
    """Output of a command; why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return done.stdout.strip() or done.stderr.strip()


# --- what is here


def look() -> int:
    """Versions, memory, what is missing. Streets that are being made wait, so that they disturb no timing."""
    import torch

    if process := _running(STREETS / "process.txt"):
        os.killpg(process, signal.SIGSTOP)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    print(
        f"Python {platform.python_version()}, {sys.executable}, {' '.join(platform.libc_ver())}, {platform.platform()}"
    )
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {' '.join(platform.libc_ver())}")
    print(f"missing: {', '.join(missing) or 'nothing'}")
    tools = (("nvidia-smi",), *((name, "--version") for name in ("nvcc", "ncu", "compute-sanitizer", "g++")))
    for command in (*tools, ("free", "-g"), ("df", "-h", str(ROOT), "/dev/shm", "/tmp"), ("lscpu",)):
        print(f"--- {' '.join(command)}\n{said_by(*command)}")
    if missing:
        return found(f"missing: {', '.join(missing)}", 1)
    if not has_gpu():
        return found(f"torch {torch.__version__}, {os.cpu_count()} cores, no GPU", NO_GPU)
    about, (free, _) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
    print(about)
    cores = f"{os.cpu_count()} cores"
    return found(f"{about.name}, {free >> 30} GiB free, torch {torch.__version__}, {cores}")


# --- the native ops


def sources() -> str:
    """Hash of all that the native ops are made from."""
    whole = hashlib.sha256()
    for path in [*sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()), ROOT / "setup.py"]:
        whole.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return whole.hexdigest()


def cuda_names(pattern: str) -> list[str]:
    """What the CUDA sources name so."""
    return sorted(
        {name for path in (ROOT / "csrc" / "cuda").glob("*.cu") for name in re.findall(pattern, path.read_text())}
    )


LOADS = """
import sys, torch
from kdmos.ops import native
assert "cuda" in native.DEVICES, native.WHY_NOT
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [name for name in sys.argv[1:] if not has(f"kdmos::{name}", "CUDA")]
assert len(sys.argv) > 1 and not missing, f"no CUDA kernel of {missing}"
if torch.cuda.is_available():
    order, start = torch.ops.kdmos.sort_by_cell(torch.tensor([2, 0, 1], device="cuda"), 3)
    assert order.tolist() == [1, 2, 0], order
print("devices:", *sorted(native.DEVICES), native.instructions())
"""


def loads() -> bool:
    names = cuda_names(r'm\.impl\("(\w+)"')
    done = subprocess.run([sys.executable, "-c", LOADS, *names], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout + done.stderr, end="", flush=True)
    return done.returncode == 0


def native() -> int:
    """The packed ops if they are of these sources and run, else built here."""
    prebuilt, start = PACK / "native", time.monotonic()
    how = "no packed ops"
    if prebuilt.is_dir():
        if (prebuilt / "sources.txt").read_text().strip() == sources():
            for path in prebuilt.glob("*.so"):
                shutil.copy(path, ROOT / "kdmos")
            if loads():
                return found("the packed ones load" + ("" if has_gpu() else ", no GPU"), 0 if has_gpu() else NO_GPU)
            how = "the packed ones do not load"
        else:
            how = "the packed ones are of other sources"
    print(f"{how}; building", flush=True)
    environment = {**os.environ, "KDMOS_CUDA": "on", "MAX_JOBS": str(os.cpu_count())}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "build/gpu"]
    built = subprocess.run(command, cwd=ROOT, env=environment)
    for path in (ROOT / "build" / "gpu" / "kdmos").glob("*.so"):
        shutil.copy(path, ROOT / "kdmos")
    if built.returncode or not loads():
        return found(f"{how}; building here failed", 1)
    about = f"{how}; built here in {time.monotonic() - start:.0f} s"
    return found(about + ("" if has_gpu() else ", no GPU"), 0 if has_gpu() else NO_GPU)


# --- made-up streets to train on


def streets(background: bool, workers: int, most: int) -> int:
    """Batches of them, each usable when it is done; in a session of its own that outlives the call if asked for."""
    from kdmos.synth import SynthSettings, synthesize

    if background:
        if not has_gpu():
            return found("no GPU", NO_GPU)
        if process := _running(STREETS / "process.txt"):
            os.killpg(process, signal.SIGCONT)  # after `look`
        if process or len(finished()) >= most:
            return found(f"{len(finished())} streets are there")
        STREETS.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.device_stages", "streets"]
        command += ["--workers", str(workers), "--most", str(most)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(STREETS / "log.txt", "ab") as log:
            process = subprocess.Popen(
                ["nice", "-n", "19", *command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        (STREETS / "process.txt").write_text(str(process.pid))
        return found(f"{workers} processes make them; {len(finished())} are there")
    for count in range(min(STREETS_A_TIME, most), most + 1, STREETS_A_TIME):
        settings = SynthSettings(
            None, STREET_SEED, count, STREET_SCANS, compensate=None, drift=STREET_ERRORS, jitter=STREET_ERRORS
        )
        made = synthesize(STREETS, settings, workers)
        print(f"{time.strftime('%H:%M:%S')} {count} streets, {made} scans of them made now", flush=True)
    return found(f"{len(finished())} streets")


def finished() -> list[str]:
    """Names of the streets that are whole."""
    return sorted(path.parent.name for path in STREETS.glob("sequences/*/tracks.csv"))


def _running(path: Path) -> int | None:
    """The process that a file names, if it runs."""
    try:
        process = int(path.read_text())
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return None
    return process if state not in ("Z", "X") else None  # ended, and nobody has asked how


# --- tests


def tests(arguments: Sequence[str]) -> int:
    """Each file in a process of its own, several at a time: an illegal access ends one of them."""
    import pytest  # noqa: F401

    options, files = [], []
    for argument in arguments:
        path = ROOT / argument
        if path.is_dir():
            files += sorted(path.rglob("test_*.py"), key=lambda file: -file.stat().st_size)
        elif path.is_file():
            files.append(path)
        else:
            options.append(argument)
    gpu, limit = has_gpu(), max(5.0, seconds_left() - 4)
    if not gpu:
        options.append("--collect-only")

    def one(path: Path) -> tuple[Path, int, str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *options, str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired as late:
            return path, 124, (late.stdout or b"").decode(errors="replace") + f"\nnot done in {limit:.0f} s\n"
        return path, done.returncode, done.stdout + done.stderr

    counts, bad = {}, []
    with ThreadPoolExecutor(TOGETHER) as pool:
        for path, code, output in pool.map(one, files):
            good = code in (0, 5)  # 5: none of its tests was asked for
            last = output.strip().splitlines()[-1] if output.strip() else ""
            print(f"{'ok    ' if good else 'FAILED'} {path.relative_to(ROOT)}: {last}", flush=True)
            if not good:
                print("\n".join(output.splitlines()[-150:]), flush=True)
                bad.append(f"{path.stem} ({code})")
            for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last):
                counts[what] = counts.get(what, 0) + int(number)
    about = ", ".join(f"{number} {what}" for what, number in counts.items()) + (f"; {', '.join(bad)}" if bad else "")
    if not gpu and not bad:
        return found(f"{len(files)} files import; no GPU", NO_GPU)
    return found(about or "no tests ran", 1 if bad or not counts.get("passed") else 0)


# --- benchmarks, profilers, checkers


def bench(name: str, arguments: Sequence[str]) -> int:
    """A program of this folder, and a word about its rows."""
    for module in (f"benchmarks.{name}", "benchmarks.baseline", *(f"kdmos.{part}" for part in IMPORTS)):
        if not has_gpu() or module.startswith("benchmarks."):
            importlib.import_module(module)
    if not has_gpu():
        return found("no GPU", NO_GPU)
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    words, last = [], ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
        if line.startswith("{"):
            words.append(word_about(ast.literal_eval(line)))
        elif "busy" in line:
            words.append(line.strip())
    if process.wait():
        return found(f"exit code {process.returncode}: {last}", 1)
    return found("; ".join(words) or last)


def word_about(row: dict) -> str:
    """A row of a benchmark in short."""
    if "p50_ms" in row:
        stages = "".join(
            f", {name} {row[f'{name}_ms']}" for name in ("residual", "network", "labels") if row[f"{name}_ms"]
        )
        return f"p50 {row['p50_ms']} p95 {row['p95_ms']} p99 {row['p99_ms']} ms{stages}, {row['count']} scans"
    if "s_p20" in row:
        return f"{row['case']}: {row['s']} s, {row['peak_gib']} GiB"
    return f"{row['case']}: {row['kdmos_ms']} ms, {row['ratio']} x"


def sanitize() -> int:
    """Every op once, small, under the memory, race and barrier checkers, at the same time."""
    importlib.import_module("benchmarks.device_ops")
    if not has_gpu():
        return found("no GPU", NO_GPU)
    limit = max(5.0, seconds_left() - 4)

    def one(tool: str) -> tuple[str, int | None, str]:
        work = [sys.executable, "-m", "benchmarks.device_ops", "tiny", "--seed", "1"]
        # each tensor its own allocation: what runs over its end runs into nothing
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
        output = ""
        for options in (["--kernel-regex", "kns=kdmos"], []):  # our kernels; all, where that is not understood
            options = options if tool != "memcheck" else []
            command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", *options, *work]
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit
                )
            except subprocess.TimeoutExpired as late:
                return tool, None, output + (late.stdout or b"").decode(errors="replace")
            except OSError as error:
                return tool, None, str(error)
            output += done.stdout.decode(errors="replace")
            if "SUMMARY" in output or not options:
                break
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
        return tool, int(summary[1]) if summary else None, output

    words, good = [], True
    with ThreadPoolExecutor(3) as pool:
        for tool, errors, output in pool.map(one, ("memcheck", "racecheck", "synccheck")):
            print(f"--- {tool}\n{output[:200_000]}", flush=True)
            words.append(f"{tool}: {'no answer' if errors is None else f'{errors} errors'}")
            good &= errors == 0
    return found(", ".join(words), 0 if good else 1)


METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    "launch__registers_per_thread": "registers",
}


def ncu() -> int:
    """Duration, share of the memory's and the multiprocessors' rate, and occupancy of our kernels at real size."""
    importlib.import_module("benchmarks.device_ops")
    if not has_gpu():
        return found("no GPU", NO_GPU)
    work = [sys.executable, "-m", "benchmarks.device_ops", "once", "--seed", "1"]
    ours = "|".join(cuda_names(r"\b(\w+_kernel)\("))
    command = ["ncu", "--csv", "--clock-control", "none", "--target-processes", "all", "-k", f"regex:^({ours})$"]
    command += ["--metrics", ",".join(METRICS), "--launch-count", "300", *work]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(5.0, seconds_left() - 4))
        output, errors = done.stdout, done.stderr
    except OSError as error:
        return found(str(error), 1)
    except subprocess.TimeoutExpired as late:
        output, errors = ((text or b"").decode(errors="replace") for text in (late.stdout, late.stderr))
    print(errors, output, sep="\n", flush=True)
    table = ncu_table(output)
    print("\n".join(f"{name}: {values}" for name, values in table))
    (STAGING / "more").mkdir(parents=True, exist_ok=True)
    (STAGING / "more" / "ncu.csv").write_text(output)
    if not table:
        return found((output + errors).strip().splitlines()[-1] if (output + errors).strip() else "no output", 1)
    name, slowest = max(table, key=lambda pair: pair[1].get("us", 0.0))
    return found(f"{len(table)} launches; slowest {name}: {slowest}")


def ncu_table(output: str) -> list[tuple[str, dict[str, float]]]:
    """Kernel and values of each launch, from ncu's CSV of one row a metric."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    launches: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:] if start is not None else []))):
        key = METRICS.get(row.get("Metric Name") or "")
        if key is None:
            continue
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:
            continue
        scale = {"nsecond": 1e-3, "ns": 1e-3, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6}
        value *= scale.get(row["Metric Unit"], 1.0) if key == "us" else 1.0
        short = re.sub(r"\(.*?\)|\w+::|void ", "", row["Kernel Name"].split(">(")[0]).lstrip(":")
        launches.setdefault(row["ID"], (short, {}))[1][key] = round(value, 1)
    return list(launches.values())


# --- training


def train(root: Path = STREETS, options: Sequence[str] = ()) -> int:
    """The student that ships, on the streets that are there: an epoch to see how long one takes, then what fits.

    options: Settings of the run; with any, it is done without a GPU too.
    """
    for name in IMPORTS:
        importlib.import_module(f"kdmos.{name}")
    from benchmarks import accuracy
    from kdmos.data.semantic_kitti import find_sequences
    from kdmos.models import load_student

    if not has_gpu() and not options:
        return found("no GPU", NO_GPU)
    end = time.monotonic() + seconds_left() - TRAIN_RESERVE
    while len(finished()) < LEAST_STREETS and _running(STREETS / "process.txt") and time.monotonic() < end - 60:
        time.sleep(1)
    if process := _running(STREETS / "process.txt"):  # the cores are for reading now
        os.killpg(process, signal.SIGKILL)
    names = sorted(path.parent.name for path in root.glob("sequences/*/tracks.csv"))
    if len(names) < 3:
        return found(f"{len(names)} streets are too few", 1)
    learnt = [name for name in names if name not in VALID]
    common = [f"data.root={root}", f"data.train=[{','.join(learnt)}]", f"data.valid=[{','.join(VALID)}]"]
    common += ["batch_size=24", "save_every=1000000", *options]

    first, fine = RUN / "first", RUN / "fine"
    if not (fine / "state.ckpt").exists():
        shutil.rmtree(RUN, ignore_errors=True)
        settings = ["epochs=1", "optimizer.lr=0.001", "optimizer.decay=1", "optimizer.warmup_epochs=0.3"]
        for workers in (min(12, os.cpu_count() or 1), 0):  # none: where processes have no memory to share
            begun = time.monotonic()
            common.append(f"data.workers={workers}")
            lines = list(_trained([f"init={WEIGHTS}", f"output={named(first)}", *common, *settings], end))
            took = [float(match[1]) for line in lines if (match := re.search(r"  (\d+) s$", line))]
            if took:
                break
            shutil.rmtree(first, ignore_errors=True)
        else:
            return found(f"no epoch was done: {lines[-1] if lines else 'no output'}", 1)
        put_away(first / "last.safetensors")
        beside = min(15.0, time.monotonic() - begun - took[0])  # start-up; the motion caches are there by now
        epochs = max(1, int(0.9 * (end - time.monotonic() - beside) / max(took[0], 0.5)))
        settings = [f"epochs={epochs}", "optimizer.lr=0.001", f"optimizer.decay={0.05 ** (1 / epochs):.4f}"]
        settings += ["optimizer.warmup_epochs=0.1", "save_every=50"]
        lines += _trained([f"init={named(first)}/last.safetensors", f"output={named(fine)}", *common, *settings], end)
    else:
        lines = list(_trained(["--config", str(fine / "config.yaml"), "--resume"], end))
    done = sum(line.startswith("epoch ") for line in lines)

    best = next((path for path in (fine / "best.safetensors", first / "best.safetensors") if path.exists()), None)
    if best is None:
        return found("no weights", 1)
    put_away(best)
    for folder in (first, fine):
        if (folder / "tensorboard").is_dir():
            shutil.copytree(folder / "tensorboard", STAGING / "more" / f"tensorboard-{folder.name}", dirs_exist_ok=True)
    words, device = [], "cuda" if has_gpu() else "cpu"
    try:
        for data, sequences in (("streets", find_sequences(root, VALID)), ("real", find_sequences(SCANS))):
            models = (load_student(path, device) for path in (WEIGHTS, STAGING / "keep" / "student.safetensors"))
            before, after = (accuracy.moving_scores(model, sequences, device) for model in models)
            print(f"on {data}: {before} before, {after} after", flush=True)
            words.append(f"{data} {before['moving_iou']} -> {after['moving_iou']}")
    except Exception as fault:  # the weights are safe
        words.append(f"not scored: {fault}")
    return found(f"{len(learnt)} streets, {done} epochs; moving IoU {', '.join(words)}")


def named(path: Path) -> Path:
    """As a header says it: from the checkout on."""
    return path.relative_to(ROOT)


def put_away(weights: Path) -> None:
    """To the files that go back, in float16."""
    import torch

    from benchmarks import rows
    from kdmos.models import load_student, save_model

    (STAGING / "keep").mkdir(parents=True, exist_ok=True)
    model = load_student(weights)
    about = {key: value for key, value in model.header.items() if key != "model"} | {"commit": rows.commit()}
    save_model(STAGING / "keep" / "student.safetensors", model, torch.float16, **about)
    shutil.copy(weights.with_suffix(".md"), STAGING / "keep" / "student.md")


def _trained(arguments: list[str], end: float) -> Iterator[str]:
    """Lines of a training run, which is asked to stop at `end`."""
    command = [sys.executable, "-m", "kdmos", "train"]
    if "--config" not in arguments:
        command += ["--config", "synthetic"]
    process = subprocess.Popen(
        [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    left = max(1.0, end - time.monotonic())
    timers = [threading.Timer(left, process.send_signal, [signal.SIGINT]), threading.Timer(left + 8, process.kill)]
    for timer in timers:
        timer.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        yield line.rstrip()
    process.wait()
    for timer in timers:
        timer.cancel()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in ("look", "native", "sources", "sanitize", "ncu", "train"):
        stages.add_parser(name)
    of_streets = stages.add_parser("streets")
    of_streets.add_argument("--background", action="store_true")
    of_streets.add_argument("--workers", type=int, default=os.cpu_count())
    of_streets.add_argument("--most", type=int, default=MOST_STREETS)
    stages.add_parser("tests", add_help=False)
    stages.add_parser("bench", add_help=False).add_argument("name")
    given, others = parser.parse_known_args()
    if given.stage == "streets":
        return streets(given.background, given.workers, given.most)
    if given.stage == "tests":
        return tests(others)
    if given.stage == "bench":
        return bench(given.name, others)
    if given.stage == "sources":
        print(sources())
        return 0
    return {"look": look, "native": native, "sanitize": sanitize, "ncu": ncu, "train": train}[given.stage]()


if __name__ == "__main__":
    sys.exit(main())
