# SPDX-License-Identifier: MIT
# Each command first sets up what it needs in .venv, so any of them may come first:
#
#   make test       the quick tests
#   make test-all   the slow tests too
#   make aot        the Triton kernels compiled for each architecture, without a GPU
#   make bench      the benchmark on photographs: a table, a JSON file and pictures
#   make lint       formatting, lint and types
#
# PYTHON selects the interpreter, VENV the environment, MAX_JOBS the parallel compilers. pip reads
# its own variables; they can point it to a CPU build of PyTorch.
PYTHON ?= python3
VENV ?= .venv

# Relative, because pip splits the value at spaces.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

python := $(VENV)/bin/python
cpp_files = $(shell find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
build_files := setup.py CMakeLists.txt convnn_kernels/version.py $(shell find csrc -type f)

.NOTPARALLEL:
.PHONY: help test test-all aot bench lint
help:
	@sed -n '2,/^$$/{/^#/{s/^# \{0,1\}//p}}' Makefile

test: $(VENV)/.test
	$(python) -m pytest -m "not slow and not gpu and not triton"

test-all: $(VENV)/.test
	$(python) -m pytest -m "not gpu and not triton"
	TRITON_INTERPRET=1 $(python) -m pytest -m triton tests/test_triton.py

# Compiles the Triton kernels for each architecture, without a GPU, and writes down the outcome.
aot: $(VENV)/.test
	$(python) -m benchmarks.aot --write

bench: $(VENV)/.bench
	$(python) -m benchmarks

lint: $(VENV)/.dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(cpp_files)
	$(python) -m mypy

# PyTorch and what the build requires.
$(VENV)/.base: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install torch setuptools cmake ninja pybind11
	touch $@

# The package, editable, with one of its extras; built again only where a source has changed.
$(VENV)/.test $(VENV)/.bench $(VENV)/.dev: $(VENV)/.%: $(VENV)/.base $(build_files)
	$(python) -m pip install --no-build-isolation -e ".[$*]"
	$(python) -m convnn_kernels.info
	touch $@
