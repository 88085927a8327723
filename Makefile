# Every target makes .venv when it is missing; nothing is installed twice.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test test-slow test-cpus test-floors lint type docs bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/diffusion-gym demo $(if $(THREADS),--threads $(THREADS))

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# The numerical tests as other processors compute them. A processor ignores what it does not have.
NUMERICAL := tests/models tests/wrappers tests/agents/test_policy*.py tests/test_scheduling.py
define ON_CPU
ATEN_CPU_CAPABILITY=$(1) ONEDNN_MAX_CPU_ISA=$(2) MKL_CBWR=$(3) TEST_THREADS=$(4) OMP_NUM_THREADS=$(4) \
	$(BIN)/python -m pytest -n $(5) $(NUMERICAL)
endef

test-cpus: $(STAMP)
	$(call ON_CPU,default,SSE41,COMPATIBLE,1,2)
	$(call ON_CPU,avx2,AVX2,AVX2,1,2)
	$(call ON_CPU,avx512,AVX512_CORE,AVX512,2,1)
	$(call ON_CPU,default,SSE41,COMPATIBLE,2,1)

# The lowest versions that pyproject.toml declares, in an environment of their own; torch is that of constraints.txt,
# or FLOOR_TORCH, because an old wheel of it brings gigabytes of CUDA libraries.
FLOORS := build/floors
FLOOR_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CORE := tests/models tests/envs tests/wrappers

$(FLOORS)/.installed: pyproject.toml constraints.txt tools/floors.py
	rm -rf $(FLOORS)
	$(PYTHON) -m venv $(FLOORS)
	$(PYTHON) tools/floors.py > $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install -q --disable-pip-version-check torch==$(FLOOR_TORCH) -r $(FLOORS)/floors.txt \
		'setuptools>=77' 'pytest>=8' 'pytest-xdist>=3.6'
	$(FLOORS)/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

test-floors: $(FLOORS)/.installed
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -n 2 -p no:cacheprovider $(CORE)

# Tools that follow imports cannot see the package-dir mapping of an editable install, so they read an installed copy.
COPY := build/installed

$(COPY): FORCE
	@rm -rf $(COPY) build/lib build/bdist*
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --target $(COPY) .

lint: $(STAMP) $(COPY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(COPY) && ../../$(BIN)/lint-imports --config ../../pyproject.toml

type: $(STAMP) $(COPY)
	cd $(COPY) && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p diffusion_gym

FORCE:

docs: $(STAMP)
	$(BIN)/python docs/make_results.py

# TRL=PYTHON names the Python of TRL's own environment; see benchmarks/peers/trl_ddpo.py.
bench: $(STAMP)
	$(BIN)/python benchmarks/peers/compare.py run --samples 8 --steps 10 --rounds 3 --records build/bench/records \
		$(if $(TRL),--trl $(TRL))

clean:
	rm -rf .venv build dist *.egg-info
