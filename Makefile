# Needs python3 >= 3.11 with pip and venv, and make. Everything else is installed into .venv, from
# the lock; every target sets up what it needs.

PYTHON ?= python3
UV := .venv/bin/uv
RUN := .venv/bin/python -m
PYTEST := pytest -n 2
# Most of the time of small tests is compilation. Programs are kept from run to run for every process, outside
# the checkout; those of another lock are others.
PROGRAMS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/nt-deq/programs
KEPT := JAX_COMPILATION_CACHE_DIR="$(PROGRAMS)/$(firstword $(shell cksum < uv.lock))" \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
# A process on Linux has 65,530 regions of memory, and ends when its programs need more. One in pieces needs
# hundreds.
WHOLE := --xla_cpu_parallel_codegen_split_count=1
# And most of the time of compilation goes into optimising programs that run once, and into XLA's own emitters of
# fusions.
QUICK := XLA_FLAGS="$(WHOLE) --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false $$XLA_FLAGS" \
  JAX_TRACEBACK_IN_LOCATIONS_LIMIT=0 $(KEPT)

# Else the first start of every program compiles what it imports.
export UV_COMPILE_BYTECODE := 1

# Tested besides the locked JAX: the floor, where every direct dependency is at its lowest allowed
# version, and versions in between, where neural-tangents needs other bridges than at either end.
JAX_VERSIONS := 0.5.3 0.7.2 0.9.2

.PHONY: demo test test-all test-versions attack lint docs notebooks dist bench clean
.DELETE_ON_ERROR:

demo: .venv/.ready
	$(RUN) experiments.claims.compare --workdir=out/demo

# A worker takes files in order, which share what is traced, and at the end from the other's rest.
test: .venv/.ready
	$(QUICK) $(RUN) $(PYTEST) --dist worksteal -m "not slow"

# As users run it: with every optimisation.
test-all: .venv/.notebooks test-versions
	XLA_FLAGS="$(WHOLE) $$XLA_FLAGS" $(KEPT) $(RUN) $(PYTEST)

test-versions: $(JAX_VERSIONS:%=test-jax-%)

# Nothing is kept: JAX 0.5.3 reads back programs that compute something else. Nor optimised, as in `test`.
test-jax-%: .venvs/jax-%/.ready
	JAX_ENABLE_COMPILATION_CACHE=false XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" \
	  .venvs/jax-$*/bin/python -m $(PYTEST) -m "smoke and not slow" -p no:cacheprovider

# Random problems against the bounds of the kernels' errors: the table of docs/precision.md.
attack: .venv/.ready
	$(KEPT) .venv/bin/python tests/kernels/attack.py

lint: .venv/.types
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) pyright

# Built, and all of its code and the README's run as users run it: every page by itself, with every
# optimisation (`make test-all` runs them at other sizes too). Material announces its successor at every
# start.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict
	$(KEPT) $(RUN) $(PYTEST) tests/docs/test_docs.py tests/docs/test_readme.py -k "not at_other_sizes"

notebooks: .venv/.notebooks
	$(KEPT) $(RUN) $(PYTEST) tests/docs/test_notebooks.py

# The wheel, made of the sdist and installed into an empty environment, works there; with pip alone too,
# and without TensorFlow.
dist: .venv/.ready
	rm -rf dist
	$(UV) build --quiet
	$(UV) venv --quiet --clear --python .venv/bin/python .venvs/dist
	$(UV) pip install --quiet --python .venvs/dist dist/*.whl
	cd .venvs && dist/bin/python -P ../tests/installed.py
	.venv/bin/python tests/pip_alone.py

bench: .venv/.ready
	@set -e; for file in benchmarks/[a-z]*.py; do \
	  echo "== $$file"; $(RUN) benchmarks.$$(basename $$file .py); \
	done

clean:
	rm -rf .venv .venvs dist site out/demo .pytest_cache .ruff_cache .hypothesis "$(PROGRAMS)"
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "nt-deq needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "$(PYTHON) cannot make environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check "uv>=0.7"
	UV_PROJECT_ENVIRONMENT=.venv $(UV) sync --locked --inexact --all-extras
	@touch $@

# A group that few targets need: pyright brings a Node.js of 200 MB.
.venv/.%: .venv/.ready
	UV_PROJECT_ENVIRONMENT=.venv $(UV) sync --locked --inexact --all-extras --group $*
	@touch $@

.venvs/jax-0.5.3/.ready: RESOLUTION := lowest-direct
.venvs/jax-%/.ready: pyproject.toml | .venv/.ready
	$(UV) venv --quiet --clear --python .venv/bin/python .venvs/jax-$*
	$(UV) pip install --quiet --python .venvs/jax-$* --no-build --resolution $(or $(RESOLUTION),highest) \
	  "jax==$*" "jaxlib==$*" -e ".[experiments,test]"
	@touch $@
