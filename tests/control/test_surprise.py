"""Event-triggered planning and the limits of an old intent: surprises are seen, calm is calm, and holding is safe."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies

from libra_ray.config import ActionConfig, ControlConfig, DelayConfig
from libra_ray.control.delays import Delays
from libra_ray.control.lockstep import drive
from libra_ray.control.robot import RobotControl
from libra_ray.control.surprise import RunningScale, SurpriseDetector
from libra_ray.spec import NO_GRIPPER, UNDECLARED, VectorSpec
from libra_ray.types import IMAGE_KEY, ActionChunk, Intent, Level, Observation
from tests.policies import DualStub, dual_levels, plan_of

ACTION = ActionConfig(horizon=5, chunks=4)
L, H = ACTION.plan_steps, ACTION.horizon
LEVELS = dual_levels(L, H)
GAIN = 0.01


def observe(state, step=0, picture=None):
    images = {} if picture is None else {IMAGE_KEY: picture}
    return Observation(images=images, state=np.asarray(state, np.float32), instruction="go", step=step)


class Arm:
    """A simulated arm whose position follows position deltas, with noise; `push` moves it by other means."""

    def __init__(self, seed=0):
        self.dice = np.random.default_rng(seed)
        self.place = np.zeros(3)

    def act(self, action):
        self.place = self.place + GAIN * action[:3] + self.dice.normal(0, 1e-4, 3)

    def push(self):
        self.place = self.place + 0.2


class Wandering(DualStub):
    """A policy of random chunks that counts how often it was asked to plan."""

    levels = LEVELS

    def __init__(self, seed=0):
        self.dice, self.planned = np.random.default_rng(seed), []

    def plan(self, observations):
        self.planned += [o.step for o in observations]
        return [plan_of(np.zeros((L, 4), np.int64), o.step) for o in observations]

    def refine(self, observations, plans):
        return [
            ActionChunk(
                actions=self.dice.uniform(-1, 1, (H, 4)).astype(np.float32), first_step=o.step, intent_first_step=p.first_step
            )
            for o, p in zip(observations, plans, strict=True)
        ]


def play(rule, steps, pushed_at=()):
    arm, policy, done = Arm(), Wandering(), 0
    control = RobotControl(ControlConfig(rule=rule), LEVELS)
    while done < steps:
        for action in drive({0: control}, {0: observe(arm.place, done)}, policy, {})[0]:
            arm.act(action.value)
            done += 1
            if done in pushed_at:
                arm.push()
    return policy.planned


def test_event_saves_plans_where_nothing_happens():
    """Each rule covers every step; `event` asks one chunk before its plan ends, `overlap` at every chunk."""
    calm = play("event", 400)
    assert len(play("fifo", 400)) <= len(calm) < 0.5 * len(play("overlap", 400))


def test_a_push_is_answered_by_a_plan_at_the_next_look():
    """The second chunk of a plan of four, where a calm robot would not be planned for."""
    calm = play("event", 400)
    late = next(step for step in calm if step > 200)
    pushed = late + H - 1
    assert late + H not in calm
    assert late + H in play("event", 400, pushed_at=(pushed,))


CHAIN = (Level(name="goal", covers=80), Level(name="path", covers=L, reads="goal"), Level(name="motor", covers=H, reads="path"))


class Hearing:
    """A policy whose intents and actions carry the step at which the words behind them were said; notes who was asked when."""

    def __init__(self, levels):
        self.levels, self.asked = levels, {level.name: [] for level in levels}

    def infer(self, level, observations, intents):
        [of] = [each for each in self.levels if each.name == level]
        return [self.answer(of, seen, above) for seen, above in zip(observations, intents, strict=True)]

    def answer(self, level, seen, above):
        self.asked[level.name].append(seen.step)
        heard = seen.step if above is None else int(above.values["heard"][0])
        if level is not self.levels[-1]:
            return Intent(level=level.name, values={"heard": np.array([heard])}, first_step=seen.step, covers=level.covers)
        actions = np.full((level.covers, 4), heard, np.float32)
        return ActionChunk(actions=actions, first_step=seen.step, intent_first_step=above.first_step)


def told(rule, levels, *, late=0, pushed_at=-1):
    """Who was asked, and what was done: other words are said from step 10 on, or else a picture changes at `pushed_at`."""
    policy, done, actions = Hearing(levels), 0, []
    control, dice = RobotControl(ControlConfig(rule=rule), levels), np.random.default_rng(0)
    scene = dice.integers(0, 255, (16, 16, 3)).astype(np.uint8)
    while done < 140:
        seen = observe([0], done, 255 - scene if 0 <= pushed_at <= done else scene)
        seen = replace(seen, instruction="stop" if pushed_at < 0 and done >= 10 else "go")
        new = drive({0: control}, {0: seen}, policy, {}, Delays(DelayConfig(intent_steps=late)))[0]
        actions, done = actions + [int(action.value[0]) for action in new], done + len(new)
    return policy.asked, actions


@pytest.mark.parametrize("rule", ["fifo", "overlap", "event"])
@pytest.mark.parametrize("levels", [LEVELS, CHAIN], ids=["two", "three"])
@pytest.mark.parametrize("late", [0, 3])
def test_other_words_have_all_levels_asked_anew_in_their_order(rule, levels, late):
    """At the next look, whatever the rule; what is late is what that level always is, and meanwhile nobody stands still."""
    asked, actions = told(rule, levels, late=late)
    assert 10 in asked[levels[0].name]
    assert min(actions[10 + (len(levels) - 1) * (H if late else 0) :]) >= 10
    assert len(actions) >= 140


def test_a_surprise_reaches_every_level():
    (calm, _), (asked, actions) = (told("event", CHAIN, pushed_at=step) for step in (1000, 125))
    for level in ("goal", "path"):
        assert 125 in asked[level]
        assert 125 not in calm[level]
    assert min(actions[125:]) == 125


def test_a_picture_that_changes_unusually_is_a_surprise():
    dice, detector = np.random.default_rng(0), SurpriseDetector()
    scene = dice.integers(0, 255, (64, 64, 3)).astype(np.uint8)
    for step in range(20):
        noisy = np.clip(scene.astype(int) + dice.integers(-5, 6, scene.shape), 0, 255).astype(np.uint8)
        assert not detector.surprised(observe([0], step, noisy), None)
    assert detector.surprised(observe([0], 20, 255 - scene), None)


def test_what_is_learned_stays_over_episodes_but_nothing_is_compared_across_them():
    detector, dice = SurpriseDetector(), np.random.default_rng(0)
    place = np.zeros(3)
    for _ in range(30):
        action = dice.uniform(-1, 1, 3).astype(np.float32)
        place = place + GAIN * action
        detector.surprised(observe(place), action)
    detector.reset()
    assert not detector.surprised(observe(place + 5), np.ones(3, np.float32))
    assert not detector.surprised(observe(place + 5 + GAIN), np.ones(3, np.float32))
    assert detector.surprised(observe(place + 6), np.ones(3, np.float32))


@pytest.mark.parametrize("forget", [0.9, 0.99])
def test_what_is_predicted_is_the_least_squares_of_all_that_was_seen_the_older_the_less(forget):
    """Surprises are where that is off by more than usual, also of a robot whose gain changes."""
    detector, usual = SurpriseDetector(times=1.2, forget=forget), RunningScale(floor=1e-6)
    dice, place, surprises = np.random.default_rng(0), np.zeros(2, np.float32), []
    # Next to nothing is assumed: that it hardly moves.
    sums, moves = [*math.sqrt(1e-3) * np.eye(3)], [np.zeros(2)] * 3
    gains = dice.normal(0, 1, (12, 3, 2))
    detector.surprised(observe(place), None)
    for step in range(600):
        executed = dice.uniform(-1, 1, 3).astype(np.float32)
        moved = executed @ gains[step // 50] + dice.normal(0, 0.1, 2)
        weights = forget ** (np.array([0] * 3 + [*range(step - 1, -1, -1)])[:, None] / 2)
        learned = np.linalg.lstsq(weights * sums, weights * moves)[0]
        before, place = place, (place + moved).astype(np.float32)
        sums, moves = [*sums, executed], [*moves, place - before]
        surprises.append(usual.exceeded(float(np.linalg.norm(moves[-1] - executed @ learned)), 1.2))
        assert detector.surprised(observe(place), executed) == surprises[-1], step
    assert 60 < sum(surprises) < 540


def test_what_is_never_done_does_no_harm_however_long():
    detector, dice, place = SurpriseDetector(forget=0.5), np.random.default_rng(0), np.zeros(3)
    for _ in range(3000):
        executed = np.array([*dice.uniform(-1, 1, 3), 0], np.float32)
        place = place + GAIN * executed[:3] + dice.normal(0, 1e-4, 3)
        detector.surprised(observe(place), executed)
    assert detector.surprised(observe(place + 1), np.zeros(4, np.float32))


@given(strategies.lists(strategies.floats(0, 1e3), min_size=20, max_size=60))
def test_nothing_is_unusual_during_warm_up_or_below_the_usual(values):
    usual = RunningScale(warm_up=10)
    assert not any(usual.exceeded(value, 3) for value in values[:10])
    assert not usual.exceeded(0.0, 3)


def test_the_first_value_after_warm_up_can_be_unusual():
    usual = RunningScale(warm_up=3)
    assert [usual.exceeded(value, 2) for value in (1.0, 1.0, 1.0, 5.0)] == [False, False, False, True]


def test_what_is_unusual_raises_the_measure_only_as_far_as_what_is_just_usual_would():
    huge, just = (RunningScale(warm_up=3, keep=0.5) for _ in range(2))
    for value in (3.0, 3.0, 3.0):
        assert huge.exceeded(value, 2) == just.exceeded(value, 2) is False
    assert huge.exceeded(1e6, 2)
    assert not just.exceeded(6.0, 2)
    assert huge == just


def test_the_first_values_count_alike_however_slowly_it_forgets():
    """Their root mean square is what is usual: 5 of 1 and 7."""
    for value, unusual in ((9.9, False), (10.1, True)):
        usual = RunningScale(warm_up=2, keep=0.99)
        assert not any(usual.exceeded(seen, 2) for seen in (1.0, 7.0))
        assert usual.exceeded(value, 2) is unusual


def loaded(action=UNDECLARED, **control):
    control = RobotControl(ControlConfig(**({"rule": "overlap"} | control)), LEVELS, action=action)
    control.accept_intent(plan_of(np.zeros((L, 4), np.int64), 0), 0)
    actions = np.arange(1, 4 * H + 1, dtype=np.float32).reshape(H, 4)
    control.wants("refiner", 0)
    control.accept_chunk(ActionChunk(actions=actions, first_step=0, intent_first_step=0))
    return control, actions


def test_holding_still_moves_nothing_and_keeps_the_gripper():
    control, actions = loaded(hold="still")
    for step in range(H):
        control.next_action(step)
    held = control.next_action(H)
    np.testing.assert_array_equal(held.value, [0, 0, 0, actions[-1, -1]])
    assert held.held
    np.testing.assert_array_equal(control.held_actions(H), np.tile(held.value, (H, 1)))


@pytest.mark.parametrize(
    ("action", "held"),
    [
        (VectorSpec(), [0, 0, 0, 1]),
        (VectorSpec(delta=True, gripper=3), [0, 0, 0, 1]),
        (VectorSpec(delta=True, gripper=1), [0, 1, 0, 0]),
        (VectorSpec(delta=True, gripper=NO_GRIPPER), [0, 0, 0, 0]),
        (VectorSpec(delta=False, gripper=1), [1, 1, 1, 1]),
    ],
)
def test_what_is_held_follows_from_what_the_actions_are_declared_to_be(action, held):
    control, actions = loaded(action)
    for step in range(H):
        control.next_action(step)
    np.testing.assert_array_equal(control.next_action(H).value, actions[-1] * held)
    by_hand, _ = loaded(action, hold="repeat")
    np.testing.assert_array_equal(by_hand.held_actions(H)[0], actions[-1])


@pytest.mark.parametrize(("step", "row"), [(1, 0), (3, 2), (5, 4), (50, 4)])
def test_held_chunks_follow_the_last_action_that_was_executed(step, row):
    control, actions = loaded(hold="repeat")
    np.testing.assert_array_equal(control.held_actions(step), np.tile(actions[row], (H, 1)))
    later, _ = loaded(hold="repeat")
    later.accept_chunk(ActionChunk(actions=actions, first_step=20, intent_first_step=0), 20)
    np.testing.assert_array_equal(later.held_actions(20 + step), np.tile(actions[row], (H, 1)))


def test_an_intent_past_its_limit_is_not_acted_under():
    control, _ = loaded(max_intent_age_steps=7)
    assert control.read_by("refiner", 7) is not None
    assert control.read_by("refiner", 8) is None
    assert control.wants("refiner", 7)
    assert not control.wants("refiner", 8)


def test_an_intent_that_is_used_up_is_acted_under_and_asked_for_anew():
    """Until it is three times as old as what it covers: its level sees for itself, and knows nothing of it any more."""
    control, _ = loaded(rule="fifo")
    assert (control.intent_at("planner", L - 1), control.intent_at("planner", L)) == (control.current("planner", L), None)
    assert control.read_by("refiner", 3 * L) is control.current("planner", L)
    assert control.read_by("refiner", 3 * L + 1) is None
    assert control.wants("planner", L)
    assert control.wants("refiner", L)


LONG = dual_levels(1000, H)
"""Of a plan that lasts, so that only a surprise has it replaced."""


class Watched:
    """A robot by `event` that executes random chunks and is looked at as often as one likes."""

    def __init__(self, **control):
        self.arm, self.dice, self.done = Arm(), np.random.default_rng(0), 0
        self.control = RobotControl(ControlConfig(rule="event", **control), LONG)
        self.look()
        self.control.accept_intent(plan_of(np.zeros((1000, 4), np.int64), 0), 0)

    def look(self):
        """Whether what is seen now surprises it."""
        self.control.observe(observe(self.arm.place, self.done))
        return self.done > 0 and self.control.wants("planner", self.done)

    def go(self, steps):
        """Execute so many steps, with a new chunk where that is due."""
        for _ in range(steps):
            if self.control.wants("refiner", self.done):
                actions = self.dice.uniform(-1, 1, (H, 4)).astype(np.float32)
                self.control.accept_chunk(ActionChunk(actions=actions, first_step=self.done, intent_first_step=0))
            self.arm.act(self.control.next_action(self.done).value)
            self.done += 1

    def calm(self):
        """Look at it until it knows itself, at any steps of its chunks and always where the next one is due."""
        for steps in [1, 2, 2, 3, 2, 5, 4, 1, 2, 1, 2] * 15:
            self.go(steps)
            assert not self.look(), self.done
        return self


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_push_smaller_than_a_step_is_seen_at_whatever_step_it_is_looked_for(steps):
    """What was executed since the last look is known to the step."""
    watched = Watched().calm()
    watched.go(steps)
    watched.arm.place += GAIN / 5
    assert watched.look()


def test_nothing_is_predicted_where_it_is_not_known_what_was_executed():
    """Between two pictures of one step, before the first chunk, and past the end of the chunk in use."""
    early = Watched()
    early.done = 1
    early.arm.push()
    assert not early.look()
    watched = Watched().calm()
    watched.arm.push()
    assert not watched.look(), "no action lies between"
    watched.go(H)
    assert not watched.look()
    for _ in range(H + 3):
        watched.arm.act(watched.control.next_action(watched.done).value)
        watched.done += 1
    watched.arm.push()
    assert not watched.look(), "it has held since, and whoever drives it may have moved it otherwise"


def test_a_planner_that_fails_may_be_asked_again():
    control, _ = loaded()
    control.mark_requested("planner")
    assert not control.wants("planner", L)
    control.mark_failed("planner")
    assert control.wants("planner", L)
    untouched, failed = (RobotControl(ControlConfig(), LEVELS) for _ in range(2))
    failed.mark_requested("planner")
    assert failed != untouched
    failed.mark_failed("planner")
    assert failed == untouched
