"""Policies: raw observations in, intents and action chunks out, batched over robots, by the same transforms as training.

A policy holds no robot's state. An intent is a value that whoever drives the robot hands back.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("torch is not installed; pip install 'libra-ray[policy]'", name="torch") from missing

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from libra_ray import checkpoint
from libra_ray.checkpoint import Checkpoint
from libra_ray.data.transforms import Pipeline
from libra_ray.manifest import read_config
from libra_ray.model.parts.backbone import Text
from libra_ray.model.registry import lengthening, system_class
from libra_ray.model.system import IntentValue, SystemInput
from libra_ray.types import ActionChunk, Intent, Level, Observation, Policy

KNOWN_TEXTS = 1024
"""Instructions whose tokens are remembered."""


@dataclass
class SystemPolicy:
    """The policy of a checkpoint, whatever its system.

    Args:
        variant: one of the system's `variants`; empty for the policy itself.

    Raises:
        ValueError: (from every call) an observation or intent that does not fit the checkpoint; the message says what would.
    """

    source: Checkpoint
    device: torch.device | str = "cpu"
    variant: str = ""

    def __post_init__(self) -> None:
        """Prepare the transforms that training used."""
        self.pipeline = Pipeline(self.source.stats, self.source.config.data.normalisation)
        self.model = self.source.model.to(self.device).eval()
        # Robots may be asked for something else at every step, for ever.
        self._texts = functools.lru_cache(KNOWN_TEXTS)(lambda instruction: self.model.tokenise([instruction]))

    @property
    def levels(self) -> tuple[Level, ...]:
        """The system's, slow to fast; the last one acts."""
        return self.model.levels

    @torch.no_grad()
    def infer(
        self, level: str, observations: Sequence[Observation], above: Sequence[Intent | None]
    ) -> Sequence[Intent | ActionChunk]:
        """The answers of one level: chunks of the last one, intents of the others; see `Policy.infer`."""
        asked = self.model.level(level)
        if len(observations) != len(above):
            raise ValueError(f"{len(observations)} observations and {len(above)} intents; one per observation is needed")
        if not observations:
            return []
        seen = self.inputs(observations)
        read = self._read(asked, observations, above)
        noise = self._noise(asked, observations, read)
        on_device = {name: value.to(self.device) for name, value in read.items()}
        answers = self.model.infer(level, seen, on_device, noise, self.variant)
        values = {name: answer.cpu() for name, answer in answers.items()}
        if asked is not self.levels[-1]:
            rows = {name: value.numpy() for name, value in values.items()}
            return [
                Intent(level=level, values={name: row[i] for name, row in rows.items()}, first_step=o.step, covers=asked.covers)
                for i, o in enumerate(observations)
            ]
        actions = self.pipeline.outputs_action(values["actions"].float().numpy())
        measures = {name: value.tolist() for name, value in values.items() if name != "actions"}
        return [
            ActionChunk(
                actions=actions[i],
                first_step=o.step,
                intent_first_step=o.step if intent is None else intent.first_step,
                measures={name: row[i] for name, row in measures.items()},
            )
            for i, (o, intent) in enumerate(zip(observations, above, strict=True))
        ]

    def inputs(self, observations: Sequence[Observation]) -> SystemInput:
        """What the model is shown of the observations, on its device."""
        return SystemInput(
            images=self._images(observations),
            state=self._state(observations),
            text=self._text(observations),
            committed=self._committed(observations),
        )

    def stages(self) -> Mapping[str, Callable[..., object]]:
        """What the time of `infer` goes into, see `System.stages`."""
        return {"preprocessing": self.inputs, **self.model.stages()}

    def _read(self, level: Level, observations: Sequence[Observation], above: Sequence[Intent | None]) -> dict[str, Tensor]:
        """The intents' values from each observation's step on, on the CPU; what no intent covers is unknown."""
        if level.reads is None:
            return {}
        spec = self.model.intents[level.reads]
        for observation, intent in zip(observations, above, strict=True):
            if intent is not None:
                _check_intent(intent, level.reads, spec, observation.step)
        values = {}
        for name, value in spec.items():
            blank = np.full(value.shape, value.unknown, value.dtype)
            rows = [blank if intent is None else np.asarray(intent.values[name], value.dtype) for intent in above]
            values[name] = torch.from_numpy(np.stack(rows))
        ages = [-1 if i is None else o.step - i.first_step for o, i in zip(observations, above, strict=True)]
        return self.model.aligned(level, values, torch.tensor(ages))

    def _noise(
        self, level: Level, observations: Sequence[Observation], read: dict[str, Tensor]
    ) -> Float[Tensor, "B *shape"] | None:
        """Starting noise drawn from each robot's intent and step, so that an answer never depends on who else is in the batch.

        Not from the observation, nor from real numbers of an intent, whose last bits differ between batches of different sizes:
        the noise would be another one.
        """
        shape = self.model.noise_shape(level.name)
        if shape is None:
            return None
        values, rows = [value.numpy() for value in read.values() if not value.is_floating_point()], []
        for row, observation in enumerate(observations):
            intent = b"".join(value[row].tobytes() for value in values) + observation.step.to_bytes(8, "little")
            seed = hashlib.blake2b(intent, digest_size=8).digest()
            rows.append(np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(shape, dtype=np.float32))
        return torch.from_numpy(np.stack(rows)).to(self.device)

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

    def _committed(self, observations: Sequence[Observation]) -> Float[Tensor, "B K D"] | None:
        """What the robots execute meanwhile, normalised; NaN where they wait."""
        steps, dims = max((0 if o.committed is None else len(o.committed)) for o in observations), self.model.shape.action_dim
        if not steps:
            return None
        rows = np.full((len(observations), steps, dims), np.nan, np.float32)
        for row, committed in enumerate(o.committed for o in observations):
            if committed is None:
                continue
            if committed.shape[1:] != (dims,) or not np.isfinite(committed).all():
                raise ValueError(f"committed actions must be (steps, {dims}) finite numbers; got shape {committed.shape}")
            rows[row, : len(committed)] = self.pipeline.inputs_action(committed)
        return torch.from_numpy(rows).to(self.device)

    @property
    def lengthened_by(self) -> Mapping[str, tuple[str, int]]:
        """See `lengthening`."""
        return lengthening(self.source.config, self.levels)

    def blank(self) -> Observation:
        """What a robot of this policy might see: black pictures, and an instruction that it was trained on."""
        manifest, config = self.source.manifest, self.source.config
        picture = np.zeros((config.sim.image_size, config.sim.image_size, 3), np.uint8)
        return Observation(
            images=dict.fromkeys(manifest.image_keys, picture),
            state=np.zeros(manifest.shape.state_dim, np.float32),
            instruction=manifest.instructions[0] if manifest.instructions else "",
        )

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


def _check_intent(intent: Intent, reads: str, spec: Mapping[str, IntentValue], step: int) -> None:
    if intent.level != reads:
        raise ValueError(f"an intent of level {intent.level} was given where one of level {reads} is read")
    if step < intent.first_step:
        raise ValueError(f"the intent holds from step {intent.first_step} on, the observation is of step {step}")
    for name, valid in spec.items():
        value = np.asarray(intent.values.get(name, ()))
        if value.shape != valid.shape or not (valid.low <= value.min() and value.max() <= valid.high):
            held = f"shape {value.shape}" + (f" in [{value.min():g}, {value.max():g}]" if value.size else "")
            raise ValueError(
                f"an intent of {reads} has {name} of shape {valid.shape} in [{valid.low:g}, {valid.high:g}]; got {held}"
            )


def act(policy: Policy, observations: Sequence[Observation]) -> list[ActionChunk]:
    """The chunks of all levels asked one after the other with the same observations."""
    intents: dict[str | None, Sequence[Intent | None]] = {None: [None] * len(observations)}
    *upper, last = policy.levels
    for level in upper:
        answers = policy.infer(level.name, observations, intents[level.reads])
        intents[level.name] = [answer for answer in answers if isinstance(answer, Intent)]
    return [answer for answer in policy.infer(last.name, observations, intents[last.reads]) if isinstance(answer, ActionChunk)]


def load_policy(
    folder: Path | str,
    device: torch.device | str = "cpu",
    *,
    variant: str = "",
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> SystemPolicy:
    """The policy of a checkpoint folder.

    Args:
        changes: settings of inference that replace those which it was trained with, see `System.denoised_by`.
        variant: another way to run it, e.g. `coarse_only` of `libra`.

    Raises:
        ValueError: the folder is not a checkpoint that this version can run, or its system has no such variant.
    """
    if variant:
        check_variant(folder, variant)
    source = checkpoint.load(folder, device, changes)
    return SystemPolicy(source, device, variant)


def check_variant(folder: Path | str, variant: str) -> None:
    """Refuse another way to run a policy that its system does not have, before any weights are loaded.

    Raises:
        ValueError: names those there are.
    """
    config = read_config(folder)
    name = config.model.system
    variants = system_class(name).variants_of(config)
    if variant not in variants:
        has = f"it has {', '.join(variants)}" if variants else "it has none"
        raise ValueError(f"checkpoint {folder} is of model.system={name}, which has no variant {variant!r}; {has}")


__all__ = ["Policy", "SystemPolicy", "act", "check_variant", "load_policy"]
