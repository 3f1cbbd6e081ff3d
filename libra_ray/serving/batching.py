"""Natural batching: while a call is under way, questions gather; when it comes back, all of them go as the next one."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from libra_ray.serving.batches import Answers, Question
from libra_ray.types import Observation, Plan

WINDOW_SHARE = 0.1
"""Share of a call's duration, and of the control deadline, for which an idle system waits for company."""


class MixedUpError(RuntimeError):
    """A system answered other questions than it was asked; nobody gets any of it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One robot's row.

    Attributes:
        values: plan tokens `(L, D)` or actions `(H, D)`.
        queue_s: from the question to the call.
        call_s: of the call, seen from here.
        compute_s: that the replica computed of it.
        batch: robots in the call.
        queued: questions still waiting when it was sent.
    """

    values: NDArray[np.int64] | NDArray[np.float32]
    queue_s: float
    call_s: float
    compute_s: float
    batch: int
    queued: int


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    question: Question
    weights: str
    future: asyncio.Future[Answer]
    since: float


class Batcher:
    """The questions of all robots to one system. Every question carries its own future, so an answer has one place to go.

    Args:
        call: sends one batch.
        max_batch: robots in one call.
        in_flight: calls that may be under way now.
        company: robots that may ask: when all of them wait, nobody else is waited for.
        window_s: longest wait for company; None derives it from the duration of calls.
        deadline_s: control deadline, which bounds the derived window.
    """

    def __init__(
        self,
        call: Callable[[list[Question], str], Awaitable[Answers]],
        *,
        max_batch: int,
        in_flight: Callable[[], int],
        company: Callable[[], int],
        window_s: float | None,
        deadline_s: Callable[[], float],
    ) -> None:
        self._call, self._max_batch, self._in_flight, self._company = call, max_batch, in_flight, company
        self._window_s, self._deadline_s = window_s, deadline_s
        self._numbers = itertools.count()
        self._waiting: list[_Waiting] = []
        self._running: set[asyncio.Task[None]] = set()
        self._asked = 0
        self._timer: asyncio.TimerHandle | None = None
        self._call_s = 0.0

    @property
    def queued(self) -> int:
        """Questions that wait for a call."""
        return len(self._waiting)

    def ask(self, observation: Observation, plan: Plan | None, weights: str) -> asyncio.Future[Answer]:
        """The answer to come. Its exception is the call's."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        question = Question(number=next(self._numbers), observation=observation, plan=plan)
        self._waiting.append(_Waiting(question=question, weights=weights, future=future, since=time.perf_counter()))
        self._consider()
        return future

    def _consider(self) -> None:
        """Send what waits, now or when its window ends, where a call may be made at all."""
        if not self._waiting or len(self._running) >= self._in_flight():
            return
        window = self._window()
        full = len(self._waiting) >= self._max_batch or len(self._waiting) + self._asked >= self._company()
        left = 0.0 if full else self._waiting[0].since + window - time.perf_counter()
        if left <= 0:
            self._send()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(left, self._window_ended)

    def _window(self) -> float:
        if self._window_s is not None:
            return self._window_s
        return WINDOW_SHARE * min(self._call_s, self._deadline_s())

    def _window_ended(self) -> None:
        self._timer = None
        if self._waiting and len(self._running) < self._in_flight():
            self._send()

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        weights = self._waiting[0].weights
        batch = [w for w in self._waiting if w.weights == weights and not w.future.done()][: self._max_batch]
        chosen = {w.question.number for w in batch}
        self._waiting = [w for w in self._waiting if w.question.number not in chosen and not w.future.done()]
        if not batch:
            self._consider()
            return
        self._asked += len(batch)
        task = asyncio.get_running_loop().create_task(self._run(batch, weights, len(self._waiting)))
        self._running.add(task)
        task.add_done_callback(lambda done: self._came_back(done, len(batch)))
        self._consider()

    def _came_back(self, task: asyncio.Task[None], size: int) -> None:
        self._running.discard(task)
        self._asked -= size
        self._consider()

    async def _run(self, batch: list[_Waiting], weights: str, queued: int) -> None:
        began = time.perf_counter()
        try:
            answers = await self._call([w.question for w in batch], weights)
            if answers.numbers.tolist() != [w.question.number for w in batch] or len(answers.values) != len(batch):
                raise MixedUpError("the answers belong to other questions")
        except Exception as error:  # noqa: BLE001  # the border of a batch: each of its requests gets the failure
            for w in batch:
                if not w.future.done():
                    w.future.set_exception(error)
            return
        call_s = time.perf_counter() - began
        self._call_s += 0.2 * (call_s - self._call_s)
        for w, values in zip(batch, answers.values, strict=True):
            if not w.future.done():
                answer = Answer(
                    values=values, queue_s=began - w.since, call_s=call_s, compute_s=answers.seconds, batch=len(batch),
                    queued=queued,
                )  # fmt: skip
                w.future.set_result(answer)
