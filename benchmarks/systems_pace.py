"""What an optimiser step of each policy of the study of systems costs, by a clock that a machine's other users disturb."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from libra_ray.config import Config, override
from libra_ray.on_ray.evaluate import device_of
from libra_ray.runs.folder import RunFolder
from libra_ray.runs.results import PHASE
from libra_ray.training.data import TrainingData
from libra_ray.training.fit import Trainer

PROBED_STEPS = {"cpu": 40, "cuda": 300}
"""Optimiser steps by which a system's pace is measured; on a GPU the first ones record its graphs."""
ROUNDS = 3
"""Times that all paces are measured."""


def least_in_turn(measures: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """The least of several measures each, taken in turn.

    What else a machine does can only make a step longer, by caches and memory that are shared its CPU time too; measured one
    after the other, some would be measured under more of it than others.
    """
    rounds = [{name: measure() for name, measure in measures.items()} for _ in range(ROUNDS)]
    return {name: min(found[name] for found in rounds) for name in measures}


def step_seconds(config: Config, data: RunFolder, clock: Callable[[], float], steps: int) -> float:
    """What one of a system's optimiser steps takes, by the clock.

    A short training with the phases in their shares of the steps, as the schedule has them: of each phase the first third warms
    up and is not counted.
    """
    brief = {"train.steps": steps, "train.log_every": 1, "train.validate_every": 0, "train.checkpoint_every": steps}
    opened = TrainingData.open(override(config, brief), data.dataset, data.path("frames"))
    torch.manual_seed(config.train.seed)
    device, took = torch.device(device_of(config)), dict[str, list[float]]()
    trainer = Trainer(opened.make_model().to(device), device=device)
    with opened.stream(trainer.model, rank=0, world=1, start_step=0, pin=device.type == "cuda") as batches:
        began = clock()
        for progress in trainer.run(batches):
            phase = next((name for name, on in progress.metrics.items() if name.startswith(PHASE) and on), "")
            took.setdefault(phase, []).append(clock() - began)
            began = clock()
    return sum(len(of) * float(np.mean(of[len(of) // 3 :])) for of in took.values()) / steps
