"""Training of a system: all levels together, by the weighted sum of its losses.

`Trainer.run` is a generator of progress, so a Ray worker reports it, a test collects it and a notebook plots it.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from libra_ray.batch import Batch
from libra_ray.config import TrainConfig
from libra_ray.model.layers import compile_layers, pretrained_layers
from libra_ray.model.precision import uses_bf16
from libra_ray.model.system import System
from libra_ray.training import optimiser, parallel
from libra_ray.training.graph import GraphedStep, is_graph
from libra_ray.training.loss_balance import GradientMeter, RawGradients, make_balance
from libra_ray.training.speed import Meter, flops_per_window, on_gpu
from libra_ray.training.step import OptimiserStep, StepFindings, StepKind, StepNumbers
from libra_ray.training.weights import TrainedWeights

Validate = Callable[[System], dict[str, float]]
Save = Callable[[dict[str, float]], None]
"""Keeps `Trainer.state`; told the metrics of the step."""
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
    schedule. Where there are several workers, they share the model as `ray.parallel` says, and each asks `weights` and
    `averaged` as often as the others.
    """

    def __init__(self, model: System, *, device: torch.device, state: dict[str, Any] | None = None) -> None:
        """Prepare to train `model`; `state` is what an earlier run's `state()` gave.

        Raises:
            ValueError: settings that this device or this number of workers cannot follow.
        """
        self.model, self.device = model, device
        self.config: TrainConfig = model.config.train
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self._bf16 = uses_bf16(self.config.precision, device)
        self._sharded = model.config.ray.parallel == "fsdp" and distributed.is_initialized()
        if self._sharded:
            parallel.check_sharded(model)
        graphed = is_graph(self.config.graph, device, self.world, sharded=self._sharded)
        self._speed = Meter(device, parts=not graphed)
        wrapped = self._spread()
        parts = {name: self._weights.of(part) for name, part in model.parts().items()}
        # What other levels are made of is not spoken of where they do not learn.
        parts = {name: of for name, of in parts.items() if of or model.learned is None}
        terms = {name: weight for name, weight in model.loss_weights().items() if model.teaches(name)}
        self.optimiser = optimiser.make(self._weights, self.config, capturable=graphed)
        self.balance = make_balance(self.config, terms)
        self.schedule = model.schedule()
        meter = GradientMeter({name: list(weights) for name, weights in model.reached().items() if name in terms})
        self._measures = meter.able
        self._parts = parts
        step = OptimiserStep(
            wrapped=wrapped,
            weights=self._weights,
            optimiser=self.optimiser,
            parts=parts,
            meter=meter,
            config=self.config,
            bf16=self._bf16,
            timer=self._speed.timer,
        )
        self._take: Callable[[Batch, StepKind, StepNumbers], StepFindings] = GraphedStep(step) if graphed else step
        self._gradients: RawGradients | None = None
        self.step = 0
        self.row: dict[str, float] = {}
        self._begun = False
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
        config, meter = self.config, self._speed
        until = min(until or config.steps, config.steps)
        meter.restart()
        for batch in batches:
            if self.step >= until:
                return
            if not self._begun:
                self._begin(batch.to(self.device))
            waited = time.perf_counter()
            result, numbers = self._optimise(batch.to(self.device))
            meter.add(len(batch) * self.world, waited)
            log = self.step == config.steps or self.step % config.log_every == 0
            due = self.step == until or self.step % config.checkpoint_every == 0
            if not (log or due or (validate is not None and self.validation_due)):
                continue
            self.row = self._row(result, numbers) | meter.take(self.world)
            if not math.isfinite(self.row["loss"]):
                raise FloatingPointError(
                    f"the loss became {self.row['loss']} at step {self.step}; lower train.lr or look at the data"
                )
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
        if validate is None or not self.validation_due:
            return self.row
        with self.averaged() as model:
            return self.row | validate(model)

    @contextmanager
    def averaged(self) -> Iterator[System]:
        """The model with the moving average of its weights, as a policy runs it; do not train meanwhile."""
        training = self.model.training
        with (
            torch.no_grad(),
            self._weights.averaged(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self._weights.mixed),
        ):
            self.model.eval()
            try:
                yield self.model
            finally:
                self.model.train(training)

    def weights(self) -> dict[str, Tensor]:
        """The moving average of the weights, and the frozen ones: what a policy runs with."""
        return self._weights.everything()

    def state(self) -> dict[str, Any]:
        """Everything needed to continue: raw weights, their moving average, frozen ones, optimiser, balance, step, schedule.

        Tensors share the trainer's memory, and of sharded ones it is this worker's shards (DTensors). Once `shards.begin` has
        written it, any number of workers may continue.
        """
        return {
            **self._weights.state(),
            "optimiser": optimiser.state(self.optimiser, self._weights),
            "balance": self.balance.state(),
            "step": self.step,
            "schedule": self.schedule.state(),
            "row": self.row,
        }

    def checkpoint_bytes(self) -> int:
        """What `state` comes to: trained weights raw, averaged and with both moments of the optimiser, the others once."""
        return self._weights.bytes(trained=4, frozen=1)

    def _spread(self) -> nn.Module:
        """Put the model on its device, and its weights where the workers share them."""
        ray = self.model.config.ray
        if self._sharded:
            parallel.shard(self.model, self.device, self._speed.timer, bf16=self._bf16)
        self.model.to(self.device)
        self._weights = TrainedWeights(self.model, bf16=self._bf16)
        if self.world > 1 and ray.parallel == "ddp":
            return parallel.replicate(self.model, self.device, self._speed.timer)
        return self.model

    def _restore(self, state: dict[str, Any]) -> None:
        self._weights.restore(state)
        optimiser.restore(self.optimiser, self._weights, state["optimiser"])
        self.balance.restore(state["balance"])
        self.schedule.restore(state["schedule"])
        self.step = state["step"]
        self.row = state.get("row", {})

    def _optimise(self, batch: Batch) -> tuple[StepFindings, StepNumbers]:
        config = self.config
        torch.manual_seed(hash((config.seed, self.step, self.rank)) & 0x7FFFFFFF)
        first, end = self.schedule.stretch(config.steps)
        optimiser.set_rate(self.optimiser, learning_rate(config, self.step - first, end - first))
        if not self.model.training:
            self.model.train()
        weights = self.balance.weights
        measured = len(weights) > 1 and self.step % config.balance_every == 0 and min(weights.values()) > 0 and self._measures
        kind = StepKind(phase=self.schedule.phase, resting=frozenset(self._resting()), measured=measured)
        # At first the average would be mostly the random start of what learns now: its memory grows.
        learned = self.step - first
        decay = min(config.ema_decay, (1 + learned) / (10 + learned))
        numbers = StepNumbers(loss_weights=weights, average_rate=1 - decay)
        result = self._take(batch, kind, numbers)
        if result.gradients is not None:
            # Read where a step is logged, or where the next one's weights depend on it: the host waits.
            self._gradients = result.gradients.kept()
            if self.balance.calibrates:
                self.balance.measure(self._gradients.read())
        self._advance(result)
        return result, numbers

    def _begin(self, batch: Batch) -> None:
        """Count the arithmetic of a step, and only then change how it is done."""
        self._begun = True
        if on_gpu(self.device):
            one = batch.index(torch.arange(1, device=self.device))
            self._speed.learn(flops_per_window(self.model, one, self.schedule.phase, bf16=self._bf16))
        parallel.recompute(self.model, self.config.checkpointing)
        wanted = bool(pretrained_layers(self.model)) and on_gpu(self.device)
        if self.config.compile == "layers" or (self.config.compile == "auto" and wanted):
            compile_layers(self.model, dynamic=False)
        self._speed.restart()

    def _row(self, result: StepFindings, numbers: StepNumbers) -> dict[str, float]:
        """What a step is in the log; waits for the device."""
        found = {"loss": result.loss, **result.metrics}
        found |= {f"loss_{name}": term for name, term in result.terms.items()}
        found |= {f"grad_norm_{name}": norm for name, norm in result.norms.items()}
        values = torch.stack([value.float() for value in found.values()]).tolist()
        row = dict(zip(found, values, strict=True)) | {"lr": optimiser.rate(self.optimiser)}
        row |= {f"{PHASE}{name}": float(name == self._phase) for name in self.schedule.phases if name}
        row |= {f"weight_{name}": float(weight) for name, weight in numbers.loss_weights.items()}
        return row | ({} if self._gradients is None else self._gradients.read().row())

    def _advance(self, result: StepFindings) -> None:
        self.step += 1
        self._phase, scalars = self.schedule.phase, dict[str, float]()
        if self.balance.watches or self.schedule.watches:
            scalars = self._mean({**result.terms, **result.metrics})
            if self.balance.watches:
                self.balance.learn({name: scalars[name] for name in result.terms})
        rested = self._resting()
        self.schedule.advance(self.step, scalars)
        if stopped := self._resting() - rested:
            # What comes after is learned with the weights that the policy runs with.
            self._gradients = None
            self._weights.settle([weight for name in stopped for weight in self._parts[name]])
        elif self._resting() != rested:
            self._gradients = None

    def _mean(self, found: dict[str, Tensor]) -> dict[str, float]:
        """The numbers, means over all workers; waits for the device."""
        means = torch.stack([value.float() for value in found.values()])
        if self.world > 1:
            distributed.all_reduce(means)
            means /= self.world
        return dict(zip(found, means.tolist(), strict=True))

    def _resting(self) -> set[str]:
        """The parts that do not learn in the present phase."""
        return {name for name in self._parts if not self.schedule.learns(name)}


def learning_rate(config: TrainConfig, step: int, steps: int | None = None) -> float:
    """Linear warm-up, then a cosine down to `lr_final_share` of the peak at the last of `steps`, by default the run's."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, (steps or config.steps) - config.warmup_steps)
    return config.lr * (config.lr_final_share + (1 - config.lr_final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))
