# llmproxy: see `make help`. Everything is installed into .venv; nothing outside this folder changes,
# but for `make peers`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP_OPTIONS := -m pip --disable-pip-version-check --no-input -qq
PIP    := $(BIN)/python $(PIP_OPTIONS)
environment = test -x $(VENV)-$(1)/bin/python || $(PYTHON) -m venv $(VENV)-$(1)
# A command, and behind a colon the package that has it, where that is called otherwise.
PEERS  := nginx haproxy caddy apache2:apache2-bin varnishd:varnish curl slowhttptest go:golang-go node:nodejs npm git javac:default-jdk-headless chromium debootstrap systemd-analyze:systemd systemd-nspawn:systemd-container logrotate promtool:prometheus squid tinyproxy redis-server postgres:postgresql
ARGS   ?=
# CPythons for `make test-all`; `make bench` takes those that the command line names here or as PYTHON.
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
named = $(if $(findstring command,$(origin PYTHONS)),$(PYTHONS),$(if $(findstring command,$(origin PYTHON)),$(PYTHON)))
# How many processes run tests, more than there are cores, for most tests wait; ARGS="-n 0" is one without
# workers, as a debugger wants it.  Tests of one file stay together, for they share what stands for their
# module; tests/conftest.py orders the files.
JOBS   ?= 4
AT_ONCE = -n $(JOBS) --dist loadfile --no-loadscope-reorder

# A stamp for what `make run` needs and one for all the rest, so that the second run installs nothing.
INPUTS    := setup.cfg pyproject.toml constraints.txt
RUN_STAMP := $(VENV)/installed-run
DEV_STAMP := $(VENV)/installed-dev

# What went well says nothing; what failed says all that it has to say.
quietly = @output=$$($(1) 2>&1) || { printf '%s\n' "$$output"; exit 1; }

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test test-lowest test-newest test-all audit lint fmt docs docs-hops monitoring bench bench-docs bench-quick bench-capacity bench-watched bench-shared bench-hosts bench-sticky bench-sandbox soak peers peer-programs peer-hops dist clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1	/p' $(MAKEFILE_LIST) | expand -t 13

run: $(RUN_STAMP) ## the demo: a provider and the proxy before it, in the foreground (ARGS="--help")
	@echo "Starting the proxy with a demo provider ..."
	@exec $(BIN)/llmproxy demo $(ARGS)

test: lint ## everything that a change must pass (ARGS="-k relay" for pytest)
	@$(BIN)/python -m pytest -q $(AT_ONCE) $(ARGS)

# Each has an environment of its own, in which pip takes what it finds at that moment; constraints.txt is
# about another one, and so is the machine that is installed with it.
NO_MACHINE = --deselect tests/systemd/test_machine.py
UNPINNED = --deselect tests/test_versions.py::test_what_the_promises_need_is_pinned_too $(NO_MACHINE)

test-lowest: ## the tests with the lowest versions that setup.cfg allows (ARGS="-k relay" for pytest)
	@$(call environment,lowest)
	@sed -n 's/^ *\([A-Za-z0-9._-]*\)\(\[[a-z]*\]\)\{0,1\}>=\([0-9.]*\).*/\1==\3/p' setup.cfg > $(VENV)-lowest/constraints.txt
	@$(VENV)-lowest/bin/python $(PIP_OPTIONS) install --upgrade -c $(VENV)-lowest/constraints.txt -e '.[test]'
	@$(VENV)-lowest/bin/python -m pytest -q $(AT_ONCE) $(UNPINNED) $(ARGS)

test-newest: ## the tests with the newest versions that setup.cfg allows (ARGS="-k relay" for pytest)
	@$(call environment,newest)
	@$(VENV)-newest/bin/python $(PIP_OPTIONS) install --upgrade --upgrade-strategy eager -e '.[test]'
	@$(VENV)-newest/bin/python -m pytest -q $(AT_ONCE) $(UNPINNED) $(ARGS)

# The machine has Debian's CPython: wheels for another one are nothing to it.
test-all: ## the tests by each CPython that is here (PYTHONS="python3.12 /path/to/python3.13")
	@failed=; for python in $(PYTHONS); do \
	    version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) \
	        || { echo "test-all: left out: $$python is not here"; continue; }; \
	    echo "test-all: CPython $$version"; environment=$(VENV)-$$version; \
	    test -x $$environment/bin/python || "$$python" -m venv $$environment || exit 1; \
	    $$environment/bin/python $(PIP_OPTIONS) install -c constraints.txt -e '.[test]' \
	        && $$environment/bin/python -m pytest -q $(AT_ONCE) $(NO_MACHINE) $(ARGS) || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "test-all: failed:$$failed"; exit 1; }

audit: ## known vulnerabilities of what constraints.txt names, asked of PyPI (ARGS="-s osv" asks OSV)
	@$(call environment,audit)
	@$(VENV)-audit/bin/python $(PIP_OPTIONS) install pip-audit
	@$(VENV)-audit/bin/pip-audit --strict --progress-spinner off --no-deps --disable-pip -r constraints.txt $(ARGS)

lint: $(DEV_STAMP) ## form, style, types and docstrings
	$(call quietly,$(BIN)/ruff format --check .)
	$(call quietly,$(BIN)/ruff check .)
	$(call quietly,$(BIN)/mypy)
	$(call quietly,$(BIN)/interrogate -vv --no-color --omit-covered-files llmproxy)
	$(call quietly,$(BIN)/interrogate -vv --no-color --omit-covered-files -w '^test_' tests)

fmt: $(DEV_STAMP) ## put the code into its form
	$(call quietly,$(BIN)/ruff check --select I --fix .)
	$(call quietly,$(BIN)/ruff format .)

docs: $(RUN_STAMP) ## docs/configuration.rst and docs/admin-api.json, from their declarations
	@$(BIN)/python -m llmproxy.config.reference docs/configuration.rst
	@$(BIN)/python -m llmproxy.admin.schema docs/admin-api.json

docs-hops: $(DEV_STAMP) ## the table in docs/buffering.rst, from real programs (after `make peers`)
	@LLMPROXY_TEST_WRITE_HOPS=1 $(BIN)/python -m pytest -q -n 0 tests/live/test_hops.py $(ARGS)

monitoring: ## Debian's Prometheus with the rules of monitoring/, on the demo that `make run` started
	@command -v prometheus >/dev/null || { echo "monitoring: no prometheus here: apt-get install prometheus, or make peers"; exit 1; }
	@python3 -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:9080/livez", timeout=5)' 2>/dev/null || { echo "monitoring: nothing answers at 127.0.0.1:9080: start the demo first, with make run"; exit 1; }
	@mkdir -p build/prometheus
	@echo "Prometheus scrapes the demo's admin site: http://127.0.0.1:9090/alerts and /graph; Ctrl-C ends it."
	@exec prometheus --config.file=monitoring/prometheus.yml --storage.tsdb.path=build/prometheus \
	    --web.listen-address=127.0.0.1:9090 --log.level=warn $(ARGS)

bench: $(DEV_STAMP) ## the daemon against nginx, HAProxy, Go and others (ARGS="--help"; docs/benchmark.rst)
	@$(BIN)/python -m bench.compare $(foreach python,$(named),--python $(python)) $(ARGS)

# The second run is of those that are shown for W1, W3, W8 and START alone, other CPythons among them.
bench-docs: $(DEV_STAMP) ## tables and pictures of docs/benchmark.rst, in hours (RESULTS="FILE FILE": from those)
	@mkdir -p build/bench
	@test -n "$(RESULTS)" || $(BIN)/python -m bench.compare --out build/bench/docs-1.json \
	    --peer nginx,envoy,go,nginx-tls,envoy-tls,go-tls \
	    --work W1,W2,W3,W4,W5,W7,W8,W8T,W9,W10,STREAMS,START $(ARGS)
	@test -n "$(RESULTS)" || $(BIN)/python -m bench.compare --out build/bench/docs-2.json \
	    --peer haproxy,caddy,traefik,aiohttp,litellm,portkey,cpython --work W1,W3,W8,START \
	    $(foreach python,$(named),--python $(python)) $(ARGS)
	@$(BIN)/python -m bench.report $(or $(RESULTS),build/bench/docs-1.json build/bench/docs-2.json)

bench-quick: $(RUN_STAMP) ## what one event and one request cost, in under a minute (ARGS="--help")
	@$(BIN)/python -m bench.quick $(ARGS)

bench-capacity: $(DEV_STAMP) ## ten thousand streams, and two processes on one port (ARGS="--help")
	@$(BIN)/python -m bench.capacity $(ARGS)

bench-watched: $(DEV_STAMP) ## what a scrape costs with 5,000 streams, and the page that is open (ARGS="--help")
	@$(BIN)/python -m bench.watched $(ARGS)

bench-shared: $(DEV_STAMP) ## what it costs that processes share an engine (ARGS="--help")
	@$(BIN)/python -m bench.shared $(ARGS)

bench-hosts: $(DEV_STAMP) ## how a shared engine bears two hundred hosts, by simulation (ARGS="--help")
	@$(BIN)/python -m bench.hosts $(ARGS)

bench-sticky: $(DEV_STAMP) ## what providers find in their prompt caches, sticky or not (ARGS="--help")
	@$(BIN)/python -m bench.sticky $(ARGS)

bench-sandbox: $(DEV_STAMP) ## what an interception and a tunnel cost, beside Go and HAProxy (ARGS="--help")
	@$(BIN)/python -m bench.sandbox $(ARGS)

soak: $(DEV_STAMP) ## whether memory goes flat under load and reloads, for two hours (ARGS="--help")
	@$(BIN)/python -m bench.soak $(ARGS)

# The programs of tests/sandbox and tests/hops have a package for each platform, of which mirrors keep some: no
# lock of them could be whole everywhere.  The version of each program is pinned.
peers: peer-programs peer-hops ## the other programs that tests talk to, by apt-get, pip and npm
	@if ! command -v npm >/dev/null; then echo "peers: no npm here; left out: tests/browser, tests/sandbox, tests/hops"; exit 0; fi; \
	output=$$(npm ci --prefix tests/browser 2>&1 && npm install --no-package-lock --prefix tests/sandbox 2>&1) \
	    || { printf '%s\n' "$$output"; exit 1; }; \
	output=$$(npm install --no-package-lock --prefix tests/hops 2>&1) || printf '%s\n' "$$output" "peers: left out: tests/hops"

# PyPI has them for some platforms only: without them, tests of them are skipped.
peer-hops:
	@$(call environment,peers)
	@output=$$($(VENV)-peers/bin/python $(PIP_OPTIONS) install -r tests/hops/requirements.txt 2>&1) \
	    || printf '%s\n' "$$output" "peers: left out: $$(sed 's/[=#].*//' tests/hops/requirements.txt | xargs)"

peer-programs:
	@set -e; missing=; \
	for peer in $(PEERS); do \
	    PATH="$$PATH:/usr/sbin:/sbin:$$(echo /usr/lib/postgresql/*/bin | tr " " :)" command -v $${peer%:*} >/dev/null || missing="$$missing $${peer#*:}"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then echo "peers: no apt-get here; left out:$$missing"; exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "peers: not root; left out:$$missing"; exit 0; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	output=$$( { apt-get -q update && apt-get -q -y install --no-install-recommends $$missing; } 2>&1 ) \
	    || { printf '%s\n' "$$output"; exit 1; }

dist: $(DEV_STAMP) ## sdist and wheel, in dist/
	@rm -rf dist
	$(call quietly,$(BIN)/python -m build --no-isolation)

clean: ## away with everything that was made here
	@rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest $(VENV)-audit $(VENV)-peers $(VENV)-3.* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -f twisted/plugins/dropin.cache

$(BIN)/python:
	@echo "Making a Python environment in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(RUN_STAMP): $(BIN)/python $(INPUTS)
	@echo "Installing the proxy and what it needs into $(VENV), once; it can take a minute ..."
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(DEV_STAMP): $(BIN)/python $(INPUTS)
	@echo "Installing what tests and checks need into $(VENV), once; it can take some minutes ..."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(RUN_STAMP) $@
