# `make test` and `make demo` do all the set-up by themselves: an own virtual environment, the pinned versions.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready

.PHONY: test demo setup lint clean gpu gpu-pack cuda-on-host

test: setup lint
	$(BIN)/python -m pytest --cov --cov-report=term

# From nothing to a distilled student and runs/demo/report.html. REAL=path also tries it on a real sequence folder,
# SEEDS=3 trains three pairs of students.
demo: setup
	$(BIN)/python -m kdmos.demo $(if $(REAL),--real $(REAL)) $(if $(SEEDS),--seeds $(SEEDS))

# On a machine with a GPU and a CUDA build of torch, with the Python that is there: builds the kernels, runs every op and
# student test on both devices, then the benchmarks, whose rows are appended to benchmarks/results.
GPU_PACK ?= gpu_pack
GPU_TESTS = tests/ops tests/models/test_student.py tests/models/test_fast.py tests/models/test_student_on_gpu.py \
    tests/models/test_normed.py tests/models/test_teacher_on_gpu.py
GPU_BENCHMARKS = polar_grid polar_scatter dysample wdcd_loss selective_scan height_residual student training_step
gpu:
	KDMOS_CUDA=on $(PYTHON) setup.py -q build_ext --inplace
	KDMOS_REQUIRE_SHARED=1 KDMOS_SHARED=$(GPU_PACK) $(PYTHON) -m pytest -q $(GPU_TESTS)
	for name in $(GPU_BENCHMARKS); do \
	    $(PYTHON) -m benchmarks.bench_$$name $(GPU_PACK)/realdata/kitti-raw-0005-a --device cuda || exit 1; done
	$(PYTHON) -m benchmarks.bench_stream $(GPU_PACK)/realdata/kitti-raw-0005-a --device cuda --precision bfloat16 \
	    --scans 10000 --full-speed

# Without a GPU: the CUDA kernels' source compiled for the CPU (x86-64), threads as fibers, and the op tests on it.
cuda-on-host: setup
	$(BIN)/python tests/cuda_on_host/build.py build/cuda_on_host
	KDMOS_CUDA_ON_HOST=build/cuda_on_host/kernels.so $(BIN)/python -m pytest -q tests/ops

# What those tests and benchmarks read, in one folder that git ignores: the goldens and eight real scans.
SHARED ?= ../shared
gpu-pack:
	rm -rf $(GPU_PACK)
	mkdir -p $(GPU_PACK)/goldens $(GPU_PACK)/realdata/kitti-raw-0005-a/velodyne $(GPU_PACK)/realdata/kitti-raw-0005-a/labels
	cp $(SHARED)/goldens/*student* $(SHARED)/goldens/a3_* $(SHARED)/goldens/a7_* $(GPU_PACK)/goldens
	for name in poses.txt calib.txt velodyne/00000[0-7].bin labels/00000[0-7].label; do \
	    cp $(SHARED)/realdata/kitti-raw-0005-a/$$name $(GPU_PACK)/realdata/kitti-raw-0005-a/$$(dirname $$name); done
	du -sh $(GPU_PACK)

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
