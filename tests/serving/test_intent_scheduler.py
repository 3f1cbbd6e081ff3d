"""A free-running level: who is asked for first, who waits for whom, and which answers are adopted."""

import asyncio
import dataclasses
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import uvloop

from libra_ray.config import ControlConfig
from libra_ray.control.robot import RobotControl
from libra_ray.serving import intent_scheduler
from libra_ray.serving.batches import InferenceResult
from libra_ray.serving.batching import CALL_SHARE
from libra_ray.serving.fleet_snapshot import RobotRow
from libra_ray.serving.intent_scheduler import IntentScheduler
from libra_ray.serving.robot_sessions import RobotSession
from libra_ray.types import Intent
from tests.serving.bench import Bench, check
from tests.serving.stubs import HORIZON, LEVELS, THREE, StubLevel, StubOfOne, StubOfThree, observe
from tests.serving.virtual_time import run


class Calls:
    """A scheduler in front of a level that answers with the robot's number; `fault` changes what comes back."""

    def __init__(self, level=LEVELS[0], *, max_batch=9, call_s=0.05, fault=lambda result: result, peers=1):
        self.sent, self.failed, self.call_s, self.fault = [], [], call_s, fault
        self.weights, self.ready = "w", []
        self.scheduler = IntentScheduler(
            level,
            self._call,
            weights=lambda: self.weights,
            max_batch=max_batch,
            in_flight=lambda: 1,
            failed=self.failed.append,
            ready=lambda level, seconds: self.ready.append((level, seconds)),
            expected_peers=lambda: peers,
            clock=asyncio.get_running_loop().time,
        )

    async def _call(self, requests, weights, urgent):
        self.sent.append(
            SimpleNamespace(
                robots=[int(r.observation.state[0]) for r in requests],
                weights=weights,
                asked=requests,
                at=asyncio.get_running_loop().time(),
            )
        )
        await asyncio.sleep(self.call_s)
        values = [{"tokens": np.array([[int(r.observation.state[0])]])} for r in requests]
        told = {"subgoals": ["reach"]}
        answers = [
            Intent(level=self.scheduler.level.name, values=value, first_step=0, covers=1, metadata=told) for value in values
        ]
        return self.fault(InferenceResult(numbers=[r.number for r in requests], answers=answers, seconds=0))

    def robot(self, number, step=0, levels=LEVELS):
        robot = RobotSession(
            name=f"robot {number}", control=RobotControl(ControlConfig(), levels), row=RobotRow(name=f"robot {number}")
        )
        robot.show(observe(number, step), 0.0)
        return robot


def intent_of(robot, level="planner"):
    return robot.control.current(level, robot.seen.step)


def other_order(result):
    return dataclasses.replace(result, numbers=result.numbers[::-1])


def one_too_few(result):
    return dataclasses.replace(result, answers=result.answers[:-1])


def other_numbers(result):
    return dataclasses.replace(result, numbers=[number + 1 for number in result.numbers])


@pytest.mark.parametrize("fault", [other_order, one_too_few, other_numbers])
def test_intents_of_other_robots_are_never_adopted(fault):
    async def work():
        calls = Calls(fault=fault)
        robots = [calls.robot(number) for number in (1, 2)]
        for robot in robots:
            calls.scheduler.schedule(robot)
        await asyncio.sleep(1.5 * calls.call_s)
        assert calls.sent[0].robots == [1, 2]
        assert [intent_of(robot) for robot in robots] == [None, None]
        assert calls.failed == ["planner"]
        assert not any(robot.control.is_requested("planner") for robot in robots), "they may be asked for again"
        assert all(robot.answered.is_set() for robot in robots), "those that wait hear of it"

    run(work())


def test_the_latency_of_an_intent_is_counted_from_its_picture():
    """Also of a robot that waits for its call: what it saw is as old as it is."""

    async def work():
        calls = Calls(max_batch=1)
        first, second = calls.robot(1), calls.robot(2)
        for robot in (first, second):
            robot.seen_at = asyncio.get_running_loop().time()
            calls.scheduler.schedule(robot)
        await asyncio.sleep(2.5 * calls.call_s)
        assert calls.ready == [("planner", pytest.approx(times * calls.call_s)) for times in (1, 2)]

    run(work())


@pytest.mark.parametrize(
    ("peers", "wait_s", "batches"), [(1, 0.0, [[1], [2], [3]]), (3, 0.025, [[1], [2, 3]]), (2, 0.01, [[1], [2, 3]])]
)
def test_robots_that_stand_share_a_call_with_those_that_come_soon(peers, wait_s, batches):
    """Half a call is waited, not for more robots than there are, and by the first call of all not at all."""

    async def work():
        calls, began = Calls(peers=peers), asyncio.get_running_loop().time()
        for number, pause_s in ((1, 2 * calls.call_s), (2, 0.01), (3, 3 * calls.call_s)):
            calls.scheduler.schedule(calls.robot(number))
            await asyncio.sleep(pause_s)
        assert [sent.robots for sent in calls.sent] == batches
        assert calls.sent[1].at - began == pytest.approx(2 * calls.call_s + wait_s)

    run(work())


def test_how_long_a_call_takes_is_learned_of_all_calls_and_of_the_last_ones_most():
    async def work():
        calls, usual_s = Calls(peers=9), 0.0
        for number, call_s in enumerate((0.05, 0.1, 0.1, 0.02, 0.02)):
            robot, began = calls.robot(number), asyncio.get_running_loop().time()
            calls.call_s = call_s
            calls.scheduler.schedule(robot)
            await robot.answered.wait()
            assert calls.sent[-1].at - began == pytest.approx(CALL_SHARE * usual_s)
            usual_s += (call_s - usual_s) * (0.2 if number else 1)

    run(work())


@pytest.mark.parametrize(
    ("step", "peers", "calls_apart", "waits"),
    [(9, 9, 200, 1.0), (9, 1, 200, 1.0), (9, 9, 5, 0.5), (10, 9, 200, 0.5), (10, 1, 200, 0.0)],
)
def test_a_robot_stands_from_its_intents_last_step_on(step, peers, calls_apart, waits):
    """Before it waits for half of its time to spare, at most as long as a call takes, alone or not; then for half a call."""

    async def work():
        calls = Calls(peers=peers)
        robot = calls.robot(1)
        calls.scheduler.schedule(robot)
        await robot.answered.wait()
        began = asyncio.get_running_loop().time()
        robot.show(observe(1, step), began)
        robot.pace_s = calls_apart * calls.call_s
        calls.scheduler.schedule(robot)
        await asyncio.sleep(1)
        assert calls.sent[-1].at - began == pytest.approx(waits * calls.call_s)

    run(work())


def test_a_full_batch_waits_for_nobody():
    async def work():
        calls = Calls(max_batch=2, peers=9)
        calls.scheduler.schedule(calls.robot(0))
        await asyncio.sleep(2 * calls.call_s)
        began = asyncio.get_running_loop().time()
        for number in (1, 2):
            calls.scheduler.schedule(calls.robot(number))
        await asyncio.sleep(calls.call_s)
        assert [(sent.robots, sent.at) for sent in calls.sent[1:]] == [([1, 2], began)]

    run(work())


def test_nobody_is_asked_for_any_more_once_all_are_forgotten():
    async def work():
        calls = Calls(max_batch=1)
        for number in range(3):
            calls.scheduler.schedule(calls.robot(number))
        await asyncio.sleep(0.5 * calls.call_s)
        calls.scheduler.clear()
        await asyncio.sleep(5 * calls.call_s)
        assert [sent.robots for sent in calls.sent] == [[0]]
        assert calls.scheduler.queued == 0

    run(work())


def test_a_robot_that_has_begun_anew_and_shown_nothing_yet_is_not_asked_for():
    async def work():
        calls = Calls()
        under_way, anew = calls.robot(1), calls.robot(2)
        calls.scheduler.schedule(under_way)
        await asyncio.sleep(0.5 * calls.call_s)
        calls.scheduler.schedule(anew)
        anew.begin()
        await asyncio.sleep(5 * calls.call_s)
        assert [sent.robots for sent in calls.sent] == [[1]]
        assert calls.scheduler.queued == 0
        assert not anew.control.is_requested("planner")

    run(work())


def test_intents_of_an_earlier_episode_are_never_adopted():
    async def work():
        calls = Calls()
        gone, there = calls.robot(1), calls.robot(2)
        for robot in (gone, there):
            calls.scheduler.schedule(robot)
        await asyncio.sleep(0.5 * calls.call_s)
        gone.begin()
        gone.show(observe(1), 0.0)
        await asyncio.sleep(calls.call_s)
        assert intent_of(gone) is None
        assert int(intent_of(there).values["tokens"][0, 0]) == 2
        assert not gone.answered.is_set()

    run(work())


def test_an_intent_says_what_it_was_made_from():
    async def work():
        calls = Calls()
        robot = calls.robot(7, step=15)
        robot.seen_at = 3.5
        calls.scheduler.schedule(robot)
        await asyncio.sleep(1.5 * calls.call_s)
        intent = intent_of(robot)
        assert (intent.level, intent.first_step, intent.covers, intent.made_at, intent.weights) == ("planner", 15, 10, 3.5, "w")
        assert intent.ready_at == pytest.approx(calls.sent[0].at + calls.call_s)
        assert intent.metadata == {"subgoals": ["reach"]}

    run(work())


def test_a_level_is_asked_with_the_intent_it_reads_and_by_the_weights_that_made_it():
    """Robots whose intents above were made by different weights are never in one batch."""

    async def work():
        top, below = Calls(THREE[0]), Calls(THREE[1])
        robots = [top.robot(number, levels=THREE) for number in range(4)]
        for weights, some in (("old", robots[:2]), ("new", robots[2:])):
            top.weights = weights
            for robot in some:
                top.scheduler.schedule(robot)
            await asyncio.sleep(1.5 * top.call_s)
        below.weights = "newest"
        for robot in robots:
            below.scheduler.schedule(robot)
        await asyncio.sleep(2.5 * below.call_s)
        assert [(call.weights, call.robots) for call in below.sent] == [("old", [0, 1]), ("new", [2, 3])]
        assert [r.above.values["tokens"][0, 0] for call in below.sent for r in call.asked] == [0, 1, 2, 3]
        assert [intent_of(robot).weights for robot in robots] == ["old", "old", "new", "new"]

    run(work())


def test_a_level_whose_reading_has_ended_meanwhile_is_not_asked():
    async def work():
        top, below = Calls(THREE[0]), Calls(THREE[1])
        robot = top.robot(1, levels=THREE)
        top.scheduler.schedule(robot)
        await asyncio.sleep(1.5 * top.call_s)
        below.scheduler.schedule(robot)
        robot.show(observe(1, step=THREE[0].covers), 0.0)
        await asyncio.sleep(0.1)
        assert below.sent == []
        assert not robot.control.is_requested("planner")

    run(work())


def test_a_robot_whose_call_failed_goes_alone_and_later():
    async def work():
        def fail(result):
            raise ArithmeticError

        calls = Calls(fault=fail)
        robots = [calls.robot(number) for number in (1, 2)]
        for robot in robots:
            calls.scheduler.schedule(robot)
        await asyncio.sleep(1.1 * calls.call_s)
        calls.fault = lambda result: result
        for robot in robots:
            calls.scheduler.schedule(robot)
        began = asyncio.get_running_loop().time()
        while intent_of(robots[1]) is None:
            await robots[1].answered.wait()
            robots[1].answered.clear()
        waited_s = asyncio.get_running_loop().time() - began
        assert [call.robots for call in calls.sent] == [[1, 2], [1], [2]]
        assert waited_s == pytest.approx(intent_scheduler.AGAIN_S - 0.1 * calls.call_s + 2 * calls.call_s)

    run(work())


def test_after_each_further_failure_a_robot_waits_twice_as_long_up_to_a_limit_and_one_success_ends_that():
    def fail(result):
        raise ArithmeticError

    async def work():
        calls = Calls(fault=fail)
        robot = calls.robot(1)

        async def ask():
            calls.scheduler.schedule(robot)
            await robot.answered.wait()
            robot.answered.clear()

        for _ in range(9):
            await ask()
        calls.fault = lambda result: result
        await ask()
        calls.fault = fail
        for _ in range(2):
            await ask()
        waits = np.diff([sent.at for sent in calls.sent]) - calls.call_s
        longer = [min(intent_scheduler.AGAIN_S * 2**n, intent_scheduler.LONGEST_PENALTY_S) for n in range(9)]
        assert waits == pytest.approx([*longer, 0.0, intent_scheduler.AGAIN_S])

    run(work())


def test_a_robot_whose_call_failed_goes_after_those_without_an_intent():
    async def work():
        calls = Calls()
        had, none = calls.robot(1), calls.robot(2)
        calls.scheduler.schedule(had)
        await asyncio.sleep(1.5 * calls.call_s)
        calls.fault = other_numbers
        calls.scheduler.schedule(had)
        await asyncio.sleep(2 * calls.call_s)
        calls.fault = lambda result: result
        await asyncio.sleep(2 * intent_scheduler.AGAIN_S)
        for robot in (had, none):
            calls.scheduler.schedule(robot)
        await asyncio.sleep(5 * calls.call_s)
        assert [call.robots for call in calls.sent] == [[1], [1], [2], [1]]

    run(work())


def test_the_robots_that_run_out_first_are_asked_for_first():
    class Slow(StubLevel):
        delay_s = 0.03

    async def work():
        bench = await Bench(kinds={"planner": Slow}, **{"levels.planner.max_batch": 1}).start()
        await asyncio.gather(*[bench.ask(n) for n in (1, 2, 3)])
        bench.planner.batches.clear()
        await asyncio.gather(bench.ask(1, 5), bench.ask(2, 5), bench.ask(3, 9), bench.ask(4, 0))
        await asyncio.sleep(0.2)
        order = [batch[0] for batch in bench.planner.batches]
        assert order[:2] == [4, 3]

    run(work())


@pytest.mark.parametrize(("pause_s", "batches"), [(0.6, [[1, 2]]), (0.0, [[1], [2]])])
def test_a_level_with_time_to_spare_waits_for_more_requests(pause_s, batches):
    """Robots that ask one soon after the other share a call where they ask seldom, and do not wait where they ask often."""

    class Steady(StubLevel):
        delay_s = 0.05

    async def work():
        bench = await Bench(kinds={"planner": Steady}).start()
        await asyncio.gather(bench.ask(1), bench.ask(2))
        await asyncio.sleep(pause_s)
        bench.planner.batches.clear()
        await bench.ask(1, 5)
        await bench.ask(2, 5)
        await asyncio.sleep(4 * Steady.delay_s)
        assert bench.planner.batches == batches

    run(work())


@pytest.mark.parametrize(("call_s", "pause_s", "urgent"), [(0.05, 1.0, False), (0.05, 0.15, True), (0.15, 0.0, False)])
def test_a_request_is_urgent_where_that_decides_whether_its_intent_comes_in_time(call_s, pause_s, urgent):
    """Not where there is time enough at low priority, and not where even an urgent one would come too late."""

    async def work():
        bench = await Bench().start()
        bench.planner.delay_s = call_s
        await bench.ask(2)
        bench.planner.delay_s = 0.01
        await bench.ask(1)
        await asyncio.sleep(pause_s)
        bench.planner.urgent.clear()
        await bench.ask(1, 5)
        await asyncio.sleep(0.2)
        assert bench.planner.urgent == [urgent]

    run(work())


def test_three_levels_each_have_their_age_and_are_late_for_themselves():
    """The director answers slowly, the planner fast: each intent's age is its own, and only the director is late."""

    class Director(StubOfThree):
        delay_s = 0.7

    async def work():
        bench = await Bench(StubOfThree, kinds={"director": Director}, **{"levels.director.timeout_s": 5}).start()
        for step in range(0, 40 * HORIZON, HORIZON):
            reply = await bench.ask(1, step)
            check(reply, 1, step)
            assert not reply.held
            await asyncio.sleep(0.48)
        assert reply.intent_age_steps == HORIZON
        ages = {level["name"]: level["intent_age_steps"]["max"] for level in bench.core.snapshot().to_json()["levels"]}
        assert ages["refiner"] is None
        assert ages["planner"] == HORIZON < ages["director"]
        late = {name: level.late_shares[-1] for name, level in bench.levels.items()}
        assert late["director"] > 0.2
        assert late["planner"] == 0
        assert late["refiner"] < 0.01, "once, at the beginning, which waits for the director"

    run(work())


def test_levels_are_asked_on_the_event_loop_that_replicas_of_serve_run_on():
    """Its timers are others than those of Python's own."""

    async def work():
        bench = await Bench(StubOfThree).start()
        for replies in await asyncio.gather(*[bench.drive(number, 4) for number in range(3)]):
            assert not any(reply.held for reply in replies)

    uvloop.run(asyncio.wait_for(work(), 60))


def test_the_first_request_of_an_episode_asks_every_level_once():
    async def work():
        bench = await Bench(StubOfThree).start()
        check(await bench.ask(1), 1, 0)
        await asyncio.sleep(1)
        assert [level.batches for level in bench.levels.values()] == [[[1]]] * 3

    run(work())


def test_a_level_that_cannot_be_asked_is_not_late():
    """The director is gone: the planner has nothing to read any more, which more planners would not mend."""

    class Director(StubOfThree):
        async def infer(self, batch):
            if batch.requests[0].observation.step:
                raise OSError
            return await super().infer(batch)

    async def work():
        bench = await Bench(StubOfThree, kinds={"director": Director}).start()
        replies = []
        for step in range(0, 40 * HORIZON, HORIZON):
            replies.append(await bench.ask(1, step))
            await asyncio.sleep(0.48)
        assert [reply.held for reply in replies].index(True) == (25 + 3 * THREE[1].covers) // HORIZON + 1
        assert bench.core._late["director"].mean > 0.9
        assert bench.core._late["planner"].mean < 0.1

    run(work())


def test_one_level_has_no_intent_and_no_detour():
    async def work():
        bench = await Bench(StubOfOne).start()
        replies = await bench.drive(1, 4)
        assert bench.core._upper.schedulers == {}
        assert {(reply.intent_first_step, reply.intent_age_steps, reply.intent_age_ms) for reply in replies} == {(None,) * 3}
        assert not any(reply.held for reply in replies)
        assert len(bench.policy.batches) == 4

    run(work())


def test_other_weights_of_other_levels_steps_begin_anew():
    """What a level covers belongs to what a robot's control depends on."""

    class Growing(StubLevel):
        async def describe(self, weights):
            longer = dataclasses.replace(LEVELS[0], covers=15 if "second" in weights else 10)
            return await super().describe(weights) | {"levels": (longer, LEVELS[1])}

    async def work():
        bench, told = await Bench(Growing).start(), []
        bench.core.connections.add(Mock(leave=lambda: told.append(1)))
        await bench.drive(1, 2)
        await bench.use({"checkpoint": "second", "revision": ""})
        assert told == [1]
        assert bench.core._upper.schedulers["planner"].level.covers == 15

    run(work())
