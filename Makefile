# Two commands do everything from a fresh clone, set-up included: `make demo` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test soak lint

BIN := .venv/bin
INSTALLED := .venv/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@echo "make demo   the whole chain on the shipped photographs: shards, learner, adapter, evaluation, report"
	@echo "make test   ruff, mypy, layer check, tests"
	@echo "make soak   the long tests"
	@echo "make lint   ruff, mypy, layer check"

demo: $(INSTALLED)
	deedsr demo --out demo

# Two processes with a Ray cluster each; the tests of a file share what is costly to make.
test: lint
	pytest -n 2 --dist loadfile

soak: $(INSTALLED)
	pytest -m soak --timeout 3600

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy
	pytest tests/test_layers.py

# Once, and again when a pin changes. The stamp is written last, so that an interrupted install is repeated.
$(INSTALLED): pyproject.toml
	@python=$$(for name in python3.11 python3.12 python3; do command -v $$name || true; done | while read -r found; do \
	    "$$found" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' && echo "$$found" && break; done || true); \
	if [ -z "$$python" ]; then \
	    echo "error: DeeDSR needs Python 3.11 or 3.12 on the PATH (python3.11, python3.12 or python3)" >&2; exit 1; fi; \
	echo "installing into .venv with $$python: some minutes, once" >&2; \
	"$$python" -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@
