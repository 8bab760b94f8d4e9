# make mnist and make test work from a fresh clone: each sets up what it needs first.
PYTHON ?= $(shell tools/newest-python)
VENV ?= .venv
BIN = $(VENV)/bin
SETUP = $(VENV)/.installed
# Compilers for TPUs and GPUs lie apart: beside them jax looks for the devices, and says so.
TARGETS = $(VENV)-targets

.PHONY: setup mnist test lint bench clean

setup: $(SETUP)

$(SETUP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

mnist: setup  ## train the CNN on two devices and show which collectives the step contains
	$(BIN)/python examples/mnist/train.py --model cnn --devices 2 $(MNIST_ARGS)

test: setup $(TARGETS)/.installed  ## run the tests, those that compile for absent machines last
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	$(TARGETS)/bin/python -m pytest tests/profiling/test_*target*.py

$(TARGETS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TARGETS)
	$(TARGETS)/bin/python -m pip install --quiet --editable ".[test,tpu-target,gpu-target]"
	touch $@

lint: setup  ## ruff and mypy over everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p txcore
	$(BIN)/mypy examples/*.py examples/mnist
	$(BIN)/mypy tests benchmarks

bench: setup  ## run the benchmark suites
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only $(BENCH_ARGS)

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
