# Thin targets over CMake's presets and a virtual environment made here. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BUNDLE := gpu-bundle

py             := $(VENV)/bin/python
lint           := .venv-lint/bin
build_requires := $(shell grep '^requires =' pyproject.toml | grep -o '"[^"]*"')
sources        := cpu cuda shim examples tests/native tests/abi
c_files        := $(shell find $(wildcard $(sources)) -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp')

# A developer's build is for the GPU of this machine, or for none; what ships (make dist) is for all.
gpu := $(shell nvidia-smi -L 2>/dev/null)
dev := TORCH_SUBSPACE_CUDA=$(or $(TORCH_SUBSPACE_CUDA),$(if $(gpu),AUTO,OFF)) CUDAARCHS=$(or $(CUDAARCHS),$(if $(gpu),native,90))
all := CUDAARCHS='$(or $(CUDAARCHS),all)'

# Kept, whatever the user's habit is: without it every process that imports torch compiles all of it anew, 2 to 10 s
unexport PYTHONDONTWRITEBYTECODE

# what torch.compile makes in the tests is for no vector unit: C++ that compiles in half the time, around the same ops
tests_env := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 TORCHINDUCTOR_VEC_ISA_OK=0

.PHONY: c-files help lock demo test test-latest pytest build bench bench-compare evidence peers docs lint format asan dist dist-again wheel-check \
    clean cuda-on-cpu cuda-race pytest-cuda-on-cpu cuda-check gpu gpu-quick gpu-bundle gpu-build gpu-native gpu-test gpu-bench

help:           ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  \1	/p' Makefile | expand -t 16

# ------------------------------------------------------------- environment
# An environment holds what its file in locks/ names, to the byte. pip alone will do; with UV=1, as .ci/run has it, the uv
# of locks/lint.txt installs, in a third of the time.
lock := newest
.venv-floor/.ready: lock := floor
.venv-build/.ready: lock := build
.venv-lint/.ready: lock := lint
.venv-lint/.ready: override UV :=
install = $(if $(UV),$(lint)/uv pip install -q -p $*/bin/python,$*/bin/pip install -q --no-compile)

.PRECIOUS: %/.ready
.SECONDEXPANSION:
%/.ready: locks/$$(lock).txt $$(if $$(UV),.venv-lint/.ready)
	$(PYTHON) -m venv $*
	$(install) --require-hashes -r $<
	touch $@

%/.in_place: %/.ready pyproject.toml # this package, in place
	$(dev) $*/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

ifdef WHEEL
build: $(VENV)/.ready
	rm -f $(VENV)/.in_place
	$(py) -m pip install -q --no-deps --force-reinstall $(WHEEL)
else
build: $(VENV)/.in_place ## compile what has changed, into ops/lib; with WHEEL='dist/*.whl' that is installed, and tested
	$(dev) $(py) setup.py -q build_ext --inplace
endif

# locks/$1.txt: the newest set that holds together, of what $2 and the lines $3 ask for
resolve = printf '%s\n' $3 | $(lint)/uv pip compile -q --upgrade --universal --python-version 3.10 --generate-hashes \
    --custom-compile-command 'make lock' -c locks/constraints.in $2 - -o locks/$1.txt

lock: .venv-lint/.ready ## renew locks/ from what the package index has today
	$(call resolve,newest,pyproject.toml --extra test --extra demo --extra bench --group docs,$(build_requires))
	$(call resolve,floor,pyproject.toml --extra test,$(build_requires) 'torch==2.11.*')
	$(call resolve,build,--group build,$(build_requires))
	$(call resolve,lint,--group lint)

# -------------------------------------------------------------- daily work
demo: build     ## train with a linear and a Grassmann head, then fine-tune with adapters, on real images
	$(py) examples/swap_head.py
	$(py) examples/finetune.py

test: native-release pytest ## GoogleTest at every instruction set, ABI checks, pytest

pytest: build   ## pytest alone, in JOBS=2 processes; PYTEST_ARGS and VENV=.venv-floor (the oldest torch) are obeyed
	$(tests_env) $(py) -m pytest -n $(or $(JOBS),2) --dist worksteal $(PYTEST_ARGS)

test-latest:    ## the same tests without the locks, on what the index has today, in .venv-latest
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/pip install -q --no-compile $(build_requires)
	$(dev) .venv-latest/bin/pip install -q --no-compile --no-build-isolation -e '.[test,demo,bench]'
	.venv-latest/bin/pip install -q --no-compile --no-deps pyvene # whose other needs are notebooks' and plots'
	touch .venv-latest/.ready .venv-latest/.in_place
	$(MAKE) test VENV=.venv-latest

# KERNELS, the build folder in a tree with the same sources: what was compiled there is tested, not compiled once more
native-release: kernels := $(abspath $(wildcard $(KERNELS)))

# OBJECTS, the build folder of another preset: its test programs are linked with the kernels that are compiled here
native-%: $(VENV)/.ready # GoogleTest programs of a CMake preset: release, debug, clang, asan
	$(if $(kernels),for folder in cpu shim; do diff -r $$folder $(kernels)/../../$$folder || exit; done)
	cmake --preset $* -DPython3_EXECUTABLE=$(abspath $(py)) -DTS_KERNELS=$(kernels) -DTS_TEST_OBJECTS=$(abspath $(OBJECTS))
	cmake --build --preset $* --parallel
	ctest --preset $*

asan: native-asan ## the native tests under the address and undefined-behaviour sanitizers

cuda-on-cpu: $(VENV)/.ready ## the native tests on the CUDA kernels, run on a CPU: tests/native/cuda_on_cpu
	cmake --preset release -DPython3_EXECUTABLE=$(abspath $(py))
	cmake --build --preset release --parallel
	ctest --test-dir build/release --output-on-failure -j 2 -L cuda_on_cpu

cuda-race: native-race ## the same under the thread sanitizer: two GPU threads that no barrier orders are reported; slow

overlay := build/cuda-on-cpu# a torch_subspace whose CPU library is the CUDA kernels
pytest-cuda-on-cpu: build ## pytest likewise; slow: name files in PYTEST_ARGS. Tests of values that only a CPU looks at fail
	cmake --preset release -DPython3_EXECUTABLE=$(abspath $(py))
	cmake --build --preset release --parallel --target torch_subspace_cuda_on_cpu
	rm -rf $(overlay) && mkdir -p $(overlay)/torch_subspace
	cp -r ops/. $(overlay)/torch_subspace && rm -rf $(overlay)/torch_subspace/lib && mkdir $(overlay)/torch_subspace/lib
	ln -s $(abspath $(wildcard ops/lib/libscipy_openblas*)) $(abspath build/release/tests/native/libtorch_subspace_cpu.so) \
	    $(overlay)/torch_subspace/lib/
	PYTHONPATH=$(overlay) $(tests_env) $(py) -m pytest -n $(or $(JOBS),2) --dist worksteal $(PYTEST_ARGS)

cuda-check: $(VENV)/.ready ## compile for every architecture; registers, spills and shared memory within cuda/resources.txt
	$(all) cmake --preset cuda -DPython3_EXECUTABLE=$(abspath $(py))
	cmake --build --preset cuda --parallel --target torch_subspace_cuda
	$(py) tests/cuda_check.py build/cuda $(if $(UPDATE),--update)

bench: build    ## benchmarks on the CPU; then what a call costs, which ops two threads slow down, how cost grows
	$(py) tests/bench/bench.py
	$(py) tests/bench/overhead.py
	$(py) tests/bench/threads.py
	$(py) tests/bench/growth.py

evidence: build ## measure all that the pages show of accuracy; hours, goes on where it was. EVIDENCE_ARGS=--quick: minutes
	$(py) examples/evidence.py $(EVIDENCE_ARGS)

bench-compare:  ## what differs by more than 10 % between OLD and NEW: commits, or folders of rows; NEW is this tree's
	$(PYTHON) tests/bench/compare.py $(OLD) $(NEW)

peers: build    ## peft's own tests with our config in LoRA's place; slow. PEFT=a checkout, PYTEST_ARGS are obeyed
	OMP_NUM_THREADS=1 $(py) tests/peers/run.py $(or $(PEFT),-) -n $(or $(JOBS),2) $(PYTEST_ARGS)

docs: build     ## the site of guides and reference, in build/docs
	$(py) -m sphinx -q -E -W --keep-going -n -b html -d build/docs-cache docs build/docs

lint: .venv-lint/.ready $(VENV)/.ready ## clang-format, cppcheck, ruff; mypy and pyright, strict, on the public names
	$(lint)/clang-format --dry-run -Werror $(c_files)
	cppcheck --quiet --error-exitcode=1 --enable=warning,performance,portability --inline-suppr --std=c11 \
	    --suppress=missingIncludeSystem -Ishim -Ishim/contract -Icpu -DSUBSPACE_LEVEL=baseline \
	    -U__cplusplus $(filter cpu/%.c shim/%.c examples/%.c,$(c_files))
	$(lint)/ruff check .
	mkdir -p build/typing && ln -sfn ../../ops build/typing/torch_subspace
	MYPYPATH=build/typing $(lint)/mypy --strict --follow-imports=silent --python-executable $(py) tests/typing
	$(lint)/basedpyright -p pyproject.toml --pythonpath $(py)

c-files:        # what lint and format look at
	@echo $(c_files)

format: .venv-lint/.ready ## what lint can repair by itself
	$(lint)/clang-format -i $(c_files)
	$(lint)/ruff check --fix .

# torch has loaded these; OpenBLAS is in the wheel already
torchs := libtorch_*.so libcublas.so.* libcudart.so.*

dist: export SOURCE_DATE_EPOCH ?= 315532800
dist: .venv-build/.ready ## dist/: the sdist, and the manylinux wheel made of it, for every GPU; checked
	rm -rf dist build/dist && mkdir -p build/dist
	.venv-build/bin/python setup.py -q sdist
	tar -xzf dist/*.tar.gz -C build/dist
	$(all) PIP_BUILD_CONSTRAINT=locks/build.txt .venv-build/bin/pip wheel -q --no-deps -w build/dist build/dist/torch_subspace-*
	umask 022 && PATH=$(abspath .venv-build/bin):$$PATH auditwheel repair $(torchs:%=--exclude '%') -w dist build/dist/*.whl
	.venv-build/bin/python tests/check_dist.py dist

dist-again: .venv-build/.ready ## build what lies in dist/ once more, elsewhere: the same bytes
	rm -rf build/again && mkdir -p build/again/elsewhere && mv dist build/again/first
	git ls-files -z | xargs -0 cp -d --parents -t build/again/elsewhere
	ln -s $(abspath .venv-build) build/again/elsewhere
	cd build/again/elsewhere && umask 077 && $(MAKE) -o .venv-build/.ready dist
	mv build/again/first dist && diff -rs dist build/again/elsewhere/dist

wheel-check: $(if $(WHEEL),,dist) .venv-lint/.ready ## dist/*.whl and what it asks for alone; WHEEL, LOCK=floor are obeyed
	rm -rf build/wheel-venv
	$(PYTHON) -m venv build/wheel-venv
	$(lint)/uv pip install -q -p build/wheel-venv/bin/python -c locks/$(or $(LOCK),newest).txt $(or $(WHEEL),dist/*.whl)
	cd build && wheel-venv/bin/python -c 'import torch, warnings; warnings.simplefilter("error"); \
	    import torch_subspace; torch_subspace.show_config()'

clean:          ## remove what was built, keep the environments
	rm -rf build dist ops/lib *.egg-info $(BUNDLE)

# ------------------------------------------------- a GPU machine, offline
# `make gpu-bundle` where there is a network; then, over there with the folder beside the sources, `make gpu`, or its
# stages one by one, in this order; each ends within ten minutes. It needs nvcc, CMake and a python3 with torch 2.11 or
# newer, pytest, pytest-xdist and hypothesis; nothing outside this folder is changed. Without a GPU the last three pass
# and say that they did nothing.
# `make gpu-quick` is the short form: one call within GPU_SECONDS, what matters most first, two small files as result.
packages := $(abspath build/gpu-packages)
gpu_py   := env PYTHONPATH=$(packages) PYTHONUNBUFFERED=1 $(PYTHON)
offline  := --no-cache-dir $(if $(wildcard $(BUNDLE)),--no-index --find-links $(BUNDLE))
fetch    := -q --no-deps --only-binary=:all: --python-version $(or $(BUNDLE_PYTHON),3.12) --implementation cp \
            $(patsubst %,--platform manylinux_2_%_x86_64,28 27 17) --platform manylinux2014_x86_64
peers    := einops geoopt lycoris-lora peft pot toml
# then a limit in seconds, at which Python sums up what it has done so far
minutes  := timeout --foreground -s INT -k 15

gpu-bundle: $(VENV)/.ready ## collect what a GPU machine without a network lacks, at most 60 MiB
	rm -rf $(BUNDLE) && mkdir -p build
	$(py) tests/gpu/bundle.py --locked $(build_requires) $(peers) >build/bundle.txt
	$(py) -m pip download $(fetch) --require-hashes -r build/bundle.txt -d $(BUNDLE)
	$(py) tests/gpu/bundle.py $(BUNDLE) 60

gpu-quick:      ## all that GPU_SECONDS=520 allow, into GPU_OUT; AGAIN=last or =results.tar.gz: what failed or is missing
	$(gpu_py) tests/gpu/quick.py --seconds $(or $(GPU_SECONDS),520) --out $(or $(GPU_OUT),build/gpu-quick) \
	    $(if $(AGAIN),--again $(AGAIN))

gpu: gpu-build gpu-native gpu-test gpu-sanitize gpu-bench ## the following five; with -k, those after one that failed too

gpu-build:      ## build for this GPU, with python3's own torch
	$(PYTHON) -m pip install -q $(offline) --no-deps --upgrade --target $(packages) $(build_requires)
	$(PYTHON) tests/gpu/bundle.py --missing $(peers) | xargs -r -n 1 $(PYTHON) -m pip install -q $(offline) --no-deps \
	    --upgrade --target $(packages) || echo 'a peer could not be installed: the benchmarks go without it'
	TORCH_SUBSPACE_CUDA=ON CUDAARCHS=$(or $(CUDAARCHS),$(if $(gpu),native,90)) timeout 590 $(gpu_py) -m pip install \
	    -q $(offline) --no-deps --no-build-isolation --upgrade --target $(packages) .
	cd build && $(gpu_py) -c 'import torch_subspace; torch_subspace.show_config()'

gpu-native:     ## GoogleTest programs, on that machine's processor
	PYTHONPATH=$(packages) cmake --preset release -DPython3_EXECUTABLE=$$(command -v $(PYTHON))
	timeout 290 cmake --build --preset release --parallel
	timeout 290 ctest --preset release --parallel 8

gpu-test:       ## pytest: what needs a GPU, in GPU_JOBS=4 processes; PYTEST_ARGS is obeyed
	OMP_NUM_THREADS=2 $(minutes) 580 $(gpu_py) -m pytest tests/gpu -m gpu -q --dist loadgroup \
	    -n $(or $(GPU_JOBS),4) $(PYTEST_ARGS)

.PHONY: gpu-sanitize
gpu-sanitize:   ## one small case of every op under compute-sanitizer, where that is: memcheck, racecheck, synccheck
	$(minutes) 585 $(gpu_py) tests/gpu/sanitize.py $(SANITIZE_ARGS)

gpu-bench:      ## benchmarks on the GPU; BENCH_ARGS is obeyed
	$(minutes) 585 $(gpu_py) tests/bench/bench.py --device cuda $(BENCH_ARGS)
