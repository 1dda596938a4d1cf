# Two commands do everything from a fresh clone, set-up included: `make demo` and `make test`. With the first Python of
# those supported that is found, or with another: `make PYTHON=python3.13 test`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test soak lint

BIN := .venv/bin
INSTALLED := .venv/.installed$(if $(PYTHON),-$(notdir $(PYTHON)))
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

# Once, and again when a version changes. The stamp is written last, so that an interrupted install is repeated.
$(INSTALLED): pyproject.toml $(wildcard requirements/*.txt)
	@python=$$(for name in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do command -v $$name || true; done | while read -r found; do \
	    "$$found" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' && echo "$$found" && break; done || true); \
	if [ -z "$$python" ]; then \
	    echo "error: DeeDSR needs Python 3.11, 3.12 or 3.13 on the PATH$(if $(PYTHON),; PYTHON=$(PYTHON) is none)" >&2; exit 1; fi; \
	echo "installing into .venv with $$python: some minutes, once" >&2; \
	"$$python" -m venv $(if $(PYTHON),--clear ).venv
	$(BIN)/python -m pip install --quiet --editable ".[pipeline,test]" \
	    --constraint "$$($(BIN)/python -c 'import sys; print("requirements/py%d%d.txt" % sys.version_info[:2])')"
	@touch $@
