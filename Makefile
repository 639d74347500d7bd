# The only verbs to know: format, check, test, demo, bench.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Relational graphs ship inside this package; the tests read them out of the wheel.
GRAPHS := pykeen==1.11.1
CORE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
CXX_SOURCES := $(CORE_SOURCES) $(shell find tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: install format check test demo bench clean

install: $(INSTALLED)

# Reinstalls when the build description or a core source changed; ninja rebuilds only those objects.
$(INSTALLED): Makefile pyproject.toml setup.py constraints.txt $(CORE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d build/wheels $(GRAPHS)
	touch $@

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SOURCES)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

# Two processes: most tests wait for one core, a compiler or a disk.
test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

demo: install
	$(BIN)/dataeff demo

bench: install
	$(BIN)/python -m pytest benchmarks --benchmark-only

clean:
	rm -rf build dist $(VENV) demo-report dataeff.egg-info dataeff/_core.*.so
