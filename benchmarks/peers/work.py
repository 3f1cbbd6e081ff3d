"""The work that every server does per chunk request, so that they differ in how they serve and in nothing else.

Levels above the last are asked where their intents are used up; the last one answers every request from its own fresh picture.
That is the published FIFO rule, by the code that evaluation runs (`libra_ray.control`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from libra_ray.config import Config, ControlConfig
from libra_ray.control.lockstep import drive
from libra_ray.control.robot import RobotControl
from libra_ray.policy import SystemPolicy, load_policy
from libra_ray.types import STATE_KEY, ActionChunk, Observation

TIMEOUT_S = 10.0
"""Longest wait of every client for an answer."""


@dataclass
class Work:
    """A checkpoint's policy with the intents of the robots that it serves."""

    policy: SystemPolicy
    robots: dict[str, RobotControl] = field(default_factory=dict)

    @classmethod
    def open(cls, checkpoint: Path | str, threads: int) -> Self:
        """Load a checkpoint and compute one robot's chunk, the first of which is slow."""
        torch.set_num_threads(threads)
        work = cls(load_policy(checkpoint))
        work.answer({"warm up": work.blank()})
        work.robots.clear()
        return work

    @property
    def horizon(self) -> int:
        """Control steps of one chunk."""
        return self.policy.levels[-1].covers

    @property
    def config(self) -> Config:
        """What the checkpoint was trained with."""
        return self.policy.source.config

    def blank(self) -> Observation:
        """An observation of the checkpoint's shape."""
        manifest, size = self.policy.source.manifest, self.config.data.image_size
        return Observation(
            images={key: np.zeros((size, size, 3), np.uint8) for key in manifest.image_keys},
            state=np.zeros(manifest.shape.state_dim, np.float32),
            instruction=manifest.instructions[0] if manifest.instructions else "",
        )

    def observed(self, message: Mapping[str, Any]) -> Observation:
        """The observation of a request as `libra_ray.client.protocol.request` writes it."""
        return Observation(
            images={key: message[key] for key in self.policy.source.manifest.image_keys},
            state=message[STATE_KEY],
            instruction=message["prompt"],
            step=int(message["step"]),
        )

    def answer(self, observations: Mapping[str, Observation]) -> dict[str, ActionChunk]:
        """One chunk per robot: every level that is due, as one batch. Step 0 begins an episode."""
        names = list(observations)
        for name in names:
            if name not in self.robots or observations[name].step == 0:
                self.robots[name] = RobotControl(ControlConfig(rule="fifo"), self.policy.levels)
        controls = {i: self.robots[name] for i, name in enumerate(names)}
        drive(controls, {i: observations[name] for i, name in enumerate(names)}, self.policy, {})
        chunks = {name: controls[i].chunk for i, name in enumerate(names)}
        return {name: chunk for name, chunk in chunks.items() if chunk is not None}
