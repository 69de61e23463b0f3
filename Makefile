# make demo           install into .venv and ask the example questions; fail if an answer is wrong
# make test           install what is missing and run all tests, on all cores; those of the web page need Chromium
# make test-eval      install lmms-eval beside what is in .venv, and run the tests of the evaluation
# make test-fast      run the tests that take less than about a second each: under two minutes on two cores
# make attack         attack the package for up to half an hour: damaged files, kills at every write, full disks; a table says
#                     what became of each case. Run it again to resume; ATTACK="--seed N --minutes N KIND ..." chooses
# make attack-sanitizers
#                     attack the CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer
# make lint           run ruff, clang-format and mypy; check boundaries between rooms and sizes of functions and kernels
# make format         format Python and C++, and apply ruff's safe fixes
# make docs           build the documentation into build/docs; a warning is an error
#
# make cuda-compile   compile the CUDA sources for ARCHS with NVCC, without torch
# make sm70           bound the kernels on a V100 from their machine code; fail if a budget is exceeded. NVCC is at most 12.9
#                     (tools/volta-toolkit.sh unpacks one on Debian 12), HOST_CXX a compiler that it accepts. SM70_FLAGS:
#                     --csv FILE; --ideal-wavefronts, to skip counting wavefronts on the CPU, which needs .venv
# make sm80           check that the main loops of the Ampere kernels contain tensor-core, ldmatrix and cp.async
#                     instructions and do not touch local memory; NVCC and HOST_CXX as above
# make simt           run the CUDA kernels on the CPU, once watching for races and once under sanitizers; -j2 runs both at once
# make gpu            on a machine with an NVIDIA GPU, with PYTHON's own packages and no network: build in place, run tests,
#                     compute-sanitizer and benchmarks in under eight minutes, and write the results to OUT.
#                     GPU_FLAGS=--dry-run prints the commands
# make clean          remove .venv and everything that was built
#
# A second call installs nothing: stamp files in .venv record what is installed. Native code is rebuilt when it changes.
#
# TORCH    what pip installs as torch into a new .venv: a version, a wheel or pip options, e.g. TORCH="torch==2.10.0".
#          If the default brings CUDA libraries that you do not want, name a CPU wheel.
# PYTHON   interpreter to create .venv with
# VENV     folder to use instead of .venv; if it has a torch, that one is used
# JOBS     number of test processes

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= auto
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)
PYTEST := HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile
# Where there is no Chromium, the tests of the web page are left out, and pytest counts them as deselected.
BROWSER := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
NO_BROWSER := $(if $(BROWSER),,and not browser)

.PHONY: demo test test-fast test-eval attack attack-sanitizers lint format docs cuda-compile sm70 sm80 gpu
.PHONY: simt simt-races simt-sanitizers clean

demo: $(VENV)/installed
	$(VENV)/bin/flexattn demo
	@echo 'Next: source $(VENV)/bin/activate; flexattn ask flexattn-demo/1_picosdeeuropa.jpg "What does the sign say that is purple?"'

test: $(VENV)/test-packages
	$(PYTEST) -m "not harness $(NO_BROWSER)" python_tests

test-eval: $(VENV)/eval/ready
	HF_HUB_OFFLINE=1 $(VENV)/eval/bin/python -m pytest python_tests/evaluation

test-fast: $(VENV)/test-packages
	$(PYTEST) -m "not slow" python_tests

ATTACK ?=
ATTACKS = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=.:python_tests/support \
  $(VENV)/bin/python -W ignore -m python_tests.attack
SANITIZERS = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)
ASAN_OPTIONS := detect_leaks=0:detect_stack_use_after_return=0
attack: $(VENV)/test-packages
	$(ATTACKS) $(ATTACK)
# What a sanitizer says is in build/attack-sanitizers.PID.
attack-sanitizers: $(VENV)/test-packages
	$(VENV)/bin/python python_tests/support/simt_build.py cpu-sanitizers
	FLEXATTN_BACKEND=cpu-sanitizers LD_PRELOAD="$(SANITIZERS)" \
	  ASAN_OPTIONS=$(ASAN_OPTIONS):allocator_may_return_null=1:log_path=build/attack-sanitizers \
	  $(ATTACKS) --cases 77 --out build/attack-sanitizers.jsonl "operators, valid" "operators, damaged"

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(PIP) install $(TORCH)
	touch $@

$(VENV)/installed: $(VENV)/torch $(NATIVE)
	$(PIP) install "setuptools>=77,<82" ninja
	$(PIP) install --no-build-isolation --editable .
	touch $@

# flexattn_cuda is installed already: these add the packages of one extra.
$(VENV)/%-packages: $(VENV)/installed
	$(PIP) install "flexattn_cuda[$*]"
	touch $@

# lmms-eval wants older versions of some packages than the other tests use, so it has an environment of its own on top.
# Its torchvision links CUDA; where torch does not, nothing here works with it and nothing needs it.
$(VENV)/eval/ready: $(VENV)/test-packages
	$(PYTHON) -m venv --without-pip $(VENV)/eval
	$(VENV)/bin/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" >\
	  "$$($(VENV)/eval/bin/python -c 'import site; print(site.getsitepackages()[0])')/below.pth"
	$(VENV)/eval/bin/python -m pip --disable-pip-version-check install "flexattn_cuda[eval]" \
	  "$$($(VENV)/bin/python -c 'import torch; print("torch==" + torch.__version__)')"
	$(VENV)/eval/bin/python -c "import torchvision" 2>/dev/null || $(VENV)/eval/bin/python -m pip uninstall --yes torchvision
	touch $@

CPP = $(shell git ls-files 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.h' 'python_tests/*.cu' 'python_tests/*.cpp')
BIN = $(VENV)/bin
lint: $(VENV)/dev-packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/boundaries.py
	$(BIN)/python tools/house.py

format: $(VENV)/dev-packages
	$(BIN)/ruff check --fix --quiet . || true # what it cannot fix is for `make lint` to report
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: $(VENV)/docs-packages
	$(BIN)/mkdocs build --strict

NVCC ?= nvcc
ARCHS ?= 75;80;90
HOST_CXX ?= g++
NVCC_FLAGS ?=
CUDA_BUILD ?= build/cuda-compile
cuda-compile:
	cmake -S . -B $(CUDA_BUILD) -DCMAKE_CUDA_COMPILER=$(NVCC) -DCMAKE_CUDA_HOST_COMPILER=$(HOST_CXX) \
	  -DCMAKE_CUDA_ARCHITECTURES="$(ARCHS)" -DCMAKE_CUDA_FLAGS="$(NVCC_FLAGS)" -DCMAKE_BUILD_TYPE=Release
	cmake --build $(CUDA_BUILD) --parallel 2

SIMT_TESTS := python_tests/simt $(addprefix python_tests/ops/test_,attention_paths.py derivatives.py ops.py written_arguments.py)
simt: simt-races simt-sanitizers
simt-races: $(VENV)/test-packages
	FLEXATTN_BACKEND=races $(VENV)/bin/python -m pytest $(SIMT_TESTS)
simt-sanitizers: $(VENV)/test-packages
	$(VENV)/bin/python python_tests/support/simt_build.py sanitizers
	FLEXATTN_BACKEND=sanitizers LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=$(ASAN_OPTIONS) \
	  $(VENV)/bin/python -m pytest $(SIMT_TESTS)

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
