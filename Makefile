# What CI does, a person can do: every check is a target here. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := runs/demo

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint format types imports packages bench bench-gpu reproduce reproduce-cpu faults soak clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp is as new as what decides what gets installed: a second call installs nothing again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,wandb,tensorboard,tune,aws,gcp,comparisons]'
	@touch $@

install: $(VENV)/.installed ## create .venv and install everything into it

demo: $(VENV)/.installed ## train on the embedded digits, evaluate, explain, and write a report
	@# A run directory is never overwritten: each demo gets the next free number.
	@n=1; while [ -e $(DEMO)-$$n ]; do n=$$((n + 1)); done; run=$(DEMO)-$$n; \
	$(BIN)/batchcam train --dataset digits --model simple_cnn --objective bcpl_l1 --epochs 10 --batch-size 64 --out $$run && \
	$(BIN)/batchcam evaluate $$run && \
	$(BIN)/batchcam explain $$run --index 0:40 --sheet && \
	$(BIN)/batchcam report $$run && \
	echo "The run is in $$run: open $$run/report.html, and see $$run/explanations-1/sheet-1.png"

test: $(VENV)/.installed ## run the tests (BATCHCAM_DATA=DIR adds those on real MNIST)
	@# Files side by side on two cores; the tests of one file share what they set up.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 20

check: lint format types imports packages ## lint, format, types, the import rule, packages that fit together

lint: $(VENV)/.installed
	$(BIN)/ruff check .

format: $(VENV)/.installed
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

imports: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_imports.py

# Needs no network: that what is installed fits together. Known vulnerabilities take an index of them, and a network.
packages: $(VENV)/.installed
	$(BIN)/pip check --quiet

# digits needs no files; with MNIST and Fashion-MNIST in $BATCHCAM_DATA: make bench BENCH_DATA=mnist, as the README has it.
BENCH_DATA ?= digits
bench: $(VENV)/.installed ## measure what the README claims, on this machine's CPU
	$(BIN)/python -m benchmarks.step_time --device cpu
	$(BIN)/python -m benchmarks.against_predecessor --device cpu
	$(BIN)/python -m benchmarks.cam_libraries --device cpu
	$(BIN)/python -m benchmarks.explain_speed --device cpu $(if $(filter digits,$(BENCH_DATA)),--dataset digits --images 350)
	$(BIN)/python -m benchmarks.epoch_time --device cpu --dataset $(BENCH_DATA)
	$(BIN)/python -m benchmarks.fraction_of_peak --device cpu --image-size 28 --batch-size 32 --matrix 2048 --rounds 5
	$(BIN)/python -m benchmarks.collective_traffic
	$(BIN)/python -m benchmarks.memory --device cpu --batch-size 32
	$(BIN)/python -m benchmarks.time_to_accuracy --device cpu --datasets $(BENCH_DATA)
	$(BIN)/python -m benchmarks.sweeps

bench-gpu: $(VENV)/.installed ## the same on a GPU; without one, a smoke run of each on the CPU
	$(BIN)/python -m benchmarks.gpu

reproduce: $(VENV)/.installed ## the paper's tables and the decoy benchmark, all that this machine can; goes on where it stopped
	$(BIN)/python -m benchmarks.reproduce

reproduce-cpu: $(VENV)/.installed ## the same for SimpleCNN alone (hours on two cores); MNIST and Fashion-MNIST are downloaded where missing
	$(BIN)/python -m benchmarks.reproduce --models simple_cnn

faults: $(VENV)/.installed ## kill, tear, fill and fuzz; writes docs/reliability.md (an hour or two)
	OMP_NUM_THREADS=1 $(BIN)/python -m faults

soak: $(VENV)/.installed ## LAUNCHES=200, then short runs for MINUTES=120: memory, files and threads stay flat
	OMP_NUM_THREADS=1 $(BIN)/python -m faults.soak --minutes $(or $(MINUTES),120) --launches $(or $(LAUNCHES),200) $(if $(OUT),--out $(OUT))

clean: ## remove .venv and caches (never runs/)
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
