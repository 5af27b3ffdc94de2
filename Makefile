# make demo      set up, then fine-tune the embedded model on the embedded digits
# make test      set up, then run the tests that are not marked slow
# make test-all  set up, then run all tests
# make test-lowest, make test-newest
#                the same with the lowest or the newest versions that setup.cfg allows
# make coverage  set up, then run the tests of `make test` and report line coverage
# make lint      set up, then check format, style, types, imports and spelling
# make backends  environments with Keras on JAX and on PyTorch (a download of 300 MB), for tests
# make docs      set up, then build the documentation into site/
# make release   build sdist and wheel into dist/, and run the demo from the installed wheel
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# Two workers: a test uses about one core, and the largest needs 3 GB. Files with many slow tests run
# first, to balance the workers; a worker that dies ends the run.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
  --max-worker-restart 0

.PHONY: demo test test-all test-lowest test-newest coverage lint backends docs release format clean

demo: $(INSTALLED)
	$(BIN)/vgg-transfer finetune

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	$(PYTEST)

# Uses new virtual environments; TESTS="tests/core tests/data" restricts the tests. Newer versions of
# dependencies emit deprecation warnings, which are errors only with the constrained versions.
test-lowest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-lowest test-newest: test-%:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet uv
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python --resolution $(RESOLUTION) \
	  --editable '.[dev]'
	.venv-$*/bin/vgg-transfer finetune --epochs 1 --cache off --out .venv-$*/run
	.venv-$*/bin/python -m pytest --numprocesses 2 --dist loadfile --override-ini \
	  filterwarnings=default -m "not slow" $(TESTS)

coverage: $(INSTALLED)
	$(PYTEST) -m "not slow" --cov --cov-report term:skip-covered

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/codespell

# Without TensorFlow and this package. On PyPI, torch for Linux contains CUDA, 3 GB.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

backends: .venv-jax/installed .venv-torch/installed

.venv-torch/installed: OPTIONS := --extra-index-url $(TORCH_INDEX)
.venv-jax/installed .venv-torch/installed: .venv-%/installed: constraints.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --constraint constraints.txt $(OPTIONS) keras pillow $*
	touch $@

# NO_MKDOCS_2_WARNING silences a notice of the theme about MkDocs 2.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Needs a section of the changelog with the version and its date. The wheel is installed into an
# environment of its own, and used outside the clone, where Python does not find the sources.
VERSION = $(shell sed -n 's/^version = //p' setup.cfg)

release:
	@grep -qE '^## $(VERSION) - [0-9]{4}-[0-9]{2}-[0-9]{2}$$' CHANGELOG.md || \
	  { echo 'error: CHANGELOG.md has no section "## $(VERSION) - YYYY-MM-DD"' >&2; exit 1; }
	rm -rf build dist *.egg-info
	$(PYTHON) -m venv --clear .venv-build
	.venv-build/bin/python -m pip install --quiet --constraint constraints.txt build twine
	.venv-build/bin/python -m build --outdir dist
	.venv-build/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear .venv-release
	.venv-release/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	folder=$$(mktemp -d) && cd $$folder && $(CURDIR)/.venv-release/bin/vgg-transfer finetune \
	  --out run --cache off && $(CURDIR)/.venv-release/bin/vgg-transfer evaluate run && rm -r $$folder
	ls -l dist

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-jax .venv-torch .venv-build .venv-release dist

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: Python 3.10 to 3.13 is needed; name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

$(VENV)/installed-docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
