# Every target makes .venv when it is missing; nothing is installed twice.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test test-slow test-cpus test-floors lint type docs docs-tables site docs-check package package-check bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/diffusion-gym demo $(if $(THREADS),--threads $(THREADS))

# A worker that dies ends the tests with its test's name; with another one in its place xdist 3.8 waits for ever.
STOP := --max-worker-restart=0

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(STOP)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# The numerical tests as other processors compute them; a processor ignores an instruction set that it does not have.
NUMERICAL := $(patsubst %,tests/models/test_%.py,families latent lora pixel sd3 sdxl) \
	$(wildcard tests/agents/test_policy*.py tests/agents/test_optimization*.py) \
	$(patsubst %,tests/agents/test_%.py,rollout ddpo_is losses) \
	tests/agents/sb3/test_parity.py tests/agents/sb3/test_policy.py tests/agents/tianshou/test_parity.py \
	$(patsubst %,tests/wrappers/test_%.py,kl_penalty one_step) \
	$(patsubst %,tests/test_%.py,scheduling step_gaussian flow_table add_noise)
# $(call on_cpu,PyTorch's,oneDNN's,MKL's,threads,workers)
on_cpu = ATEN_CPU_CAPABILITY=$(1) ONEDNN_MAX_CPU_ISA=$(2) MKL_CBWR=$(3) OMP_WAIT_POLICY=passive \
	OMP_NUM_THREADS=$(4) TEST_THREADS=$(4) $(BIN)/python -m pytest -n $(5) $(STOP) $(NUMERICAL)

test-cpus: $(STAMP)
	$(call on_cpu,default,SSE41,COMPATIBLE,1,2)
	$(call on_cpu,avx2,AVX2,AVX2,2,1)
	$(call on_cpu,avx512,AVX512_CORE,AVX512,2,1)

# The lowest versions that pyproject.toml declares, in an environment of their own; torch is that of constraints.txt,
# or FLOOR_TORCH, because an old wheel of it brings gigabytes of CUDA libraries.
FLOORS := build/floors
FLOOR_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CORE := tests/models tests/envs tests/wrappers tests/test_storage.py tests/test_hub_client.py \
	$(patsubst %,tests/agents/test_%.py,policy rollout ddpo_is rwr renoising cli) \
	$(patsubst %,tests/agents/training/test_%.py,checkpoint export tracking presets) \
	tests/agents/report/test_benchmark_pictures.py \
	tests/agents/sb3 tests/agents/tianshou tests/agents/benchmark/test_matrix.py \
	tests/rewards/test_vision.py tests/rewards/vlm tests/rewards/server/test_app.py tests/test_floors.py

$(FLOORS)/.installed: pyproject.toml constraints.txt tools/floors.py
	rm -rf $(FLOORS)
	$(PYTHON) -m venv $(FLOORS)
	$(PYTHON) tools/floors.py > $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install -q --disable-pip-version-check torch==$(FLOOR_TORCH) -r $(FLOORS)/floors.txt \
		'setuptools>=77' 'pytest>=8' 'pytest-xdist>=3.6'
	$(FLOORS)/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

test-floors: $(FLOORS)/.installed
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -n 2 $(STOP) -p no:cacheprovider $(CORE)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(STAMP)
	$(BIN)/mypy -p diffusion_gym -m diffusion_gym_launcher

# The tables of the pages, from the records in docs/results/ and the registries.
docs-tables: $(STAMP)
	$(BIN)/python -m tools.pages
	$(BIN)/python benchmarks/peers/compare.py page
	$(BIN)/python benchmarks/peers/earlier.py page
	$(BIN)/python benchmarks/scaling.py page
	$(BIN)/python benchmarks/pipelines.py page
	$(BIN)/python benchmarks/demo.py page
	$(BIN)/python benchmarks/gpu.py page
	$(BIN)/python benchmarks/operations.py --page

DOCS := .venv/.installed-docs

$(DOCS): $(STAMP) pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $(DOCS)

# The site, strictly: a link that leads nowhere, a page that no section lists, or a request to elsewhere is an error.
site: $(DOCS)
	$(BIN)/python -m tools.site

docs: docs-tables site

docs-check: $(STAMP)
	mkdir -p build && sha256sum README.md docs/*.md findings/README.md > build/pages.sha256
	$(MAKE) -s docs
	sha256sum --check --quiet build/pages.sha256

# The sdist and the wheel, and what is in them.
package-check: $(STAMP)
	$(BIN)/python -m tools.package build

# The same, and the wheel in a new environment outside the clone; minutes, as pip fetches torch.
package: package-check
	$(BIN)/python -m tools.package try

# TRL=PYTHON names the Python of TRL's own environment; see benchmarks/peers/trl_ddpo.py.
bench: $(STAMP)
	$(BIN)/python benchmarks/peers/compare.py run --samples 8 --steps 10 --rounds 3 --records build/bench/records \
		$(if $(TRL),--trl $(TRL))

clean:
	rm -rf .venv build dist *.egg-info
