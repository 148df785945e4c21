# Two commands for a new user: `make demo`, `make test`. Each sets up what it needs; a second run takes seconds.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# Each step of the installation leaves a file: one that was interrupted goes on with the step it was in.
STAMP  := $(VENV)/.installed
READY  := $(VENV)/.ready
FUZZ_SECONDS ?= 600
TORTURE_MINUTES ?= 60
TORTURE ?=
BENCH ?= cpu
RELEASE ?=
UV ?= uv
DEVICE ?= cuda
# Where torch comes from, if not from the package index: the small build for CPUs, for instance (docs/install.md)
TORCH_INDEX ?=
# The versions that the tests ran with. Empty takes the newest: make CONSTRAINTS= test
CONSTRAINTS ?= constraints.txt
PINNED := $(CONSTRAINTS:%=--constraint %)

# pip keeps what it has downloaded in the home folder. A container's user without one has it here, for the next try.
ifneq ($(shell test -w "$$HOME" && echo yes),yes)
export PIP_CACHE_DIR ?= $(abspath $(VENV))/.pip-cache
endif

.PHONY: help venv demo test test-slow test-fast check lint types format docs reference clean chaos torture soak fuzz bench gpu lock release-check

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

venv: $(READY) ## build .venv with torch, sam2 and the development tools

# An environment that is finished and newer than pyproject.toml needs none of these three again.
.SECONDARY: $(VENV)/.pip $(VENV)/.torch $(VENV)/.sam2

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "sam_poll needs Python 3.10 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip 'setuptools>=77' wheel
	@touch $@

# torch and torchvision from one place: builds from two fail at import. Another index has them as 2.x+cpu, which pip takes
# before 2.x; what torch needs in the pinned versions, such an index may not have.
$(VENV)/.torch: $(VENV)/.pip
	@echo "installing torch (some GB; a few minutes the first time) …"
	@$(PIP) $(PINNED) $(TORCH_INDEX:%=--extra-index-url %) 'torch>=2.5.1' 'torchvision>=0.20.1'
	@touch $@

# sam2 asks for torch while it builds: in an isolated build environment that would be a second full download, so it is
# built without one. SAM2_BUILD_CUDA=0 leaves out its optional CUDA extension (hole filling), which we do not use.
$(VENV)/.sam2: $(VENV)/.torch
	@echo "installing sam2 and the rest …"
	@SAM2_BUILD_CUDA=0 $(PIP) --no-build-isolation $(PINNED) 'sam2>=1.1'
	@touch $@

# datumaro asks for opencv-python-headless, which would overwrite opencv-python's files: it comes without what it asks for;
# what its readers of CVAT and COCO need of that is in the extra `dev`. Where it is not to be had, its tests are skipped.
$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) $(VENV)/.sam2
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation $(PINNED) --editable '.[dev]'
	@$(PIP) --no-deps 'datumaro>=1.13' || echo "without datumaro: the tests that read with it are skipped"
	@touch $@

# opencv-python links to libraries of a desktop. Where they are missing, the headless wheel of its version is put over it.
$(READY): $(STAMP)
	@$(BIN)/python -m tools.headless_opencv
	@touch $@

demo: $(READY) ## run the main job on bundled pictures with the bundled small model
	@$(BIN)/python -m tools.demo

# One thread for torch in each test process: more of them than cores make it many times slower. One process more than
# cores, because many tests wait for a daemon. Bytecode is kept: tests start hundreds of processes of the package, and
# half of the time before the first test goes into compiling tests.
PROCESSES = $(shell $(PYTHON) -c 'import os; print(min((os.cpu_count() or 1) + 1, 8))')
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(PROCESSES) --dist worksteal

test: $(READY) ## the tests but those that take long
	@$(PYTEST) -m 'not slow' --durations=20

test-slow: $(READY) ## the others: kills at every step, compiled networks, benchmarks
	@$(PYTEST) -m slow --durations=20

test-fast: $(READY) ## the loop of a developer, under a minute: settings, prompts, formats, the share
	@$(PYTEST) -m 'not slow' tests/config tests/formats tests/prompts tests/share

chaos: $(READY) ## daemons are killed, frozen and starved for half an hour; nothing may be lost
	@$(BIN)/python -m tools.chaos
	@for blow in SIGKILL SIGSTOP EIO ENOSPC; do \
		$(BIN)/python -m tools.chaos_sweep --blow $$blow && \
		$(BIN)/python -m tools.chaos_sweep --blow $$blow --after || exit 1; done
	@$(BIN)/python -m tools.chaos_scenarios
	@$(BIN)/python -m tools.chaos_cluster
	@SAM_POLL_SWEEP=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto tests/end_to_end/test_crashes.py tests/end_to_end/test_mosaic_crashes.py

# Further flags: make torture TORTURE='--root /tmp --root overlay:/var/tmp --without foreign'
torture: $(READY) ## writers, users who plant links and junk, and kills, for TORTURE_MINUTES; nothing may be lost or touched
	@$(BIN)/python -m tools.torture --minutes $(TORTURE_MINUTES) $(TORTURE)

soak: $(READY) ## 10,000 jobs through one daemon: memory, handles and threads stay flat
	@$(BIN)/python -m tools.soak

# The figures of docs/speed.md, made again: on an idle machine only.
bench: $(READY) ## measure speed against a naive loop and the bare network; writes benchmarks/results and docs/speed.md
	@$(BIN)/sam-poll bench --part speed --part outside --part latency --json benchmarks/results/$(BENCH).json --plot docs/images/speed-$(BENCH).png
	@$(BIN)/sam-poll bench --part runtimes --json benchmarks/results/$(BENCH)-runtimes.json
	@$(BIN)/python -m benchmarks.settings --json benchmarks/results/$(BENCH)-settings.json
	@$(BIN)/python -m benchmarks.publish

# A rehearsal without one, with the bundled model: make gpu DEVICE=cpu
gpu: $(READY) ## what a GPU has to show, in eight minutes: tests, memory, speed, a mosaic; writes benchmarks/results/gpu.json
	@$(BIN)/python -m tools.gpu --device $(DEVICE)

fuzz: $(READY) ## look for input that brings anything but an answer or a refusal, for FUZZ_SECONDS
	@$(BIN)/python -m tools.fuzz --seconds $(FUZZ_SECONDS)

lint: $(READY) ## ruff: mistakes and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY) ## mypy
	@$(BIN)/mypy

format: $(READY) ## let ruff mend what it can, and wrap the documentation at 100 columns
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .
	@$(BIN)/python -m tools.wrap_docs

# Links and anchors that lead nowhere fail. NO_MKDOCS_2_WARNING: the theme's notice about its successor.
docs: $(READY) ## build the documentation's site, site/index.html; broken links fail
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

reference: $(READY) ## write the tables of docs/ that are made from the code (settings, flags, metrics …)
	@$(BIN)/python -m tools.reference

check: lint types docs test test-slow ## what CI runs

# With uv (pip install uv); versions that are there and still fit are kept.
lock: ## write constraints.txt anew, for all supported versions of Python, after a change of dependencies
	@$(PYTHON) -m tools.lock --uv $(UV)

# Everything from the package index, as a user has it: make release-check RELEASE=--whole
release-check: $(READY) ## build wheel and source archive, install the wheel into a new environment and use it
	@$(BIN)/python -m tools.release_check $(RELEASE)

clean: ## remove what was built, .venv included
	rm -rf $(VENV) build dist site *.egg-info demo-share .pytest_cache .mypy_cache .ruff_cache .hypothesis
