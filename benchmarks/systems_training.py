"""One policy of the study of systems: as many steps as fit its time, its episodes, and how long its levels take."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import baseline
from benchmarks.pretraining import begins_with, pretrain
from benchmarks.studies import evaluated, opened, outcomes_of, train
from benchmarks.systems_pace import least_in_turn, step_seconds
from benchmarks.systems_tables import VARIANTS, Domain, config_of, evaluated_config
from benchmarks.systems_times import SystemTime, level_times
from libra_ray import checkpoint
from libra_ray.budget.answer import answered_budget, kept_profile, question_of
from libra_ray.common.files import write_text
from libra_ray.common.json_text import dump, read
from libra_ray.common.progress import print_status
from libra_ray.common.provenance import describe_hardware
from libra_ray.config import Config, override
from libra_ray.on_ray import stages
from libra_ray.on_ray.evaluate import Load, device_of, load_trained
from libra_ray.on_ray.simulator_pool import SimulatorPool
from libra_ray.runs.folder import RunFolder
from libra_ray.runs.results import EpisodeResult
from libra_ray.sim.tabletop.tasks import CHAINS
from libra_ray.training.data import TrainingData

PACES, PRETRAINED, PRETRAINING_DATA = "paces.json", "pretrained", "pretraining_data"
SPENT = "train.spent_s"
"""Kept beside the stages: seconds of the clock that training took."""
IN_PARTS = tuple(CHAINS)
"""Begins the names of tasks in parts: how far the present one is from its goal says nothing of the whole."""
BUDGET_MS, BUDGET_HZ, JPEG = 50.0, 20.0, 90


@dataclass(frozen=True, kw_only=True)
class Played:
    """A policy's episodes as one controller, each in the order of the seeds.

    Attributes:
        outcomes: task -> an episode each: `1` succeeded, `0` did not.
        errors_mm: task -> how far from its goal the object ended; None of one that raised. Only of tasks about one place.
        parts_done: task -> a digit an episode, the parts that were done; only of tasks in parts.
        measures: task -> name -> the mean of what the acting level says of its answers.
    """

    outcomes: Mapping[str, str]
    errors_mm: Mapping[str, Sequence[float | None]]
    parts_done: Mapping[str, str]
    measures: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, results: Sequence[EpisodeResult], tasks: Sequence[str]) -> "Played":
        """What one controller did."""
        by_task = {task: [r for r in results if r.task == task] for task in tasks}
        placed = {task: [r.position_error_mm for r in of] for task, of in by_task.items()}
        return cls(
            outcomes=outcomes_of(results, tasks),
            errors_mm={
                task: [None if mm is None else round(mm, 2) for mm in errors]
                for task, errors in placed.items()
                if any(mm is not None for mm in errors) and not task.startswith(IN_PARTS)
            },
            parts_done={
                task: "".join(str(r.parts_done or 0) for r in of) for task, of in by_task.items() if task.startswith(IN_PARTS)
            },
            measures={task: found for task, of in by_task.items() if (found := _means(of))},
        )


def _means(results: Sequence[EpisodeResult]) -> dict[str, float]:
    said = [r.measures for r in results if r.measures]
    return {name: round(float(np.mean([m[name] for m in said])), 4) for name in (said[0] if said else ())}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A policy of one training seed.

    Attributes:
        machine: the processor or GPU that it was trained on.
        steps: of the optimiser.
        step_s: seconds of training's clock that one was reckoned with; of behaviour cloning, that it took.
        spent_s: seconds of that clock that training took, with reading the data and the measures at its end.
        held_out: what was measured on held-out episodes after the last step.
        played: by the controller's name.
    """

    variant: str
    seed: int
    machine: str
    parameters: int
    steps: int
    step_s: float
    spent_s: float
    held_out: Mapping[str, float]
    played: Mapping[str, Played]


@dataclass(frozen=True, kw_only=True)
class Course:
    """How all policies of a study are trained and evaluated.

    Attributes:
        root: folder of the work.
        data: the run of the demonstrations.
        changes: of all policies, from the command line.
        episodes: of each task.
        seconds: of training, by a clock that runs in CPU seconds, or on a GPU in real time.
        probed_steps: see `PROBED_STEPS`.
        quick: a backbone that has learned nothing.
        paced: seconds of a step by variant that earlier cells were trained with, on this machine or on another one.
    """

    root: Path
    domain: Domain
    data: RunFolder
    changes: Mapping[str, object]
    episodes: int
    seconds: float
    probed_steps: int
    quick: bool = False
    paced: Mapping[str, float] = field(default_factory=dict)

    def prepare(self) -> None:
        """Train the backbone that all systems begin with, where the domain has one, or go on with it."""
        if self.domain.pretraining is None:
            return
        data = self.data
        if own := self.domain.pretraining:
            few = {"record.episodes_per_task": self.domain.few} if self.quick else {}
            data = RunFolder.open(self.root / PRETRAINING_DATA, override(data.config, {**own, **few}))
        pretrain(self.root / PRETRAINED, data, {}, quick=self.quick)

    def started(self, variant: str) -> Mapping[str, object]:
        """The settings by which a policy begins with that backbone; plain behaviour cloning has no part of it."""
        if self.domain.pretraining is None or VARIANTS[variant].cloning:
            return self.changes
        system = config_of(self.domain, variant, 0, self.changes).model.system
        return {**self.changes, **begins_with(self.root / PRETRAINED, system)}

    @property
    def clock(self) -> Callable[[], float]:
        """Of training: on a machine that others use too, real time would say more about them."""
        return time.perf_counter if device_of(self.data.config) == "cuda" else time.process_time

    def config(self, variant: str, seed: int) -> Config:
        """Of a policy, with the steps that fit its time."""
        config = config_of(self.domain, variant, seed, self.started(variant))
        pace = self.pace(variant)
        if pace is None:
            return config
        steps = max(1, round(self.seconds / pace))
        warmup = min(config.train.warmup_steps, steps // 4)
        return override(config, {"train.steps": steps, "train.warmup_steps": warmup, "train.validate_every": steps})

    def pace(self, variant: str) -> float | None:
        """Seconds of an optimiser step: measured once, and then kept, so that all seeds take as many steps.

        None of behaviour cloning, whose schedule counts by the clock itself.
        """
        if VARIANTS[variant].cloning:
            return None
        known = self._paces()
        return known[variant] if variant in known else self.measure_paces([variant])[variant]

    def measure_paces(self, variants: Sequence[str]) -> Mapping[str, float]:
        """The paces of these policies, as far as they have one: those that are not known yet are measured together."""
        known = self._paces()
        unknown = [name for name in dict.fromkeys(variants) if name not in known and not VARIANTS[name].cloning]
        found = least_in_turn(
            {name: partial(self._step_seconds, config_of(self.domain, name, 0, self.changes)) for name in unknown}
        )
        for name, seconds in found.items():
            print_status(f"systems: {name} takes {seconds:.4f} s a step")
        if found:
            write_text(self.root / PACES, dump(known | found))
        return known | found

    def _step_seconds(self, config: Config) -> float:
        return step_seconds(config, self.data, self.clock, self.probed_steps)

    def _paces(self) -> dict[str, float]:
        path = self.root / PACES
        return {**self.paced, **(read(dict[str, float], path) if path.exists() else {})}

    def policy(self, variant: str, seed: int) -> tuple[RunFolder, Load]:
        """A policy's run, trained first where it is not yet, and how it is loaded."""
        folder = opened(self.root / f"{variant}-{seed}", self.config(variant, seed), self.data)
        if VARIANTS[variant].cloning:
            data = TrainingData.open(folder.config, folder.dataset, folder.path("frames"))
            policy, trainer = baseline.train(folder, data, "l1", self.seconds, self.clock)
            folder.note(SPENT, trainer.elapsed_s)
            return folder, lambda *_: (policy, folder.config)
        if not folder.done("train"):
            before, began = folder.fact(SPENT, float) or 0.0, self.clock()
            try:
                train(folder)
            finally:
                folder.note(SPENT, before + self.clock() - began)
        return folder, load_trained

    def cell(self, variant: str, seed: int, pool: SimulatorPool) -> Cell:
        """A policy, trained and evaluated."""
        folder, load = self.policy(variant, seed)
        config = evaluated_config(folder.config, self.domain, self.episodes)
        run = RunFolder.open(
            folder.path("evaluated"), override(config, {"evaluate.checkpoint": str(folder.path("checkpoint"))})
        )
        results = evaluated(run, load, pool)
        if VARIANTS[variant].cloning:
            policy, _ = load(run, "policy")
            assert isinstance(policy, baseline.BaselinePolicy)
            network: nn.Module = policy.network
            steps: int = torch.load(folder.path("network.pt"), "cpu", weights_only=True)["step"]
            held_out = dict[str, float]()
        else:
            loaded, log = checkpoint.load(folder.path("checkpoint")), stages.training_log(folder).rows
            network, steps = loaded.model, loaded.manifest.step
            held_out = {name: round(value, 5) for name, value in log[-1].metrics.items() if name.startswith("val_")}
        spent = folder.fact(SPENT, float) or 0.0
        return Cell(
            variant=variant,
            seed=seed,
            machine=_machine(self.data.config),
            parameters=sum(p.numel() for p in network.parameters()),
            steps=steps,
            step_s=round(self.pace(variant) or spent / steps, 5),
            spent_s=round(spent, 1),
            held_out=held_out,
            played={
                controller: Played.of([r for r in results if r.controller == controller], self.domain.tasks)
                for controller in VARIANTS[variant].controllers
            },
        )

    def times(self, variant: str) -> SystemTime:
        """How long the levels of a policy take: its weights are those of the first seed, by which a router routes."""
        folder, _ = self.policy(variant, 0)
        trained, device = folder.path("checkpoint"), device_of(folder.config)
        question = question_of(trained, budget_ms=BUDGET_MS, control_hz=BUDGET_HZ, robots=1, rule="", committed=None)
        budget = folder.path("budget")
        budget.mkdir(exist_ok=True)
        profile = kept_profile(budget, trained, device, 1, JPEG, lambda what: print_status(f"systems: {variant}, {what}"))
        answer = answered_budget(trained, question, profile)
        return SystemTime(
            variant=variant,
            machine=_machine(self.data.config),
            setting=profile.denoising_setting,
            denoising_steps=profile.denoising_steps,
            rule=question.control.rule,
            levels=level_times(profile),
            proposal=answer.proposal,
            least_chunks=answer.least_chunks,
        )


def _machine(config: Config) -> str:
    here = describe_hardware()
    return here.gpu if here.gpu and device_of(config) == "cuda" else here.cpu


def paces_of(cells: Sequence[Cell]) -> dict[str, float]:
    """Seconds of a step by variant that cells were trained with: seeds to come take as many steps, wherever they run."""
    return {cell.variant: cell.step_s for cell in cells if not VARIANTS[cell.variant].cloning}
