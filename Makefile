# make demo | test | bench | lint | docs: each sets up .venv and builds the library when needed, from python3, a C++
# compiler and make alone. `make help` lists them all. PYTHON and VENV choose another interpreter and another place, TORCH another
# torch: it gets an environment and a build of its own beside the one for development.

PYTHON ?= python3
TORCH ?=
VENV ?= .venv$(if $(TORCH),-torch-$(TORCH))
RESULT ?= bench/results/local
SANITIZE ?= full
CUDA_TORCH ?= 2.14.1
CUDA_VENV ?= .venv-torch-$(CUDA_TORCH)
TEST_JOBS ?= 2
NAME ?= local

BIN := $(VENV)/bin
PY := $(BIN)/python
INSTALL := $(PY) -m pip install
STAMPS := $(VENV)/.bn_ext

LIBRARY_SOURCES := setup.py pyproject.toml $(wildcard buildtools/*.py) \
  $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.in[cl]')
FORMATTED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-ptx test-cuda-build test-cuda-standin sanitize bench bench-all bench-compare lint docs format build clean distclean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    train the README network with both batch norms, then the short benchmark'
	@echo 'make test    run every test; TORCH=2.14.1: against that torch, in $(VENV)-torch-2.14.1'
	@echo 'make test-ptx  every case of tests/simt on every architecture, and every planted fault: an hour; PTX=90: one'
	@echo 'make test-cuda-build  a CUDA build of torch (5 GB) and of the library, tested where there is no GPU: half an hour'
	@echo 'make test-cuda-standin  the same on a stand-in for a GPU: every test for "cuda", an hour; FILES=tests/test_func.py, FAULTS=1'
	@echo 'make sanitize  fuzzers and CPU tests under the sanitizers of the compiler: an hour; SANITIZE=quick: six minutes'
	@echo 'make bench   run the full benchmark into $(RESULT).jsonl and .png'
	@echo 'make bench-all  every result file that README.md and docs/ quote, on a quiet machine; NAME=cpu-xeon'
	@echo 'make bench-compare BASE=file  run it and compare with an earlier result'
	@echo 'make lint    ruff, mypy, clang-format'
	@echo 'make docs    the pages of docs/ and the docstrings as a site: build/docs/index.html'
	@echo 'make format  let ruff and clang-format lay the code out'
	@echo 'make build   set up $(VENV) and build the library'
	@echo 'make clean   remove what builds and runs left; make distclean removes $(VENV) too'

demo: $(STAMPS)/demo $(STAMPS)/built
	$(PY) examples/train_mlp.py
	$(PY) bench/bench_batchnorm.py --quick

# From another folder, so that with TORCH the installed package is tested and not the sources. In processes side by side,
# whose idle threads sleep instead of spinning on cores that others need.
test: $(STAMPS)/test $(STAMPS)/third-party $(STAMPS)/built
	cd tests && OMP_WAIT_POLICY=passive $(abspath $(PY)) -m pytest -q -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder .

# What `make test` does a part of. -contract: with multiply and add in one, wherever ptxas may.
PTX ?= 75 80 90 100 90-contract
TALLY := $(abspath build/ptx-tally)
test-ptx: $(STAMPS)/test $(STAMPS)/built
	rm -rf $(TALLY)
	cd tests && export OMP_WAIT_POLICY=passive BN_EXT_TALLY=$(TALLY) && for on in $(PTX); do BN_EXT_PTX=$$on \
	  $(abspath $(PY)) -m pytest -q -n $(TEST_JOBS) $(filter-out %runtime.py,$(notdir $(wildcard tests/test_simt_*.py))) \
	  || exit 1; done; $(abspath $(PY)) -m ptx.table $(TALLY)
	cd tests && BN_EXT_EVERY_ARCH=1 BN_EXT_PTX_FAULTS=all $(abspath $(PY)) -m pytest -q -n $(TEST_JOBS) --dist loadfile \
	  test_ptx_sources.py test_cuda_compile.py

# With a CUDA build of torch, as PyPI's is, in an environment of its own. One architecture: each takes nvcc minutes.
.PHONY: cuda-built
cuda-built:
	TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-9.0} FORCE_CUDA=1 $(MAKE) TORCH=$(CUDA_TORCH) VENV=$(CUDA_VENV) \
	  $(CUDA_VENV)/.bn_ext/test $(CUDA_VENV)/.bn_ext/built

test-cuda-build: cuda-built
	cd tests && $(abspath $(CUDA_VENV))/bin/python -m pytest -q test_cuda_build.py test_devices.py test_guard.py

test-cuda-standin: cuda-built
	cd tests && $(abspath $(CUDA_VENV))/bin/python -m standin.$(if $(FAULTS),faults,run $(abspath $(FILES)))

sanitize: $(STAMPS)/test
	PYTHON=$(PY) scripts/sanitize.sh $(SANITIZE)

# All files that README.md and docs/ quote, about an hour: NAME=cpu-xeon writes over those of this kind of machine.
bench-all: $(STAMPS)/demo $(STAMPS)/built
	$(PY) bench/bench_all.py --name $(NAME)

bench: $(STAMPS)/demo $(STAMPS)/built
	@mkdir -p $(dir $(RESULT))
	$(PY) bench/bench_batchnorm.py --json $(RESULT).jsonl --plot $(RESULT).png

bench-compare: $(STAMPS)/demo $(STAMPS)/built
	@test -f '$(BASE)' || { echo 'say BASE=bench/results/<file>.jsonl' >&2; exit 1; }
	@mkdir -p $(dir $(RESULT))
	$(PY) bench/bench_batchnorm.py --json $(RESULT).jsonl $(BENCH)
	$(PY) bench/compare.py $(BASE) $(RESULT).jsonl

lint: $(STAMPS)/lint $(STAMPS)/torch
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

# All pages anew, each time: a warning, a broken link among them, is given only where a page is read. No network.
docs: $(STAMPS)/docs $(STAMPS)/built
	$(PY) -m sphinx -a -E -W --keep-going -q -d build/doctrees docs build/docs

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

build: $(STAMPS)/built

# The library is built into the source tree (an editable install), so a test run can import no tree without one. With
# TORCH it is built in a copy and installed: a library is for one torch, and the sources hold one library.
COPIED := setup.py pyproject.toml README.md LICENSE bn_ext buildtools csrc
COPY := build/torch-$(TORCH)
$(STAMPS)/built: $(STAMPS)/build $(LIBRARY_SOURCES) $(if $(TORCH),$(wildcard bn_ext/*.py bn_ext/*/*.py))
ifeq ($(TORCH),)
	$(INSTALL) --no-build-isolation --no-deps -e .
else
	mkdir -p $(COPY) && cp -rpu $(COPIED) $(COPY) && rm -f $(COPY)/bn_ext/_C*.so $(COPY)/bn_ext/_build.json
	$(INSTALL) --no-build-isolation --no-deps --force-reinstall ./$(COPY)
endif
	@touch $@

$(STAMPS)/venv:
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo '$(PYTHON) cannot make a virtual environment: install its venv module (apt install python3-venv)' >&2; exit 1; }
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/torch: requirements/torch.txt $(STAMPS)/venv
	$(INSTALL) $(if $(TORCH),torch==$(TORCH),-r $<)
	@touch $@

# torch comes first: a package that asks for torch then finds the pinned one.
$(STAMPS)/build $(STAMPS)/demo $(STAMPS)/docs $(STAMPS)/lint: $(STAMPS)/%: requirements/%.txt $(STAMPS)/torch
	$(INSTALL) -q -r $<
	@touch $@

$(STAMPS)/test: requirements/test.txt requirements/demo.txt $(STAMPS)/torch
	$(INSTALL) -q -r $<
	@touch $@

# Other people's networks; where they cannot be had, their tests say so and skip.
$(STAMPS)/third-party: requirements/third-party.txt requirements/third-party-alone.txt $(STAMPS)/test
	$(INSTALL) -q $(if $(TORCH),torch==$(TORCH),-r requirements/torch.txt) -r requirements/third-party.txt && \
	  $(INSTALL) -q --no-deps -r requirements/third-party-alone.txt && touch $@ || \
	  echo 'not every package of requirements/third-party*.txt could be installed'

clean:
	rm -rf build dist out *.egg-info bn_ext/_C*.so bn_ext/_build.json $(STAMPS)/built
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find bn_ext buildtools tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
