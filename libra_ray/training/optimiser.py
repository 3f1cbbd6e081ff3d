"""AdamW over the masters of trained weights, and its state, which others may go on from, however they are sharded."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from libra_ray import shards
from libra_ray.config import TrainConfig
from libra_ray.training.weights import TrainedWeight, TrainedWeights

BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")


def make(weights: TrainedWeights, config: TrainConfig, *, capturable: bool) -> torch.optim.AdamW:
    """AdamW; biases, norms and embeddings of position are not decayed.

    Args:
        capturable: whether its steps become part of a CUDA graph: then the learning rate is a tensor too.
    """
    decayed, others = _groups(weights)
    groups = [
        {"params": [w.master for w in decayed], "weight_decay": config.weight_decay},
        {"params": [w.master for w in others], "weight_decay": 0.0},
    ]
    lr = torch.tensor(config.lr, device=weights.all[0].master.device) if capturable else config.lr
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True, capturable=capturable)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def rate(optimiser: torch.optim.Optimizer) -> float:
    """The learning rate of the last step."""
    return float(optimiser.param_groups[0]["lr"])


def clip(optimiser: torch.optim.AdamW, total: Tensor, bound: float) -> None:
    """Have the next steps scale gradients of norm `total` down to at most `bound`, as they read them."""
    optimiser.grad_scale = ((total + 1e-6) / bound).clamp(min=1)  # type: ignore[attr-defined]  # its fused kernel reads it


def state(optimiser: torch.optim.Optimizer, weights: TrainedWeights) -> dict[str, Any]:
    """By the weights' names the steps behind each, and its moments, of sharded ones the shards; waits for the device."""
    learned = [weight for weight in weights.all if optimiser.state.get(weight.master)]
    steps = torch.stack([optimiser.state[w.master]["step"].float() for w in learned]).tolist() if learned else []
    found: dict[str, Any] = {"steps": dict(zip([weight.name for weight in learned], steps, strict=True))}
    return found | {kind: {w.name: w.part(optimiser.state[w.master][kind]) for w in learned} for kind in MOMENTS}


def restore(optimiser: torch.optim.Optimizer, weights: TrainedWeights, saved: Mapping[str, Any]) -> None:
    """Go on from what `state` gave, perhaps of other shards or on another device.

    Raises:
        ValueError: it has moments of another shape, or none of a weight that was learned.
    """
    order = [weight for group in _groups(weights) for weight in group]
    if "param_groups" in saved:
        saved = _former(saved, [weight.name for weight in order])
    found = optimiser.state_dict()
    for index, weight in enumerate(order):
        if weight.name in saved["steps"]:
            moments = {kind: torch.zeros_like(weight.master) for kind in MOMENTS}
            found["state"][index] = {"step": torch.tensor(float(saved["steps"][weight.name])), **moments}
    # It brings the steps to where they are counted.
    optimiser.load_state_dict(found)
    learned = [weight for weight in order if weight.name in saved["steps"]]
    shards.fill((w.part(optimiser.state[w.master][kind]), saved[kind][w.name]) for kind in MOMENTS for w in learned)


def _former(saved: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What earlier versions wrote, torch's own state by number, as `state` gives it."""
    of = {names[index]: values for index, values in saved["state"].items()}
    found: dict[str, Any] = {"steps": {name: float(values["step"]) for name, values in of.items()}}
    return found | {kind: {name: values[kind] for name, values in of.items()} for kind in MOMENTS}


def _groups(weights: TrainedWeights) -> tuple[list[TrainedWeight], list[TrainedWeight]]:
    matrices = [weight for weight in weights.all if weight.parameter.ndim >= 2]
    return matrices, [weight for weight in weights.all if weight.parameter.ndim < 2]
