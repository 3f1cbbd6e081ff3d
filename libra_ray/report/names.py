"""How the reports call what the shipped systems measure; whatever is not named here goes by its own name."""

TITLES = {
    "loss_plan": "Planner loss (cross-entropy)",
    "loss_diff": "Refiner loss (denoising)",
    "plan_accuracy": "Planner accuracy",
    "loss_coarse": "Coarse loss (cross-entropy)",
    "loss_flow": "Flow loss (velocity)",
}
"""Logged metric -> title of its plot."""
CONTROLLERS = {
    "expert": "The expert is the ceiling.",
    "coarse_only": "Coarse only executes the bin centres of the coarse tokens, without refinement.",
    "anchor_only": "Anchor only executes the anchor without its residual.",
    "zero_action": "Zero action is the floor.",
}
"""Controller -> a sentence below the table of successes."""


def title_of(metric: str) -> str:
    """The title of a metric's plot."""
    return TITLES.get(metric, metric.replace("_", " ").capitalize())
