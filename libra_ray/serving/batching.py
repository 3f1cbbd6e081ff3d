"""Natural batching: while a call is under way, requests gather; when it comes back, all of them go as the next one."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from libra_ray.serving.batches import InferenceRequest, InferenceResult
from libra_ray.types import ActionChunk, Intent, Observation

CALL_SHARE, DEADLINE_SHARE = 0.5, 0.1
"""Shares of a call's duration and of the control deadline: for the shorter of both an idle level waits for more requests.

A call for one robot costs as much as eight further robots in it: what is waited for is processors for all."""

type Call = Callable[[list[InferenceRequest], str, bool], Awaitable[InferenceResult]]
"""Sends one batch: the requests, the weights that shall answer, and whether it is urgent."""


@dataclass(frozen=True, kw_only=True)
class RobotResult:
    """One robot's row of a batch.

    Attributes:
        queue_s: from the request to the call.
        call_s: of the call, seen from here.
        compute_s: that the replica computed of it.
        batch: robots in the call.
    """

    chunk: ActionChunk
    queue_s: float
    call_s: float
    compute_s: float
    batch: int


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    request: InferenceRequest
    weights: str
    future: asyncio.Future[RobotResult]
    since: float


class Batcher:
    """The requests of all robots to the level that acts. Every one carries its own future, so a result has one place to go.

    Args:
        max_batch: robots in one call.
        in_flight: calls that may be under way now.
        expected_peers: robots that may ask: when all of them have asked, nobody else is waited for.
        window_s: longest wait for more requests; None derives it from the duration of calls.
        deadline_s: control deadline, which bounds the derived window.
    """

    def __init__(
        self,
        call: Call,
        *,
        max_batch: int,
        in_flight: Callable[[], int],
        expected_peers: Callable[[], int],
        window_s: float | None,
        deadline_s: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._call, self._max_batch, self._in_flight, self._expected_peers = call, max_batch, in_flight, expected_peers
        self._window_s, self._deadline_s, self._clock = window_s, deadline_s, clock
        self._numbers = itertools.count()
        self._waiting: list[_Waiting] = []
        self._running: dict[asyncio.Task[None], int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._call_s = 0.0

    @property
    def queued(self) -> int:
        """Requests that wait for a call."""
        return len(self._waiting)

    def ask(self, observation: Observation, above: Intent | None, weights: str) -> asyncio.Future[RobotResult]:
        """The result to come. Its exception is the call's."""
        future: asyncio.Future[RobotResult] = asyncio.get_running_loop().create_future()
        request = InferenceRequest(number=next(self._numbers), observation=observation, above=above)
        self._waiting.append(_Waiting(request=request, weights=weights, future=future, since=self._clock()))
        self._consider()
        return future

    def _consider(self, *, window_over: bool = False) -> None:
        """Send what waits, now or when its window ends, where a call may be made at all."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting and len(self._running) < self._in_flight():
            all_ask = len(self._waiting) + sum(self._running.values()) >= self._expected_peers()
            left = self._waiting[0].since + self._window() - self._clock()
            if left > 0 and not (window_over or all_ask or len(self._waiting) >= self._max_batch):
                self._timer = asyncio.get_running_loop().call_later(left, partial(self._consider, window_over=True))
                return
            window_over = False
            self._send()

    def _window(self) -> float:
        if self._window_s is not None:
            return self._window_s
        return min(CALL_SHARE * self._call_s, DEADLINE_SHARE * self._deadline_s())

    def _send(self) -> None:
        weights = self._waiting[0].weights
        batch = [w for w in self._waiting if w.weights == weights and not w.future.done()][: self._max_batch]
        chosen = {w.request.number for w in batch}
        self._waiting = [w for w in self._waiting if w.request.number not in chosen and not w.future.done()]
        if batch:
            task = asyncio.get_running_loop().create_task(self._run(batch, weights))
            self._running[task] = len(batch)
            task.add_done_callback(self._call_ended)

    def _call_ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._consider()

    async def _run(self, batch: list[_Waiting], weights: str) -> None:
        began, requests = self._clock(), [w.request for w in batch]
        try:
            result = await self._call(requests, weights, False)
            result.check(requests)
        except Exception as error:  # noqa: BLE001  # the border of a batch: each of its requests gets the failure
            for w in batch:
                if not w.future.done():
                    w.future.set_exception(error)
            return
        call_s = self._clock() - began
        self._call_s += 0.2 * (call_s - self._call_s)
        for w, chunk in zip(batch, result.answers, strict=True):
            assert isinstance(chunk, ActionChunk)
            if not w.future.done():
                queue_s, compute_s = began - w.since, result.seconds
                w.future.set_result(
                    RobotResult(chunk=chunk, queue_s=queue_s, call_s=call_s, compute_s=compute_s, batch=len(batch))
                )
