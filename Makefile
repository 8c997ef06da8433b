# `make test` and `make demo` do all the set-up by themselves: an own virtual environment, the pinned versions.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready

.PHONY: test demo setup lint clean

test: setup lint
	$(BIN)/python -m pytest --cov --cov-report=term

# From nothing to a distilled student and runs/demo/report.html. REAL=path also tries it on a real sequence folder,
# SEEDS=3 trains three pairs of students.
demo: setup
	$(BIN)/python -m kdmos.demo $(if $(REAL),--real $(REAL)) $(if $(SEEDS),--seeds $(SEEDS))

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
