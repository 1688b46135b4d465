PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

export HF_HUB_OFFLINE ?= 1
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION ?= 1
export TOKENIZERS_PARALLELISM ?= false

INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
REQUIREMENTS := pyproject.toml constraints.txt requirements-bundled.txt
PYTEST := $(BIN)/pytest -q -n 2 --dist loadfile
# With RETRY=1 in the environment a few tests that failed are run once more, alone: see tests/again.py.
AGAIN = || { [ -n "$(RETRY)" ] && $(BIN)/python -m tests.again; }

.PHONY: demo test test-quick test-slow test-soak coverage mutants docs lint format clean

demo: .venv/.installed
	$(BIN)/fedllm simulate quickstart $(ARGS)

test: test-quick test-slow

test-quick test-slow: export OMP_NUM_THREADS = 1

test-quick: .venv/.installed-test
	$(PYTEST) -m "not slow and not soak" $(ARGS) $(AGAIN)

test-slow: .venv/.installed-test
	@$(BIN)/python -m tests.dashboard.chromium
	$(PYTEST) --no-loadscope-reorder --durations 10 -m "slow and not soak" $(ARGS) $(AGAIN)

test-soak: export OMP_NUM_THREADS = 1

test-soak: .venv/.installed-test
	$(BIN)/pytest -q -m soak $(ARGS)

coverage: export OMP_NUM_THREADS = 1

coverage: .venv/.installed-test
	$(PYTEST) -m "not slow and not soak" --cov --cov-report term:skip-covered $(ARGS)

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict $(ARGS)

mutants: export OMP_NUM_THREADS = 1

mutants: .venv/.installed-mutation
	$(BIN)/python tests/mutation/score.py $(ARGS)

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist mutants *.egg-info .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: $(REQUIREMENTS) | .venv/bin/python
	$(INSTALL) --constraint constraints.txt --editable '.[simulation,dashboard]'
	$(INSTALL) --no-deps --requirement requirements-bundled.txt
	@touch $@

.venv/.installed-test: .venv/.installed
	$(INSTALL) --constraint constraints.txt --editable '.[test]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(INSTALL) --constraint constraints.txt --editable '.[docs]'
	@touch $@

.venv/.installed-mutation: .venv/.installed-test
	$(INSTALL) --constraint constraints.txt --editable '.[mutation]'
	@touch $@
