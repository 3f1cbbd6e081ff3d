"""N with and without the refiner's own encoder (the paper's table); N varies fastest, so that a part is a whole curve."""

from ray import tune

from tune_spaces import granularity

SPACE = {
    "action.bins": granularity.SPACE["action.bins"],
    "refiner.vision": tune.choice(["own", "shared"]),
}
SEARCH = "grid"
