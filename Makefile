# Two commands for a newcomer: `make demo` and `make test`. Both make .venv and install pinned versions first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-ray test-deepspeed lint docs policy clean

demo: $(STAMP)
	$(BIN)/cropi run quickstart

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

test-ray: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/pytest tests/distributed/test_ray.py

test-deepspeed: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pytest -m slow tests/distributed/test_deepspeed.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/config_reference.py --check

docs: $(STAMP)
	$(BIN)/python scripts/config_reference.py

policy: $(STAMP)
	$(BIN)/python scripts/pretrain_builtin.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	touch $@

clean:
	rm -rf $(VENV) runs build dist
