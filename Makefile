# Every target sets up what it needs: `make demo` and `make test` are all a new machine has to run.
PYTHON ?= python3
VENV   ?= .venv
# torch goes in first and by itself, so that nothing else decides which build of it is installed.
TORCH  ?= torch==2.13.0
# Each takes some 2 GB of memory.
TEST_WORKERS ?= 2

BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types notebooks docs bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml setup.py $(wildcard hf_adaptive_sparse/kernels/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --editable ".[dev]"
	touch $@

demo: $(INSTALLED) ## Compress the bundled model, offline, and compare it with the dense one
	HF_HUB_OFFLINE=1 $(BIN)/hf-adaptive-sparse demo --output demo-output --overwrite

test: $(INSTALLED) ## Run the tests, in TEST_WORKERS processes
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile

lint: $(INSTALLED) ## Check style, formatting and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(INSTALLED) ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

notebooks: $(INSTALLED) ## Run the notebooks on the bundled model
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake notebooks \
		--numprocesses $(TEST_WORKERS)

docs: $(INSTALLED) ## Build the documentation into site/
	$(PIP) install --quiet --editable ".[docs]"
	$(BIN)/mkdocs build --quiet

bench: $(INSTALLED) ## Regenerate benchmarks/results (needs the evaluation data, see benchmarks/README.md)
	$(BIN)/python benchmarks/method_table.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/open_questions.py
	$(BIN)/python benchmarks/media_transfer.py
	$(BIN)/python benchmarks/solver_cost.py
	$(BIN)/python benchmarks/search_cost.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/samplers.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/kv_search.py
	$(BIN)/python benchmarks/prune_memory.py
	$(BIN)/python benchmarks/sparse_linear.py
	$(BIN)/python benchmarks/sparse_runtime.py
	$(BIN)/python benchmarks/sparse_experts.py
	$(BIN)/python benchmarks/kv_bytes.py
	$(BIN)/python benchmarks/kv_codecs.py
	$(BIN)/python benchmarks/kv_cache.py
	$(BIN)/python benchmarks/update_readme.py

clean: ## Remove what the other targets made
	rm -rf $(VENV) demo-output site build dist *.egg-info hf_adaptive_sparse/kernels/*.so
