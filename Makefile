# Every target sets up what it needs in .venv and needs nothing but Python 3.11 or newer, with its venv module.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q

.PHONY: help quickstart test test-all check bench docs clean

help:
	@echo "make quickstart   install, look at this machine, climb examples/pharmacy, say where the report lies"
	@echo "make test         the tests that take seconds"
	@echo "make test-all     all tests"
	@echo "make check        lint, format, types, import contracts, budgets"
	@echo "make bench        speed and memory beside TRL, transformers and vLLM (about an hour); ratios of mixtures of experts"
	@echo "make docs         write the generated pages under docs/ again"
	@echo "make clean        remove .venv, peers' environments and caches; models and runs stay"

# Installed again only when pyproject.toml changed.
.venv/.user: pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@touch $@

.venv/.dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[dev]'
	@touch .venv/.user $@

quickstart: .venv/.user
	$(BIN)/ascent doctor
	$(BIN)/ascent climb examples/pharmacy

test: .venv/.dev
	$(BIN)/python -m pytest

test-all: .venv/.dev
	$(BIN)/python -m pytest -m "slow or not slow"

check: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/house

bench: .venv/.dev
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python docs/generate.py
	$(BIN)/python benchmarks/moe.py --json benchmarks/moe.json

docs: .venv/.dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv benchmarks/.envs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
