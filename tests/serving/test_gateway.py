"""The gateway without its sockets and without Ray: whose answer goes where, what never waits for what, what is held."""

import asyncio
import dataclasses
import random

import numpy as np
import pytest

from libra_ray.client.protocol import Reply, request
from libra_ray.on_ray.serving.app import engine
from libra_ray.serving import instructions
from libra_ray.serving import plan_scheduler as planning
from libra_ray.serving import robot_sessions as robots
from libra_ray.serving.batches import Answers
from libra_ray.serving.batching import Batcher, MixedUpError
from libra_ray.serving.gateway import GatewayCore, NotReadyError
from libra_ray.serving.requests import BadRequestError
from libra_ray.serving.retry import NoAnswerError
from libra_ray.serving.settings import Settings
from tests.serving.stubs import BAD, DIMS, FAIL, HANG, HORIZON, LocalHandle, StubPlanner, StubRefiner, observe

CHECKPOINT = {"checkpoint": "first"}


class Bench:
    """A gateway with both systems in this process."""

    def __init__(self, planner=StubPlanner, refiner=StubRefiner, **changes):
        self.settings = Settings.model_validate({**CHECKPOINT, "refiner.timeout_s": 0.2, "planner.timeout_s": 0.2, **changes})
        self.planner, self.refiner = planner(self.settings), refiner(self.settings)
        self.core = GatewayCore(self.settings, LocalHandle(self.planner), LocalHandle(self.refiner), engine)

    async def start(self):
        await self.use(self.settings.user_config())
        return self

    async def use(self, user_config):
        # The same order as on a cluster is not promised, so the gateway hears of it first.
        self.core.following.follow(user_config)
        for system in (self.planner, self.refiner):
            await system.reconfigure(user_config)
        for running in (self.core.following.planners, self.core.following.refiners):
            running.settled = True
        self.core.following.look = self._looked
        while not self.core.following.weights.startswith(user_config["checkpoint"]):
            await asyncio.sleep(0.005)

    async def _looked(self):
        pass

    async def ask(self, robot, step=0, instruction="go", **extra):
        message = request(observe(robot, step, instruction), robot=f"robot {robot}", **extra)
        return Reply.read(await self.core.answer(message, "nameless"))

    async def drive(self, robot, chunks, first=0):
        """Whole chunks, one after the other; every answer is checked to be this robot's and of this step."""
        replies = []
        for step in range(first, first + chunks * HORIZON, HORIZON):
            reply = await self.ask(robot, step)
            check(reply, robot, step)
            replies.append(reply)
        return replies


def check(reply, robot, step):
    assert reply.robot == f"robot {robot}"
    assert reply.actions.shape == (HORIZON, DIMS)
    assert reply.actions.dtype == np.float32
    assert reply.first_step == step
    if not reply.held:
        assert (reply.actions[:, 0] == robot).all(), "another robot's observation"
        assert (reply.actions[:, 1] == robot).all(), "another robot's plan"
        assert (reply.actions[:, 2] == step + np.arange(HORIZON)).all()
        assert (reply.actions[:, 3] == reply.actions[:, 2]).all(), "a token of another step"
        assert reply.intent_age_steps == step - reply.plan_first_step


def run(work):
    return asyncio.run(asyncio.wait_for(work, 30))


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
        bench = await Bench(**{"refiner.max_batch": 5, "planner.max_batch": 3}).start()
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
    class Shuffling(StubRefiner):
        async def refine(self, rows, pressure=0.0):
            answers = await super().refine(rows, pressure)
            order = np.roll(np.arange(len(rows.numbers)), 1)
            return dataclasses.replace(answers, numbers=answers.numbers[order], values=answers.values[order])

    async def work():
        bench = await Bench(refiner=Shuffling, window_ms=20).start()
        bench.core.connections = 9
        outcomes = await asyncio.gather(*[bench.ask(n) for n in range(4)], return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [MixedUpError] * 4

    run(work())


def test_chunks_never_wait_for_plans_after_the_first():
    """A planner that is far too slow: the refiner goes on with the plan it has, and holds where that ends."""

    class Slow(StubPlanner):
        delay_s = 0.15

    async def work():
        bench = await Bench(planner=Slow).start()
        clock = asyncio.get_running_loop().time
        check(await bench.ask(1), 1, 0)
        began = clock()
        second, third = await bench.ask(1, 5), await bench.ask(1, 10)
        assert clock() - began < Slow.delay_s
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
        assert fresh.plan_first_step == 5

    run(work())


def test_a_plan_that_came_in_time_is_not_late():
    """What planners are started by: it counts robots whose plan was not there when they asked again, and no others."""

    async def work():
        bench = await Bench().start()
        for step in range(0, 10 * HORIZON, HORIZON):
            await bench.ask(1, step)
            await asyncio.sleep(0.02)
        assert bench.core._late.mean < 0.2
        bench.planner.delay_s = 0.15
        for step in range(10 * HORIZON, 20 * HORIZON, HORIZON):
            await bench.ask(1, step)
            await asyncio.sleep(0.02)
        assert bench.core._late.mean > 0.2

    run(work())


def test_held_actions_repeat_where_that_is_asked_for():
    async def work():
        bench = await Bench(hold="repeat", **{"planner.timeout_s": 5}).start()
        last = (await bench.ask(1)).actions[-1]
        await bench.ask(1, 5, HANG)
        held = await bench.ask(1, 10, HANG)
        assert held.held
        assert (held.actions[:, 2] == last[2] + HORIZON).all()

    run(work())


def test_an_intent_older_than_the_limit_is_not_used():
    async def work():
        bench = await Bench(max_intent_age_steps=4, **{"planner.timeout_s": 5}).start()
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


def test_overlap_plans_at_every_chunk_and_event_only_where_a_plan_ends():
    class Long(StubPlanner):
        async def describe(self, weights):
            return await super().describe(weights) | {"chunks": 2}

    async def count(rule):
        bench = await Bench(planner=Long, rule=rule).start()
        for step in range(0, 100, 5):
            await bench.ask(1, step)
            await asyncio.sleep(0.01)
        return len(bench.planner.batches)

    assert run(count("overlap")) >= run(count("event"))


def test_a_reset_forgets_plans_even_those_under_way():
    class Slow(StubPlanner):
        delay_s = 0.05

    async def work():
        bench = await Bench(planner=Slow).start()
        await bench.ask(1, 0)
        await bench.ask(1, 5)  # asks for a plan from step 5
        reply = await bench.ask(1, 0, reset=True)
        check(reply, 1, 0)
        assert reply.plan_first_step == 0
        await asyncio.sleep(0.1)
        assert bench.core.robots.named("robot 1").control.plan.first_step == 0

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
        bench = await Bench(first_plan_timeout_s=0.6).start()
        stuck = asyncio.ensure_future(bench.ask(1, 0, HANG))
        await asyncio.sleep(0.01)
        await bench.drive(2, 10)
        assert not stuck.done()
        with pytest.raises(NoAnswerError, match=r"no plan within 0.6 s"):
            await stuck
        await bench.ask(2, 50)
        await asyncio.sleep(0.1)
        assert not (await bench.ask(2, 50)).held
        with pytest.raises(NoAnswerError, match="no plan"):
            await bench.ask(3, 0, FAIL)
        check(await bench.ask(3), 3, 0)
        assert bench.core.telemetry.snapshot().refused["planner call failed"] > 0

    run(work())


def test_an_instruction_that_is_none_is_refused_for_its_robot_alone():
    """However many ask at the same moment, and however often: no batch ever holds it, and nothing of the robot changes."""

    async def work():
        bench = await Bench(window_ms=20).start()
        bench.core.connections = 12
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

    class Learnt(StubRefiner):
        async def refusal(self, weights, instruction):
            return "" if "second" in weights or instruction == "go" else "too long"

        async def refine(self, rows, pressure=0.0):
            assert "second" in rows.weights or set(rows.instructions) == {"go"}
            return await super().refine(rows, pressure)

    async def work():
        bench = await Bench(refiner=Learnt).start()
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
    class Flaky(StubRefiner):
        failures = 3

        async def refusal(self, weights, instruction):
            if Flaky.failures:
                Flaky.failures -= 1
                raise OSError("this replica dies")
            return await super().refusal(weights, instruction)

    async def work():
        bench = await Bench(refiner=Flaky).start()
        with pytest.raises(NoAnswerError, match="this replica dies"):
            await bench.ask(1)
        check(await bench.ask(1), 1, 0)

    run(work())


def test_a_refiner_that_fails_is_tried_again_then_held_and_counted():
    class Flaky(StubRefiner):
        failures = 0

        async def refine(self, rows, pressure=0.0):
            if Flaky.failures:
                Flaky.failures -= 1
                raise OSError("this replica dies")
            return await super().refine(rows, pressure)

    async def work():
        bench = await Bench(refiner=Flaky).start()
        Flaky.failures = 2
        check(reply := await bench.ask(1), 1, 0)
        assert not reply.held
        Flaky.failures = 3
        assert (await bench.ask(1, 5)).held
        Flaky.failures = 3
        with pytest.raises(NoAnswerError, match="nothing was executed yet"):
            await bench.ask(2)
        snapshot = bench.core.telemetry.snapshot()
        assert snapshot.events["held"] == 1
        assert snapshot.refused["refiner call failed"] == 2

    run(work())


def test_a_name_that_is_taken_is_refused():
    class Slow(StubRefiner):
        delay_s = 0.05

    async def work():
        bench = await Bench(refiner=Slow).start()
        outcomes = await asyncio.gather(bench.ask(1), bench.ask(1), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Reply, BadRequestError]
        assert "unique in the fleet" in str(outcomes[1])

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
                await asyncio.sleep(0.02)  # time for a plan, as robots have that move; hurried ones may be told to hold

        tasks = [asyncio.ensure_future(robot(n)) for n in range(4)]
        await asyncio.sleep(0.2)
        await bench.use({"checkpoint": "second", "revision": ""})
        await asyncio.sleep(0.2)
        going = False
        await asyncio.gather(*tasks)
        assert not any(reply.held for reply in replies)
        assert bench.core.handshake.checkpoint_digest == "second#"
        assert bench.core.robots.named("robot 1").control.plan.weights == "second#"

    run(work())


def test_weights_of_another_action_space_make_robots_shake_hands_again():
    async def work():
        bench, told = await Bench().start(), []
        bench.core.space_changed_hooks.append(lambda: told.append(1))
        await bench.drive(1, 3)
        await bench.use({"checkpoint": "short", "revision": ""})
        assert told == [1]
        assert len(bench.core.robots) == 0
        assert bench.core.handshake.horizon == 3
        assert (await bench.ask(1)).actions.shape == (3, DIMS)

    run(work())


def test_questions_gather_while_a_call_is_under_way():
    """Natural batching: the first goes at once, all that come meanwhile go together; a full batch waits for nobody."""

    async def work():
        sent = []

        async def call(questions, weights):
            sent.append([int(q.observation.state[0]) for q in questions])
            await asyncio.sleep(0.02)
            return Answers(
                numbers=np.array([q.number for q in questions]),
                values=np.array([[q.observation.state[0]] for q in questions]),
                seconds=0.02,
            )

        batcher = Batcher(call, max_batch=3, in_flight=lambda: 1, company=lambda: 10, window_s=0.0, deadline_s=lambda: 1.0)
        answers = await asyncio.gather(*[batcher.ask(observe(n), None, "w") for n in range(8)])
        assert [int(answer.values[0]) for answer in answers] == list(range(8))
        assert sent == [[0], [1, 2, 3], [4, 5, 6], [7]]
        assert [answer.batch for answer in answers] == [1, 3, 3, 3, 3, 3, 3, 1]
        first = batcher.ask(observe(0), None, "old")
        mixed = [batcher.ask(observe(n), None, "new" if n % 2 else "old") for n in range(4)]
        await asyncio.gather(first, *mixed)
        assert sent[4:] == [[0], [0, 2], [1, 3]]

    run(work())


def test_the_window_ends_when_everybody_waits():
    async def work():
        sent = []

        async def call(questions, weights):
            sent.append(len(questions))
            values = np.zeros((len(questions), 1))
            return Answers(numbers=np.array([q.number for q in questions]), values=values, seconds=0)

        batcher = Batcher(call, max_batch=9, in_flight=lambda: 1, company=lambda: 3, window_s=5.0, deadline_s=lambda: 1.0)
        await asyncio.gather(*[batcher.ask(observe(n), None, "w") for n in range(3)])
        assert sent == [3]

    run(work())


def test_robots_are_forgotten_and_their_number_is_bounded(monkeypatch):
    async def work():
        bench = await Bench(max_connections=8).start()
        for number in range(100):
            bench.core.robots.named(f"made up {number}")
        assert len(bench.core.robots) <= 16
        kept = bench.core.robots.named("connected")
        kept.owner = "a connection"
        monkeypatch.setattr(robots, "FORGET_S", -1.0)
        bench.core.robots.tidy()
        assert len(bench.core.robots) == 1
        assert bench.core.robots.left("a connection") == ["connected"]

    run(work())


def test_the_robots_that_run_out_first_are_planned_for_first(monkeypatch):
    monkeypatch.setattr(planning, "AGAIN_S", 0.0)

    class Slow(StubPlanner):
        delay_s = 0.03

    async def work():
        bench = await Bench(planner=Slow, **{"planner.max_batch": 1}).start()
        await asyncio.gather(*[bench.ask(n) for n in (1, 2, 3)])
        bench.planner.batches.clear()
        await asyncio.gather(bench.ask(1, 5), bench.ask(2, 5), bench.ask(3, 9), bench.ask(4, 0))
        await asyncio.sleep(0.2)
        order = [batch[0] for batch in bench.planner.batches]
        assert order[:2] == [4, 3]

    run(work())


def test_a_planner_with_time_to_spare_gathers_company():
    """Robots that ask one soon after the other share a call where they ask seldom, and do not wait where they ask often."""

    class Steady(StubPlanner):
        delay_s = 0.05

    async def shared(pause_s):
        bench = await Bench(planner=Steady).start()
        await asyncio.gather(bench.ask(1), bench.ask(2))
        await asyncio.sleep(pause_s)
        bench.planner.batches.clear()
        await bench.ask(1, 5)
        await bench.ask(2, 5)
        await asyncio.sleep(4 * Steady.delay_s)
        return bench.planner.batches

    assert run(shared(0.6)) == [[1, 2]]
    assert run(shared(0.0)) == [[1], [2]]


@pytest.mark.parametrize(("call_s", "pause_s", "hurries"), [(0.05, 1.0, False), (0.05, 0.15, True), (0.15, 0.0, False)])
def test_a_plan_is_hurried_where_that_decides_whether_it_comes_in_time(call_s, pause_s, hurries):
    """Not where there is time enough for one that goes behind, and not where even a hurried one would come too late."""

    async def work():
        bench = await Bench().start()
        bench.planner.delay_s = call_s
        await bench.ask(2)
        bench.planner.delay_s = 0.01
        await bench.ask(1)
        await asyncio.sleep(pause_s)
        bench.planner.hurried.clear()
        await bench.ask(1, 5)
        await asyncio.sleep(0.2)
        assert bench.planner.hurried == [hurries]

    run(work())
