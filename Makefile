# make demo: set up and run the main job on the bundled model. make test: the same set-up, then the tests.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint clean

demo: $(STAMP)
	$(BIN)/python -m qvl_hydra experiment=lm_mse_v2

test: $(STAMP) lint
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch first and by version: any other range brings gigabytes of CUDA packages to a machine without a GPU.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[inc,onnx,profiles,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV)
