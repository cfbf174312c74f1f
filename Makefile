# Everything here works from a fresh checkout on Linux or macOS; each target sets up what it needs.

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
RUN ?= runs/quickstart
PROMPT ?= def __init__(self
ARGS ?=
SLOW ?=
TESTS ?= tests
WORKERS ?= 2
AGAIN ?=

# Tried in this order, by running them: a name on PATH may be a shim that only prints an error.
PYTHON_PATHS = python3.12 python3 python \
  "$$HOME"/.pyenv/versions/3.12*/bin/python3.12 /usr/local/bin/python3.12 /usr/bin/python3.12 \
  /usr/local/opt/python@3.12/bin/python3.12 /opt/homebrew/bin/python3.12 /opt/*/bin/python3.12 \
  "$$(uv python find 3.12 2>/dev/null)"
PYTHON_CHECK = import sys, ensurepip, venv; sys.exit(sys.version_info[:2] != (3, 12))
PYTHON_MISSING = Python 3.12 with its venv module is needed and was not found; \
  install it (Debian and Ubuntu: python3.12-venv) or name it with "make PYTHON=/path/to/python3.12".

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format parity bench gpu-check clean

help: ## list the targets
	@echo 'make TARGET'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1: \2/p' Makefile
	@echo 'PYTHON=... names the Python to use; make train also takes RUN=folder, PROMPT="text"'
	@echo 'and ARGS="train.tokens=4M ...", make test TESTS=tests/unit.'

setup: $(VENV)/installed ## make .venv and install the package into it

train: $(VENV)/installed ## train a small hybrid model on the standard library, then let it write
	$(VENV)/bin/hybrid-train train experiment=quickstart run_dir=$(RUN) $(ARGS)
	@echo
	$(VENV)/bin/hybrid-train generate checkpoint=$(RUN) prompt="$(PROMPT)" temperature=0.7 top_p=0.9

test: $(VENV)/installed-dev ## run the tests that this machine can run; SLOW=1: the slow ones, too
	$(VENV)/bin/pytest -n $(WORKERS) --dist loadgroup -rs --durations=10 $(if $(SLOW),,-m "not slow") $(TESTS)

lint: $(VENV)/installed-dev ## style, import layers, types, size limits, shell scripts
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck .ci/run docker/*.sh launch/*.sh launch/slurm/*.sh launch/slurm/train.sbatch tests/*.sh tests/gpu/*.sh
	$(VENV)/bin/pytest -q tests/architecture

format: $(VENV)/installed-dev ## put the code into its standard form
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

parity: $(VENV)/installed-dev ## compare every parallel layout with one process; plant faults
	$(VENV)/bin/python -m tests.parity $(ARGS)

bench: $(VENV)/installed-dev ## time a training step against transformers
	$(VENV)/bin/python tests/benchmarks/train_step.py $(ARGS)

gpu-check: ## check a GPU machine, with no network needed; AGAIN=1: all anew, ARGS=--plain: without a GPU
	@PYTHON='$(PYTHON)' tests/gpu/run.sh $(if $(AGAIN),--again) $(ARGS)

clean: ## remove .venv, caches and build products; runs/ and data/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
	  .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps, so that a second call has nothing to do. Written last: an interrupted step is done again.
$(VENV)/created:
	@for python in $(if $(PYTHON),"$(PYTHON)",$(PYTHON_PATHS)); do \
	  if "$$python" -c '$(PYTHON_CHECK)' >/dev/null 2>&1; then \
	    echo "Creating $(VENV) with $$python"; \
	    "$$python" -m venv --clear $(VENV) && touch $@; exit; \
	  fi; \
	done; \
	echo '$(PYTHON_MISSING)' >&2; exit 1

$(VENV)/installed: $(VENV)/created setup.py constraints.txt
	@echo 'Installing; the first time this loads about 3 GB and takes some minutes.'
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
