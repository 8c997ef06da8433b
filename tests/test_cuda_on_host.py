"""The CUDA kernels' own source on the CPU, threads in random order: the tests of tests/ops once more, on it."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(platform.machine() != "x86_64", reason="fibers are switched in x86-64 assembly")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_the_kernels_pass_the_op_tests(tmp_path):
    build = [sys.executable, "tests/cuda_on_host/build.py", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True)
    environment = os.environ | {"KDMOS_CUDA_ON_HOST": f"{tmp_path}/kernels.so", "KDMOS_HOST_ORDER": "random"}
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops"]
    done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert " passed" in done.stdout.splitlines()[-1]
