# One command a task; every target sets up .venv first, and a set-up that is done does nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart test check coverage chaos bench bench-serve clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "Python's venv module is missing: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: setup
	@$(BIN)/emoray quickstart

test: setup
	@$(BIN)/python -m pytest -m "not slow and not gpu and not ray" --numprocesses 2 --dist loadfile
	@$(BIN)/python -m pytest -m "not slow and not gpu and ray"

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/vulture

coverage: setup
	@$(BIN)/python -m pytest -m "not slow and not gpu and not ray" --cov=emoray --cov-branch --cov-report=term:skip-covered

chaos: setup
	@$(BIN)/python -m pytest -m "slow and not gpu"
	@$(BIN)/python -m benchmarks.chaos
	@$(BIN)/python -m benchmarks.serve_chaos

# ENCODER: a folder with a pretrained encoder such as all-MiniLM-L6-v2; DATA: a labelled data set such as dair-ai/emotion
bench: setup
	@test -n "$(ENCODER)" -a -n "$(DATA)" || { echo "make bench ENCODER=<folder> DATA=<folder or Hub id>"; exit 1; }
	@$(BIN)/python -m benchmarks.step --encoder $(ENCODER) --data $(DATA)

# MODEL: a trained model's folder; OTHER: another, for the time of a model change; TEXTS: jsonl with a `text` in each row
bench-serve: setup
	@test -n "$(MODEL)" -a -n "$(TEXTS)" || { echo "make bench-serve MODEL=<folder> TEXTS=<jsonl> [OTHER=<folder>]"; exit 1; }
	@command -v wrk > /dev/null || { echo "wrk is missing: on Debian and Ubuntu, apt-get install wrk"; exit 1; }
	@$(BIN)/python -m benchmarks.bench_serve --model $(MODEL) --texts $(TEXTS) $(if $(OTHER),--other $(OTHER))

clean:
	rm -rf $(VENV)
