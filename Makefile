# Only Python >= 3.11 and make are assumed. Everything is installed into .venv, once, with the tested versions;
# `make test-site` needs a Chromium besides, found by its name or by CHROMIUM=/path/to/it.
#
#   make demo                 install and run the main job        make lint     ruff: rules and format
#   make test                 the fast test suite                 make types    mypy
#   make test-all             every test but those of the site    make docs     the documentation, warnings are errors
#   make test-site            builds the documentation and looks at it: in Chromium, and at every link
#   make bench                ours beside other libraries         make wheel    dist/: source archive and wheel
#   make clean                remove .venv and whatever was generated
#
# Variables: PYTHON=python3.12   WORKERS=4 (test processes)   TESTS=tests/models (what to test)
#            SIZE=full (of the benchmarks)
#            TORCH_INDEX=https://download.pytorch.org/whl/cpu (where to look for a smaller torch, also at PyPI)

PYTHON ?= python3
WORKERS ?= 2
TESTS ?= tests
TORCH_INDEX ?=
SIZE ?= small

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist loadgroup

.PHONY: demo test test-all test-site lint types docs bench wheel clean

demo: $(VENV)/installed
	$(BIN)/elbozoo compare vae --data wine-standardised --seeds 3 --set likelihood=normal --set hidden=16 --out runs/demo

test: $(VENV)/installed-test
	$(PYTEST) -m "not slow and not peers and not site" $(TESTS)

test-all: $(VENV)/installed-test
	$(PYTEST) -m "not site" $(TESTS)

test-site: docs $(VENV)/installed-site
	$(PYTEST) -m site tests/site

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy -p elbozoo

docs: $(VENV)/installed-docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks --size $(SIZE)

wheel: $(VENV)/installed-dev
	rm -rf build dist
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) build dist *.egg-info runs/demo docs/_build docs/_generated
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that its pin decides which build is drawn.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"found Python {v[0]}.{v[1]}, expected 3.11 or later: make PYTHON=python3.11 ...")'
	@echo "Installing elbozoo into $(VENV); this takes minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-%: $(VENV)/installed
	$(PIP) --editable '.[$*]'
	@touch $@
