# make demo    train a small Linformer on text that Python carries, and let it write
# make test    the tests
# make lint    ruff and pyright
# make bench   the benchmarks
# Everything lives in VENV, which is made on first use. A GPU build of torch: make setup TORCH=torch
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

READY = $(VENV)/.ready
# The commands need nothing but what is in this folder and in VENV.
OFFLINE = HF_HUB_OFFLINE=1

.PHONY: setup demo test lint bench

setup: $(READY)

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt "$(TORCH)" -e ".[dev]"
	touch $(READY)

demo: setup
	$(OFFLINE) $(VENV)/bin/linpass train

test: setup
	$(OFFLINE) $(VENV)/bin/python -m pytest -m "not gpu"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

bench: setup
	$(OFFLINE) $(VENV)/bin/python -m benchmarks.run
