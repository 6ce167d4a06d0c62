# make demo    train a small Linformer on text that Python carries, and let it write
# make test    the tests
# make test-slow   the tests of minutes, whose small cases are in make test
# make test-gpu   the tests that need a CUDA device: make test-gpu TORCH=torch
# make lint    ruff and pyright
# make bench   the benchmarks
# make bench-gpu   attention on a CUDA device beside its rivals, up to an hour, of which compilers take most: make bench-gpu TORCH=torch
# make bench-models   whole models and decoding on a CUDA device beside transformers', forty minutes
# Everything lives in VENV, which is made on first use. A GPU build of torch: make setup TORCH=torch
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# A GPU build of torch brings the Triton that it was built for, and must keep it. Beside a CPU build, which brings none,
# this one interprets the kernels in the tests; it exists for Linux alone.
TRITON ?= triton==3.9.0; sys_platform == 'linux'

RESULTS ?= benchmarks/results
MONTH = $(shell date +%Y%m)
RESULT ?= $(RESULTS)/attention_gpu_$(MONTH).json

READY = $(VENV)/.ready
# Processes that share the tests. Each computes on one core: most tests are too small for more.
WORKERS ?= 2
# The commands need nothing but what is in this folder and in VENV.
OFFLINE = HF_HUB_OFFLINE=1

.PHONY: setup demo test test-slow test-gpu lint bench bench-gpu bench-models

setup: $(READY)

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(VENV)/bin/python -c "import triton" 2>/dev/null || $(VENV)/bin/python -m pip install --quiet "$(TRITON)"
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt "$(TORCH)" -e ".[dev]"
	touch $(READY)

demo: setup
	$(OFFLINE) $(VENV)/bin/linpass train

test: setup
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not gpu and not slow" -n $(WORKERS) --dist worksteal

test-slow: setup
	$(OFFLINE) $(VENV)/bin/python -m pytest -m "slow and not gpu"

test-gpu: setup
	$(OFFLINE) $(VENV)/bin/python -m pytest -m gpu

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

bench: setup
	$(OFFLINE) $(VENV)/bin/python -m benchmarks.run

# fla-core holds chunk_gsa of flash-linear-attention; it and linformer are only measured against.
bench-gpu: setup
	$(VENV)/bin/python -m pip install --quiet --no-deps fla-core==0.6.0 einops==0.8.2 linformer==0.2.3
	$(OFFLINE) $(VENV)/bin/python -m benchmarks.attention_gpu $(RESULT) --seconds 3000
	$(OFFLINE) $(VENV)/bin/python -m benchmarks.attention_gpu $(RESULTS)/attention_both_ways_gpu_$(MONTH).json --bidirectional --seconds 900
	$(OFFLINE) $(VENV)/bin/python -m benchmarks.attention_host $(RESULTS)/attention_host_gpu_$(MONTH).json

bench-models: setup
	$(OFFLINE) $(VENV)/bin/python -m benchmarks.models_gpu $(RESULTS)/models_gpu_$(MONTH).json --seconds 1500
	$(OFFLINE) $(VENV)/bin/python -m benchmarks.decoding_gpu $(RESULTS)/decoding_gpu_$(MONTH).json --seconds 900
	$(OFFLINE) $(VENV)/bin/python -m benchmarks.model_errors $(RESULTS)/model_errors_gpu_$(MONTH).json
