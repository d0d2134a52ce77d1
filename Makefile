# make demo: SFT, then Dr. DPO, on a toy world, in about a minute.   make test: all tests.   make lint: ruff.
# make test-fast: the tests that run no whole script.   make claims: the papers' claims on the toy world;
# make real: a pretrained model on real pairs, a quarter of an hour; DATA=hh:PATH where there is no hub, REAL="--n_pairs=32".
# CLAIMS="--quick", "--seeds='11 12 13'": options of python -m experiments.claims.
# torch 2.13.0 is built for Python 3.11 to 3.14; make PYTHON=PATH takes any
FITS = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c '$(FITS)' 2>/dev/null && { echo $$p; break; }; done)
BIN = .venv/bin
PYTEST = $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

.PHONY: demo real test test-fast claims lint setup

demo: setup
	$(BIN)/python -m experiments.demo

real: setup
	$(BIN)/python -m experiments.real $(if $(DATA),--data=$(DATA)) $(REAL)

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not launch"

claims: setup
	$(BIN)/python -m experiments.claims $(CLAIMS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: .venv/done

.venv/done: requirements.txt
	@test -n "$(PYTHON)" || { echo 'error: nanopref needs Python 3.11 to 3.14, with venv: install one, or name one with make PYTHON=PATH' >&2; exit 2; }
	@echo 'making .venv from requirements.txt, the first time: a minute or two'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	touch .venv/done
