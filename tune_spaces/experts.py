"""Experts: one of them or the mean of all, and how much the router is pushed to use all of them, against latency."""

from ray import tune

SPACE = {
    "model.system": tune.choice(["experts"]),
    "experts.routing": tune.choice(["hard", "soft"]),
    "experts.balance": tune.loguniform(0.001, 1.0),
}
OBJECTIVES = ("success", "latency_ms")
SEARCH = "optuna"
