# On a fresh machine each target first makes what it needs: .venv, with the CUDA libraries that fit the driver, if there is one.
#   make test PYTHON=python3.12     another interpreter (for a new .venv: make clean first)
#   make test PYTEST_ARGS="-k causal" JOBS=8
PYTHON ?= python3
VENV ?= .venv
# Test processes. Numba's threads and a GPU are shared by them all, so more than 2 gains little.
JOBS ?= 2
PYTEST_ARGS ?=
BACKEND ?= simt
TOOLS ?= memcheck racecheck synccheck

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PACKAGE := setup.cfg pyproject.toml .ci/cuda_extra.py

.DEFAULT_GOAL := help
.PHONY: help demo test perf sanitize sass verify lint wheel clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(VENV)/demo.stamp  ## decode a real serving batch on this machine, checked against float64
	$(BIN)/python -m mla_numba

test: $(VENV)/test.stamp  ## the whole suite that this machine can run, then the CUDA kernels in Numba's simulator
	@status=0; \
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not sim" $(PYTEST_ARGS) || status=$$?; \
	NUMBA_ENABLE_CUDASIM=1 $(BIN)/python -m pytest -n $(JOBS) -m sim $(PYTEST_ARGS) || status=$$?; \
	exit $$status

perf: $(VENV)/perf.stamp  ## measure this machine: ceilings, the quick suite, peers that import (perf/README.md)
	$(BIN)/python -m perf

sanitize: $(VENV)/test.stamp  ## small decodes under NVIDIA's compute-sanitizer, on a GPU machine (BACKEND=simt TOOLS="memcheck racecheck")
	$(BIN)/python -m perf.sanitize --backend $(BACKEND) --tools $(TOOLS)

sass: $(VENV)/test.stamp  ## what the compiler made of the Hopper kernels: registers, spills, instructions (no GPU needed)
	$(BIN)/python -m perf.sass

verify: $(VENV)/test.stamp  ## the property suite against every backend that runs here, with a progress bar
	$(BIN)/python -m verify

lint: $(VENV)/dev.stamp  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(VENV)/demo.stamp  ## dist/mla_numba-*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove .venv and all that was built
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 10) <= v[:2] < (3, 14) or sys.exit(f"{sys.executable} is Python {v[0]}.{v[1]}, but mla_numba needs 3.10 to 3.13: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# A stamp stands for what is installed; the CUDA extra is chosen when it is made.
$(VENV)/demo.stamp: $(PACKAGE) | $(BIN)/python
	@echo "installing mla_numba and what it needs into $(VENV), a minute or two ..."
	@extra=$$($(BIN)/python .ci/cuda_extra.py) && $(PIP) --editable ".$${extra:+[$$extra]}"
	@touch $@

# Without a driver the tests still compile CUDA kernels: cu13.
$(VENV)/test.stamp: $(PACKAGE) | $(BIN)/python
	@echo "installing mla_numba and its tests' needs into $(VENV), a minute or two ..."
	@$(PIP) --editable ".[$$($(BIN)/python .ci/cuda_extra.py cu13),test]"
	@touch $@ $(VENV)/demo.stamp

$(VENV)/perf.stamp: $(VENV)/demo.stamp
	@$(PIP) --editable ".[perf]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	@$(PIP) --editable ".[dev]"
	@touch $@
