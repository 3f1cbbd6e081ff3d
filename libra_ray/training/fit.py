"""Joint training of planner and refiner.

`Fit.run` is a generator of progress, so a Ray worker reports it, a test collects it and a notebook plots it.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from libra_ray.batch import Batch
from libra_ray.config import TrainConfig
from libra_ray.model.libra import Feed, Libra, Losses
from libra_ray.training.loss_balance import Gradients, make_balance, measure_gradients, shared_gradient

ACCURACY_MEMORY = 0.98
"""Decay per step of the planner accuracy that the curriculum watches."""

Validate = Callable[[Libra], dict[str, float]]
Save = Callable[[dict[str, float]], None]
"""Keeps `Fit.state` and `Fit.weights`; told the metrics of the step."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What `fit` yields at every logging, validation and checkpoint step.

    Attributes:
        step: optimiser steps done.
        metrics: losses, their weights, gradient norms of each system and of each loss, learning rate, throughput, held-out
            measures.
        checkpoint_due: whether this step was one to be saved.
    """

    step: int
    metrics: dict[str, float]
    checkpoint_due: bool


class Fit:
    """One training run over a stream of batches.

    Every random draw of a step is seeded by (seed, step, rank) and the learning rate is a function of the step, so a run
    resumed from `state()` continues exactly as if it had never stopped.
    """

    def __init__(
        self, model: Libra, *, device: torch.device, wrapped: nn.Module | None = None, state: dict[str, Any] | None = None
    ) -> None:
        """Prepare to train `model`; `wrapped` is the same model inside DDP, `state` what an earlier run's `state()` gave."""
        self.model, self.wrapped, self.device = model, wrapped or model, device
        self.config: TrainConfig = model.config.train
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        # Frozen weights stay what they are: the average shares them.
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.average = copy.deepcopy(model, frozen).eval().requires_grad_(requires_grad=False)
        # Walking through the modules at every step would cost a small model a twentieth of its time.
        pairs = [(a, p) for a, p in zip(self.average.parameters(), model.parameters(), strict=True) if a is not p]
        self._averages: list[Tensor] = [a for a, _ in pairs]
        self._weights: list[Tensor] = [p for _, p in pairs]
        self._buffers = list(zip(self.average.buffers(), model.buffers(), strict=True))
        self._parts = {"planner": list(model.planner.parameters()), "refiner": list(model.refiner.parameters())}
        self.optimiser = _optimiser(model, self.config)
        self.balance, self.shared = make_balance(self.config), model.shared_parameters()
        self.gradients: Gradients | None = None
        self.step, self.accuracy, self.switched_at = 0, 0.0, -1
        self.row: dict[str, float] = {}
        if state is not None:
            self._restore(state)

    def run(
        self,
        batches: Iterable[Batch],
        validate: Validate | None = None,
        save: Save | None = None,
        until: int | None = None,
    ) -> Iterator[Progress]:
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
            yield Progress(step=self.step, metrics=self.last_row(validate), checkpoint_due=due)
            meter.restart()

    @property
    def validation_due(self) -> bool:
        """Whether the present step is one to measure at."""
        every = self.config.validate_every
        return bool(every) and (self.step == self.config.steps or self.step % every == 0)

    def last_row(self, validate: Validate | None) -> dict[str, float]:
        """The metrics of the last step that had any, with held-out measures where they are due; empty before the first."""
        return self.row | (validate(self.average) if validate is not None and self.validation_due else {})

    def weights(self) -> dict[str, Tensor]:
        """The moving average of the weights, and the frozen ones: what a policy runs with."""
        return self.average.state_dict()

    def state(self) -> dict[str, Any]:
        """Everything needed to continue: raw weights, averages, optimiser, balance, step, curriculum.

        Frozen weights are not in it: `weights` has them.
        """
        frozen = _frozen(self.model)
        return {
            "model": {name: value for name, value in self.model.state_dict().items() if name not in frozen},
            "average": {name: value for name, value in self.average.state_dict().items() if name not in frozen},
            "optimiser": self.optimiser.state_dict(),
            "balance": self.balance.state(),
            "step": self.step,
            "accuracy": self.accuracy,
            "switched_at": self.switched_at,
            "row": self.row,
        }

    def checkpoint_bytes(self) -> int:
        """What `weights` and `state` come to: trained weights also raw, averaged and with both moments of the optimiser."""
        trained = sum(weight.nbytes for weight in self.model.parameters() if weight.requires_grad)
        return sum(weight.nbytes for weight in self.weights().values()) + 4 * trained

    @property
    def feed(self) -> Feed:
        """Whose tokens the refiner reads now: ground truth until the planner passes `tau` (method.md, curriculum)."""
        if self.config.curriculum == "threshold":
            return "planner" if self.switched_at >= 0 else "truth"
        return "truth" if self.config.curriculum == "teacher" else "planner"

    def _restore(self, state: dict[str, Any]) -> None:
        frozen = _frozen(self.model)
        for model, found in ((self.model, state["model"]), (self.average, state["average"])):
            model.load_state_dict({name: value for name, value in model.state_dict().items() if name in frozen} | found)
        self.optimiser.load_state_dict(state["optimiser"])
        self.balance.restore(state["balance"])
        self.step, self.accuracy, self.switched_at = state["step"], state["accuracy"], state["switched_at"]
        self.row = state.get("row", {})

    def _optimise(self, batch: Batch) -> dict[str, float | Tensor]:
        config, feed, weights = self.config, self.feed, self.balance.weights
        torch.manual_seed(hash((config.seed, self.step, self.rank)) & 0x7FFFFFFF)
        rate = learning_rate(config, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if not self.wrapped.training:
            self.wrapped.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=uses_bf16(config.precision, self.device)):
            losses: Losses = self.wrapped(batch, feed)
            loss = weights.diff * losses.diff + (0.0 if losses.plan is None else weights.plan * losses.plan)
        self.optimiser.zero_grad(set_to_none=True)
        self._backward(loss, losses)
        norms = {name: _grad_norm(part) for name, part in self._parts.items()}
        total = torch.hypot(norms["planner"], norms["refiner"])
        nn.utils.clip_grads_with_norm_(self._weights, config.grad_clip, total)
        self.optimiser.step()
        row: dict[str, float | Tensor] = {
            "loss": loss.detach(),
            "loss_diff": losses.diff.detach(),
            "weight_diff": weights.diff,
            "grad_norm_planner": norms["planner"],
            "grad_norm_refiner": norms["refiner"],
            "lr": rate,
        }
        if losses.plan is not None and losses.accuracy is not None:
            row |= {"loss_plan": losses.plan.detach(), "weight_plan": weights.plan, "plan_accuracy": losses.accuracy}
            row |= {"teacher_forcing": float(feed == "truth"), **self._measured()}
        self._advance(losses)
        return row

    def _backward(self, loss: Tensor, losses: Losses) -> None:
        """The backward pass, now and then with a measure of each loss's own gradient."""
        weights = self.balance.weights
        due = losses.plan is not None and self.step % self.config.balance_every == 0 and min(weights.plan, weights.diff) > 0
        on_shared = shared_gradient(losses.diff, self.shared) if due and self.shared else None
        loss.backward()
        if due:
            self.gradients = measure_gradients(self.model, weights, self.shared, on_shared)
            self.balance.measure(self.gradients)

    def _measured(self) -> dict[str, float]:
        """The last measure of both losses' gradients."""
        if self.gradients is None:
            return {}
        found = {"grad_norm_loss_plan": self.gradients.plan, "grad_norm_loss_diff": self.gradients.diff}
        return found | ({} if self.gradients.cosine is None else {"grad_cosine_shared": self.gradients.cosine})

    def _advance(self, losses: Losses) -> None:
        # A young average would be mostly the random start: its memory grows with the run.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
            for kept, now in self._buffers:
                kept.copy_(now)
        self.step += 1
        if losses.plan is None or losses.accuracy is None:
            return
        found = torch.stack([x.detach().float() for x in (losses.accuracy, losses.plan, losses.diff)])
        if self.world > 1:
            distributed.all_reduce(found)
            found /= self.world
        accuracy, plan, diff = found.tolist()
        self.balance.learn(plan, diff)
        self.accuracy = ACCURACY_MEMORY * self.accuracy + (1 - ACCURACY_MEMORY) * accuracy
        unbiased = self.accuracy / (1 - ACCURACY_MEMORY**self.step)
        if self.switched_at < 0 and self.step >= self.config.warmup_steps and unbiased >= self.config.tau:
            self.switched_at = self.step


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to `lr_final_share` of the peak at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (config.lr_final_share + (1 - config.lr_final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: asked for, or `auto` on hardware that computes in it (elsewhere it is emulated, and slow)."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())  # noqa: SLF001


def _optimiser(model: Libra, config: TrainConfig) -> torch.optim.Optimizer:
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
