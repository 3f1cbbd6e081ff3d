"""How the reports call what the shipped systems measure; whatever is not named here goes by its own name."""

TITLES = {
    "loss_plan": "Planner loss (cross-entropy)",
    "loss_diff": "Refiner loss (denoising)",
    "plan_accuracy": "Planner accuracy",
    "loss_coarse": "Coarse loss (cross-entropy)",
    "loss_flow": "Flow loss (velocity)",
    "loss_token": "Token loss (cross-entropy)",
    "loss_diffusion": "Diffusion loss (denoising)",
    "share_token": "Share of the token expert",
    "share_diffusion": "Share of the diffusion expert",
    "share_flow": "Share of the flow expert",
    "routed_error": "Error of the routed expert, relative to all experts’ mean",
    "load": "Load balance (1: all used alike)",
}
"""Logged metric, or measure of an answer -> its title."""
CONTROLLERS = {
    "expert": "The expert is the ceiling.",
    "coarse_only": "Coarse only executes the bin centres of the coarse tokens, without refinement.",
    "anchor_only": "Anchor only executes the anchor without its residual.",
    "expert_token": "Expert token, diffusion and flow each execute one of the experts alone.",
    "zero_action": "Zero action is the floor.",
}
"""Controller -> a sentence below the table of successes."""


def title_of(metric: str) -> str:
    """The title of a metric's plot."""
    return TITLES.get(metric, metric.replace("_", " ").capitalize())
