"""The weights of the two losses: fixed, calibrated to equal gradient magnitudes, or learned (method.md, Libra-VLA: training).

Where planner and refiner share no parameters, AdamW, which divides by the gradient's own size, leaves a loss weight one way to
matter: the clipping of both systems' *joint* gradient norm, in which the heavier loss takes the room of the other. Where they
share parameters (`refiner.vision=shared`, `refiner.see_language`) the weights also decide whose gradient those follow.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, distributed, nn

from libra_ray.config import TrainConfig
from libra_ray.model.libra import Libra

UNCERTAINTY_RATE = 0.01
"""Step size of the learned log-variances; at their optimum the curvature is 1, so they settle within some hundred steps."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the losses are multiplied by before they are added."""

    plan: float
    diff: float


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """One measure of both losses' gradients, unweighted, each over all parameters it reaches.

    Attributes:
        plan: norm of the gradient of the planner's cross-entropy.
        diff: norm of the gradient of the refiner's denoising loss.
        cosine: between both on the parameters they share, in [-1, 1]; None where they share none.
    """

    plan: float
    diff: float
    cosine: float | None = None


class Balance(Protocol):
    """How the weights are found. `state` and `restore` let a resumed run go on exactly."""

    @property
    def weights(self) -> Weights:
        """The weights of the present step."""

    def learn(self, plan: float, diff: float) -> None:
        """Take note of a step's unweighted losses, the mean over all workers."""

    def measure(self, gradients: Gradients) -> None:
        """Take note of a measure of both gradients."""

    def state(self) -> dict[str, float]:
        """All that was learned."""

    def restore(self, state: dict[str, float]) -> None:
        """Go on from what `state` gave."""


@dataclass(frozen=True)
class Fixed:
    """The configured weights."""

    config: TrainConfig

    @property
    def weights(self) -> Weights:
        """The lambdas."""
        return Weights(plan=self.config.lambda_plan, diff=self.config.lambda_diff)

    def learn(self, plan: float, diff: float) -> None:
        """Nothing to learn."""

    def measure(self, gradients: Gradients) -> None:
        """Nothing to calibrate."""

    def state(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Nothing."""


@dataclass
class EqualGradients:
    """Calibrated so that the weighted losses' gradients have norms in the ratio of the lambdas, equal by default.

    The paper's words: "calibrated to balance gradient magnitudes"; how is open. Here the norms are smoothed geometrically over
    the measures, and the weights always add up to what the lambdas do.
    """

    config: TrainConfig
    log_norms: dict[str, float] = field(default_factory=lambda: {"plan": 0.0, "diff": 0.0})
    measures: int = 0

    @property
    def weights(self) -> Weights:
        """In inverse proportion to the gradients; the lambdas before the first measure."""
        plan, diff = self.config.lambda_plan, self.config.lambda_diff
        if self.measures == 0:
            return Weights(plan=plan, diff=diff)
        unbiased = 1 - self.config.balance_memory**self.measures
        wanted_plan = plan * math.exp(-self.log_norms["plan"] / unbiased)
        wanted_diff = diff * math.exp(-self.log_norms["diff"] / unbiased)
        scale = (plan + diff) / (wanted_plan + wanted_diff)
        return Weights(plan=scale * wanted_plan, diff=scale * wanted_diff)

    def learn(self, plan: float, diff: float) -> None:
        """The losses' values do not matter."""

    def measure(self, gradients: Gradients) -> None:
        """Smooth both norms; a measure with a vanished gradient says nothing about a weight and is passed over."""
        if min(gradients.plan, gradients.diff) <= 0 or not math.isfinite(gradients.plan + gradients.diff):
            return
        memory = self.config.balance_memory
        for name, norm in (("plan", gradients.plan), ("diff", gradients.diff)):
            self.log_norms[name] = memory * self.log_norms[name] + (1 - memory) * math.log(norm)
        self.measures += 1

    def state(self) -> dict[str, float]:
        """Smoothed logarithms and their number."""
        return {**self.log_norms, "measures": self.measures}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.log_norms, self.measures = {name: state[name] for name in self.log_norms}, int(state["measures"])


@dataclass
class Uncertainty:
    """Learned log-variances s (Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses).

    Gradient descent on the sum of lambda exp(-s) L + s over both losses; the optimum, exp(s) = lambda L, makes both weighted
    losses 1.
    """

    config: TrainConfig
    log_variances: dict[str, float] = field(default_factory=lambda: {"plan": 0.0, "diff": 0.0})

    @property
    def weights(self) -> Weights:
        """The lambdas times exp(-s)."""
        return Weights(
            plan=self.config.lambda_plan * math.exp(-self.log_variances["plan"]),
            diff=self.config.lambda_diff * math.exp(-self.log_variances["diff"]),
        )

    def learn(self, plan: float, diff: float) -> None:
        """One step on the log-variances; the derivative is 1 - weight * loss."""
        weights = self.weights
        for name, weighted in (("plan", weights.plan * plan), ("diff", weights.diff * diff)):
            self.log_variances[name] -= UNCERTAINTY_RATE * (1 - weighted)

    def measure(self, gradients: Gradients) -> None:
        """Gradients do not matter."""

    def state(self) -> dict[str, float]:
        """The log-variances."""
        return dict(self.log_variances)

    def restore(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.log_variances = {name: state[name] for name in self.log_variances}


def make_balance(config: TrainConfig) -> Balance:
    """The configured way to the weights."""
    match config.balance:
        case "gradient":
            return EqualGradients(config)
        case "uncertainty":
            return Uncertainty(config)
        case _:
            return Fixed(config)


def shared_gradient(loss: Tensor, shared: list[nn.Parameter]) -> Tensor:
    """The gradient of `loss` alone on the shared parameters, flat, the mean over all workers; the graph is kept."""
    found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(shared, found, strict=True)])
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
    return flat


def measure_gradients(model: Libra, weights: Weights, shared: list[nn.Parameter], diff_on_shared: Tensor | None) -> Gradients:
    """Both losses' gradients, taken apart after one backward pass of their weighted sum (before clipping).

    Args:
        model: holds the sum's gradients.
        weights: of the sum, above 0.
        shared: parameters that both losses reach.
        diff_on_shared: `shared_gradient` of the denoising loss; None where nothing is shared.
    """
    theirs = {id(p) for p in shared}
    plan = _norm([p for p in model.planner.parameters() if id(p) not in theirs]) / weights.plan
    diff = _norm(list(model.refiner.parameters())) / weights.diff
    if diff_on_shared is None:
        return Gradients(plan=plan, diff=diff)
    both = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in shared])
    plan_on_shared = (both - weights.diff * diff_on_shared) / weights.plan
    cosine = torch.nn.functional.cosine_similarity(plan_on_shared, diff_on_shared, dim=0)
    return Gradients(
        plan=math.hypot(plan, float(plan_on_shared.norm())),
        diff=math.hypot(diff, float(diff_on_shared.norm())),
        cosine=float(cosine),
    )


def _norm(parameters: list[nn.Parameter]) -> float:
    grads = [p.grad for p in parameters if p.grad is not None]
    return float(nn.utils.get_total_norm(grads)) if grads else 0.0
