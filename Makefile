# Every target sets up what it needs: Python 3.10 or later, make and, for the fast kernels, a C++ compiler are enough.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml setup.py $(wildcard dat/csrc/*.h dat/csrc/*/*)

.PHONY: install demo test lint format clean

install: $(STAMP)

# torch first and without build isolation: the kernels are built against the torch that will run them.
$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0])'
	@# A venv that was left without pip (Debian without python3-venv) is made anew.
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install "torch>=2.11" "setuptools>=77" wheel ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --no-build-isolation --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python -m examples.demo

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror dat/csrc/*.h dat/csrc/*/*

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i dat/csrc/*.h dat/csrc/*/*

clean:
	rm -rf build dist *.egg-info dat/*.so $(STAMP)
