# SPDX-License-Identifier: MIT
# Each command first installs what it needs into .venv, so any of them may come first:
#
#   make test       run the quick tests
#   make test-all   run the slow tests too
#   make nightly    two hours of random cases, derivatives, reruns, leaks, threads and fuzzing
#   make bench      measure on this CPU: tables, goals, a JSON file and plots; with ISA=avx2 as on a
#                   processor without AVX-512
#   make lint       check formatting, lint and types
#   make aot        compile the Triton kernels for each architecture, without a GPU
#   make gpu-kit    build what a GPU machine without a network needs, with its version of Python
#   make gpu        check and time the kernels on an NVIDIA GPU; installs nothing into PYTHON
#
# PYTHON selects the interpreter, VENV the environment, MAX_JOBS the parallel compilers, WORKERS the
# processes that run the tests (0: this one); with CONVNN_CUDA=1 the CUDA library is built even if
# PyTorch has no CUDA. pip's own variables can point it to a CPU build of PyTorch.
PYTHON ?= python3
VENV ?= .venv

# Relative, because pip splits the value at spaces.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

python := $(VENV)/bin/python
# As many processes as tests/conftest.py says, unless told otherwise.
WORKERS ?= auto
in_parallel := -n $(WORKERS) --dist worksteal
cpp_files = $(shell find csrc examples tests tools -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
build_files := setup.py CMakeLists.txt convnn_kernels/version.py $(shell find csrc -type f)

.NOTPARALLEL:
.PHONY: help test test-all nightly aot gpu-kit gpu bench lint
help:
	@sed -n '2,/^$$/{/^#/{s/^# \{0,1\}//p}}' Makefile

test: $(VENV)/.test
	$(python) -m pytest $(in_parallel) -m "not slow and not gpu and not triton"

test-all: $(VENV)/.test
	$(python) -m pytest $(in_parallel) -m "not gpu and not triton and not host_cuda and not sanitized"
	$(python) -m pytest -m "(host_cuda or sanitized) and not gpu"
	TRITON_INTERPRET=1 $(python) -m pytest -m triton tests/test_triton*.py tests/test_gpu_runner.py

nightly: $(VENV)/.test
	$(python) -m tools.nightly

# Compiles the Triton kernels for each architecture with each version of Triton and records the
# outcome. Kernels that have not changed since are not compiled again.
triton_versions := 3.6.0 3.7.1 3.8.0
aot: $(VENV)/.test $(addprefix $(VENV)-triton-,$(addsuffix /.done,$(triton_versions)))
	for version in $(triton_versions); do \
	  $(VENV)-triton-$$version/bin/python -m tools.aot --write || exit 1; \
	done
	$(python) -m tools.aot_table

$(VENV)-triton-%/.done: constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install torch numpy
	PIP_CONSTRAINT= $(@D)/bin/python -m pip install --no-deps triton==$*
	touch $@

# Puts libraries, compiled kernels and flashlib into gpu-kit (docs/gpu.md). The versions are those of
# the GPU machine; needs nvcc.
gpu-kit: $(VENV)-gpu/.done
	$(VENV)-gpu/bin/python -m tools.gpu_kit

$(VENV)-gpu/.done: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "make gpu-kit: PYTHON must be Python 3.12, not $(PYTHON)"; exit 2; }
	$(PYTHON) -m venv $(@D)
	PIP_CONSTRAINT= $(@D)/bin/python -m pip install torch==2.11.0 cmake ninja pybind11 \
	  'numpy<2.4' pillow psutil pytest pytest-timeout pytest-xdist scikit-image tqdm
	touch $@

# STAGES selects some of the stages, OUTPUT the folder of results. If there is neither a kit nor a
# CUDA library, the library is built for the GPU of this machine.
capability = import torch; print("%d.%d" % torch.cuda.get_device_capability())
gpu:
	@$(PYTHON) -c 'import torch' 2>/dev/null || \
	  { echo "make gpu: $(PYTHON) has no PyTorch; choose another one with PYTHON=..."; exit 2; }
	@test -e gpu-kit/manifest.json || test -e convnn_kernels/lib/libconvnn_cuda.so || \
	  ! arch=$$($(PYTHON) -c '$(capability)' 2>/dev/null) || \
	  TORCH_CUDA_ARCH_LIST=$$arch $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m benchmarks.gpu $(if $(STAGES),--only $(STAGES)) $(if $(OUTPUT),--output $(OUTPUT))

# What convnn_kernels, PyTorch, oneDNN, MKL, and FAISS of newer and older versions read.
as_avx2 := CONVNN_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
  MKL_ENABLE_INSTRUCTIONS=AVX2 FAISS_SIMD_LEVEL=AVX2 FAISS_OPT_LEVEL=AVX2
bench: $(VENV)/.bench $(VENV)/.faiss
	$(if $(ISA),$(or $(as_$(ISA)),$(error ISA must be avx2, not $(ISA)))) $(python) -m benchmarks

# Where there is no wheel, the benchmark leaves out what is compared with FAISS.
$(VENV)/.faiss: $(VENV)/.bench constraints.txt
	-$(python) -m pip install --only-binary :all: faiss-cpu
	touch $@

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

# The package, editable, with one of its extras; rebuilt only if a source has changed.
$(VENV)/.test $(VENV)/.bench $(VENV)/.dev: $(VENV)/.%: $(VENV)/.base $(build_files)
	$(python) -m pip install --no-build-isolation -e ".[$*]"
	$(python) -m convnn_kernels.info
	touch $@
