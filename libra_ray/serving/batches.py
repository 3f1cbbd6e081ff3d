"""What travels between the gateway and a level's replicas: one record per batch, arrays over robots, picklable without copies.

Every row carries the number of the request it answers, and the gateway compares it: rows that were mixed up are an error,
never another robot's actions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libra_ray.types import ActionChunk, Intent, Level, Observation

ACTIONS = "actions"
"""What the values of a level that acts are called."""


class RowMismatchError(RuntimeError):
    """A level answered other requests than it was asked; nobody gets any of it."""


@dataclass(frozen=True, kw_only=True)
class InferenceRequest:
    """One robot's row: its observation, and the intent that the level reads, where it reads one."""

    number: int
    observation: Observation
    above: Intent | None = None


@dataclass(frozen=True, kw_only=True)
class InferenceBatch:
    """The requests of `B` robots to one level.

    Attributes:
        numbers: `(B,)` of the requests.
        weights: which of the loaded checkpoints shall answer.
        images: camera feature -> `(B, T, height, width, 3)` uint8, oldest first.
        state: `(B, S)` float32.
        instructions: per robot.
        steps: `(B,)` absolute control steps.
        above: the values of the intents to read, by name, `(B, ...)` each; empty where none is read.
        above_first_steps: `(B,)` of those intents.
        committed: `(B, C, D)` what robots do meanwhile, NaN where they wait; None where all wait.
    """

    numbers: NDArray[np.int64]
    weights: str
    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    instructions: tuple[str, ...]
    steps: NDArray[np.int64]
    above: dict[str, NDArray[Any]] = field(default_factory=dict)
    above_first_steps: NDArray[np.int64] | None = None
    committed: NDArray[np.float32] | None = None

    @classmethod
    def stacked(cls, requests: Sequence[InferenceRequest], weights: str, history: int) -> "InferenceBatch":
        """The batch of requests to one level; pictures missing at an episode's start repeat the first."""
        seen = [request.observation for request in requests]
        intents = [request.above for request in requests if request.above is not None]
        assert len(intents) in (0, len(requests)), "requests to different levels in one batch"
        return cls(
            numbers=np.array([request.number for request in requests]),
            weights=weights,
            images={name: np.stack([_pictures(o, name, history) for o in seen]) for name in seen[0].images},
            state=np.stack([o.state for o in seen]),
            instructions=tuple(o.instruction for o in seen),
            steps=np.array([o.step for o in seen]),
            above={name: np.stack([i.values[name] for i in intents]) for name in intents[0].values} if intents else {},
            above_first_steps=np.array([intent.first_step for intent in intents]) if intents else None,
            committed=_padded([o.committed for o in seen]),
        )

    def observations(self) -> list[Observation]:
        """The observations, one by one."""
        found = []
        frames = next((stack.shape[1] for stack in self.images.values()), 1)
        for row, instruction in enumerate(self.instructions):
            history = [{name: stack[row, t] for name, stack in self.images.items()} for t in range(frames)]
            found.append(
                Observation(
                    images=history[-1],
                    state=self.state[row],
                    instruction=instruction,
                    step=int(self.steps[row]),
                    past=history[:-1],
                    committed=None if self.committed is None else _known(self.committed[row]),
                )
            )
        return found

    def intents(self, level: Level | None) -> list[Intent | None]:
        """The intents to read, which are answers of `level`, one by one; None for each where none is read."""
        if level is None or self.above_first_steps is None:
            return [None] * len(self.numbers)
        return [
            Intent(
                level=level.name,
                values={name: value[row] for name, value in self.above.items()},
                first_step=int(first_step),
                covers=level.covers,
            )
            for row, first_step in enumerate(self.above_first_steps)
        ]


@dataclass(frozen=True, kw_only=True)
class InferenceResult:
    """What a level answers to a batch.

    Attributes:
        numbers: `(B,)` of the requests, as asked.
        values: an intent's values by name, `(B, ...)` each; of the level that acts `ACTIONS`, `(B, H, D)`.
        seconds: the replica computed.
        metadata: of every intent; empty for the level that acts.
    """

    numbers: NDArray[np.int64]
    values: Mapping[str, NDArray[Any]]
    seconds: float
    metadata: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def stacked(cls, numbers: NDArray[np.int64], answers: Sequence[Intent | ActionChunk], seconds: float) -> "InferenceResult":
        """A policy's answers to the batch of those numbers."""
        assert len(answers) == len(numbers)
        batch = [answer.values if isinstance(answer, Intent) else {ACTIONS: answer.actions} for answer in answers]
        return cls(
            numbers=numbers,
            values={name: np.stack([row[name] for row in batch]) for name in batch[0]},
            seconds=seconds,
            metadata=[answer.metadata for answer in answers if isinstance(answer, Intent)],
        )

    def check(self, requests: Sequence[InferenceRequest]) -> None:
        """Refuse answers to other requests.

        Raises:
            RowMismatchError: they are not the requests', in their order.
        """
        same = self.numbers.tolist() == [request.number for request in requests]
        if not same or any(len(value) != len(requests) for value in self.values.values()):
            raise RowMismatchError("the answers belong to other requests")


def _padded(rows: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    known = [row for row in rows if row is not None]
    if not known:
        return None
    padded = np.full((len(rows), max(map(len, known)), known[0].shape[1]), np.nan, np.float32)
    for into, row in zip(padded, rows, strict=True):
        if row is not None:
            into[: len(row)] = row
    return padded


def _known(padded: NDArray[np.float32]) -> NDArray[np.float32] | None:
    known = padded[~np.isnan(padded).any(axis=1)]
    return known if len(known) else None


def _pictures(observation: Observation, name: str, history: int) -> NDArray[np.uint8]:
    if history == 1:
        return observation.images[name][None]
    return np.stack(observation.pictures(name, history))
