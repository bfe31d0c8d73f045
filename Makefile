# Two commands do everything on a machine with Python 3.11, make and a package index: `make demo` and `make test`.
PYTHON ?= python3.11
ifeq ($(shell command -v $(PYTHON) 2>/dev/null),)
PYTHON := python3
endif
BIN := .venv/bin
OUTPUT ?= runs/demo
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-data test-gpu quality format bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

# The stamps hold what was installed from: a changed requirements file installs again, an unchanged one costs nothing.
.venv/python.stamp:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "recllm needs Python 3.11 or newer, found %d.%d: make PYTHON=python3.11 …" % v[:2])'
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/run.stamp: .venv/python.stamp requirements.txt pyproject.toml
	@echo "installing requirements.txt into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

.venv/dev.stamp: .venv/run.stamp requirements-dev.txt
	@echo "installing requirements-dev.txt into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

install: .venv/run.stamp  ## .venv with everything that runs

demo: .venv/run.stamp  ## the main job on the embedded shop, from raw log to a model that holds the items
	@$(BIN)/recllm demo --output $(OUTPUT)

test: .venv/dev.stamp  ## the test suite
	@$(BIN)/python -m pytest -n 2

test-slow: .venv/dev.stamp  ## the tests that take minutes or gigabytes
	@$(BIN)/python -m pytest -m slow

test-data: .venv/dev.stamp  ## the tests on public data sets: RECLLM_DATA=folder make test-data
	@$(BIN)/python -m pytest -m data

test-gpu: .venv/dev.stamp  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

quality: .venv/dev.stamp  ## lint and format check
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: .venv/dev.stamp  ## mend what lint and format can mend
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: .venv/dev.stamp  ## the benchmarks of docs/performance.md (about 3 minutes on 2 quiet cores)
	@$(BIN)/python benchmarks/prepare.py --output runs/bench/prepare.json
	@$(BIN)/python benchmarks/semantic_ids.py --output runs/bench/semantic_ids.json

clean:  ## remove .venv and what demo and bench made (not your own runs)
	@rm -rf .venv runs/demo runs/bench
