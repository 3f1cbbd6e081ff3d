"""Coarse-to-fine: how many classes, and how many steps of the flow from how much noise around them."""

from ray import tune

SPACE = {
    "model.system": tune.choice(["coarse_to_fine"]),
    "refiner.objective": tune.choice(["flow"]),
    "action.bins": tune.choice([10, 32, 64]),
    "coarse_to_fine.steps": tune.choice([1, 2, 5, 10]),
    "coarse_to_fine.noise": tune.loguniform(0.01, 1.0),
}
OBJECTIVES = ("success", "latency_ms")
SEARCH = "optuna"
