# Every target is one line that you could type. What the lines need (uv, the locked environment, the rendering
# libraries) is seen to first by deploy/setup.sh, which is quick where everything is there.

SHELL := /bin/sh
export PATH := $(CURDIR)/.uv/bin:$(PATH)
.DEFAULT_GOAL := help

.PHONY: help
help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## */\t/' | expand -t 16

.PHONY: setup
setup:  ## uv, the locked environment and the rendering libraries; every target below does this by itself
	@sh deploy/setup.sh

.PHONY: quickstart
quickstart: setup  ## the main job: five Meta-World tasks, from demonstrations to the report
	uv run jobs/pipeline.py quickstart

.PHONY: debug
debug: setup  ## the main job at its smallest, in under two minutes
	uv run jobs/pipeline.py debug

.PHONY: mt10
mt10: setup  ## the main job on the ten tasks of MT10
	uv run jobs/pipeline.py mt10

.PHONY: sweep
sweep: setup  ## a small sweep over the granularity, in a few minutes
	uv run jobs/sweep.py debug granularity

.PHONY: serve
serve: setup  ## the quickstart's checkpoint for robots at ws://127.0.0.1:8765; its live page is http://127.0.0.1:8765
	uv run serve run serve_apps.libra:app checkpoint=runs/quickstart/checkpoint

.PHONY: report
report: setup  ## open the quickstart's report in the browser
	uv run python -m webbrowser runs/quickstart/report.html

.PHONY: doctor
doctor: setup  ## what this machine lacks for the jobs, with what to type against it
	uv run jobs/doctor.py

.PHONY: test
test: setup  ## the tests
	uv run pytest

.PHONY: test-gpu
test-gpu: setup  ## the tests that need a GPU
	uv run pytest tests/gpu -n0

.PHONY: mutants
mutants: setup  ## does each small change of the core's code fail a test? An hour or more; goes on where it stopped
	uv run --with mutmut==3.8.1 mutmut run

.PHONY: test-docs
test-docs: setup  ## every line that README and docs print, run from a clone
	uv run pytest -n0 -m printed tests/docs

.PHONY: lint
lint: setup  ## style, docstrings, annotations
	uv run ruff check

.PHONY: types
types: setup  ## static types
	uv run mypy

.PHONY: format
format: setup  ## lay out the code
	uv run ruff format

.PHONY: cluster-check
cluster-check: setup  ## cluster.yaml against the schema that Ray ships
	uv run pytest tests/test_cluster.py

.PHONY: clean
clean:  ## remove environment and caches; runs/ stays
	rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache
