# One command each; each does all its own set-up on Debian and Ubuntu (scripts/setup), quickly where nothing is missing.
# ARGS goes to the program: make test ARGS="-k election", make demo ARGS=my-lab.toml

export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
ARGS ?=

# Sets of texts have one order in every run, so that a failing schedule of the simulation can be played again.
export PYTHONHASHSEED ?= 0

export GUEST_IS_BUILT = kilo-etcd: there is no kernel for guests yet. The first test that needs one builds it (some ten minutes of \
processor time, at a low priority) while other tests run; the compiler's output is in $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kilo-etcd/build.log.

# Tests start Python hundreds of times, and pytest takes longer to compile the tests than to import them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-fast simulate newcomer check coverage docs deb matrix bench bench-failover format clean

help:
	@echo 'make demo       a small internet on this machine: three sites, real etcd, real agents, real packets'
	@echo 'make test       all tests (the first time some of them may build a kernel, while the others run)'
	@echo 'make test-fast  the tests that need neither etcd nor graphviz nor root nor a network, a minute'
	@echo 'make simulate   thousands of schedules of faults, agents and all, in virtual time; KILO_SEEDS=5000'
	@echo 'make newcomer   what the README says of demo and tests, word for word in a fresh minimal Debian; ARGS=demo'
	@echo 'make check      ruff, mypy strict, import-linter'
	@echo 'make coverage   which lines the tests reach, as a table; ARGS chooses tests as with make test'
	@echo 'make docs       the documentation as a site, with the API, in build/docs; a broken link is an error'
	@echo 'make deb        the Debian package, and the archive for other systems, in dist/'
	@echo 'make matrix     the fast tests under each Python from 3.11 that this machine has'
	@echo 'make bench      the numbers, as tables; ARGS=--quick, or the names of some benchmarks'
	@echo 'make bench-failover  the gap when a leader crashes, kilo-etcd next to keepalived (Debian'\''s package is installed)'
	@echo 'make format     what ruff can put right by itself'
	@echo 'make clean      remove all that the others have made here'

demo:
	@scripts/setup all
	@.venv/bin/kgctl lab demo $(ARGS)

test:
	@scripts/setup all
	@scripts/guest ready || { scripts/setup guest && echo "$$GUEST_IS_BUILT" >&2; }
	@KILO_SEEDS=$${KILO_SEEDS:-60} KILO_CROWD=$${KILO_CROWD:-10} .venv/bin/python -m pytest -n 4 --dist loadgroup --no-loadscope-reorder $(ARGS)

test-fast:
	@scripts/setup python
	@KILO_SEEDS=$${KILO_SEEDS:-5} KILO_EXAMPLES=$${KILO_EXAMPLES:-10} KILO_CROWD=$${KILO_CROWD:-2} .venv/bin/python -m pytest -n 2 --dist worksteal --fast $(ARGS)

simulate:
	@scripts/setup python
	@KILO_SEEDS=$${KILO_SEEDS:-2000} .venv/bin/python -m pytest -n auto tests/agent/test_agent_simulation.py $(ARGS)

newcomer:
	@scripts/setup newcomer
	@scripts/newcomer $(ARGS)

check:
	@scripts/setup python
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy --strict
	.venv/bin/lint-imports

coverage:
	@scripts/setup all
	@scripts/coverage $(ARGS)

docs:
	@scripts/setup docs
	@scripts/docs

deb:
	@scripts/setup package
	@scripts/package $(ARGS)

matrix:
	@scripts/matrix $(ARGS)

bench:
	@scripts/setup all
	@bench/run $(ARGS)

bench-failover:
	@scripts/setup all
	@scripts/setup keepalived
	@bench/run $(ARGS) failover

format:
	@scripts/setup python
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:
	@[ -f scripts/setup ] && [ -d src/kilo_etcd ] || { echo 'make clean: this directory is not a checkout of kilo-etcd' >&2; exit 1; }
	rm -rf .venv build dist mesh.svg .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
