# `make help` lists the targets. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0
# Each of a job's processes imports torch and Ray: compiled once, whatever the machine's setting.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test long check fix golden bench

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/.done ## build .venv from pyproject.toml and constraints.txt

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "udiff needs Python 3.11 or newer"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[cluster,encoders,download,clean,captions,lora,demo,dev]'
	@touch $@

demo: setup ## the main job on real pictures, from web shards to samples and a report
	$(BIN)/python -m jobs.demo --out runs/demo

serve: setup ## answer on http://127.0.0.1:8000 with the demo's model
	$(BIN)/python -m jobs.serve --bundle runs/demo/ddt/bundle

test: setup ## all tests but the long ones
	$(BIN)/python -m pytest -m 'ray and not long' tests
	$(BIN)/python -m pytest -m 'not ray and not long' tests -n 2 --dist loadfile

long: setup ## the long tests: whole runs, killed again and again
	$(BIN)/python -m pytest -m long tests --timeout 900

check: setup ## style, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: setup ## put style right where a tool can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: setup ## reference vectors of a folder: make golden GOLDEN=DIR
	$(BIN)/python -m pytest tests/golden $(if $(GOLDEN),--golden $(GOLDEN))

bench: setup ## the figures of benchmarks/README.md
	$(BIN)/python -m benchmarks.train_loop
	$(BIN)/python -m benchmarks.prepare
	$(BIN)/python -m benchmarks.read_decode
	$(BIN)/python -m benchmarks.download
	$(BIN)/python -m benchmarks.resume
	$(BIN)/python -m benchmarks.memory_shards
