# Each target works alone on a clean clone: it makes .venv first, once, and again when the lock changes.

PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint notebooks bench clean

help:
	@echo "make setup   a .venv with every version as locked"
	@echo "make demo    the audit of the shipped pocket organism: verdict, figures, report"
	@echo "make test    every test, with the shapes in signatures checked"
	@echo "make lint    ruff, pyright, and the order of the floors"
	@echo "make notebooks   run the notebooks from top to bottom"
	@echo "make bench   the benchmarks"
	@echo "make clean   remove .venv and caches"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# torch first and alone: whichever build of it the index offers is the one that stays
	$(PIP) "$$(grep '^torch==' requirements.lock)"
	@# the lock is whole, so nothing is left for pip to choose
	$(PIP) --no-deps -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	@touch $@

demo: setup
	$(BIN)/persona-probe audit

test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_floors.py

notebooks: setup
	$(BIN)/python notebooks/run.py

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
