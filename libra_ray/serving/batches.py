"""What travels between the gateway and the two systems: one record per batch, arrays over robots, picklable without copies.

Every row carries the number of the question it answers, and the gateway compares it: rows that were mixed up are an error,
never another robot's actions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from libra_ray.types import ActionChunk, Observation, Plan


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A batch of `B` observations, for the refiner with the plans in use.

    Attributes:
        numbers: `(B,)` of the questions.
        weights: which of the loaded checkpoints shall answer.
        images: camera feature -> `(B, T, height, width, 3)` uint8, oldest first.
        state: `(B, S)` float32.
        instructions: per robot.
        steps: `(B,)` absolute control steps.
        tokens: `(B, L, D)` of the plans in use; None where a plan is asked for.
        plan_first_steps: `(B,)` of those plans.
    """

    numbers: NDArray[np.int64]
    weights: str
    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    instructions: tuple[str, ...]
    steps: NDArray[np.int64]
    tokens: NDArray[np.int64] | None = None
    plan_first_steps: NDArray[np.int64] | None = None

    def observations(self) -> list[Observation]:
        """The rows, one by one."""
        found = []
        for row, instruction in enumerate(self.instructions):
            history = [{name: stack[row, t] for name, stack in self.images.items()} for t in range(self._history)]
            found.append(
                Observation(
                    images=history[-1],
                    state=self.state[row],
                    instruction=instruction,
                    step=int(self.steps[row]),
                    past=history[:-1],
                )
            )
        return found

    def plans(self) -> list[Plan]:
        """The plans in use, one by one."""
        assert self.tokens is not None
        assert self.plan_first_steps is not None
        return [Plan(tokens=t, first_step=int(s)) for t, s in zip(self.tokens, self.plan_first_steps, strict=True)]

    @property
    def _history(self) -> int:
        return next((stack.shape[1] for stack in self.images.values()), 1)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The rows' answers: `values` are plan tokens `(B, L, D)` or actions `(B, H, D)`.

    Attributes:
        numbers: `(B,)` of the questions, as asked.
        seconds: the replica computed.
    """

    numbers: NDArray[np.int64]
    values: NDArray[np.int64] | NDArray[np.float32]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Question:
    """One robot's row: an observation, for the refiner with its plan."""

    number: int
    observation: Observation
    plan: Plan | None = None


def stacked(questions: Sequence[Question], weights: str, history: int) -> Rows:
    """The batch of questions of the same kind; pictures missing at an episode's start repeat the first."""
    seen = [question.observation for question in questions]
    plans = [question.plan for question in questions if question.plan is not None]
    assert len(plans) in (0, len(questions)), "questions for planner and refiner in one batch"
    return Rows(
        numbers=np.array([question.number for question in questions]),
        weights=weights,
        images={name: np.stack([_pictures(o, name, history) for o in seen]) for name in seen[0].images},
        state=np.stack([o.state for o in seen]),
        instructions=tuple(o.instruction for o in seen),
        steps=np.array([o.step for o in seen]),
        tokens=np.stack([plan.tokens for plan in plans]) if plans else None,
        plan_first_steps=np.array([plan.first_step for plan in plans]) if plans else None,
    )


def _pictures(observation: Observation, name: str, history: int) -> NDArray[np.uint8]:
    if history == 1:
        return observation.images[name][None]
    return np.stack(observation.pictures(name, history))


def plan_answers(rows: Rows, plans: Sequence[Plan], seconds: float) -> Answers:
    """What a planner replica sends back."""
    assert len(plans) == len(rows.numbers)
    return Answers(numbers=rows.numbers, values=np.stack([plan.tokens for plan in plans]), seconds=seconds)


def chunk_answers(rows: Rows, chunks: Sequence[ActionChunk], seconds: float) -> Answers:
    """What a refiner replica sends back."""
    assert len(chunks) == len(rows.numbers)
    return Answers(numbers=rows.numbers, values=np.stack([chunk.actions for chunk in chunks]), seconds=seconds)
