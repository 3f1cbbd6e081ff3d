"""A system: the model behind a policy, as levels that are trained together and answer apart.

Every kind of hierarchical policy is one subclass of `System`, in a file of its own, named in `libra_ray.model.registry`.
Trainer, checkpoints, evaluation, serving and reports know nothing else of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from libra_ray.batch import Batch
from libra_ray.config import Config
from libra_ray.model.parts.backbone import Text
from libra_ray.model.parts.chunks import chunk_of, mean_error
from libra_ray.model.parts.diffusion import Denoised
from libra_ray.model.records import IntentValue, Losses, SystemInput, seen_first, seen_now
from libra_ray.model.schedule import Schedule
from libra_ray.types import Level, RobotShape

__all__ = [
    "IntentValue",
    "Losses",
    "System",
    "SystemInput",
    "answered",
    "asked",
    "held_out",
    "held_out_losses",
    "seen_first",
    "seen_now",
]


class System(nn.Module, ABC):
    """A policy's model: levels, slow to fast, of which the last one acts.

    A subclass sets `levels` and `intents` in its constructor.

    Attributes:
        levels: of the policy.
        intents: level name -> what its intent holds, by name; none of the last level.
        variants: other ways to run it, beside `policy`, e.g. `coarse_only`; names for `evaluate.controllers`.
        learned: the loss terms that are learned, where some levels learn without the others (`libra_ray.model.levels`); None
            means all.
    """

    variants: ClassVar[tuple[str, ...]] = ()
    learned: frozenset[str] | None = None
    levels: tuple[Level, ...]
    intents: Mapping[str, Mapping[str, IntentValue]]

    def __init__(self, config: Config, shape: RobotShape, folder: Path | None = None) -> None:
        """Build from a configuration; `folder` is a checkpoint whose architectures replace the configured sources."""
        super().__init__()
        self.config, self.shape = config, shape

    @abstractmethod
    def losses(self, batch: Batch, phase: str, generator: torch.Generator | None = None) -> Losses:
        """The losses on a batch, which is augmented in training mode.

        Args:
            phase: of the schedule.
            generator: of all random draws; None takes torch's own.
        """

    def forward(self, batch: Batch, phase: str, generator: torch.Generator | None = None) -> Losses:
        """The `losses` that are learned, as DistributedDataParallel calls it."""
        found = self.losses(batch, phase, generator)
        if self.learned is None:
            return found
        return Losses(terms={n: term for n, term in found.terms.items() if self.teaches(n)}, metrics=found.metrics)

    @abstractmethod
    def infer(
        self, level: str, seen: SystemInput, above: Mapping[str, Tensor], noise: Tensor | None = None, variant: str = ""
    ) -> Mapping[str, Tensor]:
        """The answers of one level.

        Args:
            level: its name.
            seen: what the robots see now.
            above: the values of the intents to read, aligned to the present step by `aligned`; empty where none is read.
            noise: `(B, *noise_shape(level))`, standard normal; None where the level has no use for it.
            variant: one of `variants`; empty for the policy itself.

        Returns:
            The values of `intents[level]`, `(B, *shape)` each; of the last level `actions` `(B, H, D)` in [-1, 1], and beside
            them whatever it measures of its answers, `(B,)` each, by name: for `ActionChunk.measures`.
        """

    @classmethod
    def variants_of(cls, config: Config) -> tuple[str, ...]:
        """Those of `variants` that a system of this configuration has; by default all."""
        return cls.variants

    @classmethod
    def names_subgoals(cls, config: Config) -> bool:
        """Whether what it says or reads are places in its data set's list of sub-goals (`RobotShape.subgoals`).

        Then levels fit one another only where they have learned with the same list.
        """
        return False

    @abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """What it is made of, by the beginning of the names of its weights; together all trained weights."""

    @abstractmethod
    def tokenise(self, instructions: list[str]) -> Text:
        """The instructions' tokens, on the CPU.

        Raises:
            ValueError: one is too long, or holds what is no text to the backbone.
        """

    @abstractmethod
    def save_processor(self, folder: Path) -> None:
        """Write under `folder` what rebuilds pretrained parts without their source: tokenisers, processors, architectures."""

    def metadata(self, level: str, values: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        """What one robot's intent of a level says to people, plain JSON by name, for replies and the fleet's page."""
        return {}

    def loss_weights(self) -> Mapping[str, float]:
        """The configured weight of every loss term, by its name."""
        return {"loss": 1.0}

    def taught_by(self) -> Mapping[str, tuple[str, ...]]:
        """The loss terms that each level learns by, given what the levels above it should have said.

        A level that cannot learn without another is not in it. By default that of a single level.
        """
        return {self.levels[0].name: tuple(self.loss_weights())} if len(self.levels) == 1 else {}

    @classmethod
    def follows(cls, config: Config) -> Sequence[str] | None:
        """Which settings of `libra_ray.model.ignored.OF_SYSTEMS` mean something to it: names, or their beginnings with a dot.

        None where that is not known, as of a system of a user's own: then nobody is told of settings without effect.
        """
        return None

    def teaches(self, term: str) -> bool:
        """Whether a loss term is learned; one that is not need not be computed."""
        return self.learned is None or term in self.learned

    def reached(self) -> Mapping[str, Iterable[nn.Parameter]]:
        """The trained weights that each loss term reaches; by default all of them."""
        return {name: [p for p in self.parameters() if p.requires_grad] for name in self.loss_weights()}

    def schedule(self) -> Schedule:
        """A new schedule of its training."""
        return Schedule()

    def noise_shape(self, level: str) -> tuple[int, ...] | None:
        """The shape of one robot's starting noise; by default the last level's `(H, D)`, and none of the others."""
        last = self.levels[-1]
        return (last.covers, self.shape.action_dim) if level == last.name else None

    def stages(self) -> Mapping[str, Callable[..., object]]:
        """What the time of `infer` goes into, by a reader's name: bound methods, none of which calls another one of them."""
        return {name: part.forward for name, part in self.parts().items()}

    def denoised_by(self) -> Denoised | None:
        """The level that denoises, and the setting that says in how many steps; None where none does."""
        return None

    def measure(self, batch: Batch, everything: Batch) -> Mapping[str, float]:
        """How much was learned, on held-out windows: by default the losses and the mean absolute error of the actions.

        Args:
            batch: held-out windows with pictures; what the networks are asked about.
            everything: all held-out windows, with or without pictures, for statistics.
        """
        return held_out(self, batch)

    @classmethod
    def lengthened_by(cls, config: Config, level: Level, *, acts: bool) -> tuple[str, int] | None:
        """The setting that says how many control steps an answer of the level covers, and the steps that one more of it adds.

        None where no setting does. By default that of a chunk, of the level that acts, or of a plan, where the level covers as
        many steps as these have in `config.action`; a system whose levels are as long by themselves says so here.
        """
        if acts:
            return ("action.horizon", 1) if level.covers == config.action.horizon else None
        return ("action.chunks", config.action.horizon) if level.covers == config.action.plan_steps else None

    def level(self, name: str) -> Level:
        """The level of that name.

        Raises:
            ValueError: there is none; names those there are.
        """
        for level in self.levels:
            if level.name == name:
                return level
        raise ValueError(f"this policy has no level {name!r}; its levels are {', '.join(level.name for level in self.levels)}")

    def aligned(self, level: Level, values: Mapping[str, Tensor], ages: Int[Tensor, " B"]) -> dict[str, Tensor]:
        """The values of intents of the given ages as `level` reads them: from its own step on.

        Args:
            level: who reads.
            values: `(B, *shape)` of the intents of the level above.
            ages: control steps since the observations behind them; below 0 there is no intent.
        """
        assert level.reads is not None
        spec, found = self.intents[level.reads], {}
        for name, value in values.items():
            if not spec[name].per_step:
                known = (ages >= 0).view(-1, *[1] * (value.ndim - 1))
                found[name] = torch.where(known, value, torch.full_like(value, spec[name].unknown))
                continue
            steps = ages[:, None] + torch.arange(level.covers, device=value.device)
            known = (ages >= 0)[:, None] & (steps < value.shape[1])
            rows = value[torch.arange(len(value), device=value.device)[:, None], steps.clamp(0, value.shape[1] - 1)]
            found[name] = rows.masked_fill(~known.view(*known.shape, *[1] * (value.ndim - 2)), spec[name].unknown)
        return found


@torch.no_grad()
def asked(system: System, seen: SystemInput, noise: Tensor | None) -> Tensor:
    """The chunk `(B, H, D)` that the levels answer when all are asked about the same moment.

    Args:
        noise: of the last level; the others have none.
    """
    now, values = torch.zeros(len(seen), dtype=torch.long, device=seen.state.device), dict[str, Mapping[str, Tensor]]()
    for level in system.levels:
        above = {} if level.reads is None else system.aligned(level, values[level.reads], now)
        own = noise if level is system.levels[-1] else _no_noise(system, level, seen.state)
        values[level.name] = system.infer(level.name, seen, above, own)
    return values[system.levels[-1].name]["actions"]


@torch.no_grad()
def answered(system: System, batch: Batch, noise: Tensor | None, variant: str = "") -> Tensor:
    """The chunk `(B, H, D)` that the levels together answer to a batch, each with what it would see."""
    intents: dict[str, Mapping[str, Tensor]] = {}
    *upper, last = system.levels
    for level in upper:
        seen = seen_first(batch)
        above = {} if level.reads is None else system.aligned(level, intents[level.reads], torch.zeros_like(batch.offset))
        intents[level.name] = system.infer(level.name, seen, above, _no_noise(system, level, batch.actions), variant)
    above = {} if last.reads is None else system.aligned(last, intents[last.reads], batch.offset)
    return system.infer(last.name, seen_now(batch), above, noise, variant)["actions"]


def _no_noise(system: System, level: Level, like: Tensor) -> Tensor | None:
    """The middle of a level's starting noise; None where it has no use for any."""
    shape = system.noise_shape(level.name)
    return None if shape is None else like.new_zeros(len(like), *shape)


@torch.no_grad()
def held_out(system: System, batch: Batch) -> dict[str, float]:
    """What a batch says of all phases' losses and metrics, as `loss_<term>` and by their names, and of the answered chunk.

    `action_error` is the chunk's mean absolute error in normalised units, `action_error_<variant>` that of every variant.
    """
    last, found = system.levels[-1], dict[str, float]()
    chunk = chunk_of(batch, last.covers)
    for phase in system.schedule().phases:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses = system.losses(batch, phase)
            noise = torch.randn_like(chunk.actions)
        found |= {f"loss_{name}": float(value) for name, value in losses.terms.items()}
        found |= {name: float(value) for name, value in losses.metrics.items()}
    given = noise if system.noise_shape(last.name) else None
    for variant in ("", *system.variants_of(system.config)):
        error = (answered(system, batch, given, variant) - chunk.actions).abs()
        found["_".join(filter(None, ("action_error", variant)))] = mean_error(error, chunk.mask)
    return found


@torch.no_grad()
def held_out_losses(system: System, batch: Batch) -> dict[str, float]:
    """What a batch says of the losses that are learned, and of their metrics: where not all levels learn, none can be asked."""
    found = dict[str, float]()
    for phase in system.schedule().phases:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses = system(batch, phase)
        found |= {f"loss_{name}": float(value) for name, value in losses.terms.items()}
        found |= {name: float(value) for name, value in losses.metrics.items()}
    return found
