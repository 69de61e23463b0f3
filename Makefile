# make demo           installs into .venv and asks the example questions; fails when an answer is wrong
# make test           installs what is missing and runs the tests
# make cuda-compile   compiles the CUDA sources for ARCHS with NVCC, without torch and without running them
# make sm70           what the V100 can make of the kernels, from their machine code; fails when a budget is exceeded.
#                     NVCC up to 12.9, HOST_CXX a compiler that it takes, SM70_FLAGS e.g. "--csv sm70.csv". Counts wavefronts on
#                     the CPU (make simt), for which it needs the .venv of make test; SM70_FLAGS=--ideal-wavefronts goes without
# make simt           runs the CUDA kernels of every operator on the CPU, with races watched and under sanitizers
# make sm80           that the Ampere kernels are in the machine code: tensor cores, ldmatrix, cp.async, no local memory in the main
#                     loop. NVCC and HOST_CXX as above, NVCC with cuobjdump beside it
# make gpu            on a machine with an NVIDIA GPU, with PYTHON's own packages and no network, its steps' limits under eight
#                     minutes together: builds in place, runs the tests, compute-sanitizer and the benchmarks; results in OUT.
#                     GPU_FLAGS=--dry-run prints the commands
# make clean          removes .venv and what was built
#
# A second call installs nothing: stamps in .venv tell what is there. Native code is built again when it changes.
#
# TORCH    what pip installs as torch into a new .venv: a version, a wheel's path, pip options, e.g. TORCH="torch==2.10.0".
#          Where the default brings CUDA libraries that are not wanted, name a CPU wheel.
# PYTHON   the interpreter behind .venv
# VENV     another place than .venv; where it exists and has a torch, that one is used

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test cuda-compile sm70 sm80 gpu simt simt-races simt-sanitizers clean

demo: $(VENV)/installed
	$(VENV)/bin/flexattn demo

test: $(VENV)/test-packages
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest python_tests

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(PIP) install $(TORCH)
	touch $@

$(VENV)/installed: $(VENV)/torch $(NATIVE)
	$(PIP) install "setuptools>=77,<82" ninja
	$(PIP) install --no-build-isolation --editable .
	touch $@

$(VENV)/test-packages: $(VENV)/installed
	$(PIP) install "flexattn_cuda[test]"  # it is there already: this adds what the tests need
	touch $@

NVCC ?= nvcc
ARCHS ?= 75;80;90
HOST_CXX ?= g++
NVCC_FLAGS ?=
CUDA_BUILD ?= build/cuda-compile
cuda-compile:
	cmake -S . -B $(CUDA_BUILD) -DCMAKE_CUDA_COMPILER=$(NVCC) -DCMAKE_CUDA_HOST_COMPILER=$(HOST_CXX) \
	  -DCMAKE_CUDA_ARCHITECTURES="$(ARCHS)" -DCMAKE_CUDA_FLAGS="$(NVCC_FLAGS)" -DCMAKE_BUILD_TYPE=Release
	cmake --build $(CUDA_BUILD) --parallel 2

# The CUDA kernels on the CPU (csrc/simt): once with races watched, once under the sanitizers. -j2 runs both at a time.
SIMT_TESTS := python_tests/simt/test_simt.py python_tests/ops/test_attention_paths.py python_tests/ops/test_ops.py
simt: simt-races simt-sanitizers
simt-races: $(VENV)/test-packages
	FLEXATTN_BACKEND=races $(VENV)/bin/python -m pytest $(SIMT_TESTS)
simt-sanitizers: $(VENV)/test-packages
	$(VENV)/bin/python python_tests/support/simt_build.py sanitizers
	FLEXATTN_BACKEND=sanitizers LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 $(VENV)/bin/python -m pytest $(SIMT_TESTS)

SM70_FLAGS ?=
REPORT_PYTHON = $(firstword $(wildcard $(VENV)/bin/python) $(PYTHON))
sm70:
	$(REPORT_PYTHON) benchmarks/sm70_report.py --nvcc $(NVCC) --ccbin $(HOST_CXX) $(SM70_FLAGS)
sm80:
	$(REPORT_PYTHON) benchmarks/sm80_report.py --nvcc $(NVCC) --ccbin $(HOST_CXX)

OUT ?= build/gpu
GPU_FLAGS ?=
gpu:
	$(PYTHON) benchmarks/gpu.py --out $(OUT) $(GPU_FLAGS)

clean:
	rm -rf $(VENV) build dist *.egg-info flexattn_cuda/*.so
