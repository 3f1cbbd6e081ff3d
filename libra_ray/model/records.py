"""What systems are asked, and what they answer: the records that every one of them speaks in."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float, UInt8
from torch import Tensor

from libra_ray.batch import Batch
from libra_ray.model.parts.backbone import Text


@dataclass(frozen=True, kw_only=True)
class SystemInput:
    """What a level is asked about, for `B` robots.

    Attributes:
        images: `(B, T, 3, height, width)` uint8; `T` is cameras x history.
        state: `(B, S)` normalised proprioception.
        text: the instructions' tokens.
        committed: `(B, K, D)` normalised actions that the robots will execute from now on, whatever is answered; NaN where a
            robot waits. None where all wait.
    """

    images: UInt8[Tensor, "B T C height width"]
    state: Float[Tensor, "B S"]
    text: Text
    committed: Float[Tensor, "B K D"] | None = None

    def __len__(self) -> int:
        """The number of robots."""
        return len(self.images)


def seen_first(batch: Batch) -> SystemInput:
    """What the levels above the last one see in training: the pictures at the beginning of each window."""
    return SystemInput(images=batch.plan_images, state=batch.plan_state, text=Text(ids=batch.text, mask=batch.text_mask))


def seen_now(batch: Batch) -> SystemInput:
    """What the last level sees in training, `offset` control steps later."""
    return SystemInput(images=batch.images, state=batch.state, text=Text(ids=batch.text, mask=batch.text_mask))


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What one batch teaches.

    Attributes:
        terms: unweighted losses by name, those that are learned in the phase; their weighted sum is minimised.
        metrics: further scalars by name, for the log and the schedule.
    """

    terms: Mapping[str, Float[Tensor, ""]]
    metrics: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class IntentValue:
    """What one value of a level's intent may be.

    Attributes:
        shape: of one robot's; with `per_step` its first axis counts the control steps that the intent covers.
        low, high: smallest and largest valid entry.
        unknown: the entry that stands where nothing is known: past the intent's end, or without an intent.
        dtype: numpy's name, e.g. `int64`.
        per_step: whether the level below reads the steps from its own step on, instead of the whole value.
    """

    shape: tuple[int, ...]
    low: float
    high: float
    unknown: float
    dtype: str = "int64"
    per_step: bool = True
