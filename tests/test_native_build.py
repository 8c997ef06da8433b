"""The sources that this machine's tests do not run: the wheel's instruction set, and every CUDA kernel."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    # each op has its kernel, but for three, whose work is left to torch's convolutions and products on a GPU
    cpu_alone = {"masked_conv", "mlp_max", "winograd_conv"}
    assert {path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp")} - cpu_alone == sources


def test_no_kernel_spills(built):
    """Registers that do not fit go to memory; none may. The report is nvcc's, for each architecture."""
    for log in sorted((built / "temp/cuda").glob("*.log")):
        text = log.read_text()
        kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", text)
        assert {arch for _, arch in kernels} == {"sm_80", "sm_90"}, log.name
        assert set(re.findall(r"(\d+) bytes spill", text)) == {"0"}, log.name
        assert max(map(int, re.findall(r"Used (\d+) registers", text))) <= MOST_REGISTERS, log.name
