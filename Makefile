# Each target sets itself up: a virtual environment in .venv, of the exact releases in .ci/locks/main.txt, made when missing
# and brought up to date when the lock or pyproject.toml has changed. Needs Python >= 3.10 and a Python package index, nothing else.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN = $(VENV)/bin
READY = $(VENV)/.saehooks-ready
# Compiled modules are kept even where the shell says not to: compiling torch and transformers takes most of an import,
# and dozens of tests start a process of their own.
TEST_ENV = OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	PYTHONDONTWRITEBYTECODE=

.PHONY: demo test coverage test-newest lint format setup lock docs clean gpu-bench gpu-test

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/saehooks demo --out out/demo.html

test: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# The lines of saehooks that no test runs: settings in pyproject.toml.
coverage: $(READY)
	$(BIN)/python -c "import coverage" 2> /dev/null || $(BIN)/uv pip install --quiet --python $(BIN)/python coverage
	-$(TEST_ENV) $(BIN)/python -m coverage run -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

$(READY): pyproject.toml .ci/locks/main.txt .ci/environment
	@PYTHON="$(PYTHON)" .ci/environment $(VENV) main
	@touch $@

# Resolves every lock again, to the newest releases that .ci/locks/known_good.txt allows.
lock:
	@test -x $(BIN)/uv || command -v uv > /dev/null || PYTHON="$(PYTHON)" .ci/environment $(VENV) main
	VENV=$(VENV) .ci/renew_locks --upgrade

# What newer releases of the dependencies can break, in .venv-newest, whose releases no lock chooses.
test-newest:
	PYTHON="$(PYTHON)" .ci/newest $(PYTEST_ARGS)

# The guide and the reference as a site: out/docs/index.html. A dead link ends it.
docs: $(READY)
	@PYTHON="$(PYTHON)" .ci/environment .venv-docs docs --beside $(VENV)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet --config-file .ci/mkdocs.yml

# These two need no environment of their own: a GPU machine's python3 with torch, Triton, numpy, rich, safetensors and
# (gpu-test) pytest will do.
OWN = $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))

gpu-bench:
	PYTHONPATH=. $(OWN) recipes/benchmark/run.py --device cuda --minutes 8 $(BENCH_ARGS)

gpu-test:
	PYTHONPATH=. $(OWN) -m pytest -m "not slow" tests/kernels $(PYTEST_ARGS)

clean:
	rm -rf out build dist .pytest_cache .ruff_cache .mypy_cache
