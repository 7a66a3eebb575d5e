# make compare and make test, and for contributors make test-slow, make lint, make docs, make results (tables and figures
# from the stored runs) and make results-rerun (hours: trains the missing runs first). All make the environment first,
# and again if the text of setup.cfg or pyproject.toml changes.
VENV ?= .venv
PYTHON ?= python3
READY = $(VENV)/.ready-$(shell cat setup.cfg pyproject.toml | cksum | cut -d ' ' -f 1)

compare: $(READY)
	$(VENV)/bin/python benchmarks/compare.py
	$(VENV)/bin/python benchmarks/compare.py --data fashion-mnist

results: $(READY)
	$(VENV)/bin/python benchmarks/tables.py

results-rerun: $(READY)
	$(VENV)/bin/python benchmarks/results.py

test: $(READY)
	$(VENV)/bin/python -m pytest -n logical --dist loadfile

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -n logical --dist loadfile -m slow

lint: $(READY)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

docs: $(READY)
	$(VENV)/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build

$(READY):
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[benchmarks,test,lint,docs]'
	rm -f $(VENV)/.ready*
	touch $@

.PHONY: compare results results-rerun test test-slow lint docs
