# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo
KILLS  ?= 60
LOCK   := requirements.lock
LATEST := .envs/latest
LOWEST := .envs/lowest
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadfile \
    --no-loadscope-reorder

.PHONY: help install demo test test-latest test-lowest test-tritons lock soak lint format clean-demo

help:
	@echo "make demo          simulate recordings, train in three phases, evaluate (minutes on two CPU cores)"
	@echo "make test          all tests, then those that start several ranks"
	@echo "make test-latest   the fast tests with the newest packages that pyproject.toml allows"
	@echo "make test-lowest   the same with the oldest, on Python 3.10 (PYTHON=python3.10)"
	@echo "make test-tritons  the kernels' tests under every triton that a supported torch brings"
	@echo "make lock          renew $(LOCK), the versions that everything here installs"
	@echo "make soak          kill a run 60 times and compare it with one left alone (KILLS=60)"
	@echo "make lint          ruff and mypy"
	@echo "make format        let ruff format the code"
	@echo "make clean-demo    forget the demo's data and run"

install: $(VENV)/.installed

# Constraints, not requirements: torch's own metadata say whether a machine needs the CUDA packages.
# Packages built from source are built with locked tools too: older pips read PIP_CONSTRAINT there.
$(VENV)/.installed: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "b2t needs Python 3.10 or newer, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) $(BIN)/python -m pip install --quiet --editable '.[dev,eeg,bids,nwb,lm,lora,peers]'
	@touch $@

demo: install
	BIN=$(BIN) RUN=$(RUN) scripts/demo.sh

# One thread per process: the tests start many small ones. Tests of one file stay together, they
# share what is costly to make; those that start ranks need the cores for themselves.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not distributed" $(SIDE_BY_SIDE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m distributed

test-latest:
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev,eeg,bids,nwb,lm,lora,peers]'
	PATH="$(CURDIR)/$(LATEST)/bin:$$PATH" OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest -m "not distributed" $(SIDE_BY_SIDE)

# What is asked for directly, at its oldest; what that brings along, at its newest.
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade uv
	$(LOWEST)/bin/uv pip compile pyproject.toml --all-extras --resolution lowest-direct --upgrade --quiet \
	  --python $(LOWEST)/bin/python --no-annotate --output-file $(LOWEST)/requirements.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --no-deps \
	  --requirements $(LOWEST)/requirements.txt --editable .
	PATH="$(CURDIR)/$(LOWEST)/bin:$$PATH" OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -m "not distributed" $(SIDE_BY_SIDE)

test-tritons: install
	$(BIN)/python scripts/kernel_tritons.py

# The tools that build packages from source are locked beside what pyproject.toml asks for.
lock:
	$(PYTHON) -m venv .envs/lock
	.envs/lock/bin/python -m pip install --quiet --upgrade uv
	printf 'setuptools>=77\nwheel\n' | .envs/lock/bin/uv pip compile pyproject.toml - --all-extras \
	  --universal --python-version 3.10 --upgrade --quiet --no-annotate \
	  --custom-compile-command "make lock" --output-file $(LOCK)

soak: install
	$(BIN)/python scripts/soak.py --kills $(KILLS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean-demo:
	rm -rf data/demo runs/demo
