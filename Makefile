# `make test` and `make demo` do all the set-up by themselves: an own virtual environment, the pinned versions.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready

.PHONY: test coverage demo setup lint clean gpu gpu-pack twin cuda-on-host

test: setup lint
	$(BIN)/python -m pytest

# The same tests, up to half as slow again, and the share of each file that they run.
coverage: setup
	$(BIN)/python -m pytest --cov --cov-report=term

# From nothing to a distilled student and runs/demo/report.html. REAL=path also tries it on a real sequence folder,
# SEEDS=3 trains three pairs of students.
demo: setup
	$(BIN)/python -m kdmos.demo $(if $(REAL),--real $(REAL)) $(if $(SEEDS),--seeds $(SEEDS))

# On a machine with a GPU and a CUDA build of torch, with the Python that is there: what is there, is it right, how fast,
# and training; stage by stage, see benchmarks/device.py. CALL=A (250 s) or CALL=B (400 s); without it both in turn.
# BUDGET=seconds for another length, OUT=folder for the results (runs/gpu). GPU_PACK is read where it is there.
GPU_PACK := gpu_pack
gpu:
	$(PYTHON) -m benchmarks.device $(if $(CALL),--call $(CALL))

# Without a GPU: the CUDA kernels' source compiled for the CPU (x86-64), threads as fibers, and the op tests on it.
cuda-on-host: setup
	$(BIN)/python tests/cuda_on_host/build.py build/cuda_on_host
	KDMOS_CUDA_ON_HOST=build/cuda_on_host/kernels.so $(BIN)/python -m pytest -q tests/ops

# An environment like that of such a machine, without the GPU: `make twin` builds the native ops in it, packs, and
# rehearses `make gpu`. TWIN: its folder. PYTHON3_12, TORCH: others, for instance TORCH=2.13.0 TWIN=build/twin-2.13.
TWIN       ?= build/twin
PYTHON3_12 ?= python3.12
TORCH      ?= 2.11.0
IN_TWIN    := PYTHON=$(PYTHON3_12) TORCH=$(TORCH) KEEP=$(TWIN) benchmarks/twin.sh
twin: gpu-pack
	$(IN_TWIN) rehearse

# What `make gpu` cannot find there, in one folder that git ignores: goldens, nine real scans, the native ops for sm_90
# and CPython 3.12, and missing packages. It travels beside the checkout, so that it must be small.
SHARED       ?= ../shared
GPU_PACK_MIB ?= 45
SEQUENCE     := realdata/kitti-raw-0005-a
gpu-pack:
	$(IN_TWIN) build
	rm -rf $(GPU_PACK)
	mkdir -p $(GPU_PACK)/goldens $(GPU_PACK)/$(SEQUENCE)/velodyne $(GPU_PACK)/$(SEQUENCE)/labels
	cp $(SHARED)/goldens/a3_* $(SHARED)/goldens/a7_* $(GPU_PACK)/goldens
	for name in poses.txt calib.txt velodyne/00000[0-8].bin labels/00000[0-8].label; do \
	    cp $(SHARED)/$(SEQUENCE)/$$name $(GPU_PACK)/$(SEQUENCE)/$$(dirname $$name) || exit 1; done
	cp -r $(TWIN)/native $(GPU_PACK)
	$(TWIN)/bin/python -m pip download -q --only-binary=:all: --python-version 3.12 --implementation cp \
	    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d $(GPU_PACK)/wheels pydantic
	chmod -R u+w $(GPU_PACK)
	git rev-parse --short HEAD > $(GPU_PACK)/commit.txt
	du -sh $(GPU_PACK)
	test $$(du -sm $(GPU_PACK) | cut -f 1) -le $(GPU_PACK_MIB)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(READY)

# torch comes first, so that nothing below can bring another build of it.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[train,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .coverage
