"""Lateness in simulated time: what comes when, never, or in another order, and what a robot does meanwhile."""

import json

import numpy as np
import pytest

from libra_ray.config import ControlConfig, DelayConfig
from libra_ray.control.delays import Arrival, Delays, in_steps, open_delays
from libra_ray.control.lockstep import PolicyController, drive
from libra_ray.control.robot import RobotControl
from libra_ray.types import Level
from tests.control.test_robot import LEVELS, H, L, StubPolicy, asked, fresh, observe, run

RULES = pytest.mark.parametrize("rule", ["fifo", "overlap", "event"])
MIXED = DelayConfig(intent_steps=4, lost_share=0.3, reordered_share=0.3)


def executed(actions):
    return [(action.value.tolist(), action.intent_age_steps, action.held) for action in actions]


@RULES
def test_no_delay_is_no_injection(rule):
    delays = Delays(DelayConfig(seed=7), {level.name: np.zeros(3, np.int64) for level in LEVELS})
    assert executed(run(StubPolicy(), 60, delays=delays, rule=rule)[0]) == executed(run(StubPolicy(), 60, rule=rule)[0])


@RULES
def test_the_same_seed_gives_the_same_episode_whoever_runs_beside_it(rule):
    policy = StubPolicy()
    alone = run(policy, 80, delays=Delays(MIXED), rule=rule)[0]
    beside = run(StubPolicy(), 80, robots=3, delays=Delays(MIXED), rule=rule)[0]
    assert executed(alone) == executed(beside)
    other = run(StubPolicy(), 80, delays=Delays(DelayConfig(**{**vars(MIXED), "seed": 1})), rule=rule)[0]
    assert executed(alone) != executed(other)


def test_every_episode_draws_its_own():
    delays = Delays(MIXED)
    drawn = [[delays.intent("planner", episode, step) for step in range(50)] for episode in (0, 1)]
    assert drawn[0] != drawn[1]


@RULES
def test_an_intent_never_replaces_a_later_one(rule):
    """Whatever is lost or overtaken: the picture behind what is executed only gets newer."""
    delays = Delays(DelayConfig(intent_steps=3, reordered_share=0.5))
    for step, action in enumerate(run(StubPolicy(), 200, delays=delays, rule=rule)[0]):
        assert step >= action.value[2] or action.value[2] == -1
    behind = [step - action.intent_age_steps for step, action in enumerate(run(StubPolicy(), 200, delays=delays, rule=rule)[0])]
    assert (np.diff(behind) >= 0).all()


def test_overtaken_intents_do_come():
    """A late one that nothing newer has overtaken is used."""
    delays = Delays(DelayConfig(intent_steps=3, reordered_share=1.0))
    behind = {
        step - action.intent_age_steps for step, action in enumerate(run(StubPolicy(), 100, delays=delays, rule="overlap")[0])
    }
    assert len(behind) > 3


def test_an_overtaken_intent_comes_a_step_after_the_one_that_was_asked_for_when_it_was_due():
    delays = Delays(DelayConfig(intent_steps=4, reordered_share=1.0))
    assert delays.intent("planner", episode=0, step=7) == Arrival(due=4, usable=4 + 4 + 1)


@RULES
@pytest.mark.parametrize("share", ["lost_share", "reordered_share"])
def test_a_lost_or_late_intent_is_asked_for_again_when_it_was_due_and_not_before(rule, share):
    policy = StubPolicy()
    run(policy, 100, delays=Delays(DelayConfig(intent_steps=8, **{share: 1.0})), rule=rule)
    # The first one is waited for.
    assert (np.diff(asked(policy.planned))[1:] >= 8).all()


@RULES
def test_the_next_request_follows_a_lost_intent(rule):
    policy = StubPolicy()
    actions = run(policy, 100, delays=Delays(DelayConfig(intent_steps=2, lost_share=1.0)), rule=rule)[0]
    assert len(asked(policy.planned)) > 5
    # Only the first one, which is waited for, ever comes.
    assert {step - action.intent_age_steps for step, action in enumerate(actions)} == {0}


@RULES
@pytest.mark.parametrize("delay", [0, 1, 2])
def test_a_robot_goes_on_with_its_chunk_until_the_next_is_there(rule, delay):
    """With as many steps committed as a chunk is late nothing is held, and no chunk is used before it is there."""
    policy = StubPolicy()
    actions = run(policy, 100, delays=Delays(DelayConfig(chunk_steps=delay)), rule=rule, committed_steps=delay)[0]
    assert not any(action.held for action in actions)
    for step, action in enumerate(actions):
        begins = action.value[3]
        assert step >= begins + (delay if begins > 0 else 0)
        assert step - begins < H
    assert max(np.diff(asked(policy.refined))) == H - delay


@pytest.mark.parametrize("delay", [1, 3])
def test_who_commits_to_nothing_holds_until_its_chunk_is_there(delay):
    actions = run(StubPolicy(), 60, delays=Delays(DelayConfig(chunk_steps=delay)))[0]
    held = [step for step, action in enumerate(actions) if action.held]
    assert held[:delay] == list(range(H, H + delay))


def test_the_last_level_is_told_what_the_robot_does_meanwhile():
    """And nobody else is; at an episode's first step there is nothing."""
    told = []

    class Listening(StubPolicy):
        def infer(self, level, observations, above):
            told.extend((level, o.step, None if o.committed is None else o.committed[:, 1].tolist()) for o in observations)
            return super().infer(level, observations, above)

    run(Listening(), 2 * L, delays=Delays(DelayConfig(chunk_steps=2)), rule="overlap", committed_steps=2)
    refined = {step: committed for level, step, committed in told if level == "refiner"}
    assert refined.pop(0) is None
    assert refined
    assert all(committed == [step, step + 1] for step, committed in refined.items())
    assert all(committed is None for level, _, committed in told if level == "planner")


@RULES
@pytest.mark.parametrize("delay", [0, 2, 7, 12])
def test_the_age_is_that_of_what_was_executed(rule, delay):
    config = DelayConfig(intent_steps=delay, chunk_steps=2)
    for step, action in enumerate(run(StubPolicy(), 100, delays=Delays(config), rule=rule, committed_steps=2)[0]):
        if not action.held and action.value[2] >= 0:
            assert action.intent_age_steps == step - action.value[2]
            assert action.value[1] == step


def test_measured_latencies_are_whole_steps():
    """A plan is used from a later step on; a chunk still in the step of its picture."""
    steps = in_steps({"planner": [0.0, 12.5, 12.6, 100.0], "refiner": [1.0, 12.4, 12.5, 30.0]}, LEVELS, control_hz=80)
    assert steps["planner"].tolist() == [0, 1, 2, 8]
    assert steps["refiner"].tolist() == [0, 0, 1, 2]
    assert all(np.issubdtype(found.dtype, np.integer) for found in steps.values())
    drawn = {Delays(measured=steps).intent("planner", 0, step).due for step in range(200)}
    assert drawn == {0, 1, 2, 8}
    levels = (*LEVELS, Level(name="third", covers=1, reads="refiner"))
    of_three = in_steps({level.name: [12.6] for level in levels}, levels, control_hz=80)
    assert {name: found.tolist() for name, found in of_three.items()} == {"planner": [2], "refiner": [2], "third": [1]}


def test_without_a_trace_delays_are_as_set():
    config = DelayConfig(intent_steps=3, lost_share=0.5, seed=7)
    assert open_delays(config, LEVELS, 10) == Delays(config)


def test_a_trace_may_hold_an_answer_that_took_no_time(tmp_path):
    path = tmp_path / "drive.json"
    path.write_text(json.dumps({"level_latencies_ms": {"planner": [0.0], "refiner": [0.0]}}))
    assert open_delays(DelayConfig(trace=str(path)), LEVELS, 10).intent("planner", 0, 0).due == 0


def test_a_trace_that_lacks_a_level_or_is_none_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="no latencies of level refiner, but of planner; the policy's levels are planner, refiner"
    ):
        in_steps({"planner": [1.0]}, LEVELS, control_hz=10)
    with pytest.raises(ValueError, match="no latencies of level planner, but of one, two;"):
        in_steps({"one": [1.0], "two": [1.0]}, LEVELS, control_hz=10)
    with pytest.raises(ValueError, match="no latencies of level planner, but of none;"):
        in_steps({}, LEVELS, control_hz=10)
    path = tmp_path / "drive.json"
    with pytest.raises(ValueError, match=r"drive.json holds no latencies \(FileNotFoundError.* jobs/drive.py --out"):
        open_delays(DelayConfig(trace=str(path)), LEVELS, 10)
    path.write_text(json.dumps({"level_latencies_ms": {"planner": [100.0], "refiner": [1.0]}}))
    assert open_delays(DelayConfig(trace=str(path)), LEVELS, 10).chunk("refiner", 0, 0) == 0
    assert open_delays(DelayConfig(trace=str(path)), LEVELS, 10).intent("planner", 0, 0).due == 1
    assert open_delays(DelayConfig(trace=str(path), control_hz=80), LEVELS, 10).intent("planner", 0, 0).due == 8
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert open_delays(DelayConfig(trace=str(path)), LEVELS, 10).intent("planner", 0, 0).due == 1, (
        "a byte order mark does no harm"
    )


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (None, "IsADirectoryError"),
        (b"", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
        ([], "TypeError"),
        ({}, "KeyError"),
        ({"level_latencies_ms": [1.0]}, "AttributeError"),
        *[
            ({"level_latencies_ms": {"planner": values, "refiner": [1.0]}}, words)
            for values, words in [
                ([1.0, None], "level planner are not all numbers of milliseconds from 0 on"),
                ([1.0, -1.0], "level planner are not all numbers"),
                ([[1.0]], "level planner are not all numbers"),
                (3.0, "level planner are not all numbers"),
                (["soon"], "could not convert"),
                ([{}], "TypeError"),
            ]
        ],
        ({"level_latencies_ms": {"planner": [], "refiner": [1.0]}}, "no latencies of level planner"),
        ({"level_latencies_ms": {"goal": [1.0]}}, "no latencies of level planner, but of goal; the policy's levels are"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path, kept, words):
    path = tmp_path / "trace.json"
    if kept is None:
        path.mkdir()
    else:
        path.write_bytes(kept if isinstance(kept, bytes) else json.dumps(kept).encode())
    with pytest.raises(ValueError, match=words) as refused:
        open_delays(DelayConfig(trace=str(path)), LEVELS, 10)
    assert str(refused.value).startswith(f"delay.trace={path}")
    assert "\n" not in str(refused.value)


def test_a_policy_of_one_level_is_late_as_a_whole():
    """There is no intent to be late: only the chunk is."""
    only = (Level(name="policy", covers=H),)

    class One(StubPolicy):
        levels = only

        def infer(self, level, observations, above):
            chunks = self.refine(observations, self.plan(observations))
            self.planned.clear()
            return chunks

    policy, control = One(), RobotControl(ControlConfig(committed_steps=2), only)
    actions = []
    while len(actions) < 40:
        delays = Delays(DelayConfig(intent_steps=9, chunk_steps=2))
        actions += drive({0: control}, {0: observe(0, len(actions))}, policy, {}, delays)[0]
    assert not any(action.held for action in actions)
    assert all(value[1] == step for step, value in fresh(actions))
    assert max(action.intent_age_steps for action in actions) == H - 1


def test_a_controllers_episodes_draw_their_own_delays():
    """By their seeds, as robots in lockstep do."""

    class Noting(Delays):
        def intent(self, level, episode, step):
            asked.append(episode)
            return super().intent(level, episode, step)

    asked: list[int] = []
    controller = PolicyController(StubPolicy(), ControlConfig(rule="overlap"), delays=Noting(DelayConfig(intent_steps=2)))
    for seed in (11, 12):
        controller.reset(None, seed)
        for step in range(4 * H):
            controller.act(observe(0, step))
    assert set(asked) == {11, 12}
