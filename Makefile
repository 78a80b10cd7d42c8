# Two commands set up everything on a fresh machine: `make demo` and `make test`.
# VENV=PATH uses another virtual environment; PYTHON=python3.12 makes it with another interpreter.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
# What an installation is made from: a change of these makes it again, the compiled engine included.
INSTALLED := pyproject.toml CMakeLists.txt qvit/engines/cpu/digest.py $(shell find qvit/engines/cpu/src)

.PHONY: demo test lint base-install soak sanitize aarch64 clean

demo: $(VENV)/.train
	rm -rf demo
	$(BIN)/qvit demo --json demo_report.json

# Files of tests are shared out among WORKERS processes.
test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A fresh environment without the extras: no PyTorch, and models run.
base-install: $(VENV)/.dev
	PYTHON=$(BIN)/python .ci/base_install.sh

# The tests of tests/robustness for minutes instead of moments.
soak: $(VENV)/.dev
	QVIT_SOAK=1 $(BIN)/python -X faulthandler -m pytest tests/robustness

# The CPU engine under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.dev
	PYTHON=$(BIN)/python .ci/sanitize.sh

# The CPU engine cross-compiled for aarch64, under qemu; see the script for what it needs.
aarch64: $(VENV)/.dev
	PYTHON=$(BIN)/python .ci/aarch64.sh

# Each stamp stands for one set of extras, and is older than what it was made from when it has to be installed again.
$(VENV)/.train: $(INSTALLED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train]'
	touch $@

$(VENV)/.dev: $(INSTALLED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,dev]'
	touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) build dist demo demo_report.json
