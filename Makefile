# make demo   set up, prepare, train, evaluate, report: from a bare checkout, on CPU or GPU
# make test   set up, then every check: ruff, mypy --strict, import contracts, the tests of some minutes
# make test-all   the long tests, which `make test` leaves out: all ZeRO stages, lost nodes, sweeps, the demo
# make docs   the documents and the API as a site, into site/
# Options: PYTHON=python3.12 (who makes the environment), VENV=DIR, TORCH=auto|system|torch==X (see requirements/install.sh),
#          DEMO="--base Qwen/Qwen3.5-0.8B-Base" (options of launch/demo.py), PYTEST="-k memory" (options of pytest)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= auto
DEMO ?=
PYTEST ?= -n 2 --dist loadfile

BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.titans_ds_ready
# Bytecode is kept, whatever the shell's environment says: without it every process compiles 2,600 files anew.
RUN := PATH="$(BIN):$$PATH" TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=
# One thread a process: the tests start several at a time. (Training shares the cores among its ranks by itself.)
TESTING := $(RUN) OMP_NUM_THREADS=1

.PHONY: setup demo test test-all lint types imports pytest format lock docs
.DEFAULT_GOAL := test

setup: $(READY)

$(READY): pyproject.toml requirements/ci.txt requirements/install.sh
	@requirements/install.sh $(VENV) $(PYTHON) $(TORCH)
	@touch $@

demo: setup
	@$(RUN) python -m launch.demo $(DEMO)

test: lint types imports pytest

lint: setup
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

types: setup
	@$(RUN) mypy

imports: setup
	@$(RUN) lint-imports --no-logo

pytest: setup
	@$(TESTING) python -m pytest -m "not long" $(PYTEST)

test-all: setup
	@$(TESTING) python -m pytest -m long $(PYTEST)

format: setup
	@$(RUN) ruff format .
	@$(RUN) ruff check --fix .

# In an environment of its own: the site's packages have nothing to do with the library's.
docs: .venv-docs/.ready
	@PYTHONPATH=. NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs --quiet build --strict

.venv-docs/.ready: requirements/docs.txt
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install -qq --disable-pip-version-check -r requirements/docs.txt
	@touch $@

# Write down what this environment holds, for CI and for everyone else. torch is chosen apart, by requirements/install.sh.
lock:
	@{ echo "# Made by 'make lock' from a working environment; every extra of pyproject.toml is in it."; \
	  $(BIN)/python -m pip freeze --exclude-editable --exclude torch --exclude titans-ds | grep -v -i -E '^(nvidia-|triton==)'; \
	  } > requirements/ci.txt.new && mv requirements/ci.txt.new requirements/ci.txt
