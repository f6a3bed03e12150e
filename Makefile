# A Python of your own: make demo PYTHON=python3.12. Arguments for pytest: make test ARGS='-k affine --flags slow'
PYTHON ?= python3
OMP_NUM_THREADS ?= 1
ARGS ?=
VENV := .venv
py := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check docs fix clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Quantize a small digits classifier, and compare what comes out
	@$(py) examples/digits.py

test: $(VENV)/.dev ## Run every test, in a process for each processor, up to four: all notebooks, and tests/
	@OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(py) -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(ARGS)

check: $(VENV)/.dev ## What CI checks besides the tests: everything generated is in step, style, docs
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/check

docs: $(VENV)/.dev ## Build the docs in _docs/, as they are published; it needs no network
	@$(py) scripts/docs.py

fix: $(VENV)/.dev ## Bring the package, the notebooks' metadata and README.md in step with the notebooks
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/check --fix

clean: ## Remove the environment and everything built
	rm -rf $(VENV) _docs _proc build dist *.egg-info

# .venv/.demo and .venv/.dev say when the extra of that name was last installed
$(VENV)/.%: settings.ini setup.py pyproject.toml
	@scripts/install $* $(PYTHON)
	@touch $@
