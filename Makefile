# Every target sets up what it needs: Python 3.10 or later, make and, for the fast kernels, a C++ compiler are enough.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Several times as fast as pip; where only pip can reach packages: make install INSTALL=".venv/bin/python -m pip install".
INSTALL ?= $(BIN)/python -m uv pip install --python $(BIN)/python
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed_demo
KERNELS := $(wildcard $(foreach suffix,h cuh cpp cu,dat/csrc/*.$(suffix) dat/csrc/*/*.$(suffix)))
SOURCES := pyproject.toml setup.py $(KERNELS)
CLANG_FORMATTED := $(KERNELS) $(wildcard $(foreach suffix,h cuh cpp cu,tests/cuda_host/*.$(suffix)))
# What the wheel is installed beside to be checked: PYTHON:TORCH, torch as a requirement of pip.
CHECKS ?= python3.10:torch~=2.11.0 python3.12:torch

ALL_OPS := deform_sample ms_deform_attn ms_deform_attn_extremes deform_attn_op neighborhood_attn

.PHONY: install demo test test-gpu lint format docs wheel clean

install: $(STAMP)

$(STAMP): $(SOURCES)
	$(call install,dev)
	touch $@ $(DEMO_STAMP)

$(DEMO_STAMP): $(SOURCES)
	$(call install,demo)
	touch $@

# Installs the package, editable, with an extra. torch comes first and without build isolation: the kernels are built
# against the torch that will run them.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0])'
	@# A venv that was left without pip (Debian without python3-venv) is made anew.
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(INSTALL) "torch>=2.11" "setuptools>=77" wheel ninja
	@# Where Python writes no byte code itself, every process would compile torch anew.
	PATH="$(abspath $(BIN)):$$PATH" UV_COMPILE_BYTECODE=1 $(INSTALL) --no-build-isolation --editable ".[$(1)]"
endef

# The demo needs the package and the extra `demo` alone, not the tools of developers.
demo: $(DEMO_STAMP)
	$(BIN)/python -m examples.demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# On a machine with a GPU whose own python has torch, timm and pytest: nothing is installed, libraries that lack are built.
# DAT_GPU_TESTS=dry runs on a CPU what can run there.
test-gpu:
	@[ "$$DAT_GPU_TESTS" = dry ] || $(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make test-gpu: torch finds no GPU")'
	@ls dat/_C_cuda*.so >/dev/null 2>&1 || [ "$$DAT_GPU_TESTS" = dry ] || $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m pytest $$($(PYTHON) -c 'import xdist; print("-n 4")' 2>/dev/null) -rs --durations=5 tests/gpu
	@# The ops' own tests, of which every one that takes a device also takes a GPU.
	[ "$$DAT_GPU_TESTS" = dry ] || $(PYTHON) -m pytest $$($(PYTHON) -c 'import xdist; print("-n 4")' 2>/dev/null) -k cuda $(ALL_OPS:%=tests/ops/test_%.py)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMATTED)

docs: install
	$(INSTALL) --quiet mkdocs-material "mkdocstrings[python]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_FORMATTED)

wheel: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/wheel.py $(CHECKS)

clean:
	rm -rf build dist *.egg-info dat/*.so $(STAMP) $(DEMO_STAMP)
