# Two commands matter: `make demo` and `make test`. Both set up .venv from requirements/test.txt first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python

NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py

.PHONY: demo test study family-study cameamp-study activation-study codecs bench bench-micro gpu-check lint format lock clean

demo: $(VENV)/.built
	$(RUN) -m coat_train.demo

test: $(VENV)/.built
	$(RUN) -m pytest

study: $(VENV)/.built
	$(RUN) -m bench.study

family-study: $(VENV)/.built
	$(RUN) -m bench.study.family

cameamp-study: $(VENV)/.built
	$(RUN) -m bench.study.cameamp

activation-study: $(VENV)/.built
	$(RUN) -m bench.study.activations

codecs: $(VENV)/.built
	$(RUN) -m bench.codecs

bench: $(VENV)/.built
	$(RUN) -m bench

bench-micro: $(VENV)/.built
	$(RUN) -m pytest bench/bench_*.py --benchmark-only

# Runs in the Python at hand, which must hold torch and triton: a GPU machine's own, not the CPU lock.
gpu-check:
	$(PYTHON) -m bench.gpu_check

lint: $(VENV)/.built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu')

format: $(VENV)/.built
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu')

$(VENV)/.installed: requirements/test.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "the lock is for Python 3.11; run: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -r requirements/test.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml $(NATIVE_SOURCES)
	$(VENV)/bin/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# A new lock from requirements/test.in, resolved in an empty environment.
lock:
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/pip install -q -r requirements/test.in
	build/lock/bin/pip freeze --all | grep -v '^pip=='

clean:
	rm -rf $(VENV) build output coat_kernels/*.so coat_kernels/fatbin *.egg-info
