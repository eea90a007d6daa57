# `make demo` and `make test` work from a bare clone: they make .venv, install what is pinned in constraints.txt and
# build the extension first. PYTHON, VENV and RESNET_FUSED_BUILD may be set from outside.
PYTHON ?= python3
VENV ?= .venv
THREADS ?= 2
RESULTS ?= build/bench.json
# The Triton of torch 2.11, the oldest torch that is supported: kernels are compiled with it too.
OLDEST_TRITON ?= 3.6.0
# Of `make soak` and `make sanitize`: operands that do not fit, steps of training, and the seed of all random inputs.
CASES ?= 5000
STEPS ?= 10000
SEED := $(if $(SEED),$(SEED),$(strip $(shell od -An -N4 -tu4 /dev/urandom)))
# Of `make packages`: interpreters with torch, of the oldest and the newest versions, say.
PYTHONS ?= $(VENV)/bin/python
# The interpreter, with the torch and Triton, of the machine with the GPU that `make gpu-bundle` compiles for.
PYTHON312 ?= build/py312/bin/python

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.py')
NATIVE := csrc tests/emulated_cuda tests/sanitizers
SANITIZE := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=undefined,float-cast-overflow
# libstdc++ is loaded early too, so that exceptions are intercepted. Python and torch never free all that they allocate:
# leaks are looked for without them, by tests/sanitizers.
ASAN_PYTHON = env -C build/asan LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell gcc -print-file-name=lib$(name).so))" \
	OMP_NUM_THREADS=$(THREADS) ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 \
	$(abspath $(BIN))/python

.PHONY: demo examples test test-interpreter test-oldest-triton bench report compatibility docs docs-check lint format \
	build gpu-bundle clean sanitize asan properties soak soak-operands soak-accuracy soak-training memory determinism faults \
	packages mutants

# Threads that wait for each other don't spin: beside other jobs on the same cores a step takes an eighth of the time.
demo: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m resnet_fused train --impl compare --data digits --epochs 8 --out runs/demo --overwrite

# Each with its defaults: half a minute in all on two cores.
examples: build
	for script in examples/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

test: build lint test-interpreter test-oldest-triton
	$(PYTEST)

# Triton's interpreter has to be asked for before triton is imported.
test-interpreter: build
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) -m interpreter tests/kernels tests/ops tests/test_plan.py

test-oldest-triton: build build/triton-$(OLDEST_TRITON)
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(PYTEST) tests/kernels/test_ahead_of_time.py

# The tests of tests/properties with 10,000 examples that are not those of `make test`; SEED repeats a run.
properties: build
	$(PYTEST) tests/properties --hypothesis-profile properties --hypothesis-seed $(SEED) --timeout 3600 --record properties

soak: soak-operands soak-accuracy soak-training properties

# Of one thread: a model that small is slower with two.
soak-training: build
	RESNET_FUSED_TEST_SEED=$(SEED) RESNET_FUSED_TEST_STEPS=$(STEPS) OMP_NUM_THREADS=1 $(PYTEST) tests/test_soak.py --record soak

# What the process's memory grows by, and the pool of buffers.
memory: build
	$(PYTEST) tests/test_memory.py tests/test_buffers.py --record memory

# What has the same bits in every run, and with every number of threads.
determinism: build
	$(PYTEST) tests/test_determinism.py tests/ops/test_conv3x3.py tests/ops/test_conv_wgrad.py \
		-k 'test_determinism or test_results_do_not_depend_on_the_threads' --record determinism

# The random inputs of `make test` are the same every time, these are not. The command that make prints repeats them.
soak-accuracy: build
	RESNET_FUSED_TEST_SEED=$(SEED) $(PYTEST) tests/ops tests/reference tests/test_models.py
	RESNET_FUSED_TEST_SEED=$(SEED) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) -m interpreter tests/kernels tests/ops

# Ops with operands that do not fit, from a random seed, with csrc under AddressSanitizer and UBSan.
soak-operands: asan
	$(ASAN_PYTHON) -m tests.ops.ill_fitting --memory 0 --seed $(SEED) --cases $(CASES) --log cases.log \
		|| { tail -n 1 build/asan/cases.log; exit 1; }

# Kernels without Python under AddressSanitizer, UBSan, LeakSanitizer, ThreadSanitizer and valgrind; ops, large buffers,
# training steps and operands that do not fit under AddressSanitizer and UBSan.
sanitize: asan
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m tests.sanitizers --python '$(ASAN_PYTHON)' --cases $(CASES) --seed $(SEED)

# A copy of the package in build/asan, whose extension is under both.
asan: build
	mkdir -p build/asan
	rm -rf build/asan/csrc build/asan/resnet_fused build/asan/tests build/asan/tools build/asan/benchmarks
	cp -rp csrc resnet_fused tests tools benchmarks setup.py pyproject.toml README.md LICENSE build/asan/
	rm -f build/asan/resnet_fused/_C*.so
	cd build/asan && RESNET_FUSED_BUILD=cpu CFLAGS='$(SANITIZE) -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS' \
		LDFLAGS='$(SANITIZE)' $(abspath $(BIN))/python setup.py --quiet build_ext --inplace

# Builds the sdist and wheels, installs them in new environments and runs them there: with each of PYTHONS, which have torch.
packages: build
	$(BIN)/python -m tools.packages $(PYTHONS:%=--python %)

# Plants faults in a copy of the code, one at a time: tests have to fail. MUTANTS chooses some by words of their names.
mutants: build
	$(BIN)/python -m tools.mutants $(MUTANTS)

# Fifty kills of the trainer, full disks, lost ranks, damaged checkpoints and the like; `make test` has fewer of each.
faults: build
	RESNET_FUSED_TEST_KILLS=50 OMP_NUM_THREADS=1 $(PYTEST) --record faults tests/cli/test_faults*.py tests/cli/test_distributed.py

# RESULTS=benchmarks/results/NAME.json keeps the figures; `make report` makes tables and pictures of what is there.
bench: build
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest benchmarks --results $(RESULTS)

report: build
	$(BIN)/python -m benchmarks.report --write

# Runs tests/compat and writes docs/compatibility.md, which shows what passed.
compatibility: build
	$(PYTEST) tests/compat --compat-results docs/compatibility.json
	$(BIN)/python -m benchmarks.compatibility --write

# Whether generated tables and charts of README, docs/ and benchmarks/RESULTS.md show their data; writes nothing.
docs-check: build
	$(BIN)/python -m benchmarks.docs_check

# build/docs/index.html: README, docs/ and the API reference; warnings are errors.
docs: build
	$(BIN)/python docs/architecture_svg.py
	$(BIN)/python docs/check_environment.py
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs -d build/doctrees . build/docs

# build/gpu-bundle.tar.xz: what `python -m benchmarks.gpu` would compile on an H100, compiled here, without a GPU.
gpu-bundle: $(PYTHON312)
	$(PYTHON312) -m benchmarks.gpu_bundle make build/gpu-bundle.tar.xz

build/py312/bin/python:
	python3.12 -m venv build/py312
	$@ -m pip install --quiet --disable-pip-version-check torch==2.11.0 triton==3.6.0 numpy setuptools ninja wheel

build/triton-%: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.tmp triton==$*
	mv $@.tmp $@

build: $(VENV)/.built

# torch first: the extension is built against the torch that it will run with, without an isolated second one.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja numpy
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(SOURCES)
	$(PIP) --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c 'from resnet_fused import native; print("resnet_fused has", native.summary())'
	touch $@

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find $(NATIVE) -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find $(NATIVE) -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build $(VENV) .venv resnet_fused/_C*.so resnet_fused/_build.json *.egg-info
