# Every target makes .venv and installs what it needs, at the versions of constraints.txt, when that has not been done yet.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
WORKERS ?= auto
SOURCES := hf_merge tests docs $(wildcard examples)

.PHONY: demo test slow quality style pages docs clean

demo: $(VENV)/.installed-demo
	$(BIN)/hf-merge demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) tests

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not network" tests

quality: $(VENV)/.installed-quality
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/python docs/check_coverage.py

style: $(VENV)/.installed-quality
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The paper index and the notebook, from the code and the quick tour.
pages: $(VENV)/.installed-test
	$(BIN)/python docs/make_pages.py

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

clean:
	rm -rf $(VENV) site build dist demo-output *.egg-info

# torch comes first and alone, so that nothing that depends on it chooses another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.installed-%: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[$*]"
	touch $@
