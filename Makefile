# Two commands do everything on a fresh machine: `make demo` and `make test`. PYTHON and TORCH may be set.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# What is installed besides torch is pinned by hash in locks/. `make demo LOCK=` takes the newest within pyproject.toml's bounds.
LOCK ?= yes
BIN = .venv/bin
TOOLS = .venv/tools/bin
PIP = $(BIN)/python -m pip install -q
# The native ops: CUDA where nvcc is found, which takes minutes; demo and test leave it out on a machine without a GPU driver.
# `make native CMT_CUDA=1` builds it anywhere.
export CMT_CUDA ?= $(if $(wildcard /proc/driver/nvidia/version),,0)
# `make gpu`, or part by part: gpu-tests gpu-sweep gpu-train gpu-calibrate gpu-proofs gpu-step gpu-step-graph gpu-step-stream gpu-ops gpu-trajectories gpu-pipeline gpu-step-xl1024.
# Nothing is installed, PYTHON must have torch; MINUTES of all parts together, 14 unless given.
DEVICE ?= cuda
GPU = PYTHONPATH=.:kernels:$$PYTHONPATH $(PYTHON) -m bench gpu --device $(DEVICE) $(if $(TINY),--tiny) $(if $(MINUTES),--minutes $(MINUTES))

demo: .venv/demo ; $(BIN)/python -m cmt_kernels._native.build && $(BIN)/cmt train digits --out runs/digits
# one test process a core and one more, for a fifth of their time they wait for disks, children and clocks; one thread each;
# the 20 slowest at the end
TESTERS ?= $(shell echo $$(($$(nproc) + 1)))
# where PYTHONDONTWRITEBYTECODE is set, each of the hundreds of processes would compile every module anew
test: export PYTHONDONTWRITEBYTECODE =
test: native ; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TESTERS) --dist loadfile --no-loadscope-reorder --durations=20 --durations-min=1
# The native ops' tests on csrc/cuda, compiled for the CPU, and on the CPU kernels, with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: .venv/dev
	$(BIN)/python -m tests.kernels.emulated --sanitize --native-tests
	$(BIN)/python -m tests.kernels.emulated --sanitize --reverse --native-tests
	$(BIN)/python -m tests.kernels.emulated --sanitize --cpu --native-tests
bench: native ; $(BIN)/python -m bench ops
gpu: ; $(GPU)
gpu-dry: ; $(MAKE) gpu DEVICE=cpu TINY=1
# one folder that a machine with torch and triton runs with no network; KIT="--python 3.11" and more: bench/harness/kit.py
gpu-kit: .venv/dev ; PYTHONPATH=.:kernels $(BIN)/python -m bench kit $(KIT)
gpu-%: ; $(GPU) $*
lint: .venv/dev ; $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
# per cent of the lines of every room of cmt_fast that the tests run, their child processes included;
# printed where a test fails too
coverage: native
	$(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -q -n auto --dist loadfile --ignore tests/kernels tests; failed=$$?; \
	$(BIN)/python -m coverage combine -q && $(BIN)/python -m bench coverage && exit $$failed
format: .venv/dev ; $(BIN)/ruff check --fix . && $(BIN)/ruff format .
.venv/bin/python: ; $(PYTHON) -m venv .venv
# torch comes after the lock, whose triton gives way to the one that torch is built with
.venv/%: .venv/bin/python pyproject.toml locks/%.txt
	$(if $(LOCK),$(PIP) --require-hashes --no-deps -r locks/$*.txt)
	$(PIP) "$(TORCH)"
	$(PIP) $(if $(LOCK),--no-deps --no-build-isolation -e .,-e ".[$*]") && touch $@
# programs that look at the environment from outside, in one of their own
$(TOOLS)/python: locks/audit.txt
	$(PYTHON) -m venv .venv/tools && $(TOOLS)/python -m pip install -q --require-hashes --no-deps -r locks/audit.txt && touch $@
# sbom.json: all that is installed in .venv with version, licence and what needs it, in CycloneDX's format
sbom: .venv/dev $(TOOLS)/python
	$(TOOLS)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o sbom.json $(BIN)/python
# known faults of all that is installed; needs a network, and says where it found none
audit: .venv/dev $(TOOLS)/python ; PYTHONPATH=.:kernels $(BIN)/python -m bench audit
# the locks anew, after a change of pyproject.toml; needs a network. Then: python -m bench licences
UV = $(TOOLS)/uv pip compile -q --no-config --universal --python-version 3.10 --generate-hashes --no-annotate --no-header \
	--no-emit-package torch --overrides locks/overrides.txt --index-url https://pypi.org/simple $(UPGRADE)
locks: $(TOOLS)/python
	$(UV) --extra dev pyproject.toml locks/torch.in -o locks/dev.txt
	$(UV) --extra demo pyproject.toml locks/torch.in -c locks/dev.txt -o locks/demo.txt
	$(UV) locks/audit.in -o locks/audit.txt
native: .venv/dev ; $(BIN)/python -m cmt_kernels._native.build
# sdists and wheels of both distributions, the native library in them where it can be built
dist: .venv/demo
	rm -rf dist && $(BIN)/python -m pip install -q build twine
	export VIRTUAL_ENV=$(CURDIR)/.venv; for folder in . kernels; do $(BIN)/python -m build -o dist $$folder || exit 1; done
	$(BIN)/twine check --strict dist/*
.PHONY: audit locks sbom dist demo test sanitize bench gpu gpu-dry gpu-kit lint coverage format native
