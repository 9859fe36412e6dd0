# Tasks of the course. `make` alone lists them. Each runs the set-up if needed; python is the one in .venv.
SHELL := /usr/bin/env bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Ignore the settings of any other Python environment.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX
export PATH := $(CURDIR)/.venv/bin:$(PATH)

PYTHON_IN := .venv/bin/python
READY := .venv/ready
# Rebuild an environment that was made elsewhere (a moved or copied directory), or with a different python than PYTHON.
ifneq ($(PYTHON)$(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

TESTS := $(PYTHON_IN) -m pytest
# Two pytest processes: each takes a file, or a group that tests/distributed names, when it has finished the one before.
TWO_FILES := -n 2 --dist loadfile --no-loadscope-reorder
TWO_GROUPS := -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: help setup run-notebooks check test matrix lab execute nbval unit distributed cluster cluster-tools notebooks \
	lint style types imports format bench images embedded embedded-text clean

help: ## list the targets
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  %-14s %s\n", $$1, $$2 }'

setup: $(READY) ## the first step of every other target: .venv with everything pinned (PYTHON=... chooses another python)
	@echo "set-up: ready (remove .venv to rebuild it)"

$(READY): constraints.txt pyproject.toml
	@PYTHON="$(PYTHON)" .ci/setup

run-notebooks: $(READY) ## run the whole course without a browser; executed copies in build/notebooks
	@$(PYTHON_IN) tests/notebooks/run.py

lab: $(READY) ## JupyterLab for this machine only: 127.0.0.1, with its token
	@$(PYTHON_IN) -m jupyterlab --log-level=WARN --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=. \
		--LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

check: $(READY) ## lint and unit: run this all the time
	@.ci/parts lint unit

test: $(READY) ## lint, unit, distributed, cluster, notebooks and nbval, and how long each took
	@.ci/parts lint unit distributed cluster notebooks nbval

matrix: $(READY) cluster-tools ## distributed with every valid combination of settings, each rank in a new interpreter; then all of cluster
	@MATRIX=1 TUTORIAL_LIB_WARM_WORKERS=0 $(TESTS) tests/distributed $(TWO_GROUPS)
	@MATRIX=1 $(TESTS) tests/cluster $(TWO_FILES)

unit: $(READY) ## fast tests of single functions, in parallel: one pytest process more than cores, because some tests wait
	@$(TESTS) tests/unit -n $$(( $$(nproc) + 1 < 8 ? $$(nproc) + 1 : 8 ))

distributed: $(READY) ## real runs on 1, 2 and 4 processes, compared number by number: all valid pairs of settings
	@$(TESTS) tests/distributed $(TWO_GROUPS)

cluster: $(READY) cluster-tools ## torchrun, SLURM and Ray on virtual nodes of this machine (root and Linux; skipped elsewhere)
	@$(TESTS) tests/cluster $(TWO_FILES)

cluster-tools: ## install SLURM and munge, which cluster needs (as root, with apt-get)
	@.ci/cluster-tools

notebooks: $(READY) ## check each committed notebook: its form, its claims, and that the code it shows is the library's
	@$(TESTS) tests/notebooks

nbval: $(READY) ## every notebook runs, all claims hold with the committed numbers, deterministic cells show what is committed
	@$(PYTHON_IN) tests/notebooks/run.py --copy-to build/nbval
	@$(TESTS) -o addopts=-ra -p tests.conftest -p tests.notebooks.same_claims --nbval-lax --nbval-current-env \
		--nbval-cell-timeout 600 --timeout 620 $(TWO_FILES) \
		$$(ls -r build/nbval/*.ipynb) # the longest come first

lint: $(READY) ## style, types and imports, at the same time
	@$(MAKE) --jobs --output-sync=target style types imports

style: $(READY) ## run ruff
	@ruff check --quiet . && ruff format --quiet --check . || { echo "style: make format repairs most of this"; exit 1; }

types: $(READY) ## run mypy
	@mypy

imports: $(READY) ## check which module may import which
	@lint-imports --no-logo

format: $(READY) ## let ruff repair style
	@ruff check --quiet --fix . ; ruff format .

execute: $(READY) ## run the committed notebooks in place, so that their outputs match this code
	@$(PYTHON_IN) tests/notebooks/run.py --in-place

# `make bench startup ray` measures these alone: the words after `bench` are its arguments, not targets.
BENCHMARKS := $(if $(filter bench,$(firstword $(MAKECMDGOALS))),$(wordlist 2,99,$(MAKECMDGOALS)))
ifneq ($(BENCHMARKS),)
.PHONY: $(BENCHMARKS)
$(BENCHMARKS): ; @:
endif

bench: $(READY) ## measure the figures of docs/benchmarks.md: a table and JSON; `make bench startup` measures one of them
	@$(PYTHON_IN) -m tests.benchmarks.bench $(BENCHMARKS)

images: $(READY) ## draw images/ again
	@$(PYTHON_IN) -m tutorial_lib.lab.images

embedded: $(READY) ## train the embedded tiny models again, from their seed
	@$(PYTHON_IN) -m tutorial_lib.embedded.pretrain

embedded-text: $(READY) ## extract the embedded text again, which needs CPython 3.11.7
	@$(PYTHON_IN) -m tutorial_lib.embedded.extract

clean: ## remove what tools and tests leave behind; .venv and your runs stay
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
	@find tutorial_lib tests -name __pycache__ -type d -prune -exec rm -rf {} +
