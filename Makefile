# Every recipe sets up what it needs: `make demo` and `make test` work on a fresh machine with Python 3.10+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Hundreds of processes start in the tests: each would compile our sources anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test smoke hostile lint types format bench matrix docs site clean

help: ## list the recipes
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## make the virtual environment, install mergekit in it and compile its kernels

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m mergekit warmup
	touch $(READY)

demo: $(READY) ## merge the bundled tiny models and compare the result with its sources
	$(BIN)/python examples/demo.py

test: $(READY) lint types ## lint, types and all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

smoke: $(READY) ## one tiny merge end to end, in seconds
	$(BIN)/python -m pytest tests/test_smoke.py

hostile: $(READY) ## every file of the hostile corpus; `make test` takes an eighth
	MERGEKIT_WHOLE_CORPUS=1 $(BIN)/python -m pytest tests/test_hostile_corpus.py

lint: $(READY) ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## static types
	$(BIN)/mypy

format: $(READY) ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## time a 1.1B-parameter merge against moving its bytes
	$(BIN)/python bench/merge_speed.py

matrix: $(READY) ## every family with every method (minutes)
	$(BIN)/python -m pytest -m matrix tests/test_families.py

site: $(READY) ## build the documentation as a site in docs/_build; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -n -b html docs docs/_build

docs: $(READY) ## write the generated parts of the documentation
	$(BIN)/python docs/generate.py

clean: ## remove what the recipes made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out docs/_build build *.egg-info
