# From a fresh clone: `make train`. Everything installed goes into .venv, everything trained into runs.
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
GPU_PYTHON := python3
# Bytecode is kept also where the environment says not to: each worker would compile the package and all tests anew.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: help setup shell train assistant check fast test lint docs board bench gpu-check reproduce clean corpus bilingual
.DEFAULT_GOAL := help

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s  %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED) ## make .venv and install everything into it, once

train: $(INSTALLED) ## train configs/laptop.yaml: minutes on two cores, no download, no account
	$(PYTHON) -m dsv3_lightning run configs/laptop.yaml

assistant: $(INSTALLED) ## from nothing to a model that answers: pre-train, tune, reinforce, evaluate each, chat
	$(PYTHON) -m dsv3_lightning.data.text.sums runs/assistant
	for stage in text tuned reinforced; do \
	  $(PYTHON) -m dsv3_lightning run configs/assistant/$$stage.yaml || exit 1; \
	  $(PYTHON) -m dsv3_lightning evaluate runs/assistant/$$stage --tasks runs/assistant/task.jsonl --protocol aime || exit 1; \
	done
	for sum in 37+48 19+02; do \
	  echo $$sum | $(PYTHON) -m dsv3_lightning chat runs/assistant/reinforced --temperature 0 --max-new-tokens 5; \
	done

corpus: $(INSTALLED) ## fetch the demo corpus of English, Chinese and code, and prepare it for `make bilingual`
	$(PYTHON) -m pip install -q -e '.[dev,data]' -c constraints.txt
	$(PYTHON) -m dsv3_lightning demo-corpus
	$(PYTHON) -m dsv3_lightning prepare configs/bilingual.yaml

bilingual: $(INSTALLED) ## train configs/bilingual.yaml on the corpus of `make corpus`
	$(PYTHON) -m dsv3_lightning run configs/bilingual.yaml

shell: $(INSTALLED) ## start a shell in which `dsv3`, `lightning` and `pytest` are on the PATH
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" VIRTUAL_ENV="$(CURDIR)/$(VENV)" "$${SHELL:-/bin/sh}"

check: $(INSTALLED) ## lint, types and the fast tests side by side: two minutes on two cores
	@$(MAKE) -j2 --no-print-directory lint fast

fast: $(INSTALLED)
	$(PYTEST) -q -m "not slow"

test: $(INSTALLED) ## run the whole test suite
	$(PYTEST)

lint: $(INSTALLED) ## check style, spelling and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files | xargs $(VENV)/bin/codespell
	$(VENV)/bin/mypy -p dsv3_lightning

docs: $(INSTALLED) ## build the documentation site into site/, with every warning an error
	$(PYTHON) -m mkdocs build --strict

board: $(INSTALLED) ## open the dashboard of all runs in TensorBoard
	$(VENV)/bin/tensorboard --logdir runs

bench: $(INSTALLED) ## measure a training step by part, against transformers and an earlier commit, start-up and memory
	$(PYTHON) benchmarks/bench.py

gpu-check: ## check kernels, runs and speed on this machine's CUDA GPU with its own Python; WHEELS=FOLDER: what that lacks
	$(GPU_PYTHON) benchmarks/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS))

reproduce: $(INSTALLED) ## run the papers' experiments: an hour on two cores; QUICK=1: minutes, to see that it works
	$(PYTHON) -m dsv3_lightning reproduce --jobs 2 $(if $(QUICK),--quick --dir runs/quick,--out docs/reproduction.md)

clean: ## remove caches and builds; .venv and runs stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch first and alone: it is the one package whose build (CPU, CUDA) an index or a local wheel decides.
$(INSTALLED): pyproject.toml constraints.txt
	@python3 -c 'import sys; sys.exit("python3 is older than 3.10" if sys.version_info < (3, 10) else 0)'
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install "$$(grep '^torch==' constraints.txt)"
	$(PYTHON) -m pip install -e '.[dev]' -c constraints.txt
	touch $@
