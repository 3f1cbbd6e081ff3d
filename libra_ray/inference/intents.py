"""What a level reads of the intents that it is handed, and the noise that it begins with."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from libra_ray.model.system import IntentValue, System
from libra_ray.types import Intent, Level, Observation


def values_read(
    model: System, level: Level, observations: Sequence[Observation], above: Sequence[Intent | None]
) -> dict[str, Tensor]:
    """The intents' values from each observation's step on, on the CPU; what no intent covers is unknown.

    Raises:
        ValueError: an intent is none of the level that is read, or younger than its observation.
    """
    if level.reads is None:
        return {}
    spec = model.intents[level.reads]
    for observation, intent in zip(observations, above, strict=True):
        if intent is not None:
            _check_intent(intent, level.reads, spec, observation.step)
    values = {}
    for name, value in spec.items():
        blank = np.full(value.shape, value.unknown, value.dtype)
        rows = [blank if intent is None else np.asarray(intent.values[name], value.dtype) for intent in above]
        values[name] = torch.from_numpy(np.stack(rows))
    ages = [-1 if i is None else o.step - i.first_step for o, i in zip(observations, above, strict=True)]
    return model.aligned(level, values, torch.tensor(ages))


def starting_noise(
    shape: tuple[int, ...] | None, observations: Sequence[Observation], read: Mapping[str, Tensor]
) -> Float[Tensor, "B *shape"] | None:
    """Starting noise drawn from each robot's intent and step, so that an answer never depends on who else is in the batch.

    Not from the observation, nor from real numbers of an intent, whose last bits differ between batches of different sizes:
    the noise would be another one.
    """
    if shape is None:
        return None
    values, rows = [value.numpy() for value in read.values() if not value.is_floating_point()], []
    for row, observation in enumerate(observations):
        intent = b"".join(value[row].tobytes() for value in values) + observation.step.to_bytes(8, "little")
        seed = hashlib.blake2b(intent, digest_size=8).digest()
        rows.append(np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(shape, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


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
