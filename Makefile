# Every target installs what is missing, then runs. Needed beforehand: make, g++, python3 with venv.

PYTHON ?= python3
# Test workers: one per core of the machine CI runs on.
WORKERS ?= 2

NEEDED := torch numpy rich safetensors tqdm sklearn matplotlib transformers setuptools \
	accelerate lightning onnx onnxruntime onnxscript peft pytest xdist hypothesis expecttest ruff mypy

# A python3 that has everything (an activated environment) is used as it is, and nothing is
# installed into it. Any other gets a .venv, which sees the packages of a python3 that has torch.
# (Except where that python3 is itself a virtual environment and lacks something else: a .venv made
# from it sees only the python underneath, so torch is installed once more.)
HAS_ALL := $(shell $(PYTHON) -c 'import sys; from importlib.util import find_spec; \
	print(all(map(find_spec, sys.argv[1:])))' $(NEEDED))
ifeq ($(HAS_ALL),True)
RUN := $(PYTHON)
READY :=
else
RUN := .venv/bin/python
READY := .venv/ready
endif

PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all lint native

demo: native  ## dense, STE and SR-STE training side by side
	$(RUN) -m nmfx demo

test: lint native  ## what CI runs: lint, types, the fast tests
	$(RUN) -m pytest -n $(WORKERS)

test-all: lint native  ## everything: slow tests too, and many more hypothesis examples
	NMFX_HYPOTHESIS_PROFILE=deep $(RUN) -m pytest -n $(WORKERS) -m "deep or not deep"

native: $(READY)  ## the C++ kernels, with $(CXX); does nothing when they are up to date
	$(RUN) nmfx/kernels/cpu/build.py

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# torch comes first and is then pinned to what is there: no other package may replace it.
.venv/ready: pyproject.toml
	if $(PYTHON) -c "import torch" 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages .venv; else $(PYTHON) -m venv .venv; fi
	$(RUN) -c "import torch" 2>/dev/null || $(PIP) torch==2.13.0
	$(RUN) -c "from importlib.metadata import version; print('torch==' + version('torch'))" \
		> .venv/constraints.txt
	$(PIP) "setuptools>=77"
	$(PIP) -c .venv/constraints.txt --no-build-isolation -e ".[test,demo]"
	$(RUN) -c "import triton" 2>/dev/null || $(PIP) "triton==3.9.*" \
		|| echo "no Triton for this machine: the tests of the GPU kernels will be skipped"
	touch $@
