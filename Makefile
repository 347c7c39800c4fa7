# `make run` and `make test` set themselves up in .venv: all they need is make and Python 3.11 or newer.

VENV   ?= .venv
PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11
TORCH  ?= $(shell grep '^torch==' constraints.txt)
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What decides the contents of .venv; a change installs again.
SETTINGS := settings.ini setup.py constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test lint lab docs bench bench-full install clean FORCE

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{ printf "%-19s%s\n", $$1, $$2 }'
	@echo
	@echo '  make run ARGS="--seconds 60 --seeds 5"    options of `hctrain acs` (ARGS=--help lists them)'
	@echo '  make run ARGS=--resume                    go on after Ctrl-C'
	@echo '  make test ARGS="-k 05_sslalm"             options of pytest (--slow also runs the slow cells)'
	@echo '  make bench ARGS="step ghost"              some of its suites (ARGS=--help lists them)'
	@echo '  make install PYTHON=python3.12            another Python, for a new .venv'
	@echo '  make install TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"'
	@echo '                                            another PyTorch: /cpu is the small one without CUDA'

run: $(VENV)/.run ## Train on the census data: table and figure in ./runs
	@$(BIN)/hctrain acs $(ARGS)

test: $(VENV)/.dev ## Run every check: notebooks, modules, site, package, lint
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev ## Check names, imports and line lengths with ruff
	@$(BIN)/ruff check

lab: $(VENV)/.dev ## Open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=nbs $(ARGS)

docs: $(VENV)/.dev ## Build the site: with Quarto into _docs, without it into _site
	@if command -v quarto > /dev/null; then PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_docs; \
	else $(BIN)/python tools/build_site.py _site; fi

bench: $(VENV)/.peers ## Measure speed beside other libraries: a table, and JSON in ./runs/bench
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m bench $(ARGS)

bench-full: $(VENV)/.peers ## The same with more rounds and seeds, and every library tuned anew: an hour
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m bench --effort full $(ARGS)

install: $(VENV)/.dev ## Install everything for development into .venv
	@echo 'Ready: . $(BIN)/activate'

clean: ## Remove what was built (.venv and runs stay)
	rm -rf _docs _proc _site build dist .pytest_cache .ruff_cache .hypothesis
	find hctrain nbs tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# Four stamps, each an installation that need not be repeated: Python and PyTorch, the experiment, the libraries that
# speed is compared with, development.
# TORCH given by hand is compared with what is there each time; otherwise an existing stamp is enough.
ifneq ($(origin TORCH),file)
$(VENV)/.torch: FORCE
endif

$(VENV)/.torch: | $(VENV)/.python
	@if [ "$$(cat $@ 2> /dev/null)" != '$(TORCH)' ]; then \
	  echo 'Installing $(TORCH) into $(VENV), once; it is large. (Another build: make help)'; \
	  if [ -e $@ ]; then $(PIP) uninstall --quiet --yes torch; fi; \
	  $(PIP) install --quiet $(TORCH) && echo '$(TORCH)' > $@; \
	fi

$(VENV)/.python:
	@for p in $(PYTHON); do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	    if ! $$p -c 'import ensurepip, venv' 2> /dev/null; then \
	      echo "make: $$p has no venv module: install it first (Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; \
	    fi; \
	    $$p -m venv $(VENV) && $$p --version > $@ && exit 0 || exit 1; \
	  fi; \
	done; \
	echo 'make: hctrain needs Python 3.11 or newer, and none of "$(PYTHON)" is: name one with `make PYTHON=/path/to/python3`.' >&2; \
	exit 1

# PyTorch is installed above and stays as it is, whatever build it is: its line is left out here.
$(VENV)/.constraints: constraints.txt | $(VENV)/.python
	@grep -v '^torch==' $< > $@

$(VENV)/.run: $(VENV)/.torch $(VENV)/.constraints $(SETTINGS)
	@echo 'Installing hctrain with what the census experiment needs into $(VENV), once.'
	@$(PIP) install --quiet -c $(VENV)/.constraints -e '.[acs]'
	@touch $@

$(VENV)/.peers: $(VENV)/.torch $(VENV)/.constraints $(SETTINGS)
	@echo 'Installing the libraries to compare with into $(VENV), once.'
	@$(PIP) install --quiet -c $(VENV)/.constraints -e '.[peers]'
	@touch $@ $(VENV)/.run

# pip does not see a broken nbdev set (nbdev 2.4 with a newer execnb), so it is imported.
$(VENV)/.dev: $(VENV)/.torch $(VENV)/.constraints $(SETTINGS)
	@echo 'Installing the tools for development into $(VENV), once.'
	@$(PIP) install --quiet -c $(VENV)/.constraints -e '.[dev]'
	@$(PIP) check
	@$(BIN)/python -c 'import nbdev.export, nbdev.test, nbdev.showdoc'
	@touch $@ $(VENV)/.run
