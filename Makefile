# make mnist and make test work from a fresh clone: each sets up what it needs first.
PYTHON ?= $(shell tools/newest-python)
VENV ?= .venv
BIN = $(VENV)/bin
SETUP = $(VENV)/.installed
# A worker for each core and one more: most tests compile, some wait for the processes they start.
PARALLEL ?= -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --dist worksteal
# Compilers for TPUs and GPUs lie apart: beside them jax looks for the devices, and says so.
TARGETS = $(VENV)-targets
# Kernels in Triton's language need a jax and a triton that jax-triton works with.
TRITON = $(VENV)-triton
# The site's builder is no part of what tests need.
DOCS = $(VENV)-docs
# The peers that txcore is measured against lie apart too: they are large, and no part of it.
PEERS = $(VENV)-peers
PEERS_FALLBACK ?= python3

# What depends on the version of jax or of Python; kernels on more than these values, runs of several
# processes and documents do not.
VERSIONED = tests/collectives tests/profiling tests/train/test_engine.py tests/train/test_engine_guards.py \
  tests/train/test_guarded_steps.py tests/train/test_batch_statistics.py tests/train/test_loading.py \
  tests/parallel tests/train/test_replicas.py tests/train/test_prng.py tests/optim tests/kernels/test_kernel_values.py \
  tests/launch/test_initialize.py tests/multiprocess/test_ranks_agree.py tests/examples/test_ecosystem.py \
  tests/test_import.py tests/test_packaging.py
# Compiled for machines that are not here.
TARGET_TESTS = $(shell find tests -name 'test_*target*.py' -not -path '*/targets/*') tests/profiling/targets \
  tests/train/test_describe.py tests/train/test_pipeline_prediction.py
TARGETS_VERSIONED = tests/profiling/targets/test_sends_target.py tests/profiling/targets/test_targets_compile.py
TRITON_TESTS = tests/kernels/test_jax_triton.py tests/kernels/test_triton_ptx.py

.PHONY: setup mnist test test-versioned test-triton lint docs bench bench-peers clean

setup: $(SETUP)

$(SETUP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

mnist: setup  ## train the CNN on two devices and show which collectives the step contains
	$(BIN)/python examples/mnist/train.py --model cnn --devices 2 $(MNIST_ARGS)

test: setup $(TARGETS)/.installed  ## run the tests, those that compile for absent machines last
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)
	$(TARGETS)/bin/python -m pytest $(PARALLEL) $(TARGET_TESTS)

test-versioned: setup $(TARGETS)/.installed  ## run the tests of what depends on the version of jax or Python
	$(BIN)/python -m pytest $(PARALLEL) $(VERSIONED) $(PYTEST_ARGS)
	$(TARGETS)/bin/python -m pytest $(PARALLEL) $(TARGETS_VERSIONED)

$(TARGETS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TARGETS)
	$(TARGETS)/bin/python -m pip install --quiet --editable ".[test,tpu-target,gpu-target]"
	touch $@

test-triton: $(TRITON)/.installed  ## compile the GPU kernels to PTX, and run those in Triton's language by its interpreter
	$(TRITON)/bin/python -m pytest $(PARALLEL) $(TRITON_TESTS)
	TRITON_INTERPRET=1 $(TRITON)/bin/python -m pytest $(TRITON_TESTS)

$(TRITON)/.installed: tests/kernels/jax_triton_requirements.txt
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --requirement $<
	touch $@

lint: setup  ## ruff and mypy over everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p txcore
	$(BIN)/mypy examples/*.py examples/mnist
	$(BIN)/mypy examples/ecosystem
	MYPYPATH=examples/gpt_small $(BIN)/mypy examples/gpt_small
	$(BIN)/mypy tests benchmarks

docs: $(DOCS)/.installed  ## build the site into build/site and test it; a warning is an error
	$(DOCS)/bin/python -m sphinx -W --keep-going -q -c docs . build/site
	TXCORE_SITE=build/site $(DOCS)/bin/python -m pytest tests/test_site.py

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --editable ".[docs]" pytest pytest-benchmark
	touch $@

bench: setup  ## run the benchmark suites, compare them with the last run, and draw one page
	$(BIN)/python benchmarks/run_suites.py $(BENCH_ARGS)

bench-peers: setup $(PEERS)/.installed  ## compare with plain jax, PyTorch and TensorFlow
	$(BIN)/python benchmarks/peers/compare.py --peers-python $(PEERS)/bin/python $(BENCH_ARGS)

# TensorFlow comes out for a new Python months after it.
$(PEERS)/.installed: benchmarks/peers/requirements.txt
	$(call install-peers,$(PYTHON)) || { \
	  echo "bench-peers: $(PYTHON) cannot have the peers, so they run on $(PEERS_FALLBACK)" >&2; \
	  $(call install-peers,$(PEERS_FALLBACK)); }
	touch $@

install-peers = $(1) -m venv --clear $(PEERS) && \
  $(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers/requirements.txt

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
