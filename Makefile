# The project's commands. `make help` prints them from the ## comments.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?=
LABELS ?=
PORT ?= 8000

# Compiled sources are kept: the product starts a dozen processes, each of which would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test nightly chaos chaos-full up check format bench clean

help: ## Print the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first and pinned: an unpinned torch pulls gigabytes of CUDA libraries. Where the default
# indexes hold no CPU wheel, point PIP_EXTRA_INDEX_URL at PyTorch's CPU index (README, "Install").
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,train,test]'
	touch $(STAMP)

install: $(STAMP) ## Create .venv and install everything

demo: $(STAMP) ## The whole chain on synthetic CT (DATA=folder [LABELS="liver=6"] for your own pairs)
	$(BIN)/python -m service.demo $(if $(DATA),--data '$(DATA)') $(if $(LABELS),--labels '$(LABELS)')

up: $(STAMP) ## Start the embedded stack until Ctrl-C
	$(BIN)/pcrl up --port $(PORT)

test: $(STAMP) ## Run the test suite, but for what `make nightly` runs
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not nightly"

nightly: $(STAMP) ## Run the tests that take long beside a shorter one of the same
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m nightly

chaos: $(STAMP) ## 60 uploads under 8 random kills of every process, at most two leases to drain (`make test` runs them too)
	$(BIN)/python -m benchmarks.chaos --uploads 60 --kills 8

chaos-full: $(STAMP) ## 500 uploads under 50 kills, the embedded pair, every reliability test at length
	$(BIN)/python -m benchmarks.chaos --uploads 100 --kills 10 --embedded
	PCRL_CHAOS_FULL=1 $(BIN)/python -m pytest tests/chaos
	$(BIN)/python -m benchmarks.chaos --uploads 500 --kills 50 --trainings 6 --timeout 3600

check: $(STAMP) ## Format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code and sort its imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Run the benchmarks and print their JSON
	@ls benchmarks/bench_*.py >/dev/null 2>&1 || { echo "no benchmark has been written yet"; exit 1; }
	@for file in benchmarks/bench_*.py; do \
	  $(BIN)/python -m benchmarks.$$(basename $$file .py) --json || exit 1; done

clean: ## Remove caches and demo output (not data/)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache demo-output
