# The commands of this repository. Only python3 (3.11 or newer), a C++17 compiler and make are needed.
#
#   make venv          .venv with the pinned packages of constraints.txt and the C++ extension
#   make test          the whole test suite
#   make test-long     what `make test` leaves out: ten thousand random cases or more, the largest models
#   make test-next     the whole suite under Python 3.12 or newer, with the newer Megatron-Core that
#                      constraints.txt names for it; its CUDA build of torch is a large download
#   make check         `make lint` and the fast tests: what every commit must pass
#   make lint          format, lint, types, stub, layers and C++ format
#   make stub          megatron_ettin/_native.pyi, from the docstrings and signatures in csrc/bindings_*.cc
#   make quickstart    from text to a trained pair of models (QUICKSTART_SHORT=1: fewer steps)

PYTHON ?= python3
VENV ?= .venv
NEXT_PYTHON ?= python3.12
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CPP := $(wildcard csrc/*.h csrc/*.cc)

.PHONY: venv test test-long test-next check lint stub quickstart

venv: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; make PYTHON=/path/to/python3 names one")'
	$(PYTHON) -m venv $(VENV)

# The build needs pinned setuptools and pybind11 at hand, because it runs without pip's isolated
# environment: what compiles the extension is then what constraints.txt says.
$(INSTALLED): constraints.txt pyproject.toml setup.py $(CPP) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools pybind11
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[attest,datatrove,dev,eval]'
	@touch $@

# A worker takes a file at a time, in the order of tests/conftest.py.
test: venv
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# glibc keeps what was freed in pieces of up to 32 MB, which the layers of large models are.
test-long: venv
	MALLOC_MMAP_THRESHOLD_=1000000 $(BIN)/python -m pytest -m long

test-next:
	@$(NEXT_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "error: Python 3.12 or newer is needed; make test-next NEXT_PYTHON=/path/to/python3 names one")'
	$(MAKE) test PYTHON="$(NEXT_PYTHON)" VENV=.venv-next

check: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -m "not slow and not long" tests/unit tests/native

lint: venv
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python csrc/stub.py --check
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP)

stub: venv
	$(BIN)/python csrc/stub.py

quickstart: venv
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart.sh $(if $(QUICKSTART_SHORT),--short)
