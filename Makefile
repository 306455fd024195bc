# Needs Python 3.11 or newer, pip and make; everything else is installed into .venv.
#   make demo    install, then fetch a small model, quantize it and compare (about 6 minutes on 2 cores)
#   make test    install, then lint, types and tests
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: help demo test lint types clean python-version

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.installed
	$(BIN)/mixllm demo

test: lint types
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info

python-version:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "Python 3.11 or newer is needed, and there is no '$(PYTHON)'. Install it, or name it: make ... PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Name another: make ... PYTHON=python3.12"; exit 1; }

# Some systems ship Python without ensurepip; there, the system's pip installs a pip into the environment.
$(BIN)/python: | python-version
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	  rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install --disable-pip-version-check --quiet pip; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing mixllm-jax into $(VENV) (some minutes the first time)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "installing what the tests need (PyTorch among it: the CPU build is enough, if your pip is set to find it)"
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.installed
