# Two commands: make compare, make test. Both make the environment first, once.
VENV ?= .venv
PYTHON ?= python3
READY = $(VENV)/.ready

compare: $(READY)
	$(VENV)/bin/python benchmarks/compare.py

test: $(READY)
	$(VENV)/bin/python -m pytest

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[benchmarks,test]'
	touch $@

.PHONY: compare test
