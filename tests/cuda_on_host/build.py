"""The CUDA kernels' own source, compiled for the CPU: without a GPU, their arithmetic, indices and barriers still run.

    make cuda-on-host      # builds, then runs tests/ops with the CUDA ops replaced by these

`translate` rewrites what C++ does not know (launches, shared memory, CUB under the namespace's name in include/), and
device.cpp runs each thread of a block as a fiber, which another one follows at each barrier and warp exchange. Shared
memory starts as NaN; threads that wait for ever, or at different barriers, end the run with the kernel's name.
KDMOS_HOST_ORDER=reverse or random changes the order of threads and blocks. What a GPU alone can show is left: atomics
and memory under real concurrency, CUB itself, streams, graphs, limits at launch. x86-64 alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).parent
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-w", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=fast", "-DKDMOS_ON_HOST"]
FLAGS += ["-DKDMOS_HOST_ARCH=900", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-include", "cuda_runtime.h"]
ON_DEVICE = """struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};
"""
CHECKS = """#undef STD_CUDA_CHECK
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_CHECK(x) do { if ((x) != cudaSuccess) throw std::runtime_error("CUDA error: " #x); } while (0)
#define STD_CUDA_KERNEL_LAUNCH_CHECK()
"""


def end_of_call(text: str, begin: int) -> int:
    """Place of the bracket that closes the one at `begin`."""
    depth = 0
    for i in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket after {text[begin : begin + 40]!r}")


def launches(text: str) -> str:
    """kernel<T><<<config>>>(arguments) -> host::launch("kernel", config, a lambda that calls it, arguments)"""
    while (config := text.find("<<<")) >= 0:
        begin = config
        while text[begin - 1].isspace():
            begin -= 1
        end = begin
        if text[begin - 1] == ">":  # template arguments
            depth = 0
            while True:
                begin -= 1
                depth += {">": 1, "<": -1}.get(text[begin], 0)
                if depth == 0:
                    break
        while re.match(r"[\w:]", text[begin - 1]):
            begin -= 1
        kernel, close = text[begin:end], text.index(">>>", config)
        first = text.index("(", close)
        last = end_of_call(text, first)
        call = f"[&](const auto&... a) {{ {kernel}(a...); }}"
        name = re.match(r"\w+", kernel).group()
        arguments = f'"{name}", {text[config + 3 : close]}, {call}, {text[first + 1 : last]}'
        text = f"{text[:begin]}host::launch({arguments}){text[last + 1 :]}"
    return text


def shared_memory(text: str) -> str:
    """One block runs at a time: its shared memory is static, and begins as NaN in each."""

    def declared(match: re.Match) -> str:
        names = re.findall(r"(?:^|[\s,])(\w+)(?=(?:\s*\[|,|$))", re.sub(r"\[[^\]]*\]", "[]", match[2]))
        return f"static {match[1]} {match[2]};" + "".join(f" host::begin_shared(&{n}, sizeof({n}));" for n in names)

    dynamic = r"extern __shared__ __align__\(16\) unsigned char (\w+)\[\];"
    text = re.sub(dynamic, r"unsigned char* const \1 = static_cast<unsigned char*>(host::dynamic_shared());", text)
    return re.sub(r"__shared__ ([\w ]+?) (\w+(?:\[[^;]*|(?:, \w+)*)?);", declared, text)


def translate(file: Path) -> str:
    """A source of csrc as C++ for the host, its ops under another name."""
    text = file.read_text().replace("__CUDACC__", "KDMOS_ON_HOST").replace("__CUDA_ARCH__", "KDMOS_HOST_ARCH")
    text = text.replace("is_cuda()", "is_cpu()").replace(
        "STABLE_TORCH_LIBRARY(kdmos,", "STABLE_TORCH_LIBRARY(kdmos_host,"
    )
    if not file.suffix.startswith(".cu"):
        return text
    text = text.replace("STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA,", "STABLE_TORCH_LIBRARY_IMPL(kdmos_host, CPU,")
    if file.name == "launch.cuh":
        begin, end = text.index("class OnDevice {"), text.index("// Blocks for `work`")
        text = text[:begin] + ON_DEVICE + text[end:]
        for header in ("torch/csrc/stable/accelerator.h", "torch/csrc/inductor/aoti_torch/c/shim.h"):
            text = text.replace(f"#include <{header}>", "")
        text = text.replace("namespace kdmos {", CHECKS + "namespace kdmos {", 1)
    text = re.sub(
        r'asm volatile\("red\.global\.add\.v4.*?: "memory"\);', "host_add_four(to + v, a, b, c, d);", text, flags=re.S
    )
    return launches(shared_memory(text))


def build(folder: Path) -> Path:
    """kernels.so in `folder`: the ops of the CUDA sources as kdmos_host, on the CPU."""
    sources = []
    for file in (*CSRC.glob("*.h"), CSRC / "schemas.cpp", *CSRC.glob("cuda/*.cu*")):
        target = folder / file.relative_to(CSRC)
        target = target.with_suffix(".cpp") if file.suffix == ".cu" else target
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(translate(file))
        sources += [target] * (target.suffix == ".cpp")
    includes = [HERE / "include", TORCH / "include", TORCH / "include/torch/csrc/api/include"]
    includes = [f"-I{path}" for path in includes]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run(["c++", *FLAGS, *includes, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sources, HERE / "device.cpp"]))
    library = folder / "kernels.so"
    subprocess.run(
        ["c++", "-shared", *objects, "-o", library, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"], check=True
    )
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
