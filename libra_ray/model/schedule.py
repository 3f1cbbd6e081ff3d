"""What changes in the course of training: its phases, what learns in each, and over which steps the learning rate falls."""

from collections.abc import Mapping
from typing import Any


class Schedule:
    """One phase, in which every part of a system learns; a subclass says what is otherwise.

    `state` and `restore` let a resumed run go on exactly.

    Attributes:
        phases: the names of all phases, in their order; the only one needs none.
    """

    phases: tuple[str, ...] = ("",)

    @property
    def phase(self) -> str:
        """Of the next step; given to `System.losses`."""
        return self.phases[0]

    def learns(self, part: str) -> bool:
        """Whether a part of the system learns in the present phase.

        One that does not keeps its weights, whatever reaches them. When it stops learning, they become their moving average,
        with which the policy runs.
        """
        return True

    @property
    def watches(self) -> bool:
        """Whether `advance` has to be told the losses and metrics, for which the host waits at every step."""
        return False

    def stretch(self, steps: int) -> tuple[int, int]:
        """The first step of the learning rate's present rise and fall, and the one after its last, of a run of `steps`."""
        return 0, steps

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of an optimiser step; `step` counts those done.

        Args:
            metrics: its losses and metrics, means over all workers; empty where it does not watch.
        """

    def state(self) -> dict[str, Any]:
        """All that was learned."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""


class OneAfterAnother(Schedule):
    """One part by its own schedule up to a given step, then another; each with a rise and fall of the learning rate.

    The phases are called `<early>`, or `<early>_<phase>` where the early part has phases of its own, and `<late>`.
    """

    def __init__(self, parts: tuple[str, str], within: Schedule, switch: int, *, frozen: bool) -> None:
        """The early and the late part, the early one's schedule, and the late one's first step.

        `frozen` says whether the early part then stays as it is.
        """
        self._early, self._late = parts
        self._within, self._switch, self._frozen = within, switch, frozen
        self._step = 0
        self.phases = (*map(self._early_phase, within.phases), self._late)

    @property
    def phase(self) -> str:
        """Of the part whose turn it is."""
        return self._late if self._is_late else self._early_phase(self._within.phase)

    def learns(self, part: str) -> bool:
        """The early part alone, then the late one, and the early one with it where it is not frozen."""
        return part == self._late or not self._frozen if self._is_late else part == self._early

    @property
    def watches(self) -> bool:
        """As the early part's own schedule does, while it is its turn."""
        return not self._is_late and self._within.watches

    def stretch(self, steps: int) -> tuple[int, int]:
        """The steps of the part whose turn it is."""
        return (self._switch, steps) if self._is_late else (0, self._switch)

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count, and tell the early part's own schedule while it is its turn."""
        if not self._is_late:
            self._within.advance(step, metrics)
        self._step = step

    def state(self) -> dict[str, Any]:
        """The step, and what the early part's own schedule has learned."""
        return {"step": self._step, "within": self._within.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._step = state["step"]
        self._within.restore(state["within"])

    @property
    def _is_late(self) -> bool:
        return self._step >= self._switch

    def _early_phase(self, within: str) -> str:
        return f"{self._early}_{within}" if within else self._early
