# Two commands do everything on a fresh machine: `make demo` and `make test`. PYTHON and TORCH may be set.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = .venv/bin
# `make gpu`, or part by part gpu-tests gpu-calibrate gpu-ops gpu-step gpu-step-xl1024 gpu-train: nothing is installed, PYTHON must have torch.
DEVICE ?= cuda
GPU = PYTHONPATH=.:kernels:$$PYTHONPATH $(PYTHON) -m bench gpu --device $(DEVICE) $(if $(TINY),--tiny)

demo: .venv/demo ; $(BIN)/cmt train digits --out runs/digits
test: .venv/dev ; $(BIN)/python -m pytest -q
bench: .venv/dev ; $(BIN)/python -m bench ops
gpu: ; $(GPU)
gpu-dry: ; $(MAKE) gpu DEVICE=cpu TINY=1
gpu-%: ; $(GPU) $*
lint: .venv/dev ; $(BIN)/ruff check . && $(BIN)/ruff format --check .
format: .venv/dev ; $(BIN)/ruff check --fix . && $(BIN)/ruff format .
.venv/bin/python: ; $(PYTHON) -m venv .venv && $(BIN)/python -m pip install -q "$(TORCH)"
.venv/%: .venv/bin/python pyproject.toml ; $(BIN)/python -m pip install -q -e ".[$*]" && touch $@
.PHONY: demo test bench gpu gpu-dry lint format
