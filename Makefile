# make demo: SFT, then Dr. DPO, on a toy world, in about a minute.   make test: all tests.   make lint: ruff.
# make claims: the papers' claims on the toy world; CLAIMS="--quick", "--seeds='11 12 13'": options of runs/claims.py.
PYTHON ?= python3.11
BIN = .venv/bin

.PHONY: demo test claims lint setup

demo: setup
	$(BIN)/python runs/demo.py

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

claims: setup
	PYTHON=$(BIN)/python runs/claims.sh $(CLAIMS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: .venv/done

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	touch .venv/done
