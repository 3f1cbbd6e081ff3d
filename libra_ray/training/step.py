"""One optimiser step: all that a device does between two batches, without a word to the host."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from libra_ray.batch import Batch
from libra_ray.config import TrainConfig
from libra_ray.model.system import Losses
from libra_ray.training import optimiser
from libra_ray.training.loss_balance import GradientMeter, RawGradients
from libra_ray.training.speed import COMMUNICATION, StepTimer
from libra_ray.training.weights import TrainedWeight, TrainedWeights

Number = float | Tensor


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """What makes a step another computation.

    Attributes:
        phase: of the schedule.
        resting: parts that do not learn.
        measured: whether the losses' own gradients are.
    """

    phase: str
    resting: frozenset[str]
    measured: bool


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """What changes from step to step: the losses' weights, and the way that the average moves; numbers, or tensors of them."""

    loss_weights: Mapping[str, Number]
    average_rate: Number


@dataclass(frozen=True, kw_only=True)
class StepFindings:
    """What a step found, on the device: the weighted loss, unweighted terms, metrics, and gradient norms of the parts."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    gradients: RawGradients | None = None


@dataclass(frozen=True, kw_only=True)
class OptimiserStep:
    """Losses, gradients, clipping, optimiser and moving average.

    Attributes:
        wrapped: what is called: the model itself, or the model in DDP.
        parts: of the system, with their trained weights.
        bf16: whether products are computed in it.
    """

    wrapped: nn.Module
    weights: TrainedWeights
    optimiser: torch.optim.AdamW
    parts: Mapping[str, Sequence[TrainedWeight]]
    meter: GradientMeter
    config: TrainConfig
    bf16: bool
    timer: StepTimer = field(repr=False)

    def __call__(self, batch: Batch, kind: StepKind, numbers: StepNumbers) -> StepFindings:
        """Take the step on a batch that is on the device."""
        for weight in self.weights.all:
            weight.parameter.grad = None
        self.timer.begin()
        if kind.measured:
            self.meter.begin()
        losses = _mean([self._learn(piece, kind, numbers, last=last) for piece, last in self._pieces(batch)])
        if self.weights.sharded:
            self.weights.share_gradients()
            self.timer.mark(COMMUNICATION)
        gradients = self.meter.after(numbers.loss_weights) if kind.measured else None
        for name in kind.resting:
            for weight in self.parts[name]:
                # Of a gradient of zeros the optimiser would still make steps, by its memory and by weight decay.
                weight.parameter.grad = None
        norms = self.weights.norms(self.parts)
        optimiser.clip(self.optimiser, torch.linalg.vector_norm(torch.stack(list(norms.values()))), self.config.grad_clip)
        for _ in self.weights.gradients():
            self.optimiser.step()
        self.weights.apply()
        self.weights.average(numbers.average_rate)
        self.timer.mark("optimiser")
        loss = torch.stack([numbers.loss_weights[name] * term for name, term in losses.terms.items()]).sum()
        return StepFindings(loss=loss, terms=losses.terms, metrics=losses.metrics, norms=norms, gradients=gradients)

    def _learn(self, batch: Batch, kind: StepKind, numbers: StepNumbers, *, last: bool) -> Losses:
        """Add a piece's share to the gradients; only after the last one workers share them."""
        share = 1 / self.config.accumulate
        silent = self.wrapped.no_sync() if isinstance(self.wrapped, DistributedDataParallel) and not last else nullcontext()
        with silent:
            self.timer.enter("forward")
            with torch.autocast(batch.actions.device.type, torch.bfloat16, enabled=self.bf16):
                losses: Losses = self.wrapped(batch, kind.phase)
                loss = torch.stack([numbers.loss_weights[name] * share * term for name, term in losses.terms.items()]).sum()
            self.timer.mark("forward")
            self.timer.enter("backward")
            if kind.measured:
                self.meter.before(losses.terms, share)
            loss.backward()
            # In DDP the last gradients were interrupted for, and what came then was waiting.
            self.timer.mark(COMMUNICATION if last and isinstance(self.wrapped, DistributedDataParallel) else "backward")
        return Losses(
            terms={name: term.detach() for name, term in losses.terms.items()},
            metrics={name: value.detach() for name, value in losses.metrics.items()},
        )

    def _pieces(self, batch: Batch) -> list[tuple[Batch, bool]]:
        count = self.config.accumulate
        if count == 1:
            return [(batch, True)]
        size = len(batch) // count
        rows = torch.arange(len(batch), device=batch.actions.device).split(size)
        return [(batch.index(piece), place == count - 1) for place, piece in enumerate(rows)]


def _mean(losses: Sequence[Losses]) -> Losses:
    """Of the pieces of one step."""
    if len(losses) == 1:
        return losses[0]
    first = losses[0]
    return Losses(
        terms={name: torch.stack([each.terms[name] for each in losses]).mean() for name in first.terms},
        metrics={name: torch.stack([each.metrics[name].float() for each in losses]).mean() for name in first.metrics},
    )
