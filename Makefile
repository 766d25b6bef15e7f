# Every target sets up what it needs: Python 3.11 or newer and make are enough.
#   make test PYTHON=python3.12        another interpreter
#   make demo ARGS="--help"            arguments for the command

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
TEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile
READY := .venv/ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check parity format bench clean

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: $(READY)  ## learn to make videos from prompts on this CPU; writes demo/index.html
	$(BIN)/reelflow demo $(ARGS)

test: $(READY)  ## run the tests
	$(TEST) $(ARGS)

test-all: $(READY)  ## run the tests, the slow ones too
	$(TEST) -m "" $(ARGS)

check: $(READY)  ## format, lint, types and tests: all that CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TEST)

parity: $(READY)  ## compare every family with its reference on many configurations; writes docs/parity.md
	REELFLOW_EXAMPLES=24 REELFLOW_PARITY=docs/parity.md $(BIN)/python -m pytest -q tests/families --ignore=tests/families/test_vdit.py

format: $(READY)  ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## run every benchmark, one after the other
	@set -e; for file in $(sort $(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file; done

clean:  ## remove .venv and caches; demo/ and runs/ stay
	rm -rf .venv build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The stamp is touched last, so an installation that stops half-way is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "reelflow needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)." \
	       "Name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --no-input -c constraints.txt -e ".[train,dev]"
	@touch $@
