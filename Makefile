# `make quickstart` runs FedSP on the embedded model and text; `make test` and `make lint` check the code.
# Needs Python >= 3.11 and make, nothing else. Variables: VENV (folder of the virtual environment), PYTHON (the
# interpreter to build it with), PIP_ARGS (further options of pip install), PYTEST_ARGS, ARGS (of `fedsp fit`).

VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
ARGS ?=
RUN_DIR ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

# Everything here runs offline; torch's threads (OMP_NUM_THREADS) are the user's choice.
export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt
# A named interpreter is the only candidate; else the first of these that is new enough.
CANDIDATES := $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python3.14 python)

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint federation-demo bench results-table setup clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed  ## install, then run FedSP on the embedded model and text (a few minutes)
	$(BIN)/fedsp fit --config configs/quickstart.yaml --trainer.run_dir $(RUN_DIR) $(ARGS)

test: $(VENV)/.installed-dev  ## install with the development tools, then run the tests with coverage
	$(BIN)/python -m pytest --cov --cov-report=term $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## check format, lint rules, import layers and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

federation-demo: $(VENV)/.installed-dev  ## run a live federation of three processes, audit it, compare it with the simulation
	$(BIN)/python scripts/federation_demo.py

bench: $(VENV)/.installed-dev  ## run the benchmarks and print one table (under 15 minutes on 2 free cores)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/table.py

results-table: $(VENV)/.installed-dev  ## rebuild the table of docs/results.md from results/*.csv
	$(BIN)/python scripts/results_table.py

setup: $(VENV)/.installed-dev  ## create the virtual environment with the development tools

clean:  ## remove the virtual environment and the tools' caches; runs/ stays
	rm -rf $(VENV) .coverage .coverage.* htmlcov .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# --- setup: one pip call, repeated only when pyproject.toml or constraints.txt changed ------------

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fedsp into $(VENV) (once; some minutes)"
	$(INSTALL) -e .
	@touch $@

# The development tools include all that the quickstart needs: both stamps are set.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fedsp and its development tools into $(VENV) (once; some minutes)"
	$(INSTALL) -e ".[dev]"
	@touch $(VENV)/.installed $@

# Debian's python3 may come without venv and ensurepip: such an interpreter is passed over.
$(BIN)/python:
	@python=; \
	for candidate in $(CANDIDATES); do \
	    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        python=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "fedsp needs Python >= 3.11 with its venv module; tried: $(CANDIDATES)." >&2; \
	    echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python ..." >&2; \
	    exit 1; \
	fi; \
	echo "creating $(VENV) with $$python ($$($$python --version 2>&1))"; \
	$$python -m venv $(VENV)
