"""Packaging, and the native ops: `kdmos/_C` (CPU) and `kdmos/_cuda` (CUDA, where nvcc is found).

Environment:
    KDMOS_CUDA            auto (default: if nvcc is found and torch is a CUDA build), off, or on: fail where the library
                          cannot be built, does not load or does not register its ops
    KDMOS_ARCH            instruction set of the CPU ops: native (default: this machine's) or, for wheels, x86-64-v3
    TORCH_CUDA_ARCH_LIST  compute capabilities, "8.0;9.0+PTX"; default: of the GPU found, else the usual ones
    MAX_JOBS              compilers at a time

Without a compiler or torch at hand the package installs without native ops and says so; `kdmos doctor` repeats it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (ROOT / "kdmos" / "__init__.py").read_text()).group(1)

USUAL_GPUS = "7.5;8.0;8.6;8.7;8.9;9.0+PTX"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10: one build serves every torch from there on


def say(text: str) -> None:
    print(f"kdmos: {text}", flush=True)


def torch_folders() -> tuple[list[str], list[str]]:
    """Include and library folders of torch."""
    from torch.utils.cpp_extension import include_paths, library_paths

    return include_paths(), library_paths()


def cpu_arch() -> list[str]:
    arch = os.environ.get("KDMOS_ARCH", "native")
    flag = "-mcpu=native" if arch == "native" and platform.machine() in ("aarch64", "arm64") else f"-march={arch}"
    return [flag, f'-DKDMOS_BUILD="{arch}"']


def gpu_arch() -> list[str]:
    """-gencode flags, as TORCH_CUDA_ARCH_LIST asks, else for the GPU that is here, else for the usual ones."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted and shutil.which("nvidia-smi"):
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
        )
        wanted = ";".join(sorted(set(asked.stdout.split()))) if asked.returncode == 0 else None
    flags = []
    for name in re.split(r"[;, ]+", wanted or USUAL_GPUS):
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


class BuildNative(build_ext):
    """Compiles files side by side, and the CUDA library with nvcc: torch's own builder wants a CUDA build of torch."""

    def build_extension(self, extension: Extension) -> None:
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        compile_one = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(jobs) as pool:
                return [objects[0] for objects in pool.map(lambda source: compile_one([source], **options), sources)]

        self.compiler.compile = compile_all
        super().build_extension(extension)
        say(f"built the native CPU ops ({extension.extra_compile_args[0]})")
        self.build_cuda(extension.include_dirs, jobs)

    def copy_extensions_to_source(self) -> None:
        """Of an editable or in-place build. One that an earlier build left there is not of these sources."""
        super().copy_extensions_to_source()
        target, beside = self.cuda_target(), ROOT / "kdmos" / "_cuda.so"
        beside.unlink(missing_ok=True)
        if target.exists():
            shutil.copy2(target, beside)

    def cuda_target(self) -> Path:
        return Path(self.build_lib) / "kdmos" / "_cuda.so"

    def build_cuda(self, includes: list[str], jobs: int) -> None:
        mode, nvcc = os.environ.get("KDMOS_CUDA", "auto"), find_nvcc()
        if mode not in ("auto", "on", "off"):
            raise SystemExit(f"KDMOS_CUDA must be auto, on or off, got {mode!r}")
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        target = self.cuda_target()
        target.unlink(missing_ok=True)
        if mode == "off":
            return say("no CUDA ops: KDMOS_CUDA=off")
        if nvcc is None:
            if mode == "on":
                raise SystemExit("KDMOS_CUDA=on, but nvcc was not found; set CUDA_HOME or PATH")
            return say("no CUDA ops: nvcc was not found")
        import torch

        if mode == "auto" and torch.version.cuda is None:
            return say("no CUDA ops: this torch is a CPU build (KDMOS_CUDA=on builds them all the same)")
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp) / "cuda"
        objects.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC", "--extended-lambda", "--expt-relaxed-constexpr"]
        flags += ["-DUSE_CUDA", TORCH_TARGET, "-Xptxas", "-v", *gpu_arch(), *(f"-I{path}" for path in includes)]

        def compile_one(source: Path) -> Path:
            made = objects / f"{source.stem}.o"
            done = subprocess.run([nvcc, *flags, "-c", str(source), "-o", str(made)], capture_output=True, text=True)
            (objects / f"{source.stem}.log").write_text(done.stderr)  # registers and spills of each kernel
            if done.returncode:
                raise SystemExit(f"nvcc failed on {source}:\n{done.stderr}")
            return made

        with ThreadPoolExecutor(jobs) as pool:
            made = [str(path) for path in pool.map(compile_one, sources)]
        link_cuda(nvcc, made, target, objects / "stub")
        names = {name for source in sources for name in re.findall(r'm\.impl\("(\w+)"', source.read_text())}
        fault = fault_of_cuda(Path(self.get_ext_fullpath("kdmos._C")), target, objects / "stub", names)
        if fault and mode == "on":
            raise SystemExit(f"KDMOS_CUDA=on, but {target.name} {fault}")
        say(f"built the CUDA ops: {target.name} ({os.environ.get('TORCH_CUDA_ARCH_LIST', 'default')} architectures)")
        if fault:
            say(f"but {target.name} {fault}")


def link_cuda(nvcc: str, objects: list[str], target: Path, stub: Path) -> None:
    """The library, which names the torch libraries it needs: torch loads its own where no other library sees them.

    A CPU build of torch has no libtorch_cuda. A library of that name in the folder `stub` then stands for it, with what
    is missing; the result is the same file, which a CUDA build loads.
    """
    from torch.utils.cpp_extension import library_paths

    base = [nvcc, "-shared", "-cudart", "static", *objects, "-o", str(target)]
    base += [*(f"-L{path}" for path in library_paths()), "-Xlinker", "--no-as-needed"]
    libraries = ["-ltorch_cpu", "-lc10"]
    if not any((Path(path) / "libtorch_cuda.so").exists() for path in library_paths()):
        subprocess.run([*base, *libraries], check=True)
        files = (Path(path) / f"lib{name}.so" for path in library_paths() for name in ("torch_cpu", "c10"))
        there = set().union(*(symbols(file, "--defined-only") for file in files if file.exists()))
        missing = {name for name in symbols(target, "--undefined-only") if name.startswith(("aoti_", "torch_"))} - there
        stub.mkdir(parents=True, exist_ok=True)
        source = stub / "stub.c"
        source.write_text("".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in sorted(missing)))
        soname = "-Wl,-soname,libtorch_cuda.so"
        compiler = os.environ.get("CC", "cc").split()
        subprocess.run([*compiler, "-shared", "-fPIC", soname, source, "-o", stub / "libtorch_cuda.so"], check=True)
        base += [f"-L{stub}"]
    # no symbol may be left that none of them has
    done = subprocess.run([*base, "-ltorch_cuda", *libraries, "-Xlinker", "-z,defs"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"linking {target.name} failed:\n{done.stderr}")


def symbols(library: Path, which: str) -> set[str]:
    """Dynamic symbols of a library, without their versions."""
    listed = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines()}


def fault_of_cuda(cpu: Path, cuda: Path, stub: Path, names: set[str]) -> str:
    """Why the library cannot be used, in the linker's words; "" if it loads and registers a CUDA kernel of each op."""
    program = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("_C", {str(cpu)!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
try:
    torch.ops.load_library({str(cuda)!r})
except OSError as error:  # what the linker said is its cause in newer torch
    raise SystemExit(f"does not load: {{error.__cause__ or error}}")
has = lambda name: torch._C._dispatch_has_kernel_for_dispatch_key("kdmos::" + name, "CUDA")
missing = sorted(name for name in {names!r} if not has(name))
raise SystemExit("registers no CUDA kernel of " + ", ".join(missing) if missing else 0)
"""
    paths = [str(stub), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    environment = os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    said = done.stderr.strip() or f"ends the process with code {done.returncode}"
    return said if said.startswith(("does not", "registers")) else f"does not load:\n{said}"


def native() -> list[Extension]:
    try:
        includes, libraries = torch_folders()
    except ImportError:
        say("no native ops: torch is not here at build time (install it first, then use --no-build-isolation)")
        return []
    common = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp-simd"]
    return [
        Extension(
            "kdmos._C",
            sources=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("**/*.cpp"))],
            include_dirs=includes,
            library_dirs=libraries,
            libraries=["torch_cpu", "c10"],
            extra_compile_args=[*cpu_arch(), *common, "-fvisibility=hidden", "-g0", TORCH_TARGET],
            optional=os.environ.get("KDMOS_CUDA") != "on",  # without a compiler the package works on plain torch
            language="c++",
        )
    ]


setup(
    version=version,
    packages=[*find_packages(include=["kdmos", "kdmos.*"]), "kdmos.configs", "kdmos.benchmarks"],
    package_dir={"kdmos.configs": "configs", "kdmos.benchmarks": "benchmarks"},
    include_package_data=False,
    package_data={"kdmos": ["weights/*"], "kdmos.configs": ["*.yaml"]},
    ext_modules=native(),
    cmdclass={"build_ext": BuildNative},
)
