# Two commands: `make serve` talks to you, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# tests/kernels switches triton's interpreter on for its whole process: it never shares one with other tests
# one BLAS thread a worker: two workers share two cores
TEST_ENV := OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu TOKENIZERS_PARALLELISM=false
XLA_VENV ?= build/torch-xla
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: serve test test-all test-torch-xla static engine parity kernels server clean

serve: $(VENV)/.core
	$(BIN)/twinfer serve $(ARGS)

test: static engine parity kernels server

test-all: test
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m slow tests --ignore tests/kernels
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m slow tests/kernels

# torch-xla wants a torch of its own: 8 GB, most of it CUDA libraries that torch's wheel does not start without
test-torch-xla: $(XLA_VENV)/.test
	$(TEST_ENV) PJRT_DEVICE=CPU $(XLA_VENV)/bin/python -m pytest tests/backends/test_conformance_xla.py tests/backends/test_xla.py

static: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) tests/test_layers.py tests/test_twins.py

engine: $(VENV)/.test
	$(PYTEST) -m "not slow" tests/engine --ignore tests/engine/entrypoints

parity: $(VENV)/.test
	$(PYTEST) -m "not slow" tests/models

kernels: $(VENV)/.test
	$(PYTEST) -m "not slow" tests/backends
	$(PYTEST) -m "not slow" tests/kernels

server: $(VENV)/.test
	$(PYTEST) -m "not slow" tests/engine/entrypoints tests/e2e

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "twinfer needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: pyproject.toml tests/constraints.txt $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable '.[test]'
	touch $@ $(VENV)/.core

$(XLA_VENV)/.test: pyproject.toml tests/constraints-torch-xla.txt
	$(PYTHON) -m venv $(XLA_VENV)
	$(XLA_VENV)/bin/python -m pip install --quiet --constraint tests/constraints-torch-xla.txt --editable '.[torch-xla]' pytest pytest-asyncio hypothesis
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
