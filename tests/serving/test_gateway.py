"""The gateway without its sockets and without Ray: whose answer goes where, what never waits for what, what is held."""

import asyncio
import dataclasses
import random
from unittest.mock import Mock

import numpy as np
import pytest

from libra_ray.client.protocol import Reply, request
from libra_ray.control.margin import Latency
from libra_ray.serving import instructions
from libra_ray.serving import robot_sessions as robots
from libra_ray.serving.batches import RowMismatchError
from libra_ray.serving.gateway import NotReadyError
from libra_ray.serving.requests import BadRequestError
from libra_ray.serving.retry import NoAnswerError
from libra_ray.serving.telemetry import ENOUGH
from libra_ray.serving.weight_switch import LATENCY, LENGTHENED_BY
from libra_ray.spec import VectorSpec
from tests.serving.bench import Bench, check
from tests.serving.stubs import BAD, CHUNKS, DIMS, FAIL, HANG, HORIZON, LEVELS, StubLevel, observe
from tests.serving.virtual_time import run


def test_nobody_is_answered_before_the_systems_have_loaded():
    async def work():
        bench = Bench()
        assert not bench.core.ready
        with pytest.raises(NotReadyError, match="still loading"):
            await bench.ask(1)
        await bench.start()
        assert bench.core.ready
        check(await bench.ask(1), 1, 0)

    run(work())


def test_no_answer_reaches_another_robot():
    """Robots that come, go and ask at odd moments, through systems that batch them: every reply is its asker's own."""

    async def work():
        bench = await Bench(**{"levels.refiner.max_batch": 5, "levels.planner.max_batch": 3}).start()
        dice = random.Random(0)

        async def robot(number):
            step = 0
            for _ in range(25):
                await asyncio.sleep(dice.random() * 0.01)
                if dice.random() < 0.1:
                    step = 0
                    check(await bench.ask(number, 0, reset=True), number, 0)
                check(await bench.ask(number, step), number, step)
                step += HORIZON

        await asyncio.gather(*[robot(number) for number in range(16)])
        assert max(map(len, bench.refiner.batches)) > 1
        assert max(map(len, bench.planner.batches)) > 1
        assert max(map(len, bench.refiner.batches)) <= 5
        assert max(map(len, bench.planner.batches)) <= 3

    run(work())


def test_a_system_that_mixes_rows_up_is_an_error_and_nobody_gets_any():
    class Shuffling(StubLevel):
        async def infer(self, batch):
            result = await super().infer(batch)
            order = np.roll(np.arange(len(batch.requests)), 1)
            numbers, answers = ([rows[i] for i in order] for rows in (result.numbers, result.answers))
            return dataclasses.replace(result, numbers=numbers, answers=answers)

    async def work():
        bench = await Bench(kinds={"refiner": Shuffling}, window_ms=20).start()
        bench.core.connections = range(9)
        outcomes = await asyncio.gather(*[bench.ask(n) for n in range(4)], return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RowMismatchError] * 4

    run(work())


def test_chunks_never_wait_for_plans_after_the_first():
    """A planner that is far too slow: the refiner goes on with the plan it has, and holds where that ends."""

    class Slow(StubLevel):
        delay_s = 0.15

    async def work():
        bench = await Bench(kinds={"planner": Slow}, max_intent_age_steps=9).start()
        clock = asyncio.get_running_loop().time
        check(await bench.ask(1), 1, 0)
        began = clock()
        second, third = await bench.ask(1, 5), await bench.ask(1, 10)
        assert clock() - began == pytest.approx(StubLevel.delay_s), "of the last level alone"
        check(second, 1, 5)
        assert not second.held
        assert third.held
        assert third.intent_age_steps == 10
        assert (third.actions[:, :-1] == 0).all()
        assert (third.actions[:, -1] == second.actions[-1, -1]).all()
        await asyncio.sleep(1.5 * Slow.delay_s)
        fresh = await bench.ask(1, 10)
        check(fresh, 1, 10)
        assert not fresh.held
        assert fresh.intent_first_step == 5

    run(work())


def test_past_its_intents_end_a_robot_goes_on_by_what_it_sees():
    """Held only once the intent is three times as old as what it covers."""

    async def work():
        bench = await Bench(**{"levels.planner.timeout_s": 500}).start()
        await bench.ask(1)
        replies = [await bench.ask(1, step, HANG) for step in range(5, 50, 5)]
        assert [reply.held for reply in replies] == [step > 30 for step in range(5, 50, 5)]
        assert [reply.intent_age_steps for reply in replies] == list(range(5, 50, 5))

    run(work())


def test_an_intent_that_came_in_time_is_not_late():
    """What replicas of a level are started by: it counts robots whose intent was not there when they asked again."""

    async def work():
        bench = await Bench().start()
        late = bench.core._late["planner"]

        async def ask_ten(first):
            for step in range(first, first + 10 * HORIZON, HORIZON):
                await bench.ask(1, step)
                await asyncio.sleep(0.02)

        await ask_ten(0)
        assert late.mean == 0
        bench.planner.delay_s = 0.15
        await ask_ten(10 * HORIZON)
        assert late.mean > 0.2
        assert bench.planner.late_shares[0] == 0 < bench.planner.late_shares[-1]
        assert bench.refiner.late_shares[-1] == 0, "no answer missed its deadline"

    run(work())


def test_a_level_that_is_too_late_is_said_once_for_its_weights_with_what_would_do(caplog):
    """Ten control steps a second: 0.6 s are 6 steps, so that an intent is in use after two chunks and until the fourth."""

    class Slow(StubLevel):
        delay_s = 0.58

        async def describe(self, weights):
            alone = {LATENCY: Latency(p50_ms=1.0, p95_ms=1.0)}
            return await super().describe(weights) | alone | {LENGTHENED_BY: {"planner": ("action.chunks", HORIZON)}}

    async def work():
        bench = await Bench(kinds={"planner": Slow}, **{"levels.planner.timeout_s": 5}).start()
        assert bench.core.greeting().margin_steps == {"planner": 0}, "as its replica says, as long as nobody was served"

        async def ask(times):
            for step in range(0, times * HORIZON, HORIZON):
                await bench.ask(1, step, reset=step == 0)
                await asyncio.sleep(0.5)
            return bench.core.greeting().margin_steps

        assert await ask(3 * ENOUGH) == {"planner": CHUNKS * HORIZON - 4 * HORIZON, "refiner": HORIZON - 1}
        await ask(3 * ENOUGH)
        [record] = caplog.records
        assert record.levelname == "WARNING"
        assert record.getMessage().endswith("before the next one is in use; action.chunks=4 in training would do")
        await bench.use({"checkpoint": "second", "revision": ""})
        await ask(3)
        assert len(caplog.records) == 2

    run(work())


def test_levels_in_time_are_not_spoken_of(caplog):
    async def work():
        bench = await Bench().start()
        for step in range(0, 3 * ENOUGH * HORIZON, HORIZON):
            await bench.ask(1, step)
            await asyncio.sleep(0.5)
        assert bench.core.greeting().margin_steps == {"planner": 0, "refiner": HORIZON - 1}
        assert caplog.records == []

    run(work())


def test_held_actions_repeat_where_that_is_asked_for():
    async def work():
        bench = await Bench(hold="repeat", max_intent_age_steps=9, **{"levels.planner.timeout_s": 5}).start()
        last = (await bench.ask(1)).actions[-1]
        await bench.ask(1, 5, HANG)
        held = await bench.ask(1, 10, HANG)
        assert held.held
        assert (held.actions[:, 2] == last[2] + HORIZON).all()

    run(work())


def test_held_actions_repeat_where_the_policys_actions_are_values():
    class Absolute(StubLevel):
        async def describe(self, weights):
            said = await super().describe(weights)
            return said | {"action": said["action"] | {"spec": VectorSpec(delta=False).tree()}}

    async def work():
        bench = await Bench(Absolute, max_intent_age_steps=9, **{"levels.planner.timeout_s": 5}).start()
        last = (await bench.ask(1)).actions[-1]
        await bench.ask(1, 5, HANG)
        assert ((await bench.ask(1, 10, HANG)).actions[:, 2] == last[2] + HORIZON).all()

    run(work())


def test_an_intent_older_than_the_limit_is_not_used():
    async def work():
        bench = await Bench(max_intent_age_steps=4, **{"levels.planner.timeout_s": 5}).start()
        assert not (await bench.ask(1)).held
        assert (await bench.ask(1, 5, HANG)).held

    run(work())


def test_fifo_waits_for_each_plan_and_uses_all_of_it():
    async def work():
        bench = await Bench(rule="fifo").start()
        replies = await bench.drive(1, 8)
        assert [reply.intent_age_steps for reply in replies] == [0, 5] * 4
        assert len(bench.planner.batches) == 4
        assert not any(reply.held for reply in replies)

    run(work())


@pytest.mark.parametrize(("rule", "asked"), [("overlap", 20), ("event", 3)])
def test_overlap_asks_at_every_chunk_and_event_only_where_an_intent_ends(rule, asked):
    class Long(StubLevel):
        levels = (dataclasses.replace(LEVELS[0], covers=40), LEVELS[1])

    async def work():
        bench = await Bench(Long, rule=rule).start()
        for step in range(0, 100, HORIZON):
            check(await bench.ask(1, step), 1, step)
            await asyncio.sleep(0.5)
        assert len(bench.planner.batches) == asked

    run(work())


def test_a_reset_forgets_plans_even_those_under_way():
    class Slow(StubLevel):
        delay_s = 0.05

    async def work():
        bench = await Bench(kinds={"planner": Slow}).start()
        await bench.ask(1, 0)
        await bench.ask(1, 5)  # asks for a plan from step 5
        reply = await bench.ask(1, 0, reset=True)
        check(reply, 1, 0)
        assert reply.intent_first_step == 0
        await asyncio.sleep(0.1)
        assert bench.core.robots.named("robot 1").control.current("planner", 0).first_step == 0

    run(work())


def test_a_step_that_goes_back_begins_a_new_episode_too():
    async def work():
        bench = await Bench().start()
        await bench.drive(1, 4)
        check(await bench.ask(1, 0), 1, 0)

    run(work())


def test_steps_are_counted_for_robots_that_send_none():
    async def work():
        bench = await Bench().start()
        message = request(observe(1), robot="a")
        del message["step"]
        steps = [(await bench.core.answer(message, "a"))["first_step"] for _ in range(3)]
        assert steps == [0, 5, 10]
        assert (await bench.core.answer(message | {"reset": True}, "a"))["first_step"] == 0

    run(work())


def test_a_planner_that_hangs_or_fails_blocks_no_other_robot():
    async def work():
        bench = await Bench(first_intent_timeout_s=0.6).start()
        stuck = asyncio.ensure_future(bench.ask(1, 0, HANG))
        await asyncio.sleep(0.01)
        await bench.drive(2, 10)
        assert not stuck.done()
        with pytest.raises(NoAnswerError, match="level planner does not answer, and nothing was executed yet"):
            await stuck
        await bench.ask(2, 50)
        await asyncio.sleep(0.1)
        assert not (await bench.ask(2, 50)).held
        with pytest.raises(NoAnswerError, match="level planner does not answer"):
            await bench.ask(3, 0, FAIL)
        check(await bench.ask(3), 3, 0)
        assert bench.core.snapshot().refused["planner call failed"] > 0

    run(work())


def test_an_instruction_that_is_none_is_refused_for_its_robot_alone():
    """However many ask at the same moment, and however often: no batch ever holds it, and nothing of the robot changes."""

    async def work():
        bench = await Bench(window_ms=20).start()
        bench.core.connections = range(12)
        for step in range(0, 5 * HORIZON, HORIZON):
            asking = [bench.ask(n, step, BAD if n % 3 == 0 else "go") for n in range(12)]
            for number, outcome in enumerate(await asyncio.gather(*asking, return_exceptions=True)):
                if number % 3 == 0:
                    assert isinstance(outcome, BadRequestError)
                    assert (outcome.reason, str(outcome)) == ("prompt", "it has '<image>' in it")
                else:
                    check(outcome, number, step)
                    assert not outcome.held
            await asyncio.sleep(0.02)
        assert max(map(len, bench.refiner.batches)) > 1
        check(await bench.ask(0, 0), 0, 0)

    run(work())


def test_each_instruction_is_asked_about_once_under_each_weights(monkeypatch):
    monkeypatch.setattr(instructions, "KNOWN", 3)

    async def work():
        bench = await Bench().start()
        await asyncio.gather(*[bench.ask(n) for n in range(8)])
        await bench.drive(1, 3)
        assert bench.refiner.looked_at == ["go"]
        await bench.use({"checkpoint": "second", "revision": ""})
        await bench.ask(9)
        assert bench.refiner.looked_at == ["go", "go"]
        for number in range(9):
            await bench.ask(9, 0, f"go {number}", reset=True)
        assert len(bench.core._instructions._known) == 3

    run(work())


def test_plans_of_the_weights_before_are_refined_with_words_that_those_take():
    """The newer weights know an instruction that the older ones, whose plan is not yet at its end, do not."""

    class Learnt(StubLevel):
        async def refusal(self, weights, instruction):
            return "" if "second" in weights or instruction == "go" else "too long"

        async def infer(self, batch):
            assert "second" in batch.weights or {row.observation.instruction for row in batch.requests} == {"go"}
            return await super().infer(batch)

    async def work():
        bench = await Bench(kinds={"refiner": Learnt}).start()
        await bench.ask(1)
        await bench.use({"checkpoint": "second", "revision": ""})
        with pytest.raises(BadRequestError, match="too long"):
            await bench.ask(1, 5, "go far")
        assert not (await bench.ask(1, 0, "go far", reset=True)).held

    run(work())


def test_a_robot_that_leaves_does_not_take_the_instruction_from_others():
    async def work():
        asked, answered = asyncio.Event(), asyncio.Event()

        async def ask(weights, instruction):
            asked.set()
            await answered.wait()
            return ""

        known = instructions.Instructions(ask)
        leaving, staying = (asyncio.ensure_future(known.check("weights", "go")) for _ in range(2))
        await asked.wait()
        leaving.cancel()
        assert isinstance((await asyncio.gather(leaving, return_exceptions=True))[0], asyncio.CancelledError)
        answered.set()
        await staying

    run(work())


def test_nobody_is_refused_because_nobody_could_say():
    class Flaky(StubLevel):
        failures = 3

        async def refusal(self, weights, instruction):
            if Flaky.failures:
                Flaky.failures -= 1
                raise OSError("this replica dies")
            return await super().refusal(weights, instruction)

    async def work():
        bench = await Bench(kinds={"refiner": Flaky}).start()
        with pytest.raises(NoAnswerError, match="this replica dies"):
            await bench.ask(1)
        check(await bench.ask(1), 1, 0)

    run(work())


def test_a_refiner_that_fails_is_tried_again_then_held_and_counted():
    class Flaky(StubLevel):
        failures = 0

        async def infer(self, batch):
            if Flaky.failures:
                Flaky.failures -= 1
                raise OSError("this replica dies")
            return await super().infer(batch)

    async def work():
        bench = await Bench(kinds={"refiner": Flaky}).start()
        Flaky.failures = 2
        check(reply := await bench.ask(1), 1, 0)
        assert not reply.held
        Flaky.failures = 3
        assert (await bench.ask(1, 5)).held
        Flaky.failures = 3
        with pytest.raises(NoAnswerError, match="nothing was executed yet"):
            await bench.ask(2)
        snapshot = bench.core.snapshot()
        assert snapshot.summary("held")["count"] == 1
        assert snapshot.refused["refiner call failed"] == 2

    run(work())


def test_a_name_that_is_taken_is_refused():
    class Slow(StubLevel):
        delay_s = 0.05

    async def work():
        bench = await Bench(kinds={"refiner": Slow}).start()
        outcomes = await asyncio.gather(bench.ask(1), bench.ask(1), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Reply, BadRequestError]
        assert "unique in the fleet" in str(outcomes[1])

    run(work())


def test_a_name_belongs_to_the_connection_that_took_it_last():
    """A robot that comes back before its old connection was missed goes on; of two robots with one name one is told."""

    async def work():
        bench = await Bench().start()
        first, second = "a connection", "another"

        async def ask(owner, step):
            return await bench.core.answer(request(observe(1, step), robot="arm"), "unnamed", owner)

        await ask(first, 0)
        assert "actions" in await ask(second, HORIZON)
        with pytest.raises(BadRequestError, match=r"newer connection goes by the name of robot 'arm'; .* unique") as refused:
            await ask(first, HORIZON)
        assert refused.value.reason == "displaced"
        bench.core.robots.left(first)
        assert "actions" in await ask(second, 2 * HORIZON)
        assert [row.connected for row in bench.core.robots.rows()] == [True]
        bench.core.robots.left(second)
        assert "actions" in await ask(first, 3 * HORIZON)

    run(work())


def test_new_weights_take_over_without_a_break():
    """Plans are refined by the weights that made them; new plans are made by the new ones; no robot notices."""

    async def work():
        bench = await Bench().start()
        going, replies = True, []

        async def robot(number):
            step = 0
            while going:
                replies.append(reply := await bench.ask(number, step))
                check(reply, number, step)
                step += HORIZON
                await asyncio.sleep(0.02)  # time for a plan, as robots have that move; urgent ones may be told to hold

        tasks = [asyncio.ensure_future(robot(n)) for n in range(4)]
        await asyncio.sleep(0.2)
        await bench.use({"checkpoint": "second", "revision": ""})
        await asyncio.sleep(0.2)
        going = False
        await asyncio.gather(*tasks)
        assert not any(reply.held for reply in replies)
        assert bench.core.handshake.checkpoint_digest == "second#"
        assert bench.core.robots.named("robot 1").control.current("planner", 0).weights == "second#"

    run(work())


def test_new_plans_are_compared_with_those_in_use():
    """The stub's plans agree on every step; those of other weights differ in one entry of five."""

    async def work():
        bench = await Bench().start()
        await bench.drive(1, 6)
        same = bench.core.snapshot().to_json()["levels"][0]["replan_share"]
        assert same["count"] > 0
        assert same["max"] == 0
        await bench.use({"checkpoint": "second"})
        await bench.drive(1, 6, first=6 * HORIZON)
        changed = bench.core.snapshot().to_json()["levels"][0]
        assert changed["replan_share"]["max"] == pytest.approx(1 / DIMS, rel=0.01)
        assert changed["replan_difference"]["max"] == pytest.approx(1 / DIMS, rel=0.01)

    run(work())


def test_weights_of_another_action_space_make_robots_shake_hands_again():
    async def work():
        bench, told = await Bench().start(), []
        bench.core.connections.add(Mock(leave=lambda: told.append(1)))
        await bench.drive(1, 3)
        await bench.use({"checkpoint": "short", "revision": ""})
        assert told == [1]
        robot = bench.core.robots.named("robot 1")
        assert (robot.seen, robot.control.chunk, robot.control.acting.covers) == (None, None, 3)
        assert bench.core.handshake.horizon == 3
        assert (await bench.ask(1)).actions.shape == (3, DIMS)

    run(work())


def test_robots_are_forgotten_and_their_number_is_bounded(monkeypatch):
    async def work():
        bench = await Bench(max_connections=8).start()
        for number in range(100):
            bench.core.robots.named(f"made up {number}")
        assert len(bench.core.robots._robots) <= 16
        kept = bench.core.robots.named("connected", "a connection")
        monkeypatch.setattr(robots, "FORGET_S", -1.0)
        bench.core.robots.tidy()
        assert [*bench.core.robots._robots.values()] == [kept]
        bench.core.robots.left("a connection")
        bench.core.robots.tidy()
        assert not bench.core.robots._robots

    run(work())
