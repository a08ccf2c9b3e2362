# Everything a person needs; `make help` lists the targets.
# Variables: PYTHON (an interpreter >= 3.11), INPUT (quickstart on your own jsonl/txt), OUT (its folder),
# PYTEST_ARGS, BENCH_ARGS (of benchmarks/run_all.py).
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS ...) choose where packages come from.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/quickstart
INPUT ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
# Files of tests side by side; a file's own tests share what they prepared, so they stay together.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install quickstart test stress lint format bench clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(STAMP)  ## make .venv and install the package with its development tools (CPU build of the dependencies)

$(STAMP): setup.py pyproject.toml constraints/cpu.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt -e '.[dev]'
	@touch $(STAMP)

quickstart: $(STAMP)  ## edit a real corpus with a prior trained on the spot, train on it, compare (INPUT=my.jsonl for your own text)
	$(BIN)/python examples/quickstart/run.py --output-dir $(OUT) $(if $(INPUT),--input $(INPUT))

test: $(STAMP)  ## run the test suite (no GPU, no network)
	$(BIN)/python -m pytest -m "not stress and not alone" $(SIDE_BY_SIDE) $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "alone and not stress" tests/slurm $(PYTEST_ARGS) || [ $$? = 5 ]  # none of those that were asked for

stress: $(STAMP)  ## run the long tests too
	$(BIN)/python -m pytest --timeout 3600 $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## run the CPU benchmarks (ten minutes) and print ratios against their baselines
	$(BIN)/python benchmarks/run_all.py $(BENCH_ARGS)

clean:  ## remove caches and build products (not runs/, not .venv)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
