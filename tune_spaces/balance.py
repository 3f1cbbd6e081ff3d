"""The balance: how both losses' weights are found, the planner's beside the refiner's 1, and the curriculum's threshold."""

from ray import tune

SPACE = {
    "train.balance": tune.choice(["fixed", "gradient", "uncertainty"]),
    "train.lambda_plan": tune.loguniform(0.1, 10.0),
    "train.tau": tune.uniform(0.3, 0.95),
}
SEARCH = "optuna"
