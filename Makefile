# Thin targets over CMake's presets and a virtual environment made here. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BUNDLE := gpu-bundle

py             := $(VENV)/bin/python
build_requires := $(shell grep '^requires =' pyproject.toml | grep -o '"[^"]*"')
c_files        := $(wildcard cpu/*.[ch] shim/*.[ch] cuda/*.cu cuda/*.cuh tests/native/*.cpp tests/native/*.h \
    tests/native/cuda_on_cpu/*.cpp tests/native/cuda_on_cpu/*.h tests/abi/*.cpp)

# A developer's build is for the GPU of this machine, or for none; what ships (make wheel) is for all.
gpu := $(shell nvidia-smi -L 2>/dev/null)
dev := TORCH_SUBSPACE_CUDA=$(or $(TORCH_SUBSPACE_CUDA),$(if $(gpu),AUTO,OFF)) CUDAARCHS=$(or $(CUDAARCHS),$(if $(gpu),native,90))

.PHONY: help demo test pytest build bench lint format asan wheel wheel-check clean cuda-on-cpu cuda-race \
    pytest-cuda-on-cpu cuda-check gpu gpu-bundle gpu-build gpu-native gpu-test gpu-bench

help:           ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  \1	/p' Makefile | expand -t 16

# ------------------------------------------------------------- environment
.venv-floor/.ready: torch := 'torch==2.11.*'
.venv-floor/.ready: extras := test
extras := test,demo,bench,lint

%/.ready: pyproject.toml
	$(PYTHON) -m venv $*
	$*/bin/pip install -q $(build_requires)
	$(dev) $*/bin/pip install -q --no-build-isolation $(torch) -e '.[$(extras)]'
	touch $@

build: $(VENV)/.ready ## compile what has changed, into ops/lib
	$(dev) $(py) setup.py -q build_ext --inplace

# -------------------------------------------------------------- daily work
demo: build     ## train with a linear and a Grassmann head, then fine-tune with adapters, on real images
	$(py) examples/swap_head.py
	$(py) examples/finetune.py

test: native-release pytest ## GoogleTest at every instruction set, ABI checks, pytest

pytest: build   ## pytest alone, in JOBS=2 processes; PYTEST_ARGS and VENV=.venv-floor (the oldest torch) are obeyed
	OMP_NUM_THREADS=1 $(py) -m pytest -n $(or $(JOBS),2) $(PYTEST_ARGS)

native-%: $(VENV)/.ready # GoogleTest programs of a CMake preset: release, debug, clang, asan
	cmake --preset $* -DPython3_EXECUTABLE=$(abspath $(py))
	cmake --build --preset $* --parallel
	ctest --preset $*

asan: native-asan ## the native tests under the address and undefined-behaviour sanitizers

cuda-on-cpu: $(VENV)/.ready ## the native tests on the CUDA kernels, run on a CPU: tests/native/cuda_on_cpu
	cmake --preset release -DPython3_EXECUTABLE=$(abspath $(py))
	cmake --build --preset release --parallel
	ctest --preset release -L cuda_on_cpu

cuda-race: native-race ## the same under the thread sanitizer: two GPU threads that no barrier orders are reported; slow

overlay := build/cuda-on-cpu# a torch_subspace whose CPU library is the CUDA kernels
pytest-cuda-on-cpu: build ## pytest likewise; slow: name files in PYTEST_ARGS. Tests of values that only a CPU looks at fail
	cmake --preset release -DPython3_EXECUTABLE=$(abspath $(py))
	cmake --build --preset release --parallel --target torch_subspace_cuda_on_cpu
	rm -rf $(overlay) && mkdir -p $(overlay)/torch_subspace/lib
	cp ops/*.py $(overlay)/torch_subspace/
	ln -s $(abspath $(wildcard ops/lib/libscipy_openblas*)) $(abspath build/release/tests/native/libtorch_subspace_cpu.so) \
	    $(overlay)/torch_subspace/lib/
	PYTHONPATH=$(overlay) OMP_NUM_THREADS=1 $(py) -m pytest -n $(or $(JOBS),2) $(PYTEST_ARGS)

cuda-check: $(VENV)/.ready ## compile for every architecture; registers, spills and shared memory within cuda/resources.txt
	cmake --preset cuda -DPython3_EXECUTABLE=$(abspath $(py))
	cmake --build --preset cuda --parallel
	$(py) tests/cuda_check.py build/cuda $(if $(UPDATE),--update)

bench: build    ## benchmarks on the CPU
	$(py) tests/bench/bench.py

lint: $(VENV)/.ready ## clang-format, cppcheck, ruff
	clang-format --dry-run -Werror $(c_files)
	cppcheck --quiet --error-exitcode=1 --enable=warning,performance,portability --inline-suppr --std=c11 \
	    --suppress=missingIncludeSystem -Ishim -Icpu -DSUBSPACE_LEVEL=baseline -U__cplusplus cpu/*.c shim/*.c
	$(py) -m ruff check .

format: $(VENV)/.ready ## what lint can repair by itself
	clang-format -i $(c_files)
	$(py) -m ruff check --fix .

wheel: $(VENV)/.ready ## dist/*.whl, built in isolation
	rm -rf build/lib build/temp.* build/bdist.* dist
	$(py) -m pip wheel -q --no-deps -w dist .

wheel-check: wheel ## install it into an empty environment and import it
	rm -rf build/wheel-venv
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install -q dist/*.whl
	cd build && wheel-venv/bin/python -c 'import torch, warnings; warnings.simplefilter("error"); \
	    import torch_subspace; torch_subspace.show_config()'

clean:          ## remove what was built, keep the environments
	rm -rf build dist ops/lib *.egg-info $(BUNDLE)

# ------------------------------------------------- a GPU machine, offline
# `make gpu-bundle` where there is a network; then, over there with the folder beside the sources, `make gpu`.
# It needs nvcc, CMake and a python3 with torch and pytest; nothing outside this folder is changed.
packages := $(abspath build/gpu-packages)
gpu_py   := PYTHONPATH=$(packages) $(PYTHON)

gpu-bundle: $(VENV)/.ready ## collect what a GPU machine without a network lacks
	rm -rf $(BUNDLE)
	$(py) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp -d $(BUNDLE) \
	    $(patsubst %,--platform manylinux_2_%_x86_64,28 27 17) $(build_requires) wheel geoopt
	test ! -d /usr/src/googletest || cp -r /usr/src/googletest $(BUNDLE)/
	du -sh $(BUNDLE)

gpu: gpu-build gpu-native gpu-test gpu-bench ## all of the following four

gpu-build:      ## build for this GPU, with python3's own torch
	$(PYTHON) -m pip install -q --no-index --find-links $(BUNDLE) --no-deps --upgrade --target $(packages) \
	    $(build_requires) wheel geoopt
	TORCH_SUBSPACE_CUDA=ON CUDAARCHS=$(or $(CUDAARCHS),native) $(gpu_py) -m pip install -q --no-index --no-deps --no-build-isolation \
	    --upgrade --target $(packages) .
	cd build && $(gpu_py) -c 'import torch_subspace; torch_subspace.show_config()'

gpu-native:     ## GoogleTest programs of the CPU kernels, on that machine's processor
	PYTHONPATH=$(packages) cmake --preset release -DPython3_EXECUTABLE=$$(command -v $(PYTHON))
	cmake --build --preset release --parallel
	ctest --preset release

gpu-test:       ## pytest: the tests marked gpu
	$(gpu_py) -m pytest -m gpu $(PYTEST_ARGS)

gpu-bench:      ## benchmarks on the GPU
	$(gpu_py) tests/bench/bench.py --device cuda
