PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

export HF_HUB_OFFLINE ?= 1
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION ?= 1
export TOKENIZERS_PARALLELISM ?= false

INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
REQUIREMENTS := pyproject.toml constraints.txt requirements-bundled.txt

.PHONY: demo test test-quick test-slow test-soak lint format clean

demo: .venv/.installed
	$(BIN)/fedllm simulate quickstart $(ARGS)

test: test-quick test-slow

test-quick test-slow: export OMP_NUM_THREADS = 1

test-quick: .venv/.installed-test
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not slow" $(ARGS)

test-slow: .venv/.installed-test
	$(BIN)/pytest -q -n 2 --dist loadfile --durations 10 -m "slow and not soak" $(ARGS)

test-soak: export OMP_NUM_THREADS = 1

test-soak: .venv/.installed-test
	$(BIN)/pytest -q -m soak $(ARGS)

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: $(REQUIREMENTS) | .venv/bin/python
	$(INSTALL) --constraint constraints.txt --editable '.[simulation,dashboard]'
	$(INSTALL) --no-deps --requirement requirements-bundled.txt
	@touch $@

.venv/.installed-test: .venv/.installed
	$(INSTALL) --constraint constraints.txt --editable '.[test]'
	@touch $@
