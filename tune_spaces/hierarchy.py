"""Hierarchy: how long the strategic level's answer lasts, how many sub-goals it says, and how close waypoints lie."""

from ray import tune

SPACE = {
    "model.system": tune.choice(["hierarchy"]),
    "hierarchy.plans": tune.choice([2, 1, 4]),
    "hierarchy.subgoals": tune.choice([4, 1, 2]),
    "hierarchy.waypoint_steps": tune.choice([5, 2, 10]),
}
SEARCH = "optuna"
