# Every target makes .venv when it is missing; nothing is installed twice.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test test-slow lint type docs bench clean

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
