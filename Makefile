# Every target first sets up .venv if need be.  tools/dev.py has the commands for that and for the
# first line of targets; it needs neither make nor sh.
#   make demo | test | test-configs | lint | setup
#     PYTHON=python3.12 chooses the Python of a new .venv; TORCH_INDEX=URL is a further index with
#     wheels of torch, such as https://download.pytorch.org/whl/cpu, which are smaller
#   make asan         operator tests under the address and undefined-behaviour sanitizers
#   make fuzz         the tests of random input with ten thousand examples each
#   make chaos        kills a training 20 times at random moments, which must always go on
#   make cuda         compiles the CUDA operators, without a GPU too
#   make cuda-emulate runs the CUDA kernels on the CPU; SANITIZE=address or thread watches them
#   make cuda-test    operator tests and times on a GPU; CUDA_PYTHON=python3 takes another environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))

CUDA_PYTHON ?= $(CURDIR)/$(BIN)/python
OPERATORS := $(wildcard csrc/* csrc/*/*)
# Builds a copy of the package with other operators into build/$(1), and copies the tests there.
BUILD_ASIDE = setup.py --quiet build --build-lib build/$(1) --build-temp build/$(1)-objects && \
	cp -r tests pyproject.toml build/$(1)

# Tests with random input, which hypothesis marks; this -m replaces that of pyproject.toml.
FUZZED = -m "hypothesis and not slow and not network" --hypothesis-profile fuzz --timeout 3600

.PHONY: setup demo test test-configs lint asan fuzz chaos cuda cuda-emulate cuda-test

setup: $(STAMP)

demo: $(STAMP)
	@$(BIN)/python tools/dev.py $@

test: $(STAMP)
	@$(BIN)/python tools/dev.py $@

test-configs: $(STAMP)
	@$(BIN)/python tools/dev.py $@

lint: $(STAMP)
	@$(BIN)/python tools/dev.py $@

asan: $(STAMP)
	INSTSEG_OPERATORS=compiled INSTSEG_SANITIZE=1 $(BIN)/python $(call BUILD_ASIDE,asan)
	cd build/asan && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(CURDIR)/$(BIN)/python -m pytest tests/ops

fuzz: $(STAMP)
	$(BIN)/python -m pytest tests/ops $(FUZZED) & operators=$$!; \
	$(BIN)/python -m pytest tests --ignore tests/ops --ignore tests/projects $(FUZZED); files=$$?; \
	wait $$operators && exit $$files

chaos: $(STAMP)
	$(BIN)/python tools/chaos.py

cuda: $(if $(findstring $(BIN),$(CUDA_PYTHON)),$(STAMP))
	INSTSEG_OPERATORS=compiled FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-9.0} $(CUDA_PYTHON) $(call BUILD_ASIDE,cuda)

# The thread sanitizer needs addresses that are not random, and knows no library but the kernels.
EMULATE_plain =
EMULATE_address = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
EMULATE_thread = LD_PRELOAD="$$(g++ -print-file-name=libtsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 setarch -R
SANITIZE ?= plain

cuda-emulate: $(STAMP)
	INSTSEG_EMULATE=$(SANITIZE) $(BIN)/python -m tests.emulate.build $(SANITIZE)
	INSTSEG_EMULATE=$(SANITIZE) OMP_NUM_THREADS=1 $(EMULATE_$(SANITIZE)) $(BIN)/python -m pytest \
		tests/emulate -m "" $(if $(filter plain,$(SANITIZE)),--numprocesses 2 --dist worksteal,-k test_kernels)

# The caching allocator would hide an access out of bounds from compute-sanitizer.
cuda-test: cuda
	cd build/cuda && $(CUDA_PYTHON) -m pytest tests/ops
	cd build/cuda && if command -v compute-sanitizer; then \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(CUDA_PYTHON) -m pytest tests/ops -m "cuda and not slow"; fi
	cd build/cuda && $(CUDA_PYTHON) -m instseg.cli benchmark ops --device cuda

# tools/dev.py writes the stamp last, so that an interrupted setup starts again.
$(STAMP): constraints.txt setup.py pyproject.toml instseg/install_detectron2.py $(OPERATORS)
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { \
		echo "error: instseg needs Python 3.10 or newer, and '$(PYTHON)' is not one; type: make PYTHON=python3.12" >&2; \
		exit 1; }
	@TORCH_INDEX=$(TORCH_INDEX) $(PYTHON) tools/dev.py setup
