"""AdamW over the masters of trained weights, and its state as one that does not depend on how they are sharded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from libra_ray.config import TrainConfig
from libra_ray.training.weights import TrainedWeight, TrainedWeights

BETAS = (0.9, 0.95)


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
    """What torch calls its state dict, with whole moments; every worker must ask."""
    found = optimiser.state_dict()
    order = [weight for group in _groups(weights) for weight in group]
    return {
        "state": {index: _each(values, order[index].whole) for index, values in found["state"].items()},
        "param_groups": [{**group, "lr": float(group["lr"])} for group in found["param_groups"]],
    }


def restore(optimiser: torch.optim.Optimizer, weights: TrainedWeights, saved: Mapping[str, Any]) -> None:
    """Go on from what `state` gave, perhaps with another number of workers or on another device."""
    own = optimiser.state_dict()["param_groups"]
    order = [weight for group in _groups(weights) for weight in group]
    # How a step is computed is this run's business; which weights a group has is checked by torch.
    kept = ("fused", "capturable", "lr", "foreach")
    groups = [{**was, **{k: now[k] for k in kept}} for was, now in zip(saved["param_groups"], own, strict=True)]
    moments = {index: _each(values, order[index].shard) for index, values in saved["state"].items()}
    optimiser.load_state_dict({"state": moments, "param_groups": groups})


def _each(values: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """The moments changed; `step` is one number for all."""
    return {name: change(value) if isinstance(value, Tensor) and value.ndim else value for name, value in values.items()}


def _groups(weights: TrainedWeights) -> tuple[list[TrainedWeight], list[TrainedWeight]]:
    matrices = [weight for weight in weights.all if weight.parameter.ndim >= 2]
    return matrices, [weight for weight in weights.all if weight.parameter.ndim < 2]
