# Two commands: `make book` and `make test`. Each makes the environment if it is not there; both can be repeated.
PYTHON ?= python3
SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Passes run side by side, a process a core: more threads than that get into each other's way.
export OMP_NUM_THREADS ?= 1
CODE := $(wildcard dpmix/*.py dpmix/*/*.py) $(wildcard data/public/*.json) $(wildcard data/paper/*.csv) $(wildcard data/results/*/*/*.json) \
	$(wildcard benchmarks/results/*.json) $(wildcard tests/mutants.py)

.PHONY: book browse readme test lint lab env mutants notebooks standins clean

book: $(READY)
	@mkdir -p book/_build
	@# The book remembers pages and outputs by the text of their sources: forget both when the code behind them has changed.
	@cat $(CODE) | cksum > book/_build/code.new; \
	cmp -s book/_build/code.new book/_build/code || rm -rf book/_build/.jupyter_cache book/_build/.doctrees; \
	mv book/_build/code.new book/_build/code
	@# What went wrong is said again at the end, with the last lines of each failed page; the next call reads all pages again
	@# (Sphinx would take the failed ones for done) and executes those alone that failed.
	@$(BIN)/python book/execute.py
	@rm -rf book/_build/html/reports; set -o pipefail; \
	{ $(BIN)/jupyter-book build -W --keep-going book/ 2>&1 1>&3 | tee book/_build/warnings >&2; } 3>&1 || { \
	rm -rf book/_build/.doctrees; echo "The book is not whole:"; \
	grep -E '(WARNING|ERROR|CRITICAL): ' book/_build/warnings | cut -c -300; \
	find book/_build/html/reports -name '*.log' -exec tail -n 3 {} + 2> /dev/null; exit 1; }
	@echo "$(CURDIR)/book/_build/html/index.html"

browse: $(READY)  ## open every page of the built book, and three notebooks in JupyterLab, in a headless Chromium
	@test -f book/_build/html/index.html || { echo "book/_build/html/index.html: absent; run make book first"; exit 1; }
	$(BIN)/python tests/browser.py
	$(BIN)/python tests/lab.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lab: $(READY)
	$(BIN)/jupyter lab notebooks

mutants: $(READY)  ## does a test notice when an operator of core is changed? Hours; make mutants SAMPLE=30 for so many of each module
	$(BIN)/pip install --quiet cosmic-ray==8.7.0
	$(BIN)/python tests/mutation.py --sample $(or $(SAMPLE),0)

notebooks: $(READY)  ## make every .ipynb from its .py
	$(BIN)/python tests/notebooks.py

readme: $(READY)  ## README's first picture and its words, from the ledger
	$(BIN)/python tests/readme.py

standins: $(READY)  ## rebuild data/public from nothing, a quarter of an hour
	$(BIN)/papermill --log-output notebooks/public_standins.ipynb -p rebuild True > /dev/null

env: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "PYTHON=$(PYTHON): is older than 3.11; run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $(READY)

clean:
	rm -rf book/_build data/runs data/cache
