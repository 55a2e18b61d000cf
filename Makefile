# Two commands matter: `make demo` and `make test`. Both set everything up in .venv/ first.
# PYTHON=python3.12 picks another interpreter; ARGS="-k plan" is handed to pytest or to the demo;
# MODEL=smollm2 lets the demo fine-tune a real language model (docs/evidence.md).

PYTHON ?= python3
ARGS ?=
MODEL ?= shipped
VENV := .venv
STAMP := $(VENV)/.installed

# After installation nothing is looked up on a network.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install demo evidence test test-slow test-third lint format types docs check clean
.NOTPARALLEL:

help:
	@echo "make demo    fine-tune the shipped model, dense and sparse side by side"
	@echo "make test    run the tests (ARGS=... goes to pytest);  make test-slow  those marked slow, test-third  a third of them"
	@echo "make evidence  where the comparison on a real language model stands (docs/evidence.md)"
	@echo "make lint    ruff check, ruff format --check;  make format  applies both"
	@echo "make docs    the documentation as a site, in build/docs"
	@echo "make types   mypy --strict on the package"
	@echo "make check   lint, types, tests, a third of the slow ones in turn: what continuous integration runs"
	@echo "make clean   remove caches and build output (.venv stays)"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, this is %d.%d; try: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/python -m benchmarks.demo --model $(MODEL) $(ARGS)

evidence: $(STAMP)
	$(VENV)/bin/python -m benchmarks.evidence --json benchmarks/results/evidence.json --status $(ARGS)
	$(VENV)/bin/python -m benchmarks.evidence --json benchmarks/results/evidence_160_steps.json --status $(ARGS)
	$(VENV)/bin/python -m benchmarks.evidence --json benchmarks/results/evidence_500_steps.json --status $(ARGS)

# Two processes of one thread each: tracing, where most of the time goes, runs on one core.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2

test: $(STAMP)
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(STAMP)
	$(VENV)/bin/mypy

docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict

# All slow tests take longer than the 90 minutes of continuous integration: every commit runs a third
# of them there, and the next ones the others. `make test-slow` runs all.
THIRD = $$(( $$(git rev-list --count HEAD 2>/dev/null || echo 0) % 3 ))

test-third: $(STAMP)
	$(PYTEST) -m slow --share "$(THIRD)/3" $(ARGS)

# The order is deliberate: pytest's closing line comes last.
check: lint types test-third test

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find sparselora_fx passes tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
