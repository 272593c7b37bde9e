# What people and CI call. The work is done by cargo and by scripts/.
#
# MODEL=DIR     make demo: this model instead of the tiny random one
# VLLM_VENV=DIR use this environment that has vLLM, instead of installing one in .venv
# ARGS="..."    further arguments for the script behind a target

PYTHON ?= python3
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check bench peers trace gen setup

help: ## Lists the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8
	@sed -n 's/^# \([A-Z_]*=\)/  \1/p' $(MAKEFILE_LIST)

demo: ## Builds, sets up vLLM and a tiny model, serves it and asks it something
	@$(PYTHON) scripts/demo.py $(ARGS)

test: ## Runs every test, real vLLM engines included
	@$(PYTHON) scripts/test.py $(ARGS)

check: ## Formatting, lints, documentation and dependencies
	@$(PYTHON) scripts/check.py $(ARGS)

bench: ## Measures what the serving layer costs, on the simulated engine
	cargo build --profile dist --workspace --bins
	target/dist/stator-bench $(ARGS)

peers: ## Measures the router beside those of others, which takes a quarter of an hour to compile
	cargo run --release --manifest-path benches/peers/Cargo.toml -- $(ARGS)

trace: ## Simulates fleets and shows what each way of routing gives
	cargo run --profile dist -p stator-bench -- trace $(ARGS)

gen: ## Writes the golden vectors with vLLM's own encoder
	@$(PYTHON) scripts/gen.py $(ARGS)

setup: ## Installs vLLM into .venv, which demo and test do by themselves
	@$(PYTHON) scripts/setup_vllm.py
