"""What travels between the gateway and a level's replicas: robots' rows, as they are.

Every row carries a number, and the gateway compares those of the answers: rows that were mixed up are an error, never another
robot's actions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
