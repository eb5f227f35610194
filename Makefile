VENV := .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
# Rooms whose tests need seconds; `make test` runs all.
QUICK := tests/test_house.py tests/test_packaging.py tests/file tests/terminal tests/decoder \
	tests/pruning/test_patterns.py tests/pruning/test_schedules.py \
	tests/quantization/test_rounding.py tests/generation/test_samplers.py

.PHONY: demo test check docs notebooks clean

demo: $(STAMP)
	$(VENV)/bin/tfgptopt demo --force

test: $(TEST_STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -q

check: $(TEST_STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -q -m "not slow" $(QUICK)

docs: $(TEST_STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build -q

notebooks: $(TEST_STAMP)
	$(VENV)/bin/jupyter execute notebooks/*.ipynb

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Most modules of TensorFlow are never imported: those that are get compiled then.
INSTALL := $(VENV)/bin/python -m pip install -q --no-compile -c constraints.txt

$(STAMP): $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

$(TEST_STAMP): $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[test]"
	touch $(STAMP) $@

clean:
	rm -rf $(VENV) tfgptopt-demo build dist *.egg-info
