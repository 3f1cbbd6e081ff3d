"""Training of a system: all levels together, by the weighted sum of its losses.

`Trainer.run` is a generator of progress, so a Ray worker reports it, a test collects it and a notebook plots it.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from libra_ray.batch import Batch
from libra_ray.config import TrainConfig
from libra_ray.model.precision import uses_bf16
from libra_ray.model.system import Losses, System
from libra_ray.training.loss_balance import GradientMeter, LossGradients, make_balance

Validate = Callable[[System], dict[str, float]]
Save = Callable[[dict[str, float]], None]
"""Keeps `Trainer.state` and `Trainer.weights`; told the metrics of the step."""
PHASE = "phase_"
"""Begins the names of the phases in a training log: 1 in the present one, 0 in the others."""


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """What `Trainer.run` yields at every logging, validation and checkpoint step.

    Attributes:
        step: optimiser steps done.
        metrics: losses, their weights, gradient norms of each part and of each loss, learning rate, throughput, held-out
            measures.
        checkpoint_due: whether this step was one to be saved.
    """

    step: int
    metrics: dict[str, float]
    checkpoint_due: bool


class Trainer:
    """One training run over a stream of batches.

    Every random draw of a step is seeded by (seed, step, rank) and the learning rate is a function of the step, so a run
    resumed from `state()` continues exactly as if it had never stopped. In which phases which parts learn says the system's
    schedule.
    """

    def __init__(
        self, model: System, *, device: torch.device, wrapped: nn.Module | None = None, state: dict[str, Any] | None = None
    ) -> None:
        """Prepare to train `model`; `wrapped` is the same model inside DDP, `state` what an earlier run's `state()` gave."""
        self.model, self.wrapped, self.device = model, wrapped or model, device
        self.config: TrainConfig = model.config.train
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        # Frozen weights stay what they are: the average shares them.
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.ema = copy.deepcopy(model, frozen).eval().requires_grad_(requires_grad=False)
        # Walking through the modules at every step would cost a small model a twentieth of its time.
        pairs = [(a, p) for a, p in zip(self.ema.parameters(), model.parameters(), strict=True) if a is not p]
        self._ema_weights: list[Tensor] = [a for a, _ in pairs]
        self._weights: list[Tensor] = [p for _, p in pairs]
        self._buffers = list(zip(self.ema.buffers(), model.buffers(), strict=True))
        self._parts = {name: list(part.parameters()) for name, part in model.parts().items()}
        self._averages = {name: list(part.parameters()) for name, part in self.ema.parts().items()}
        self.optimiser = _optimiser(model, self.config)
        self.balance = make_balance(self.config, model.loss_weights())
        self.schedule = model.schedule()
        self._meter = GradientMeter({name: list(weights) for name, weights in model.reached().items()})
        self.gradients: LossGradients | None = None
        self.step = 0
        self.row: dict[str, float] = {}
        if state is not None:
            self._restore(state)

    def run(
        self,
        batches: Iterable[Batch],
        validate: Validate | None = None,
        save: Save | None = None,
        until: int | None = None,
    ) -> Iterator[TrainingProgress]:
        """Train to the configured last step, or `until`; `batches` must start at the present step.

        `save` is called wherever a checkpoint is due and at `until`, before anything is measured: a validation that fails
        takes no training with it.

        Raises:
            FloatingPointError: a loss is not finite; nothing after the last checkpoint is kept.
        """
        config, meter = self.config, _Meter()
        until = min(until or config.steps, config.steps)
        for batch in batches:
            if self.step >= until:
                return
            waited = time.perf_counter()
            metrics = self._optimise(batch.to(self.device))
            meter.add(len(batch) * self.world, waited)
            log = self.step == config.steps or self.step % config.log_every == 0
            due = self.step == until or self.step % config.checkpoint_every == 0
            if not (log or due or (validate is not None and self.validation_due)):
                continue
            row = {name: float(value) for name, value in metrics.items()}
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"the loss became {row['loss']} at step {self.step}; lower train.lr or look at the data"
                )
            self.row = row | meter.take()
            if due and save is not None:
                save(self.row)
            yield TrainingProgress(step=self.step, metrics=self.last_row(validate), checkpoint_due=due)
            meter.restart()

    @property
    def validation_due(self) -> bool:
        """Whether the present step is one to measure at."""
        every = self.config.validate_every
        return bool(every) and (self.step == self.config.steps or self.step % every == 0)

    def last_row(self, validate: Validate | None) -> dict[str, float]:
        """The metrics of the last step that had any, with held-out measures where they are due; empty before the first."""
        return self.row | (validate(self.ema) if validate is not None and self.validation_due else {})

    def weights(self) -> dict[str, Tensor]:
        """The moving average of the weights, and the frozen ones: what a policy runs with."""
        return self.ema.state_dict()

    def state(self) -> dict[str, Any]:
        """Everything needed to continue: raw weights, their moving average, optimiser, balance, step, schedule.

        Frozen weights are not in it: `weights` has them.
        """
        frozen = _frozen(self.model)
        return {
            "model": {name: value for name, value in self.model.state_dict().items() if name not in frozen},
            "average": {name: value for name, value in self.ema.state_dict().items() if name not in frozen},
            "optimiser": self.optimiser.state_dict(),
            "balance": self.balance.state(),
            "step": self.step,
            "schedule": self.schedule.state(),
            "row": self.row,
        }

    def checkpoint_bytes(self) -> int:
        """What `weights` and `state` come to: trained weights also raw, averaged and with both moments of the optimiser."""
        trained = sum(weight.nbytes for weight in self.model.parameters() if weight.requires_grad)
        return sum(weight.nbytes for weight in self.weights().values()) + 4 * trained

    def _restore(self, state: dict[str, Any]) -> None:
        frozen = _frozen(self.model)
        for model, found in ((self.model, state["model"]), (self.ema, state["average"])):
            model.load_state_dict({name: value for name, value in model.state_dict().items() if name in frozen} | found)
        self.optimiser.load_state_dict(state["optimiser"])
        self.balance.restore(state["balance"])
        self.schedule.restore(state["schedule"])
        self.step = state["step"]
        self.row = state.get("row", {})

    def _optimise(self, batch: Batch) -> dict[str, float | Tensor]:
        config, weights = self.config, self.balance.weights
        torch.manual_seed(hash((config.seed, self.step, self.rank)) & 0x7FFFFFFF)
        first, end = self.schedule.stretch(config.steps)
        rate = learning_rate(config, self.step - first, end - first)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if not self.wrapped.training:
            self.wrapped.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=uses_bf16(config.precision, self.device)):
            losses: Losses = self.wrapped(batch, self.schedule.phase)
            terms = losses.terms
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        self.optimiser.zero_grad(set_to_none=True)
        self._backward(loss, losses, weights)
        for name in self._resting():
            for weight in self._parts[name]:
                # Of a gradient of zeros the optimiser would still make steps, by its memory and by weight decay.
                weight.grad = None
        norms = {name: _grad_norm(part) for name, part in self._parts.items()}
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        nn.utils.clip_grads_with_norm_(self._weights, config.grad_clip, total)
        self.optimiser.step()
        row: dict[str, float | Tensor] = {"loss": loss.detach(), "lr": rate, **losses.metrics}
        row |= {f"{PHASE}{name}": float(name == self.schedule.phase) for name in self.schedule.phases if name}
        row |= {f"loss_{name}": term.detach() for name, term in terms.items()}
        row |= {f"weight_{name}": weight for name, weight in weights.items()}
        row |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
        row |= {} if self.gradients is None else self.gradients.row()
        self._advance(losses)
        return row

    def _backward(self, loss: Tensor, losses: Losses, weights: Mapping[str, float]) -> None:
        """The backward pass, now and then with a measure of each loss's own gradient."""
        due = len(weights) > 1 and self.step % self.config.balance_every == 0 and min(weights.values()) > 0
        if due:
            self._meter.before(losses.terms)
        loss.backward()
        if due:
            self.gradients = self._meter.after(weights)
            self.balance.measure(self.gradients)

    def _advance(self, losses: Losses) -> None:
        # At a run's beginning the average would be mostly the random start: its memory grows with the run.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._ema_weights, self._weights, 1 - decay)
            for kept, now in self._buffers:
                kept.copy_(now)
        self.step += 1
        found = {**losses.terms, **losses.metrics}
        means = torch.stack([value.detach().float() for value in found.values()])
        if self.world > 1:
            distributed.all_reduce(means)
            means /= self.world
        scalars = dict(zip(found, means.tolist(), strict=True))
        self.balance.learn({name: scalars[name] for name in losses.terms})
        rested = self._resting()
        self.schedule.advance(self.step, scalars)
        if (resting := self._resting()) != rested:
            self._settle(resting - rested)

    def _settle(self, parts: set[str]) -> None:
        """Give parts that have stopped learning the average of their weights; what comes after is learned with those."""
        self.gradients = None
        with torch.no_grad():
            for name in parts:
                for average, weight in zip(self._averages[name], self._parts[name], strict=True):
                    weight.copy_(average)

    def _resting(self) -> set[str]:
        """The parts that do not learn in the present phase."""
        return {name for name in self._parts if not self.schedule.learns(name)}


def learning_rate(config: TrainConfig, step: int, steps: int | None = None) -> float:
    """Linear warm-up, then a cosine down to `lr_final_share` of the peak at the last of `steps`, by default the run's."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, (steps or config.steps) - config.warmup_steps)
    return config.lr * (config.lr_final_share + (1 - config.lr_final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def _optimiser(model: System, config: TrainConfig) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    # Biases, norms and embeddings of position are not decayed.
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}


def _grad_norm(weights: list[nn.Parameter]) -> Tensor:
    grads = [p.grad for p in weights if p.grad is not None]
    return nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=weights[0].device)


class _Meter:
    """Samples per second and the share of the time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Also after a checkpoint, a validation, a report: what they took is nobody's waiting for data."""
        self.samples, self.waited, self.began = 0, 0.0, time.perf_counter()
        self._idle = self.began

    def add(self, samples: int, data_ready: float) -> None:
        self.samples += samples
        self.waited += data_ready - self._idle
        self._idle = time.perf_counter()

    def take(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.began
        reading = {"samples_per_s": self.samples / elapsed, "data_wait_share": self.waited / elapsed}
        self.restart()
        return reading
