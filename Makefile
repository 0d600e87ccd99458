# make demo | test | bench | lint | types | format | sanitize | fuzz | soak | cubins. Every target reuses one .venv and one build.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: setup demo test bench lint types format sanitize sanitize-threads fuzz soak cubins clean
setup: $(VENV)/.ready

$(VENV)/.torch: constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "gate4d: $(PYTHON) was not found; install Python 3.10 or newer, or name one with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "gate4d needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1); name another with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "gate4d: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "== creating $(VENV) and installing torch (once; a large download)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "setuptools>=77" wheel ninja numpy -c constraints.txt
	$(PIP) install torch -c constraints.txt
	@touch $@

$(VENV)/.ready: $(VENV)/.torch $(SOURCES)
	@echo "== building gate4d and installing its extras (once; a few minutes)"
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	@! grep -qs '"skipped"' gate4d/_build_report.json || echo "== note: installed without the compiled kernels; gate4d info says why"
	@touch $@

demo: setup
	$(PY) -m gate4d.cli.main demo $(ARGS)

test: setup
	$(PY) -m pytest $(ARGS)

bench: setup
	$(PY) -m gate4d.cli.main bench $(ARGS)

CLANG_FORMAT := git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(VENV)/bin/clang-format
lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror
	@$(MAKE) --no-print-directory types

# kernels/ is installed as gate4d.kernels: mypy sees it there in a tree of links.
TYPES := build/types
types: setup
	@rm -rf $(TYPES) && mkdir -p $(TYPES)
	@cp -rs $(CURDIR)/gate4d $(TYPES)/gate4d && cp -rs $(CURDIR)/kernels $(TYPES)/gate4d/kernels
	cd $(TYPES) && $(CURDIR)/$(VENV)/bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir ../mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(CLANG_FORMAT) -i

# The C++ kernels built again with AddressSanitizer and UndefinedBehaviorSanitizer, beside the normal build, and the
# kernel tests under each instruction set that this machine has; then, where the compiler has it, with ThreadSanitizer
# and some cases of the fuzzing over several threads.
SANITIZED := build/sanitize
sanitize: setup
	@echo "== building the kernels with sanitizers into $(SANITIZED)"
	GATE4D_SANITIZE=address,undefined $(PY) setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	@for isa in avx512_bf16 avx512 avx2 portable; do \
	  echo "== kernel tests with sanitizers, GATE4D_CPU_ISA=$$isa"; \
	  (cd $(SANITIZED)/lib && GATE4D_CPU_ISA=$$isa PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    $(CURDIR)/$(PY) -m pytest -p no:cacheprovider -c $(CURDIR)/pyproject.toml $(CURDIR)/tests/kernels/test_attention.py \
	    -k "cpu and (sizes or layouts or unequal or empty or logit or nothing or capped) and not 1041" $(ARGS)) || exit 1; \
	done
	@if echo 'int main(){}' | g++ -fsanitize=thread -x c++ -o /dev/null - 2>/dev/null; \
	then $(MAKE) --no-print-directory sanitize-threads; \
	else echo "== ThreadSanitizer: this compiler does not have it, left out"; fi

THREADS := build/threads
sanitize-threads: setup
	@echo "== building the kernels with ThreadSanitizer into $(THREADS)"
	GATE4D_SANITIZE=thread $(PY) setup.py -q build --build-base $(THREADS) --build-lib $(THREADS)/lib
	cd $(THREADS)/lib && PYTHONPATH=.:$(CURDIR) PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libtsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0 \
	  $$(command -v setarch >/dev/null && echo setarch -R) $(CURDIR)/$(PY) -m tests.fuzz --cases 30 --seed 0

# Random cases against an oracle, under each instruction set; the same work over and over, with flat memory.
MINUTES ?= 10
fuzz: setup
	$(PY) -m tests.fuzz --minutes $(MINUTES) $(ARGS)

soak: setup
	$(PY) -m tests.fuzz.soak --minutes $(MINUTES) $(ARGS)

# What the Triton kernels compile to for each GPU, as a table in build/cubins.md; needs no GPU, takes about two hours.
cubins: setup
	$(PY) -m gate4d.kernels._triton.cubin_table $(ARGS)

clean:
	rm -rf build dist *.egg-info gate4d/_C*.so
