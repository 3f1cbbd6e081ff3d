"""Requests gather while a call is under way; how long an idle level waits for more of them; whose results are whose."""

import asyncio
import dataclasses
import pickle

import numpy as np
import pytest

from libra_ray.serving.batches import InferenceBatch, InferenceRequest, InferenceResult, RowMismatchError
from libra_ray.serving.batching import CALL_SHARE, DEADLINE_SHARE, Batcher, RobotResult
from libra_ray.types import ActionChunk, Intent
from tests.serving.stubs import observe
from tests.serving.virtual_time import run

CALL_S = 0.02


class Calls:
    """A batcher in front of a level whose calls take `CALL_S`; notes who was sent together, and when."""

    def __init__(self, *, max_batch=9, peers=10, window_s=None, deadline_s=1.0):
        self.sent, self.at, self.weights, self.urgent = [], [], [], set()
        self.clock = asyncio.get_running_loop().time
        self.batcher = Batcher(
            self._call,
            max_batch=max_batch,
            in_flight=lambda: 1,
            expected_peers=lambda: peers,
            window_s=window_s,
            deadline_s=lambda: deadline_s,
            clock=self.clock,
        )

    async def _call(self, requests, weights, urgent):
        self.sent.append([int(r.observation.state[0]) for r in requests])
        self.at.append(self.clock())
        self.weights.append(weights)
        self.urgent.add(urgent)
        await asyncio.sleep(CALL_S)
        answers = [ActionChunk(actions=r.observation.state[:1], first_step=0, intent_first_step=0) for r in requests]
        return InferenceResult(numbers=[r.number for r in requests], answers=answers, seconds=0.015)

    def ask(self, robot, weights="w"):
        return self.batcher.ask(observe(robot), None, weights)


def test_requests_gather_while_a_call_is_under_way():
    """Natural batching: the first goes at once, all that come meanwhile go together; a full batch waits for nobody."""

    async def work():
        calls = Calls(max_batch=3, window_s=0.0)
        results = await asyncio.gather(*[calls.ask(n) for n in range(8)])
        assert [int(result.chunk.actions[0]) for result in results] == list(range(8))
        assert calls.sent == [[0], [1, 2, 3], [4, 5, 6], [7]]
        assert [result.batch for result in results] == [1, 3, 3, 3, 3, 3, 3, 1]
        assert [result.queue_s for result in results] == pytest.approx([0, *[CALL_S] * 3, *[2 * CALL_S] * 3, 3 * CALL_S])
        assert [result.call_s for result in results] == pytest.approx([CALL_S] * 8)
        assert {result.compute_s for result in results} == {0.015}
        first = calls.ask(0, "old")
        mixed = [calls.ask(n, "new" if n % 2 else "old") for n in range(4)]
        await asyncio.gather(first, *mixed)
        assert calls.sent[4:] == [[0], [0, 2], [1, 3]]
        assert calls.weights[4:] == ["old", "old", "new"]
        assert calls.urgent == {False}

    run(work())


def test_the_window_ends_when_everybody_waits():
    async def work():
        calls = Calls(peers=3, window_s=5.0)
        began = calls.clock()
        await asyncio.gather(*[calls.ask(n) for n in range(3)])
        assert calls.sent == [[0, 1, 2]]
        assert calls.at == [began]

    run(work())


def test_a_full_batch_waits_for_nobody():
    async def work():
        calls = Calls(max_batch=3, window_s=5.0)
        began = calls.clock()
        await asyncio.gather(*[calls.ask(n) for n in range(3)])
        assert (calls.sent, calls.at) == ([[0, 1, 2]], [began])

    run(work())


def test_a_window_that_is_over_is_over_by_whatever_clock():
    """Timers may fire early by the clock that requests are dated by."""

    async def work():
        calls = Calls(window_s=0.3)
        calls.batcher._clock, began = (lambda: 0.0), calls.clock()
        await calls.ask(1)
        assert calls.at == pytest.approx([began + 0.3])

    run(work())


def test_a_window_that_is_over_ends_no_others():
    async def work():
        calls = Calls(window_s=0.3)
        calls.batcher._in_flight, began = (lambda: 2), calls.clock()
        first = calls.ask(1, "old")
        await asyncio.sleep(0.1)
        await asyncio.gather(first, calls.ask(2, "new"))
        assert calls.sent == [[1], [2]]
        assert calls.at == pytest.approx([began + 0.3, began + 0.4])

    run(work())


def test_who_gives_up_while_waiting_is_not_asked_for():
    async def work():
        calls = Calls(window_s=0.3)
        gone, there = calls.ask(1), calls.ask(2)
        gone.cancel()
        assert int((await there).chunk.actions[0]) == 2
        calls.ask(3).cancel()
        await asyncio.sleep(1)
        assert calls.sent == [[2]]
        assert calls.batcher.queued == 0

    run(work())


@pytest.mark.parametrize("fails", [False, True])
def test_who_gives_up_during_a_call_takes_nobody_along(fails):
    async def work():
        calls = Calls(window_s=0.3)
        right = calls._call

        async def call(requests, weights, urgent):
            result = await right(requests, weights, urgent)
            if fails:
                raise ArithmeticError
            return result

        calls.batcher._call = call
        gone, *others = [calls.ask(n) for n in range(3)]
        await asyncio.sleep(0.3 + CALL_S / 2)
        gone.cancel()
        found = await asyncio.gather(*others, return_exceptions=True)
        assert [type(each) for each in found] == [ArithmeticError if fails else RobotResult] * 2

    run(work())


def test_those_in_a_call_are_not_waited_for():
    async def work():
        calls = Calls(peers=3, window_s=5.0)
        calls.batcher._in_flight = lambda: 2
        first = [calls.ask(n) for n in range(3)]
        await asyncio.sleep(CALL_S / 2)
        began = calls.clock()
        assert calls.batcher.queued == 0
        await asyncio.gather(calls.ask(0), *first)
        assert calls.at[1] == began, "the two others are answered just now"

    run(work())


@pytest.mark.parametrize("later_s", [0.0, 0.1, 0.29])
def test_a_window_lasts_from_the_first_that_waits(later_s):
    async def work():
        calls = Calls(window_s=0.3)
        began = calls.clock()
        first = calls.ask(1)
        await asyncio.sleep(later_s)
        await asyncio.gather(first, calls.ask(2))
        assert calls.sent == [[1, 2]]
        assert calls.at == pytest.approx([began + 0.3])

    run(work())


def test_a_window_counts_while_a_call_is_under_way():
    async def work():
        calls = Calls(window_s=1.5 * CALL_S)
        calls.batcher._in_flight, began = (lambda: 1), calls.clock()
        first = calls.ask(1)
        await asyncio.sleep(1.75 * CALL_S)
        second = calls.ask(2)
        await asyncio.gather(first, second)
        assert calls.at == pytest.approx([began + 1.5 * CALL_S, began + 3.25 * CALL_S])
        assert (await second).queue_s == pytest.approx(1.5 * CALL_S)

    run(work())


@pytest.mark.parametrize("deadline_s", [1.0, 0.005])
def test_without_a_window_a_share_of_the_calls_or_of_the_deadline_is_waited(deadline_s):
    """Of the calls so far, the last ones most."""

    async def work():
        calls, usual_s = Calls(deadline_s=deadline_s), 0.0
        for _ in range(4):
            began = calls.clock()
            await calls.ask(1)
            assert calls.at[-1] - began == pytest.approx(min(CALL_SHARE * usual_s, DEADLINE_SHARE * deadline_s))
            usual_s += 0.2 * (CALL_S - usual_s)

    run(work())


@pytest.mark.parametrize("reads", [True, False])
def test_a_batch_says_the_same_in_another_process(reads):
    """Of the intents all that a level reads."""
    seen = [
        dataclasses.replace(observe(3, 7), past=[observe(4).images] * 2, committed=np.ones((2, 5), np.float32)),
        observe(5, 0, "another"),
    ]
    intents = [
        Intent(level="planner", values={"a": np.full((2, 3), n), "b": np.array(n)}, first_step=n, covers=9) for n in (1, 2)
    ]
    rows = zip((8, 6), seen, intents if reads else (None, None), strict=True)
    requests = [InferenceRequest(number=n, observation=o, above=intent) for n, o, intent in rows]
    batch = InferenceBatch(requests=requests, weights="w", urgent=True, late_share=0.5)
    come = pickle.loads(pickle.dumps(batch, protocol=5))
    np.testing.assert_equal(dataclasses.asdict(come), dataclasses.asdict(batch))


@pytest.mark.parametrize("fault", ["order", "fewer", "more"])
def test_nobody_gets_a_result_that_may_be_anothers(fault):
    async def work():
        calls = Calls(peers=2, window_s=5.0)
        right = calls._call

        async def wrong(requests, weights, urgent):
            result = await right(requests, weights, urgent)
            rows = {"order": [1, 0], "fewer": [0], "more": [0, 1, 1]}[fault]
            numbers = [result.numbers[row] for row in rows] if fault == "order" else result.numbers
            return InferenceResult(numbers=numbers, answers=[result.answers[row] for row in rows], seconds=0)

        calls.batcher._call = wrong
        outcomes = await asyncio.gather(calls.ask(1), calls.ask(2), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RowMismatchError] * 2

    run(work())
