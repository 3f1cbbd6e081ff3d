"""Policies: raw observations in, intents and action chunks out, batched over robots, by the same transforms as training.

A policy holds no robot's state. An intent is a value that whoever drives the robot hands back.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from libra_ray.config.overrides import flatten
from libra_ray.data.transforms import Pipeline
from libra_ray.inference.engine import InferenceEngine, buckets
from libra_ray.inference.intents import starting_noise, values_read
from libra_ray.inference.tensors import LevelInput
from libra_ray.manifest import read_config
from libra_ray.model.parts.backbone import Text
from libra_ray.model.registry import lengthening, system_class
from libra_ray.model.system import System, SystemInput
from libra_ray.types import ActionChunk, Intent, Level, Observation, Policy

KNOWN_TEXTS = 1024
"""Instructions whose tokens are remembered."""
OF_TRAINING = ("preset", "sim.", "record.", "data.", "train.", "control.", "delay.", "evaluate.", "ray.", "tracking.")
"""Settings that are no matter of what a policy computes, or that its answers are checked by anew."""


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
        self.device = torch.device(self.device)
        self.engine = InferenceEngine(self.source.model, self.device, self.source.config.policy, self.variant)
        # Weights of another type are a copy: what they were made of is not kept.
        self.source = replace(self.source, model=self.engine.model)
        # Robots may be asked for something else at every step, for ever.
        self._texts = functools.lru_cache(KNOWN_TEXTS)(lambda instruction: self.model.tokenise([instruction]))

    @property
    def levels(self) -> tuple[Level, ...]:
        """The system's, slow to fast; the last one acts."""
        return self.model.levels

    @property
    def model(self) -> System:
        """The system, as it is run."""
        return self.engine.model

    def infer(
        self, level: str, observations: Sequence[Observation], above: Sequence[Intent | None]
    ) -> Sequence[Intent | ActionChunk]:
        """The answers of one level: chunks of the last one, intents of the others; see `Policy.infer`."""
        if len(observations) != len(above):
            raise ValueError(f"{len(observations)} observations and {len(above)} intents; one per observation is needed")
        asked = self.model.level(level)
        if not observations:
            return []
        values = self.engine.answer(level, self.asked(level, observations, above))
        if asked is not self.levels[-1]:
            found = {name: value.numpy() for name, value in values.items()}
            rows = [{name: value[i] for name, value in found.items()} for i in range(len(observations))]
            return [
                Intent(
                    level=level, values=row, first_step=o.step, covers=asked.covers, metadata=self.model.metadata(level, row)
                )
                for o, row in zip(observations, rows, strict=True)
            ]
        actions = self.pipeline.outputs_action(values["actions"].numpy())
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

    def asked(self, level: str, observations: Sequence[Observation], above: Sequence[Intent | None]) -> LevelInput:
        """What `InferenceEngine.answer` is asked in their name: all that `infer` does before it, whose arguments these are."""
        own, seen = self.model.level(level), self.inputs(observations)
        read = values_read(self.model, own, observations, above)
        noise = starting_noise(self.model.noise_shape(level), observations, read)
        return LevelInput(seen=seen, above=read, noise=noise)

    def warm_up(self, batch_sizes: Sequence[int], levels: Sequence[str] = ()) -> None:
        """Answer batches of these sizes once: of each size the first answer is slow.

        Args:
            batch_sizes: robots in a call; `batches` are all those that make a difference.
            levels: by default all.
        """
        for level in levels or [level.name for level in self.levels]:
            for size in sorted(batch_sizes, reverse=True):
                self.infer(level, [self.blank()] * size, [None] * size)

    def batches(self, most: int) -> tuple[int, ...]:
        """The sizes of batch that `warm_up` needs, so that none of up to `most` robots is a new one."""
        return buckets(most) if self.engine.records else tuple(sorted({1, most}))

    def take(self, source: Checkpoint) -> bool:
        """Go on with another checkpoint's weights and statistics, in the same memory; nobody may ask meanwhile.

        Returns:
            False, and nothing is changed, where it is of another model than this one's.
        """
        if not _alike(self.source, source):
            return False
        self.engine.load(source.model.state_dict())
        self.source = replace(source, model=self.model)
        self.pipeline = Pipeline(source.stats, source.config.data.normalisation)
        return True

    def inputs(self, observations: Sequence[Observation]) -> SystemInput:
        """What the model is shown of the observations, on the CPU."""
        return SystemInput(
            images=self._images(observations),
            state=self._state(observations),
            text=self._text(observations),
            committed=self._committed(observations),
        )

    def stages(self) -> Mapping[str, Callable[..., object]]:
        """What the time of `infer` goes into, see `System.stages`."""
        return {"preprocessing": self.inputs, **self.model.stages()}

    def _images(self, observations: Sequence[Observation]) -> UInt8[Tensor, "B T C height width"]:
        keys, size = self.source.manifest.image_keys, self.source.config.data.image_size
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
        return torch.from_numpy(np.stack(rows)).permute(0, 1, 4, 2, 3)

    def _state(self, observations: Sequence[Observation]) -> Float[Tensor, "B S"]:
        dims = self.source.manifest.shape.state_dim
        for o in observations:
            if o.state.shape != (dims,) or not np.isfinite(o.state).all():
                raise ValueError(f"observation.state must be {dims} finite numbers; got shape {o.state.shape}: {o.state}")
        raw = np.stack([o.state for o in observations]).astype(np.float32)
        return torch.from_numpy(self.pipeline.inputs_state(raw))

    def _committed(self, observations: Sequence[Observation]) -> Float[Tensor, "B K D"] | None:
        """What the robots execute meanwhile, normalised; NaN where they wait."""
        steps, dims = max((0 if o.committed is None else len(o.committed)) for o in observations), self.model.shape.action_dim
        if self.engine.records:
            # Of one width, whoever waits: each would be a recording of its own.
            steps = max(steps, self.levels[-1].covers)
        if not steps:
            return None
        rows = np.full((len(observations), steps, dims), np.nan, np.float32)
        for row, committed in enumerate(o.committed for o in observations):
            if committed is None:
                continue
            if committed.shape[1:] != (dims,) or not np.isfinite(committed).all():
                raise ValueError(f"committed actions must be (steps, {dims}) finite numbers; got shape {committed.shape}")
            rows[row, : len(committed)] = self.pipeline.inputs_action(committed)
        return torch.from_numpy(rows)

    @property
    def lengthened_by(self) -> Mapping[str, tuple[str, int]]:
        """See `lengthening`."""
        return lengthening(self.source.config, self.levels)

    def blank(self) -> Observation:
        """What a robot of this policy might see: black pictures, and an instruction that it was trained on."""
        manifest, config = self.source.manifest, self.source.config
        picture = np.zeros((config.data.image_size, config.data.image_size, 3), np.uint8)
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
        return Text(ids=torch.cat([t.ids for t in texts]), mask=torch.cat([t.mask for t in texts]))


def _alike(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints are of one model, and run alike: all but their training may differ."""
    ours, theirs = (
        {name: value for name, value in flatten(of.config).items() if not name.startswith(OF_TRAINING)} for of in (one, other)
    )
    shapes = [{name: value.shape for name, value in of.model.state_dict().items()} for of in (one, other)]
    return ours == theirs and shapes[0] == shapes[1] and _answers(one) == _answers(other)


def _answers(of: Checkpoint) -> tuple[object, ...]:
    """What a checkpoint's answers are about."""
    return of.manifest.levels, of.manifest.shape.action.gripper


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
        changes: settings of inference that replace the checkpoint's: those of `PolicyConfig`, and see `System.denoised_by`.
        variant: another way to run it, e.g. `coarse_only` of `libra`.

    Raises:
        ValueError: the folder is not a checkpoint that this version can run, or its system has no such variant.
    """
    return SystemPolicy(load_source(folder, variant=variant, changes=changes), device, variant)


def load_source(folder: Path | str, *, variant: str = "", changes: Mapping[str, Any] = MappingProxyType({})) -> Checkpoint:
    """The checkpoint that `load_policy` makes a policy of, on the CPU.

    Raises:
        ValueError: as `load_policy`.
    """
    if variant:
        check_variant(folder, variant)
    return checkpoint.load(folder, changes=changes)


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


__all__ = [
    "Checkpoint",
    "Policy",
    "SystemPolicy",
    "act",
    "check_variant",
    "load_policy",
    "load_source",
]
