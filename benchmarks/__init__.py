"""What this project claims, measured: one module a question. `uv run -m benchmarks.NAME --help` says what each one takes.

A finished result is a JSON file, its table and its plot in `results/`, which are committed. What a stopped benchmark goes on
with lies in `runs/`, which is not.
"""
