"""Experts: one of them or the mean of all, how sharply the router follows their errors, how much it is to use all of them."""

from ray import tune

SPACE = {
    "model.system": tune.choice(["experts"]),
    "experts.routing": tune.choice(["hard", "soft"]),
    "experts.temperature": tune.loguniform(0.02, 1.0),
    "experts.balance": tune.loguniform(0.001, 1.0),
}
OBJECTIVES = ("success", "latency_ms")
SEARCH = "optuna"
