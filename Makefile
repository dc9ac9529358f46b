# make demo | test | check | bench | soak | docs - each sets up what it needs; the second time is cheap.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test check bench soak docs clean

$(STAMP): constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	# torch first and pinned: an open range would pull several GB of CUDA packages onto a CPU machine.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,check]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	sh tests/system_packages.sh
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check hpckv tests examples bench containers
	$(BIN)/ruff format --check hpckv tests examples bench containers
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python bench/bench.py
	$(BIN)/python bench/modes.py --modes fast,unshared
	$(BIN)/python bench/store.py
	$(BIN)/python bench/store_peers.py
	$(BIN)/python bench/restart.py
	$(BIN)/python bench/acct.py
	$(BIN)/python bench/plan.py

soak: $(STAMP)
	sh tests/system_packages.sh
	$(BIN)/python -m pytest -m slow -o timeout=7200 -o faulthandler_timeout=7200 --runslow

docs: $(STAMP)
	$(BIN)/python docs/make_configuration.py

clean:
	rm -rf $(VENV) runs build *.egg-info
