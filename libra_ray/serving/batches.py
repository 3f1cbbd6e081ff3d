"""What travels between the gateway and a level's replicas: robots' rows, as they are.

Every row carries a number, and the gateway compares those of the answers: rows that were mixed up are an error, never another
robot's actions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libra_ray.types import ActionChunk, Intent, Observation


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
    """One call of a level.

    Attributes:
        requests: the robots' rows.
        weights: which of the loaded checkpoints shall answer.
        urgent: some robots have no time to spare: not to be computed at low priority.
        late_share: of the gateway's recent requests, that came too late for want of this level's answers.
    """

    requests: Sequence[InferenceRequest]
    weights: str
    urgent: bool = False
    late_share: float = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        """It is pickled by columns: an array by itself takes as long as all else of its row."""
        seen = [row.observation for row in self.requests]
        above = [row.above for row in self.requests if row.above is not None]
        assert len(above) in (0, len(seen)), "requests to different levels in one batch"
        return _batch_of, (
            (self.weights, self.urgent, self.late_share),
            [row.number for row in self.requests],
            [(o.instruction, o.step, o.past, o.committed) for o in seen],
            {name: np.stack([o.images[name] for o in seen]) for name in seen[0].images},
            np.stack([o.state for o in seen]),
            [(intent.level, intent.first_step, intent.covers) for intent in above],
            {name: np.stack([intent.values[name] for intent in above]) for name in above[0].values} if above else {},
        )


def _batch_of(
    call: tuple[str, bool, float],
    numbers: Sequence[int],
    seen: Sequence[tuple[str, int, Any, Any]],
    images: Mapping[str, NDArray[np.uint8]],
    states: NDArray[np.float32],
    above: Sequence[tuple[str, int, int]],
    values: Mapping[str, NDArray[Any]],
) -> InferenceBatch:
    """What was pickled, but of the intents what no level reads."""
    intents: list[Intent | None] = [
        Intent(level=level, values={name: of[row] for name, of in values.items()}, first_step=first, covers=covers)
        for row, (level, first, covers) in enumerate(above)
    ]
    observations = [
        Observation(
            images={name: of[row] for name, of in images.items()},
            state=states[row], instruction=instruction, step=step, past=past, committed=committed,
        )
        for row, (instruction, step, past, committed) in enumerate(seen)
    ]  # fmt: skip
    rows = zip(numbers, observations, intents or [None] * len(numbers), strict=True)
    weights, urgent, late_share = call
    requests = [InferenceRequest(number=n, observation=o, above=intent) for n, o, intent in rows]
    return InferenceBatch(requests=requests, weights=weights, urgent=urgent, late_share=late_share)


@dataclass(frozen=True, kw_only=True)
class InferenceResult:
    """What a level answers to a batch.

    Attributes:
        numbers: of the requests, as asked.
        answers: to each.
        seconds: the replica computed.
    """

    numbers: Sequence[int]
    answers: Sequence[Intent | ActionChunk]
    seconds: float

    def check(self, requests: Sequence[InferenceRequest]) -> None:
        """Refuse answers to other requests.

        Raises:
            RowMismatchError: they are not the requests', in their order.
        """
        if [*self.numbers] != [request.number for request in requests] or len(self.answers) != len(requests):
            raise RowMismatchError("the answers belong to other requests")
