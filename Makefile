# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo
KILLS  ?= 60

.PHONY: help install demo test soak lint format clean-demo

help:
	@echo "make demo        simulate recordings, train in three phases, evaluate (minutes on two CPU cores)"
	@echo "make test        all tests, then those that start several ranks"
	@echo "make soak        kill a run 60 times and compare it with one left alone (KILLS=60)"
	@echo "make lint        ruff and mypy"
	@echo "make format      let ruff format the code"
	@echo "make clean-demo  forget the demo's data and run"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "b2t needs Python 3.10 or newer, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev,eeg,peers]'
	@touch $@

demo: install
	BIN=$(BIN) RUN=$(RUN) scripts/demo.sh

# One thread per process: the tests start many small ones.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not distributed"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m distributed

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
