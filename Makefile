# make serve   install what is missing, serve a tiny model on this machine, and ask it three questions over HTTP and gRPC
# make stop    end that service
# make test    every test that needs neither GPUs nor root
#
# On a machine without a GPU, PyPI's torch brings gigabytes of CUDA with it; to have the CPU's alone:
#   make serve TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

VENV  ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
# The first Python of the right version that can make a virtual environment.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)

BIN       := $(VENV)/bin
RUNTIME   := $(VENV)/.installed
DEV       := $(VENV)/.installed-dev
CLIENTS   := tests/integration/clients
NODE      := $(CLIENTS)/node_modules/.package-lock.json
STUBS     := protos/inference_pb2.py protos/inference_pb2.pyi protos/inference_pb2_grpc.py
# The generator has an environment of its own: stubs work with its version of grpcio and protobuf and all later ones,
# so it is old on purpose, and nothing else should be.
GENERATOR := $(VENV)/protoc/.installed-1.76.0
PROTOC     = $(VENV)/protoc/bin/python -m grpc_tools.protoc -I. protos/inference.proto

.PHONY: serve stop test test-fast test-cluster check bench protos
.DELETE_ON_ERROR:

# A rank for attention and one for experts, so that tokens take the whole path.
SERVE_FLAGS ?= --layout disaggregated

serve: $(RUNTIME)
	$(BIN)/corral serve --detach $(SERVE_FLAGS)
	$(BIN)/corral ask

stop:
	$(BIN)/corral stop

test: $(DEV) $(if $(shell command -v npm),$(NODE))
	$(BIN)/python -m pytest tests/gpu tests/integration $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -n 2 tests/unit $(PYTEST_FLAGS)

test-fast: $(DEV)
	$(BIN)/python -m pytest -n 2 tests/unit $(PYTEST_FLAGS)

# Brings up cluster/local.yaml for real, on hosts that are namespaces; skipped without root, sshd and rsync. Four minutes.
test-cluster: $(DEV)
	$(BIN)/python -m pytest -m cluster tests/cluster tests/integration -s $(PYTEST_FLAGS)

check: $(DEV) $(GENERATOR)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@rm -rf $(VENV)/stubs && mkdir -p $(VENV)/stubs
	@$(PROTOC) --python_out=$(VENV)/stubs --pyi_out=$(VENV)/stubs --grpc_python_out=$(VENV)/stubs
	@for stub in $(STUBS); do diff -u $$stub $(VENV)/stubs/$$stub || { echo "$$stub is stale: make protos"; exit 1; }; done
	@echo "stubs are those of protos/inference.proto"

bench: $(DEV)
	$(BIN)/python -m benchmarks.cpu $(BENCH_FLAGS)

protos: $(GENERATOR)
	$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=.

$(RUNTIME): pyproject.toml
	@[ -x $(BIN)/python ] || [ -n "$(PYTHON)" ] || { echo "Corral needs Python 3.11 to 3.13 with venv"; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(DEV): $(RUNTIME)
	$(BIN)/pip install --quiet --editable '.[dev]'
	# Kernels are checked by Triton's interpreter where there is no GPU; a torch with CUDA brings a Triton of its own.
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet $(TRITON)
	@touch $@

$(GENERATOR): | $(RUNTIME)
	[ -x $(VENV)/protoc/bin/python ] || $(BIN)/python -m venv $(VENV)/protoc
	$(VENV)/protoc/bin/pip install --quiet grpcio-tools==1.76.0
	@touch $@

$(NODE): $(wildcard $(CLIENTS)/package.json $(CLIENTS)/package-lock.json)
	@if [ -f $(CLIENTS)/package.json ]; then npm install --no-audit --no-fund --silent --prefix $(CLIENTS); fi
