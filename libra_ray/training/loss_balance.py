"""The weights of the losses: fixed, calibrated to equal gradient magnitudes, or learned (method.md, Libra-VLA: training).

Where two losses reach no common weights, AdamW, which divides by the gradient's own size, leaves a loss weight one way to
matter: the clipping of the *joint* gradient norm, in which the heavier loss takes the room of the other. Where they share
weights (of Libra: `refiner.vision=shared`, `refiner.see_language`) it also decides whose gradient those follow.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from libra_ray.config import TrainConfig

UNCERTAINTY_RATE = 0.01
"""Step size of the learned log-variances; at their optimum the curvature is 1, so they settle within some hundred steps."""


@dataclass(frozen=True, kw_only=True)
class LossGradients:
    """One measure of the losses' gradients, unweighted, each over all weights that it reaches.

    Attributes:
        norms: by the loss's name.
        cosines: of two losses, by both names in order, on the weights they share, in [-1, 1]; no entry where they share none.
    """

    norms: Mapping[str, float]
    cosines: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """The measure's columns in the training log: `grad_norm_loss_<name>`, `grad_cosine_<one>_<other>`."""
        cosines = {f"grad_cosine_{one}_{other}": value for (one, other), value in self.cosines.items()}
        return {f"grad_norm_loss_{name}": value for name, value in self.norms.items()} | cosines


class Balance(Protocol):
    """How the weights are found. `state` and `restore` let a resumed run go on exactly."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Of the present step, by the losses' names."""

    @property
    def watches(self) -> bool:
        """Whether it has to be told the losses of every step, for which the host waits."""

    @property
    def calibrates(self) -> bool:
        """Whether it has to be told the measures of the gradients, for which the host waits."""

    def learn(self, losses: Mapping[str, float]) -> None:
        """Take note of a step's unweighted losses, the mean over all workers."""

    def measure(self, gradients: LossGradients) -> None:
        """Take note of a measure of the gradients."""

    def state(self) -> dict[str, float]:
        """All that was learned."""

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` gave."""


@dataclass(frozen=True)
class Fixed:
    """The configured weights, the lambdas."""

    weights: Mapping[str, float]
    watches, calibrates = False, False

    def learn(self, losses: Mapping[str, float]) -> None:
        """Nothing to learn."""

    def measure(self, gradients: LossGradients) -> None:
        """Nothing to calibrate."""

    def state(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Nothing."""


class EqualGradients:
    """Calibrated so that the weighted losses' gradients have norms in the ratio of the lambdas, equal by default.

    The paper's words: "calibrated to balance gradient magnitudes"; how is open. Here the norms are smoothed geometrically over
    the measures, with decay `memory`, and the weights always add up to what the lambdas do.
    """

    watches, calibrates = False, True

    def __init__(self, lambdas: Mapping[str, float], memory: float) -> None:
        self._lambdas, self._memory = lambdas, memory
        self.log_norms, self.measures = dict.fromkeys(lambdas, 0.0), 0

    @property
    def weights(self) -> Mapping[str, float]:
        """In inverse proportion to the gradients; the lambdas before the first measure."""
        if self.measures == 0:
            return self._lambdas
        unbiased = 1 - self._memory**self.measures
        wanted = {name: value * math.exp(-self.log_norms[name] / unbiased) for name, value in self._lambdas.items()}
        scale = sum(self._lambdas.values()) / sum(wanted.values())
        return {name: scale * value for name, value in wanted.items()}

    def learn(self, losses: Mapping[str, float]) -> None:
        """The losses' values do not matter."""

    def measure(self, gradients: LossGradients) -> None:
        """Smooth all norms; a measure with a vanished gradient says nothing about a weight and is passed over."""
        norms = gradients.norms
        if min(norms.values()) <= 0 or not math.isfinite(sum(norms.values())):
            return
        for name in self.log_norms:
            self.log_norms[name] = self._memory * self.log_norms[name] + (1 - self._memory) * math.log(norms[name])
        self.measures += 1

    def state(self) -> dict[str, float]:
        """Smoothed logarithms and their number."""
        return {**self.log_norms, "measures": self.measures}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from there."""
        self.log_norms, self.measures = {name: state[name] for name in self.log_norms}, int(state["measures"])


class Uncertainty:
    """Learned log-variances s (Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses).

    Gradient descent on the sum of lambda exp(-s) L + s over all losses; the optimum, exp(s) = lambda L, makes every weighted
    loss 1.
    """

    watches, calibrates = True, False

    def __init__(self, lambdas: Mapping[str, float]) -> None:
        self._lambdas, self.log_variances = lambdas, dict.fromkeys(lambdas, 0.0)

    @property
    def weights(self) -> Mapping[str, float]:
        """The lambdas times exp(-s)."""
        return {name: value * math.exp(-self.log_variances[name]) for name, value in self._lambdas.items()}

    def learn(self, losses: Mapping[str, float]) -> None:
        """One step on the log-variances; the derivative is 1 - weight * loss."""
        for name, weight in self.weights.items():
            self.log_variances[name] -= UNCERTAINTY_RATE * (1 - weight * losses[name])

    def measure(self, gradients: LossGradients) -> None:
        """Gradients do not matter."""

    def state(self) -> dict[str, float]:
        """The log-variances."""
        return dict(self.log_variances)

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from there."""
        self.log_variances = {name: state[name] for name in self.log_variances}


def make_balance(config: TrainConfig, lambdas: Mapping[str, float]) -> Balance:
    """The configured way from the lambdas, by the losses' names, to the weights."""
    match config.balance:
        case "gradient":
            return EqualGradients(lambdas, config.balance_memory)
        case "uncertainty":
            return Uncertainty(lambdas)
        case _:
            return Fixed(lambdas)


@dataclass(frozen=True, kw_only=True)
class RawGradients:
    """A measure that is still on the device."""

    norms: Mapping[str, Tensor]
    cosines: Mapping[tuple[str, str], Tensor]

    def kept(self) -> "RawGradients":
        """The same in memory that no later step writes to."""
        return RawGradients(
            norms={name: value.clone() for name, value in self.norms.items()},
            cosines={names: value.clone() for names, value in self.cosines.items()},
        )

    def read(self) -> LossGradients:
        """The numbers; waits for the device."""
        found = torch.stack([value.float() for value in (*self.norms.values(), *self.cosines.values())]).tolist()
        return LossGradients(
            norms=dict(zip(self.norms, found, strict=False)),
            cosines=dict(zip(self.cosines, found[len(self.norms) :], strict=True)),
        )


class GradientMeter:
    """Takes the losses' gradients apart after one backward pass of their weighted sum.

    A weight that one loss alone reaches needs nothing more: its gradient is that loss's, times the loss's weight. On the shared
    ones every loss but one is differentiated by itself, and the last one is what is left of the sum.

    Args:
        reached: the trained weights that each loss reaches, by its name. One that is not learned at the moment has no measure.
    """

    def __init__(self, reached: Mapping[str, list[nn.Parameter]]) -> None:
        losses_of = Counter(id(p) for weights in reached.values() for p in weights)
        known = {id(p): p for weights in reached.values() for p in weights}
        self._own = {name: [p for p in weights if losses_of[id(p)] == 1] for name, weights in reached.items()}
        self._shared = [p for key, p in known.items() if losses_of[key] > 1]
        members = {name: {id(p) for p in weights} for name, weights in reached.items()}
        self._sharing = [name for name in reached if any(id(p) in members[name] for p in self._shared)]
        self._group = next((p.device_mesh.get_group() for p in known.values() if isinstance(p, DTensor)), None)
        self._found: dict[str, Tensor] = {}
        self._learned: list[str] = []

    @property
    def able(self) -> bool:
        """Whether it can measure: gradients of one loss alone, on shared weights, are not to be had where these are sharded."""
        return self._group is None or not self._sharing

    def begin(self) -> None:
        """Before a step."""
        self._found = {}

    def before(self, terms: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Before the backward pass of a `share` of the step: gradients of all sharing losses but the first."""
        self._learned = [name for name in self._own if name in terms]
        for name in [name for name in self._sharing if name in terms][1:]:
            found = share * shared_gradient(terms[name], self._shared)
            self._found[name] = self._found[name] + found if name in self._found else found

    def after(self, weights: Mapping[str, float | Tensor]) -> RawGradients:
        """After the step's backward passes, and before clipping; every weight is above 0."""
        norms = {name: self._norm(self._own[name]) / weights[name] for name in self._learned}
        found, sharing = dict(self._found), [name for name in self._sharing if name in self._learned]
        if sharing:
            gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in self._shared]
            total = torch.cat(gradients)
            rest = total - sum((weights[name] * value for name, value in found.items()), torch.zeros_like(total))
            found = {sharing[0]: rest / weights[sharing[0]], **found}
        cosine = torch.nn.functional.cosine_similarity
        return RawGradients(
            norms={name: torch.hypot(norm, found[name].norm()) if name in found else norm for name, norm in norms.items()},
            cosines={(a, b): cosine(found[a], found[b], dim=0) for a, b in combinations(sharing, 2)},
        )

    def _norm(self, parameters: list[nn.Parameter]) -> Tensor:
        found = [p.grad for p in parameters if p.grad is not None]
        square = self._square([grad for grad in found if not isinstance(grad, DTensor)])
        if self._group is not None:
            shards = self._square([grad.to_local() for grad in found if isinstance(grad, DTensor)])
            distributed.all_reduce(shards, group=self._group)
            square = square + shards
        return square.sqrt()

    def _square(self, gradients: list[Tensor]) -> Tensor:
        # A loss that reaches nothing of its own has its norm from what it shares.
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else ()  # noqa: SLF001
        return torch.stack(norms).square().sum() if norms else torch.zeros((), device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(p.device for weights in (*self._own.values(), self._shared) for p in weights)


def shared_gradient(loss: Tensor, shared: list[nn.Parameter]) -> Tensor:
    """The gradient of `loss` alone on the shared parameters, flat, the mean over all workers; the graph is kept."""
    found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).float().flatten() for p, g in zip(shared, found, strict=True)])
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
    return flat
