# make demo: SFT, then Dr. DPO, on a toy world, in a minute and a half.   make test: all tests.   make lint: ruff.
PYTHON ?= python3.11
BIN = .venv/bin

.PHONY: demo test lint setup

demo: setup
	$(BIN)/python runs/demo.py

test: setup
	$(BIN)/python -m pytest -q tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: .venv/done

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	touch .venv/done
