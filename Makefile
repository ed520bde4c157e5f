# `make` alone lists what there is. Everything is made inside this folder: the environment in .venv, the model store in .bentoml.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The stamp remembers which pyproject.toml the environment was made from.
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
# Two to four files at a time; the end-to-end tests load a server and watch its deadlines, so they run alone.
# A worker that dies ends the run: started again, it may leave the others waiting for ever.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# `make test SLOW=yes` runs the slow ones as well, in one go, so that what they share is made once.
SLOW ?=
MARK := $(if $(SLOW),,-m "not slow")
SERVE_ARGS ?=
IMAGE_ARGS ?=

export BENTOML_HOME ?= $(CURDIR)/.bentoml
export BENTOML_DO_NOT_TRACK ?= True
# The environment is make's own, so Python keeps what it compiled there: starting a server takes half the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## List these targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(STAMP) ## Make or refresh the environment (.venv) from pyproject.toml

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed; name one with `make PYTHON=python3.12 …`.' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo 'No virtual environment could be made; on Debian: apt install python3-venv' >&2; exit 1; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
		echo 'Installing into $(VENV). This takes some minutes: PyTorch from the package index is its CUDA build (2.8 GB to fetch, 5.4 GB on disk; it runs on a CPU).'
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[build,dev]'
	@touch $@

.PHONY: demo
demo: $(STAMP) ## Make a small inspection set, fit it, serve it, and judge two pictures over HTTP
	@$(BIN)/python -m ood_runners.demo

.PHONY: serve
serve: $(STAMP) ## Serve every product with a version in production, on port 3000
	@$(BIN)/bentoml serve --timeout-keep-alive 75 $(SERVE_ARGS)

.PHONY: image
image: $(STAMP) ## Build the container image: [BASE=image to build from] [IMAGE=its name] [IMAGE_ARGS=…]
	@$(BIN)/python deploy/image.py $(if $(BASE),--base $(BASE)) $(if $(IMAGE),--image $(IMAGE)) $(IMAGE_ARGS)

.PHONY: test
test: $(STAMP) ## Run the tests, without the slow ones: [SLOW=yes, with them]
	$(BIN)/python -m pytest $(MARK) --ignore tests/end_to_end --ignore tests/container $(PARALLEL) $(PYTEST_ARGS)
	$(BIN)/python -m pytest $(MARK) tests/end_to_end $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(STAMP) ## Run the slow tests
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

.PHONY: test-container
test-container: $(STAMP) ## Build images and run them with podman, as root (.ci/containers installs what it needs)
	$(BIN)/python -m pytest -m container tests/container $(PYTEST_ARGS)

.PHONY: check
check: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: format
format: $(STAMP) ## Apply the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: clean
clean: ## Remove the environment, the model store and everything else made here
	rm -rf $(VENV) .bentoml demo reports build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
