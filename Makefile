# The front door. Every target does its own set-up on a fresh Debian machine with a Rust toolchain.
# The work is done by the scripts in scripts/, each of which can be run by hand.

.DEFAULT_GOAL := all
.PHONY: all criu demo demo-migrate test bench soak faults fuzz lint zdtm kernels criu-with-libsoccr runtimes install deb clean distclean help

# One place for what is built, whatever the shell says: scripts and tests look for it there.
export CARGO_TARGET_DIR := $(CURDIR)/target
# Under sudo, the Rust of whoever called it.
ifdef SUDO_USER
ifeq ($(shell command -v cargo),)
INVOKER := $(shell getent passwd $(SUDO_USER) | cut -d: -f6)
export PATH := $(PATH):$(INVOKER)/.cargo/bin
export RUSTUP_HOME ?= $(INVOKER)/.rustup
endif
endif
# CRIU's makefiles shall not inherit what was given to this one.
unexport MAKEFLAGS MFLAGS MAKELEVEL

PREFIX ?= /usr/local
DESTDIR ?=
WHAT ?= plugin
T ?=
K ?=
SECONDS ?= 60
R ?=
ROUNDS ?= 10
STOCK ?= 1
CASES ?=

all: ## libsoccr.{a,so}, the soccr command and the plugin for CRIU, under target/
	@scripts/build

criu: ## a stock CRIU with its tests under target/criu (CRIU=DIR or FILE: yours instead)
	@scripts/criu

demo: all criu ## freeze, kill and bring back a server while its clients go on
	@scripts/packages redis-server || echo "demo: no redis-server here, using the built-in echo server"
	@scripts/isolated target/release/soccr-test demo

demo-migrate: PODMAN = target/migrate-podman
demo-migrate: all criu ## a server moves between two hosts with its addresses while its clients go on, by criu and by podman, beside stock CRIU (STOCK=0: without)
	@scripts/packages redis-server || echo "demo-migrate: no redis-server here, using the built-in server"
	@scripts/runtimes --rounds 1 $(if $(filter 0,$(STOCK)),--no-stock) --out $(PODMAN) --cases "two hosts, published" -- podman-runc \
		|| [ -e $(PODMAN)/report.json ] || echo "demo-migrate: no podman here, criu alone"
	@scripts/isolated target/release/soccr-test migrate $(if $(filter 0,$(STOCK)),--ours-only) \
		$$(test ! -e $(PODMAN)/report.json || echo --podman $(PODMAN)/report.json) $(ARGS)

test: ## everything but what takes longer or tests nothing of ours (STEPS="cargo demo …": only these)
	@scripts/test $(STEPS)

bench: all criu ## what a dump and a restore cost, beside stock CRIU and its own work; half an hour (ARGS=…: see soccr-test bench --help)
	@cargo bench --quiet --locked --no-run --package soccr-testkit --bench engine
	@scripts/isolated target/release/soccr-test bench $(ARGS)

soak: all criu ## dump and restore under load, loss and reordering for ten minutes
	@scripts/isolated target/release/soccr-test soak

fuzz: ## the fuzz targets with libFuzzer (SECONDS=60 each, T="names": only these)
	@scripts/fuzz $(SECONDS) $(T)

faults: criu ## kill and stop everybody at every point of dump and restore (ARGS=…: see soccr-test faults --help)
	@scripts/build --with-faults
	@scripts/isolated target/release/soccr-test faults $(ARGS)

lint: ## formatting, clippy, the C header, the shell scripts
	@scripts/lint

zdtm: all criu ## CRIU's own TCP tests (WHAT=plugin|libsoccr|stock, T="names": only these, T=all: every test, beside stock)
	@if [ $(WHAT) = libsoccr ]; then scripts/criu-with-libsoccr; fi
	@scripts/isolated scripts/zdtm $(WHAT) $(T)

kernels: ## the tests on Debian's kernels in a virtual machine (K="6.1 …": only these)
	@scripts/kernels $(K)

runtimes: ## podman, runc, crun, LXC with the plugin, beside stock (R="runc …" ROUNDS=10 STOCK=1 CASES=…: see scripts/runtimes)
	@scripts/runtimes --rounds $(ROUNDS) $(if $(filter 0,$(STOCK)),--no-stock) $(if $(CASES),--cases $(CASES)) -- $(R)

criu-with-libsoccr: all criu ## CRIU linked with our libsoccr.a in place of its own
	@scripts/criu-with-libsoccr

install: ## what make has built, into $(DESTDIR)$(PREFIX)
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' scripts/install

deb: ## Debian packages in target/debian: soccr (command and plugin), libsoccr1, libsoccr-dev
	@scripts/deb

clean: ## everything built here but CRIU and tools
	@if [ -d target ]; then find target -mindepth 1 -maxdepth 1 ! -name '*criu*' ! -name tools -exec rm -rf --one-file-system {} +; fi

distclean: ## everything built or fetched here
	@rm -rf --one-file-system target

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 20
