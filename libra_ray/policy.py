"""Policies: raw observations in, plans and action chunks out, batched over robots, by the same transforms as training.

A policy holds no robot's state. The plan is a value that whoever drives the robot hands back.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("torch is not installed; pip install 'libra-ray[policy]'", name="torch") from missing

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from libra_ray import checkpoint
from libra_ray.checkpoint import Checkpoint
from libra_ray.data.transforms import Pipeline
from libra_ray.model.parts.backbone import Text
from libra_ray.types import ActionChunk, Observation, Plan, Policy

KNOWN_TEXTS = 1024
"""Instructions whose tokens are remembered."""


@dataclass
class LibraPolicy:
    """The dual system of a checkpoint.

    Raises:
        ValueError: (from every call) an observation that does not fit the checkpoint; the message says what would.
    """

    source: Checkpoint
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        """Prepare the transforms that training used."""
        self.pipeline = Pipeline(self.source.stats, self.source.config.data.normalisation)
        self.model = self.source.model.to(self.device).eval()
        self.horizon = self.source.config.action.horizon
        # Robots may be asked for something else at every step, for ever.
        self._texts = functools.lru_cache(KNOWN_TEXTS)(lambda instruction: self.model.planner.tokenise([instruction]))

    def plan(self, observations: Sequence[Observation]) -> list[Plan]:
        """Coarse tokens for the next L steps of every robot."""
        if not observations:
            return []
        tokens = self.model.plan(self._images(observations), self._state(observations), self._text(observations))
        rows = tokens.cpu().numpy()
        return [Plan(tokens=row, first_step=o.step) for row, o in zip(rows, observations, strict=True)]

    def refine(self, observations: Sequence[Observation], plans: Sequence[Plan]) -> list[ActionChunk]:
        """Continuous actions for the next H steps of every robot, from a fresh picture and the plan in use."""
        if not observations:
            return []
        tokens = self._tokens(observations, plans)
        chunk = self.model.refine(
            self._images(observations),
            self._state(observations),
            self._text(observations),
            tokens.to(self.device),
            self._noise(observations, tokens),
        )
        return self._chunks(chunk.float().cpu().numpy(), observations, plans)

    def _chunks(
        self, normalised: NDArray[np.float32], observations: Sequence[Observation], plans: Sequence[Plan]
    ) -> list[ActionChunk]:
        actions = self.pipeline.outputs_action(normalised)
        return [
            ActionChunk(actions=a, first_step=o.step, plan_first_step=p.first_step)
            for a, o, p in zip(actions, observations, plans, strict=True)
        ]

    def _tokens(self, observations: Sequence[Observation], plans: Sequence[Plan]) -> Int[Tensor, "B H D"]:
        """The plans' slices for the H steps from each observation on; steps past a plan's end carry the hidden token."""
        if len(observations) != len(plans):
            raise ValueError(f"{len(observations)} observations and {len(plans)} plans; one plan per observation is needed")
        dims = self.source.manifest.shape.action_dim
        tokens = np.full((len(plans), self.horizon, dims), self.model.bins.hidden, dtype=np.int64)
        for row, observation, plan in zip(tokens, observations, plans, strict=True):
            start = observation.step - plan.first_step
            if not 0 <= start < len(plan.tokens):
                raise ValueError(
                    f"the plan covers steps {plan.first_step} to {plan.end_step - 1}, "
                    f"the observation is of step {observation.step}"
                )
            if plan.tokens.shape[1:] != (dims,) or plan.tokens.min() < 0 or plan.tokens.max() > self.model.bins.hidden:
                raise ValueError(
                    f"a plan of this policy has {dims} tokens per step in [0, {self.model.bins.count}); got shape "
                    f"{plan.tokens.shape} in [{plan.tokens.min()}, {plan.tokens.max()}]"
                )
            part = plan.tokens[start : start + self.horizon]
            row[: len(part)] = part
        return torch.from_numpy(tokens)

    def _noise(self, observations: Sequence[Observation], tokens: Int[Tensor, "B H D"]) -> Float[Tensor, "B H D"]:
        """Starting noise drawn from each robot's intent and step, so that an answer never depends on who else is in the batch.

        Not from the observation, whose last bits differ between batches of different sizes: the noise would be another one.
        """
        shape = (self.horizon, self.source.manifest.shape.action_dim)
        scale = self.source.config.refiner.sample_noise
        rows = []
        for observation, slice_in_use in zip(observations, tokens.numpy(), strict=True):
            intent = slice_in_use.tobytes() + observation.step.to_bytes(8, "little")
            seed = hashlib.blake2b(intent, digest_size=8).digest()
            rows.append(np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(shape, dtype=np.float32))
        return torch.from_numpy(scale * np.stack(rows)).to(self.device)

    def _images(self, observations: Sequence[Observation]) -> UInt8[Tensor, "B T C height width"]:
        keys, size = self.source.manifest.image_keys, self.source.config.sim.image_size
        history = self.source.config.data.history
        rows = []
        for o in observations:
            for images in (*o.past, o.images)[-history:]:
                for key in keys:
                    if key not in images:
                        raise ValueError(f"the observation has no {key!r}; this policy needs {', '.join(keys)}")
                    if images[key].shape != (size, size, 3) or images[key].dtype != np.uint8:
                        raise ValueError(
                            f"{key} is {images[key].dtype} {images[key].shape}; this policy needs uint8 {(size, size, 3)}"
                        )
            rows.append([picture for key in keys for picture in o.pictures(key, history)])
        return torch.from_numpy(np.stack(rows)).permute(0, 1, 4, 2, 3).to(self.device)

    def _state(self, observations: Sequence[Observation]) -> Float[Tensor, "B S"]:
        dims = self.source.manifest.shape.state_dim
        for o in observations:
            if o.state.shape != (dims,) or not np.isfinite(o.state).all():
                raise ValueError(f"observation.state must be {dims} finite numbers; got shape {o.state.shape}: {o.state}")
        raw = np.stack([o.state for o in observations]).astype(np.float32)
        return torch.from_numpy(self.pipeline.inputs_state(raw)).to(self.device)

    def tokenise(self, instruction: str) -> Text:
        """An instruction's tokens, on the CPU.

        Raises:
            ValueError: it is too long, or holds what is no text to the backbone.
        """
        return self._texts(instruction)

    def _text(self, observations: Sequence[Observation]) -> Text:
        texts = [self.tokenise(o.instruction) for o in observations]
        return Text(
            ids=torch.cat([t.ids for t in texts]).to(self.device), mask=torch.cat([t.mask for t in texts]).to(self.device)
        )


@dataclass
class CoarseOnlyPolicy(LibraPolicy):
    """The planner alone: its tokens are executed at their bins' centres, without a refiner."""

    def refine(self, observations: Sequence[Observation], plans: Sequence[Plan]) -> list[ActionChunk]:
        """Bin centres of the next H steps."""
        if not observations:
            return []
        centres = self.model.bins.decode(self._tokens(observations, plans).to(self.device))
        return self._chunks(centres.cpu().numpy(), observations, plans)


@dataclass
class MonolithicPolicy(LibraPolicy):
    """The monolithic baseline: its plans say nothing, so that every chunk is as old as its own picture."""

    def refine(self, observations: Sequence[Observation], plans: Sequence[Plan]) -> list[ActionChunk]:
        """The next H actions, from the fresh picture and the instruction."""
        chunks = super().refine(observations, plans)
        return [replace(chunk, plan_first_step=chunk.first_step) for chunk in chunks]


def load_policy(folder: Path | str, device: torch.device | str = "cpu", *, coarse_only: bool = False) -> LibraPolicy:
    """The policy of a checkpoint folder.

    Raises:
        ValueError: the folder is not a checkpoint that this version can run, or `coarse_only` was asked of one without tokens.
    """
    source = checkpoint.load(folder, device)
    if source.model.monolithic:
        if coarse_only:
            raise ValueError(
                f"checkpoint {folder} was trained with refiner.condition=features and has no coarse tokens to execute; "
                "evaluate it as policy, without coarse_only"
            )
        return MonolithicPolicy(source, device)
    return CoarseOnlyPolicy(source, device) if coarse_only else LibraPolicy(source, device)


__all__ = ["CoarseOnlyPolicy", "LibraPolicy", "MonolithicPolicy", "Policy", "load_policy"]
