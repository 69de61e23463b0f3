# make demo   install into .venv and ask the example questions
# make test   install what is missing and run the tests
#
# TORCH=...   what pip installs as torch where .venv has none, e.g. TORCH="torch==2.10.0" for a CUDA build of torch
# PYTHON=...  the interpreter of .venv
# A second call installs nothing: stamps in .venv tell what is there, and native code is built again when it changes.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test cuda-compile clean

demo: $(VENV)/installed
	$(VENV)/bin/flexattn demo

test: $(VENV)/test-packages
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(PIP) install $(TORCH)
	touch $@

$(VENV)/installed: $(VENV)/torch $(NATIVE)
	$(PIP) install "setuptools>=69" wheel ninja numpy
	$(PIP) install --no-build-isolation --editable .
	touch $@

$(VENV)/test-packages: $(VENV)/installed
	$(PIP) install --no-build-isolation --editable ".[test]"
	touch $@

# Compiles the CUDA sources for ARCHS with NVCC, without torch: nothing is run.
NVCC ?= nvcc
ARCHS ?= 75;80;90
HOST_CXX ?= g++
CUDA_BUILD ?= build/cuda-compile
cuda-compile:
	cmake -S . -B $(CUDA_BUILD) -DCMAKE_CUDA_COMPILER=$(NVCC) -DCMAKE_CUDA_HOST_COMPILER=$(HOST_CXX) \
	  -DCMAKE_CUDA_ARCHITECTURES="$(ARCHS)" -DCMAKE_BUILD_TYPE=Release
	cmake --build $(CUDA_BUILD) --parallel 2

clean:
	rm -rf $(VENV) build dist *.egg-info flexattn_cuda/*.so
