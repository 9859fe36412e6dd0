# Targets of the course; `make` alone lists them. Most run the set-up first if needed, and then use .venv's python.
SHELL := /usr/bin/env bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Ignore the settings of any other Python environment.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX
export PATH := $(CURDIR)/.venv/bin:$(PATH)

PYTHON_IN := .venv/bin/python
READY := .venv/ready
# Run the set-up again if this directory was moved or copied, or if PYTHON names a python: it rebuilds .venv if needed.
ifneq ($(PYTHON)$(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

TESTS := $(PYTHON_IN) -m pytest
# Run two pytest processes. Each takes the next file, or the next group named in tests/distributed, when it is free.
TWO_FILES := -n 2 --dist loadfile --no-loadscope-reorder
TWO_GROUPS := -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: help setup run-notebooks check test matrix lab execute nbval unit distributed cluster cluster-tools notebooks \
	lint style types imports format bench images embedded embedded-text clean

help: ## list the targets
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  %-14s %s\n", $$1, $$2 }'

setup: $(READY) ## create .venv with all pinned packages; most other targets do this first (PYTHON=... names a python)
	@echo "set-up: ready (remove .venv to rebuild it)"

$(READY): constraints.txt pyproject.toml
	@PYTHON="$(PYTHON)" .ci/setup

run-notebooks: $(READY) ## run the whole course without a browser; executed copies in build/notebooks
	@$(PYTHON_IN) tests/notebooks/run.py

lab: $(READY) ## open JupyterLab, which only this machine can reach (127.0.0.1, with a token)
	@$(PYTHON_IN) -m jupyterlab --log-level=WARN --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=. \
		--LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

check: $(READY) ## run lint and unit, which are quick enough for every change
	@.ci/parts lint unit

test: $(READY) ## run lint, unit, distributed, cluster, notebooks and nbval, and show how long each took
	@.ci/parts lint unit distributed cluster notebooks nbval

matrix: $(READY) cluster-tools ## run distributed with every valid combination of settings, each rank in a new interpreter, then all of cluster
	@MATRIX=1 TUTORIAL_LIB_WARM_WORKERS=0 $(TESTS) tests/distributed $(TWO_GROUPS)
	@MATRIX=1 $(TESTS) tests/cluster $(TWO_FILES)

unit: $(READY) ## run fast tests of single functions, with one more pytest process than cores, because some tests wait
	@$(TESTS) tests/unit -n $$(( $$(nproc) + 1 < 8 ? $$(nproc) + 1 : 8 ))

distributed: $(READY) ## compare real runs on 1, 2 and 4 processes number by number, with all valid pairs of settings
	@$(TESTS) tests/distributed $(TWO_GROUPS)

cluster: $(READY) cluster-tools ## test torchrun, SLURM and Ray on virtual nodes of this machine (needs root and Linux, else skipped)
	@$(TESTS) tests/cluster $(TWO_FILES)

cluster-tools: ## install SLURM and munge, which cluster needs (as root, with apt-get)
	@.ci/cluster-tools

notebooks: $(READY) ## check each committed notebook: its form, its claims, and that the code it shows is the library's
	@$(TESTS) tests/notebooks $(TWO_FILES)

nbval: $(READY) ## run every notebook, and compare its claims and deterministic outputs with the committed ones
	@$(PYTHON_IN) tests/notebooks/run.py --copy-to build/nbval
	@$(TESTS) -o addopts=-ra -p tests.conftest -p tests.notebooks.same_claims --nbval-lax --nbval-current-env \
		--nbval-cell-timeout 600 --timeout 620 $(TWO_FILES) \
		$$(ls -r build/nbval/*.ipynb) # the two longest come first

lint: $(READY) ## run style, types and imports at the same time
	@$(MAKE) --jobs --output-sync=target style types imports

style: $(READY) ## run ruff
	@ruff check --quiet . && ruff format --quiet --check . || { echo "style: run make format, which repairs most of this"; exit 1; }

types: $(READY) ## run mypy
	@mypy

imports: $(READY) ## check which module may import which
	@lint-imports --no-logo

format: $(READY) ## let ruff repair style
	@ruff check --quiet --fix . ; ruff format .

execute: $(READY) ## run the committed notebooks in place, so that their outputs match this code
	@$(PYTHON_IN) tests/notebooks/run.py --in-place

# `make bench startup ray` measures only startup and ray: the words after `bench` are its arguments, not targets.
BENCHMARKS := $(if $(filter bench,$(firstword $(MAKECMDGOALS))),$(wordlist 2,99,$(MAKECMDGOALS)))
ifneq ($(BENCHMARKS),)
.PHONY: $(BENCHMARKS)
$(BENCHMARKS): ; @:
endif

bench: $(READY) ## measure the figures of docs/benchmarks.md, as a table and JSON; `make bench startup` measures one
	@$(PYTHON_IN) -m tests.benchmarks.bench $(BENCHMARKS)

images: $(READY) ## redraw images/
	@$(PYTHON_IN) -m tutorial_lib.lab.images

embedded: $(READY) ## train the embedded tiny models again, from their seed
	@$(PYTHON_IN) -m tutorial_lib.embedded.pretrain

embedded-text: $(READY) ## extract the embedded text again, which needs CPython 3.11.7
	@$(PYTHON_IN) -m tutorial_lib.embedded.extract

clean: ## remove what tools and tests leave behind; .venv and your runs stay
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
	@find tutorial_lib tests -name __pycache__ -type d -prune -exec rm -rf {} +
