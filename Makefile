# A fresh machine needs Python 3.11 or 3.12 and make. `make dreamer` and `make test` do the rest.

VENV    ?= .venv
PYTHON  ?=
WORKERS ?= 2
ARGS    ?=

BIN      := $(VENV)/bin
STAMP    := $(VENV)/.installed
# The tested versions first. The probe also finds a Python that cannot make environments (Debian without python3-venv).
PYTHONS  := $(or $(PYTHON),python3.11 python3.12 python3 python)
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))

.DEFAULT_GOAL := help
.PHONY: help setup dreamer tdmpc test learn trust chaos soak mutations lint bench docs clean

help:  ## this list
	@echo "make TARGET [ARGS='...'] [PYTHON=python3.11] [WORKERS=2]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## build .venv once, from pyproject.toml and constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  found=; tried=; \
	  for python in $(PYTHONS); do \
	    if "$$python" -c '$(SUITABLE)' 2>/dev/null; then found=$$python; break; fi; \
	    tried="$$tried $$python ($$("$$python" --version 2>/dev/null || echo 'does not run'));"; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "mbrl-jax needs Python 3.11 or 3.12 with its venv module; tried:$$tried install one, or name one: make setup PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	  fi; \
	  echo "building $(VENV) with $$("$$found" --version): about 1.6 GB, some minutes the first time"; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[dev,video]' -c constraints.txt
	@touch $@

dreamer: setup  ## train DreamerV3 on the default task; ARGS="--task walker_walk ..."
	$(BIN)/python experiments/dreamer_dmc.py $(ARGS)

tdmpc: setup  ## train TD-MPC2 on the default task; ARGS="--task walker_walk ..."
	$(BIN)/python experiments/tdmpc_dmc.py $(ARGS)

test: setup  ## the fast tests, on WORKERS processes; ARGS="tests/unit -k replay"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 10 $(ARGS)

learn: setup  ## the slow tests, which train agents for minutes each
	$(BIN)/python -m pytest -m learning --durations 0 $(ARGS)

trust: setup  ## the longer checks of reliability: determinism, exact resume of every model
	$(BIN)/python -m pytest -m slow --durations 0 $(ARGS)

chaos: setup  ## kill a run with SIGKILL again and again; ARGS="--kills 25"
	$(BIN)/python tests/chaos.py $(ARGS)

soak: setup  ## train for ARGS="--minutes 60" and print memory, open files, step time
	$(BIN)/python tests/soak.py $(ARGS)

mutations: setup  ## seeded bugs that the fast tests must catch
	$(BIN)/python tests/mutations.py $(ARGS)

lint: setup  ## ruff (rules and format) and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: setup  ## time the train step and the whole loop on this machine
	$(BIN)/python benchmarks/train_step.py $(ARGS)

docs: setup  ## build the documentation site into site/; ARGS="--site-dir DIR"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)

clean:  ## remove the environment and every cache; runs stay
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
