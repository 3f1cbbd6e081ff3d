"""The asynchronous controller: who is asked when, whose tokens are executed at which step, how old they are."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from libra_ray.config import ActionConfig, ControlConfig, DelayConfig
from libra_ray.control.delays import Delays
from libra_ray.control.lockstep import PolicyController, drive
from libra_ray.control.robot import RobotControl
from libra_ray.types import ActionChunk, Controller, Observation
from tests.policies import DualStub, dual_levels, plan_of

ACTION = ActionConfig(horizon=5, chunks=2)
L, H = ACTION.plan_steps, ACTION.horizon
LEVELS = dual_levels(L, H)


@dataclass
class StubPolicy(DualStub):
    """Writes into every action who it is for and where it comes from: (robot, step, plan's first step, chunk's first step).

    A plan's tokens carry the robot and the absolute step they speak of; a chunk repeats them, -1 past the plan's end. The
    robot is read from the observation's state. Slow planners are `delay.intent_steps`.
    """

    levels = LEVELS
    planned: list[list[tuple[int, int]]] = field(default_factory=list)
    refined: list[list[tuple[int, int]]] = field(default_factory=list)

    def plan(self, observations):
        self.planned.append([(int(o.state[0]), o.step) for o in observations])
        return [plan_of(np.array([(int(o.state[0]), o.step + i, o.step) for i in range(L)]), o.step) for o in observations]

    def refine(self, observations, plans):
        self.refined.append([(int(o.state[0]), o.step) for o in observations])
        chunks = []
        for o, plan in zip(observations, plans, strict=True):
            start = o.step - plan.first_step
            assert start >= 0, "the refiner was handed a plan of a later step"
            tail = np.full((H, 3), -1)
            tail[: max(0, L - start)] = plan.values["tokens"][start : start + H]
            actions = np.concatenate([tail, np.full((H, 1), o.step)], axis=1).astype(np.float32)
            chunks.append(ActionChunk(actions=actions, first_step=o.step, intent_first_step=plan.first_step))
        return chunks


def late(steps: int) -> Delays:
    """Every plan so many steps late."""
    return Delays(DelayConfig(intent_steps=steps))


def observe(robot: int, step: int) -> Observation:
    return Observation(images={}, state=np.array([robot], np.float32), instruction="go", step=step)


def run(policy, steps, robots=1, delays=None, **control):
    """Drive robots that never rest, each until `steps`; returns their actions by robot."""
    config, delays = ControlConfig(**control), delays if isinstance(delays, Delays) else late(delays or 0)
    controls = {i: RobotControl(config, LEVELS) for i in range(robots)}
    done, latencies = {i: [] for i in range(robots)}, {}
    while waiting := {i: observe(i, len(actions)) for i, actions in done.items() if len(actions) < steps}:
        for i, actions in drive(controls, waiting, policy, latencies, delays).items():
            assert actions
            done[i] += actions
    return {i: actions[:steps] for i, actions in done.items()}


def asked(calls) -> list[int]:
    """Steps at which the only robot was seen."""
    return [step for call in calls for _, step in call]


def fresh(actions):
    """Step and value of every action that was not held."""
    return [(step, action.value) for step, action in enumerate(actions) if not action.held]


DELAYS = pytest.mark.parametrize("delay", [0, 1, 3, 5, 7, 9])
RULES = pytest.mark.parametrize("rule", ["fifo", "overlap", "event"])


def test_fifo_plans_every_L_steps_and_refines_every_H():
    policy = StubPolicy()
    actions = run(policy, 6 * L)[0]
    assert asked(policy.planned) == list(range(0, 6 * L, L))
    assert asked(policy.refined) == list(range(0, 6 * L, H))
    assert not any(action.held for action in actions)


@pytest.mark.parametrize("execute", [0, 1, 2, 3, 4, 5])
def test_fifo_intent_is_never_older_than_its_plan(execute):
    """Also where the executed part of a chunk does not divide the plan: its rest is left then."""
    used = L - L % (execute or H)
    actions = run(StubPolicy(), 5 * used, execute_steps=execute)[0]
    assert [action.intent_age_steps for action in actions] == list(range(used)) * 5


@RULES
@pytest.mark.parametrize("execute", [0, 1, 2, 3, 4, 5])
def test_execute_steps_is_how_long_a_chunk_lasts(rule, execute):
    policy = StubPolicy()
    actions = run(policy, 40, rule=rule, execute_steps=execute)[0]
    assert max(np.diff(asked(policy.refined))) == (execute or H)
    for step, value in fresh(actions):
        assert step - value[3] < (execute or H)


@RULES
@DELAYS
def test_every_action_is_the_one_planned_for_its_step(rule, delay):
    """Absolute steps: whatever replaced whatever, the token executed at a step speaks of that step.

    Only a chunk that outlives its plan, because the next one is late, ends without a token.
    """
    actions = run(StubPolicy(), 100, rule=rule, delays=delay)[0]
    for step, value in fresh(actions):
        assert value[1] == (step if actions[step].intent_age_steps < L else -1)
    if delay == 0:
        assert all(value[1] == step for step, value in fresh(actions))


@RULES
@DELAYS
def test_the_age_counts_from_the_picture_behind_the_plan(rule, delay):
    for step, action in enumerate(run(StubPolicy(), 100, rule=rule, delays=delay)[0]):
        if not action.held and action.value[2] >= 0:
            assert action.intent_age_steps == step - action.value[2]
        assert action.intent_age_steps >= 0


@DELAYS
def test_a_plan_is_never_used_before_it_could_have_arrived(delay):
    for rule in ("fifo", "overlap"):
        for step, value in fresh(run(StubPolicy(), 100, rule=rule, delays=delay)[0]):
            if value[2] > 0:
                assert step >= value[2] + delay


def test_overlap_without_delay_plans_at_every_chunk():
    policy = StubPolicy()
    actions = run(policy, 40, rule="overlap")[0]
    assert asked(policy.planned) == asked(policy.refined) == list(range(0, 40, H))
    assert max(action.intent_age_steps for action in actions) == H - 1


@pytest.mark.parametrize("delay", [1, 2, 3, 4, 5])
def test_overlap_replaces_the_rest_of_the_old_plan_at_the_right_step(delay):
    """Asked at a boundary, the new plan waits for the next one, and takes over there although the old one had steps left."""
    policy = StubPolicy()
    actions = run(policy, 50, rule="overlap", delays=delay)[0]
    plans = [int(action.value[2]) for action in actions]
    assert plans[:15] == [0] * 10 + [5] * 5
    assert plans[15:] == [step // H * H - H for step in range(15, 50)]
    assert [int(action.value[1]) for action in actions] == list(range(50))
    assert not any(action.held for action in actions)


@RULES
@DELAYS
def test_the_planner_is_never_asked_twice_at_a_time(rule, delay):
    policy = StubPolicy()
    run(policy, 100, rule=rule, delays=delay)
    # The first plan is waited for, so that the second question may come at any time.
    assert (np.diff(asked(policy.planned))[1:] >= delay).all()


PUBLISHED = {"max_intent_age_steps": L - 1, "hold": "repeat"}
"""Nothing is acted under a plan that is used up."""


@DELAYS
def test_fifo_goes_on_by_what_it_sees_while_the_planner_thinks(delay):
    """The plan runs out, and nothing is known of a plan until the robot shows itself after the next one has come."""
    policy = StubPolicy()
    actions = run(policy, 10 * L, rule="fifo", delays=delay)[0]
    assert not any(action.held for action in actions)
    unplanned = [step for step, action in enumerate(actions) if action.value[1] == -1]
    chunks = -(-delay // H)
    assert unplanned[: chunks * H] == list(range(L, L + chunks * H))
    assert bool(unplanned) == (delay > 0)
    assert all(actions[step].intent_age_steps >= L for step in unplanned)


@DELAYS
def test_where_no_used_up_plan_is_acted_under_fifo_holds_and_counts_it(delay):
    """The plan runs out, `delay` steps are held, and the rest of the new plan is executed."""
    actions = run(StubPolicy(), 10 * L, rule="fifo", delays=delay, **PUBLISHED)[0]
    assert not any(action.held for action in actions[:L])
    held = [step for step, action in enumerate(actions) if action.held]
    assert held[:delay] == list(range(L, L + delay))
    for step in held:
        np.testing.assert_array_equal(actions[step].value, actions[step - 1].value)
    assert bool(held) == (delay > 0)


@RULES
@DELAYS
def test_the_refiner_never_waits_for_the_planner(rule, delay):
    """Wherever a plan is young enough and the chunk is used up, there is a new chunk, from that very step's picture."""
    policy = StubPolicy()
    actions = run(policy, 100, rule=rule, delays=delay, **PUBLISHED)[0]
    arrivals = [(first, first if first == 0 else first + delay) for first in asked(policy.planned)]
    chunks = set(asked(policy.refined))
    for step, action in enumerate(actions):
        current = max((first for first, usable in arrivals if usable <= step), default=None)
        if action.held:
            assert not current <= step < current + L
            assert step not in chunks


def test_the_first_plan_is_waited_for():
    """However slow the planner, the first step of an episode has an action of its own."""
    actions = run(StubPolicy(), 3, delays=30)[0]
    assert [action.held for action in actions] == [False] * 3
    assert [action.value[1] for action in actions] == [0, 1, 2]


@RULES
@pytest.mark.parametrize(("oldest", "held"), [(0, False), (L - 1, True)])
def test_a_planner_slower_than_its_plans_is_asked_again(rule, oldest, held):
    """Its plans are over when they arrive: nobody stops asking, and what is seen is acted on as long as that is allowed."""
    policy = StubPolicy()
    actions = run(policy, 100, rule=rule, delays=12, max_intent_age_steps=oldest)[0]
    assert len(asked(policy.planned)) > 4
    assert {action.held for action in actions[20:]} == {held}
    assert all(action.value[1] == -1 for action in actions[20:] if not held)


@RULES
def test_a_planner_that_never_answers_again_ends_in_holding(rule):
    """The last plan is acted under until it is three times as old as what it covered."""
    actions = run(StubPolicy(), 50, rule=rule, delays=1000)[0]
    assert [action.held for action in actions] == [step > 3 * L + (H - 1) for step in range(50)]


def test_without_an_intent_there_is_no_age_of_one():
    control = RobotControl(ControlConfig(), LEVELS)
    assert control.intent_age(0) is None
    assert RobotControl(ControlConfig(), LEVELS[:1]).intent_age(0) is None
    control.accept_intent(plan_of(np.zeros((L, 3)), 0), 0)
    assert [control.intent_age(step) for step in (0, 3, L + 1)] == [0, 3, L + 1]


def chunk_at(step):
    return ActionChunk(actions=np.zeros((H, 4), np.float32), first_step=step, intent_first_step=0)


@pytest.mark.parametrize("steps", range(1, 7))
def test_no_picture_is_needed_while_a_chunk_is_under_way_and_then_executed(steps):
    """Pictures cost more than all else in simulation: as many are made as somebody looks at."""
    execute = 3
    robot = RobotControl(ControlConfig(execute_steps=execute), LEVELS)
    assert robot.steps_until_wanted(0) == 1, "nothing is there and nothing comes: it looks at every step"
    robot.accept_chunk(chunk_at(0))
    assert [robot.steps_until_wanted(step) for step in range(execute)] == [3, 2, 1]
    robot.accept_chunk(chunk_at(execute), usable_from=execute + steps)
    assert robot.steps_until_wanted(execute) == max(steps, execute)


def test_what_is_committed_is_what_is_left_of_the_chunk():
    robot = RobotControl(ControlConfig(committed_steps=2), LEVELS)
    assert robot.committed(0) is None
    robot.accept_chunk(replace(chunk_at(0), actions=np.arange(4 * H, dtype=np.float32).reshape(H, 4)))
    assert [len(robot.committed(step)) for step in range(H)] == [2] * (H - 1) + [1]
    assert robot.committed(H - 1)[0, 0] == 4 * (H - 1)
    assert robot.committed(H) is None


def test_what_is_held_is_also_what_a_recording_says():
    robot = RobotControl(ControlConfig(), LEVELS)
    robot.accept_chunk(chunk_at(0))
    done = [robot.next_action(step) for step in range(H + 2)]
    assert [action.held for action in done] == [False] * H + [True] * 2
    for action in done:
        np.testing.assert_array_equal(action.label, action.value)


def test_who_holds_looks_again_when_an_intent_comes():
    robot = RobotControl(ControlConfig(), LEVELS)
    robot.accept_intent(plan_of(np.zeros((L, 3)), 0), 0)
    robot.accept_chunk(chunk_at(0))
    robot.current("planner", 0)
    robot.accept_intent(plan_of(np.zeros((L, 3)), 5), 5 + 4)
    assert [robot.steps_until_wanted(step) for step in (5, 6, 8)] == [4, 3, 1]


def test_nothing_to_hold_is_an_error():
    with pytest.raises(ValueError, match="first answer of an episode must be waited for"):
        RobotControl(ControlConfig(), LEVELS).next_action(0)


def test_a_new_episode_knows_nothing_of_the_last():
    control = RobotControl(ControlConfig(), LEVELS)
    drive({0: control}, {0: observe(0, 0)}, StubPolicy(), {})
    control.reset()
    assert control == RobotControl(ControlConfig(), LEVELS)


@RULES
@pytest.mark.parametrize("delay", [0, 3])
def test_robots_are_never_mixed(rule, delay):
    policy = StubPolicy()
    everyone = run(policy, 45, robots=7, rule=rule, delays=delay)
    for robot, actions in everyone.items():
        assert {int(action.value[0]) for action in actions if action.value[0] >= 0} == {robot}
        alone = run(StubPolicy(), 45, rule=rule, delays=delay)[0]
        assert [a.value[1:].tolist() for a in actions] == [a.value[1:].tolist() for a in alone]


def test_robots_are_never_mixed_when_they_are_at_different_steps():
    """Each tick takes another subset in another order, as an evaluation's fleet does."""
    rng, policy, latencies = np.random.default_rng(0), StubPolicy(), {}
    controls = {i: RobotControl(ControlConfig(rule="overlap"), LEVELS) for i in range(6)}
    done = {i: [] for i in controls}
    for _ in range(60):
        present = rng.permutation(6)[: rng.integers(1, 7)].tolist()
        answers = drive(controls, {i: observe(i, len(done[i])) for i in present}, policy, latencies, late(2))
        assert list(answers) == present
        for i, actions in answers.items():
            done[i] += actions
    for robot, actions in done.items():
        for step, value in fresh(actions):
            assert value[0] in (robot, -1)
            assert value[1] in (step, -1)


def test_whoever_asks_at_one_time_is_answered_in_one_call():
    policy, latencies = StubPolicy(), {}
    controls = {i: RobotControl(ControlConfig(), LEVELS) for i in range(5)}
    drive(controls, {i: observe(i, 0) for i in range(5)}, policy, latencies)
    assert [len(call) for call in policy.planned] == [len(call) for call in policy.refined] == [5]
    assert {name: calls.batch for name, calls in latencies.items()} == {"planner": [5], "refiner": [5]}
    # Now two robots need a chunk, and the one that is back at its plan's end needs both.
    used_up = replace(controls[4].current("planner", 5), first_step=-5)
    controls[4].reset()
    controls[4].accept_intent(used_up, 5)
    drive(controls, {i: observe(i, 5) for i in (1, 4)}, policy, latencies)
    assert [len(call) for call in policy.planned] == [5, 1]
    assert [len(call) for call in policy.refined] == [5, 2]
    assert latencies["planner"].batch == [5, 1]
    assert [len(calls.ms) for calls in latencies.values()] == [2, 2]
    assert all(ms >= 0 for calls in latencies.values() for ms in calls.ms)


def test_a_tick_without_questions_asks_nobody():
    policy, latencies = StubPolicy(), {}
    controls = {0: RobotControl(ControlConfig(), LEVELS)}
    drive(controls, {0: observe(0, 0)}, policy, latencies)
    answer = drive(controls, {0: observe(0, 2)}, policy, latencies)
    assert [int(action.value[1]) for action in answer[0]] == [2, 3, 4]
    assert (len(policy.planned), len(policy.refined)) == (1, 1)


@RULES
@pytest.mark.parametrize("delay", [0, 3])
def test_one_robots_controller_does_what_drive_does(rule, delay):
    control = ControlConfig(rule=rule)
    controller = PolicyController(policy=StubPolicy(), control=control, delays=late(delay))
    assert isinstance(controller, Controller)
    expected = run(StubPolicy(), 40, rule=rule, delays=delay)[0]
    for _ in range(2):
        controller.reset(None, 0)
        for step in range(40):
            action = controller.act(observe(0, step))
            np.testing.assert_array_equal(action.value, expected[step].value)
            assert (action.held, action.intent_age_steps) == (expected[step].held, expected[step].intent_age_steps)
