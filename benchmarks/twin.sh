#!/usr/bin/env bash
# An environment like that of a GPU machine (Python 3.12, a CUDA build of torch 2.11, no pydantic), without its GPU.
#   benchmarks/twin.sh build       the environment, and the native ops for sm_90 built in it: $KEEP/native
#   benchmarks/twin.sh rehearse    both calls of benchmarks/device.py there, in a copy of the checkout with gpu_pack/:
#                                  every stage must end well, or for want of a GPU
# PYTHON=python3.12  TORCH=2.11.0 (a version)  KEEP=build/twin (the environment; used again if it is there)
set -euo pipefail
cd "$(dirname "$0")/.."
keep=$(realpath -m "${KEEP:-build/twin}")
torch=${TORCH:-2.11.0}
here=$keep/bin/python

environment() {
    [ -x "$here" ] || "${PYTHON:-python3.12}" -m venv "$keep"
    if [ "$("$here" -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null)" != "$torch" ]; then
        "$here" -m pip install -q "torch==$torch" numpy setuptools wheel
    fi
    "$here" -m pip install -q PyYAML safetensors typer rich lightning torchmetrics tensorboard matplotlib pytest hypothesis
    "$here" -m pip uninstall -q -y pydantic pydantic-core annotated-types typing-inspection 2>/dev/null
    "$here" - <<'CHECK'
import importlib.util, sys, torch
assert sys.version_info[:2] == (3, 12), f"Python {sys.version}, where 3.12 is wanted"
assert torch.version.cuda, f"torch {torch.__version__} is a CPU build"
assert importlib.util.find_spec("pydantic") is None, "pydantic is here, as it is not there"
print(f"twin: Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
CHECK
}

copy() { # the checkout, as it is now, to a folder
    rm -rf "$1"
    mkdir -p "$1"
    git ls-files -z --cached --others --exclude-standard | tar -c --null --ignore-failed-read -T - | tar -x -C "$1"
}

build() {
    environment
    local made=$keep/native
    if [ "$(cat "$made/sources.txt" 2>/dev/null)" = "$("$here" -m benchmarks.device_stages sources)" ]; then
        echo "twin: the native ops in $made are of these sources"
        return
    fi
    copy "$keep/build"
    local start=$SECONDS
    (cd "$keep/build" && KDMOS_CUDA=on TORCH_CUDA_ARCH_LIST=9.0 KDMOS_ARCH=x86-64-v3 \
        "$here" setup.py -q build_ext --build-lib lib)
    echo "twin: built in $((SECONDS - start)) s"
    rm -rf "$made"
    mkdir -p "$made"
    cp "$keep"/build/lib/kdmos/_C.*.so "$keep/build/lib/kdmos/_cuda.so" "$made"
    (cd "$keep/build" && "$here" -m benchmarks.device_stages sources) > "$made/sources.txt"
}

rehearse() {
    environment
    [ -d gpu_pack ] || { echo "twin: no gpu_pack/; make gpu-pack first" >&2; exit 1; }
    copy "$keep/tree"
    cp -r gpu_pack "$keep/tree"
    local code=0
    for call in A B; do # as two machines would
        rm -rf "$keep/tree/runs" "$keep/tree"/kdmos/*.so
        (cd "$keep/tree" && CUDA_VISIBLE_DEVICES= OUT="$keep/out" "$here" -m benchmarks.device --call $call) || code=1
    done
    grep -hE '^(failed|timeout|no time)' "$keep"/out/summary-*.txt && code=1
    exit $code
}

case ${1:-} in
build) build ;;
rehearse) rehearse ;;
*) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac
