# Every command of the project. `make` alone prints the menu.
# ARGS="…" is passed on:      make prove ARGS="--seed 7 --duration 120"
# PYTHON=… names the Python:  make prove PYTHON=/usr/bin/python3.12

.DEFAULT_GOAL := help
.PHONY: help setup prove test check mutation nightly up down load chaos mutants campaign sim fidelity notebooks bench timings benchmarks benchmarks-compare sla checklist report clean lock
MAKEFLAGS += --no-print-directory

ARGS ?=
PYTHON ?=
export PYTHON
BIN := .venv/bin

help: ## Print this menu
	@printf 'usage: make TARGET [ARGS="…"]\n\n'
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

prove: setup ## Start a real stack, load it, break it, check every entry, report
	@$(BIN)/ledgerproof prove $(ARGS)

test: check ## Run the checks and every test (real stack; a browser for the report)
	$(BIN)/pytest --benchmark-disable $(ARGS)

check: setup ## Lint, format, types and import directions; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mutation: setup ## Change rules and folds in small ways: do the tests notice? (ARGS="--minutes 10")
	$(BIN)/python tools/mutation.py $(ARGS)

nightly: setup ## What takes hours: deep random machines, planted bugs in slices, every mutant of rules and folds
	$(BIN)/pytest tests/machine tests/stack/test_exchange_on_postgres.py --hypothesis-profile nightly --timeout 14400
	$(BIN)/pytest tests/unit/test_judge_scale.py --hypothesis-profile nightly
	$(BIN)/pytest tests/unit/test_sim_paths.py tests/unit/test_sim_command_path.py tests/unit/test_sim_statistics.py \
	    --hypothesis-profile nightly
	$(BIN)/python tools/mutation.py --minutes 0

up: setup ## Start the stack and the service and leave them running
	@$(BIN)/ledgerproof up $(ARGS)

down: setup ## Stop what `make up` or a killed run left behind
	@$(BIN)/ledgerproof down $(ARGS)

load: setup ## The proof under load alone: no fault is injected
	@$(BIN)/ledgerproof prove --faults none $(ARGS)

chaos: setup ## The proof with the standard faults (kill a server, kill a worker, pause Redis)
	@$(BIN)/ledgerproof prove --faults standard $(ARGS)

mutants: setup ## Plant every known bug, show that each is noticed, and store the matrix (an hour on 2 cores)
	@$(BIN)/ledgerproof mutants --write $(ARGS)

sim: setup ## Plan the capacity for a million users (ARGS="--users 2e5"; `ledgerproof sim` lists the model's commands)
	@$(BIN)/ledgerproof sim plan $(ARGS)

fidelity: setup ## Forecast every case, measure it, and score the forecast (half an hour on a quiet machine)
	@$(BIN)/ledgerproof sim fidelity $(ARGS)

notebooks: setup ## Execute the notebooks (ARGS="--html DIR" writes them as pages)
	@$(BIN)/ledgerproof notebooks run $(ARGS)

bench: setup ## Measure floors and rates of this machine (ARGS=--quick: 10 minutes)
	@$(BIN)/ledgerproof bench $(ARGS)

timings: setup ## Time the hot functions; see also tests/benchmarks/http_frameworks.py
	$(BIN)/pytest tests/benchmarks --benchmark-only --benchmark-time-unit=us \
	    --benchmark-columns=min,median,iqr,rounds $(ARGS)

benchmarks: setup ## Time the hot functions and store their medians in tests/benchmarks/stored/
	@$(BIN)/python tools/benchmarks.py store $(ARGS)

benchmarks-compare: setup ## Time the hot functions and compare with the stored medians, as ratios (ARGS="--bound 2")
	@$(BIN)/python tools/benchmarks.py compare $(ARGS)

sla: setup ## Show the service levels with what is measured here for each (ARGS="--run RUN --bench FILE")
	@$(BIN)/ledgerproof sla $(ARGS)

checklist: setup ## Go through the deployment checklist and look at each item
	@$(BIN)/ledgerproof checklist $(ARGS)

report: setup ## Write the newest run's report again and say where it is
	@$(BIN)/ledgerproof report $(ARGS)

campaign: setup ## 200 short plans one after the other: the clean build finds nothing (hours; resumable)
	@$(BIN)/ledgerproof campaign --seed 5 $(ARGS)

lock: setup ## Resolve requirements.lock anew (ARGS=--upgrade takes newer versions)
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
	    --quiet --output-file requirements.lock $(ARGS) > /dev/null
	@tools/setup

clean: ## Stop left-over stacks, remove .venv and caches; reports stay
	@if [ -x $(BIN)/ledgerproof ]; then $(BIN)/ledgerproof down; fi
	rm -rf .venv .ledgerproof .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: ## Make .venv ready (every target that needs it does this by itself)
	@tools/setup
