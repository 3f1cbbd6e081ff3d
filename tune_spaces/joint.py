"""Decomposition and balance together, success against latency."""

from tune_spaces import balance, granularity

SPACE = granularity.SPACE | balance.SPACE
OBJECTIVES = ("success", "latency_ms")
SEARCH = "optuna"
