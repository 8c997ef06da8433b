"""The sources that this machine's tests do not run: the wheel's instruction set, and every CUDA kernel."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdmos.ops import native

ROOT = Path(__file__).parent.parent
MOST_REGISTERS = 128  # two blocks of 256 threads a multiprocessor at least


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the libraries and nvcc's reports."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here")
    folder = tmp_path_factory.mktemp("build")
    environment = os.environ | {"KDMOS_CUDA": "on", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}
    if platform.machine() == "x86_64":
        environment["KDMOS_ARCH"] = "x86-64-v3"
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", f"{folder}/temp", "--build-lib", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_native_ops_are_built_where_there_is_a_compiler():
    """Else every test of theirs would be skipped, and nobody would see it."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler here")
    assert "cpu" in native.DEVICES, native.WHY_NOT


def test_everything_compiles_and_links(built):
    assert (built / "kdmos/_cuda.so").stat().st_size > 100_000
    assert list((built / "kdmos").glob("_C.*"))
    sources = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert sources == {path.stem for path in (built / "temp/cuda").glob("*.o")}
    assert {path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp")} - native.CPU_ALONE == sources


def test_the_cuda_library_names_what_it_needs(built):
    """Torch loads its libraries where no other sees them: one that does not name them loads in no torch.

    The build itself has loaded it and asked for a kernel of each op, here beside a stand-in for libtorch_cuda.
    """
    library = built / "kdmos/_cuda.so"
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"\(NEEDED\).*\[(.+)\]", needed)
    assert {"libtorch_cuda.so", "libtorch_cpu.so", "libc10.so"} <= set(names)
    assert not any("cudart" in name for name in names)  # static: a machine may have another one
    assert not re.search("RPATH|RUNPATH", needed)  # it belongs to no folder of this machine

    def symbols(path, which):
        text = subprocess.run(["nm", "-D", which, path], capture_output=True, text=True, check=True).stdout
        return {line.split()[-1].split("@")[0] for line in text.splitlines()}

    asked = {name for name in symbols(library, "--undefined-only") if name.startswith(("aoti_", "torch_", "cuda"))}
    folder = Path(torch.__file__).parent / "lib"
    there = symbols(folder / "libtorch_cpu.so", "--defined-only") | symbols(folder / "libc10.so", "--defined-only")
    # of libtorch_cuda, in every version from 2.10 on
    known = {"aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg"}
    assert asked - there == known


@pytest.fixture
def small_build(tmp_path):
    """small_build(code, op, *options) -> a finished build with the C compiler in the place of nvcc.

    code: What it compiles, whatever the source. op: That the source names; "" for none.
    """
    compiler = tmp_path / "bin/nvcc"
    compiler.parent.mkdir()
    leave = shutil.ignore_patterns("cpu", "cuda")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=leave)
    (tmp_path / "csrc/cuda").mkdir()
    (tmp_path / "kdmos").mkdir()
    shutil.copy(ROOT / "kdmos/__init__.py", tmp_path / "kdmos")
    shutil.copy(ROOT / "setup.py", tmp_path)

    def build(code, op, *options, cuda="on"):
        compiler.write_text(f"""#!{sys.executable}
import subprocess, sys
arguments = [a for a in sys.argv[1:] if a not in ("-cudart", "static")]
out = arguments[arguments.index("-o") + 1]
command = ["cc", "-x", "c", "-fPIC", "-c", "-", "-o", out] if "-c" in arguments else ["cc", *arguments]
sys.exit(subprocess.run(command, input={code!r}, text=True).returncode)
""")
        compiler.chmod(0o755)
        (tmp_path / "csrc/cuda/op.cu").write_text(f'm.impl("{op}", op);' if op else "")
        environment = os.environ | {"KDMOS_CUDA": cuda, "CUDA_HOME": str(tmp_path)}
        command = [sys.executable, "setup.py", "build_ext", *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return build


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("void missing(void); void op(void) { missing(); }", "_cuda.so: undefined symbol: missing"),
        ("void op(void) {}", "_cuda.so registers no CUDA kernel of wdcd_loss"),
        (
            "__attribute__((constructor)) void op(void) { __builtin_trap(); }",
            "_cuda.so does not load:\nends the process",
        ),
    ],
)
def test_a_library_that_cannot_be_used_fails_the_build(code, message, small_build):
    """With the linker's words."""
    done = small_build(code, "wdcd_loss", "--build-temp", "temp", "--build-lib", "lib")
    assert done.returncode != 0
    assert message in done.stderr, done.stderr


def test_a_build_in_place_takes_the_cuda_library_along(small_build, tmp_path):
    """And leaves none of an earlier build there."""
    done = small_build("void op(void) {}", "", "--inplace")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kdmos/_cuda.so").exists()
    done = small_build("void op(void) {}", "", "--inplace", "--force", cuda="off")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "kdmos").glob("_C.*")) and not (tmp_path / "kdmos/_cuda.so").exists()


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is a CPU build")
def test_every_op_has_a_cuda_kernel():
    assert {"cpu", "cuda"} == native.DEVICES, native.WHY_NOT
    assert native.registered("CPU") - native.CPU_ALONE == native.registered("CUDA")


def test_no_kernel_spills(built):
    """Registers that do not fit go to memory; none may. The report is nvcc's, for each architecture."""
    for log in sorted((built / "temp/cuda").glob("*.log")):
        text = log.read_text()
        kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", text)
        assert {arch for _, arch in kernels} == {"sm_80", "sm_90"}, log.name
        assert set(re.findall(r"(\d+) bytes spill", text)) == {"0"}, log.name
        assert max(map(int, re.findall(r"Used (\d+) registers", text))) <= MOST_REGISTERS, log.name
