# Everything starts from a machine with Python 3.11-3.13, git and the package registries.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Else every process compiles all that it imports, which takes longer than its work.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install serve demo test check format bench reliability docs clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# The environment is made anew when the dependencies or the entry points change.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; set PYTHON=python3.12, say"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "installing into $(VENV); about 7 GB, a minute or several"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]' || \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'  # slower, but finds pip's own settings
	touch $@

install: $(READY)  ## create .venv with everything in it

serve: install  ## serve the shipped model on Ray Serve at http://127.0.0.1:8000
	$(BIN)/mm serve

demo: install  ## open the demo page's server at http://127.0.0.1:7860
	$(BIN)/mm demo

test: install  ## run the tests (the long fuzz runs too: make test ARGS="-m slow")
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: install  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install  ## the benchmarks that run on a laptop
	$(BIN)/python -m demos.bench.divprune
	$(BIN)/python -m demos.bench.path

reliability: install  ## what the server promises when something goes wrong (make reliability ARGS=--release takes hours)
	$(BIN)/python -m demos.bench.reliability $(ARGS)

docs: install  ## the documentation as pages in build/docs, without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:  ## remove the environment and build leftovers
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
