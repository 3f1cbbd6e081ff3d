"""The margin is what a driven robot shows: intents are used up exactly where it says so, and what it advises does help."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libra_ray.config import ControlConfig, DelayConfig
from libra_ray.control.delays import Delays
from libra_ray.control.lockstep import drive
from libra_ray.control.margin import Latency, injected_steps, margins, measure
from libra_ray.control.robot import RobotControl
from libra_ray.types import ActionChunk, Intent, Level, Observation

H, HZ = 5, 80
ONE = (Level(name="policy", covers=H),)


def two(chunks, horizon=H):
    return Level(name="slow", covers=chunks * horizon), Level(name="fast", covers=horizon, reads="slow")


def three(upper, middle):
    return (
        Level(name="top", covers=upper * H),
        Level(name="middle", covers=middle * H, reads="top"),
        Level(name="fast", covers=H, reads="middle"),
    )


class Answers:
    """Answers of any levels, without content; notes who was asked at which steps, and which intents were read at which."""

    def __init__(self, levels):
        self.levels = levels
        self.calls = []
        self.asked = {level.name: [] for level in levels}
        self.read = {level.name: [] for level in levels}

    def infer(self, level, observations, above):
        self.calls.append((level, [intent and intent.level for intent in above]))
        for seen, intent in zip(observations, above, strict=True):
            self.asked[level].append(seen.step)
            if intent is not None:
                self.read[intent.level].append((seen.step, intent.first_step))
        asked = next(each for each in self.levels if each.name == level)
        steps = [o.step for o in observations]
        if asked is not self.levels[-1]:
            return [Intent(level=level, values={}, first_step=step, covers=asked.covers) for step in steps]
        firsts = [step if intent is None else intent.first_step for step, intent in zip(steps, above, strict=True)]
        actions = np.zeros((asked.covers, 2), np.float32)
        return [ActionChunk(actions=actions, first_step=s, intent_first_step=f) for s, f in zip(steps, firsts, strict=True)]


def driven(policy, late, control, *, at_requests=True, steps=200):
    """What a robot executes, and by level above the last, wherever it was seen, the step and that of the intent it had then.

    Args:
        at_requests: it is seen when it asks for a chunk and never else, as a served one; otherwise also when an intent comes.
    """
    delays = Delays(DelayConfig(), {level.name: np.array([late[level.name]]) for level in policy.levels})
    robot, done, had = RobotControl(control, policy.levels), [], {level.name: [] for level in policy.levels[:-1]}
    while len(done) < steps:
        begun = len(done)
        seen = Observation(images={}, state=np.zeros(2, np.float32), instruction="go", step=begun)
        done += drive({0: robot}, {0: seen}, policy, {}, delays)[0]
        for name in had:
            had[name].append((begun, robot.current(name, begun).first_step))
        while at_requests and len(done) < begun + robot.execute_steps:
            done.append(robot.next_action(len(done)))
    return done, had


def ages(levels, late, control, *, at_requests=True, steps=200):
    """The ages of what a robot executes, once the first intents, which are waited for, are forgotten."""
    done, _ = driven(Answers(levels), late, control, at_requests=at_requests, steps=steps)
    return [action.intent_age_steps for action in done[steps // 2 :]]


def judged(levels, late, control, **more):
    """The margins where each level is so many steps late."""
    found = {name: Latency(p50_ms=0, p95_ms=1000 * steps / HZ) for name, steps in late.items()}
    return {margin.level: margin for margin in margins(levels, found, HZ, control, **more)}


RULES = pytest.mark.parametrize("rule", ["fifo", "overlap", "event"])


def followed(advice, levels, control):
    """Levels and control with these settings."""
    for name, value in advice.items():
        section, setting = name.split(".")
        if section == "control":
            control = replace(control, **{setting: int(value) if value.isdigit() else value})
        else:
            levels = tuple(replace(each, covers=int(value)) if each.name == section else each for each in levels)
    return levels, control


def advice_of(name, levels, late, control):
    """The settings that are advised to a level, once it is seen that no less would do."""
    lengths = {level.name: (f"{level.name}.steps", 1) for level in levels}

    def keeps_up(settings):
        changed, under = followed(settings, levels, control)
        at_most_half = under.committed_steps <= changed[-1].covers // 2
        return at_most_half and judged(changed, late, under)[name].margin_steps >= 0

    remedy = judged(levels, late, control, lengthened_by=lengths)[name].remedy
    advice = dict(part.removesuffix(" in training").split("=") for part in remedy.split(" with ") if part)
    assert keeps_up({}) == (not advice)
    assert keeps_up(advice)
    for setting, value in advice.items():
        rest = {other: advice[other] for other in advice if other != setting}
        assert not keeps_up(rest), f"{setting} can be left out"
        assert not value.isdigit() or not keeps_up(rest | {setting: str(int(value) - 1)}), f"less of {setting} would do"
    return tuple(advice)


@RULES
def test_what_would_do_does_and_less_of_it_does_not(rule):
    """Of each level: no setting that is advised can be left out, and no number be smaller by one."""
    seen = set()
    for horizon, execute, slow, late in itertools.product(range(2, 7), range(5), (7, 12, 20), range(8)):
        for committed in range(horizon // 2 + 1):
            control = ControlConfig(rule=rule, execute_steps=execute, committed_steps=committed)
            levels = Level(name="slow", covers=slow), Level(name="fast", covers=horizon, reads="slow")
            seen |= {advice_of("slow", levels, {"slow": late, "fast": 0}, control)}
            seen |= {advice_of("fast", levels, {"slow": 0, "fast": late}, control)}
    assert seen >= {
        (),
        ("slow.steps",) if rule != "fifo" else ("control.rule", "slow.steps"),
        ("fast.steps",),
        ("fast.steps", "control.committed_steps"),
        ("control.committed_steps",),
        ("fast.steps", "control.execute_steps"),
        ("control.execute_steps",),
    }


@RULES
def test_of_three_levels_too_what_would_do_does_and_less_of_it_does_not(rule):
    """Also where the level that reads the intents is asked seldom, so that `event` needs more than `overlap`."""
    seen = set()
    for top, middle, top_late, middle_late in itertools.product((12, 19, 25, 30), (6, 9, 14), range(0, 12, 3), (0, 4)):
        for committed in (0, 1):
            levels = Level(name="top", covers=top), Level(name="middle", covers=middle, reads="top")
            levels = (*levels, Level(name="fast", covers=3, reads="middle"))
            late = {"top": top_late, "middle": middle_late, "fast": 0}
            seen |= {advice_of("top", levels, late, ControlConfig(rule=rule, committed_steps=committed))}
    assert (("control.rule",) in seen) == (rule != "overlap")


@pytest.mark.parametrize("section", ["control.", "", "settings."])
@pytest.mark.parametrize("committed", [0, 1])
def test_settings_are_named_as_the_reader_gives_them(section, committed):
    """In what is said of every level, and in what would do."""
    control = ControlConfig(rule="fifo", execute_steps=1, committed_steps=committed)
    judges = judged(two(2), {"slow": 4, "fast": 3}, control, section=section)
    said = " ".join(margin.text for margin in judges.values())
    named = re.findall(r"([a-z.]*)(rule|execute_steps|committed_steps)=", said)
    assert {name for _, name in named} == {"rule", "committed_steps" if committed else "execute_steps"}
    assert {before for before, _ in named} == {section}


@pytest.mark.parametrize("hz", [1, 10, 30, 80, 240])
def test_an_answer_is_usable_at_the_first_step_after_it_came(hz):
    for steps in range(1, 100):
        exactly = 1000 * steps / hz
        assert Latency(p50_ms=0, p95_ms=exactly).steps(hz) == steps
        assert Latency(p50_ms=0, p95_ms=exactly * 1.0001).steps(hz) == steps + 1
        assert Latency(p50_ms=0, p95_ms=exactly, injected_steps=3).steps(hz) == steps + 3


@st.composite
def loops(draw):
    """A rule, chunk lengths and lateness of two levels; a chunk comes as late as the robot commits itself."""
    horizon = draw(st.integers(2, 8))
    committed = draw(st.integers(0, horizon // 2))
    control = ControlConfig(
        rule=draw(st.sampled_from(["fifo", "overlap", "event"])),
        execute_steps=draw(st.integers(max(1, committed), horizon)),
        committed_steps=committed,
        max_intent_age_steps=10_000,
    )
    levels = (Level(name="slow", covers=draw(st.integers(horizon, 40))), Level(name="fast", covers=horizon, reads="slow"))
    return levels, {"slow": draw(st.integers(0, 20)), "fast": committed}, control


@settings(max_examples=60, deadline=None)
@given(loops())
def test_intents_are_used_up_where_the_margin_says_so_and_nowhere_else(loop):
    levels, late, control = loop
    margin = judged(levels, late, control)["slow"].margin_steps
    oldest = max(ages(levels, late, control))
    assert (margin >= 0) == (oldest < levels[0].covers)
    if margin >= 0:
        assert oldest + 1 + margin == levels[0].covers, "and exactly so much is left"
        assert max(ages(levels, late, control, at_requests=False)) == oldest


@settings(max_examples=30, deadline=None)
@given(loops())
def test_what_would_do_does(loop):
    """The shortest intents that are advised are long enough, under the rule that is advised."""
    levels, late, control = loop
    margin = judged(levels, late, control, lengthened_by={"slow": ("slow.length", 1)})["slow"]
    if not margin.remedy:
        return
    rule = "overlap" if "control.rule=overlap" in margin.remedy else control.rule
    length = re.search(r"slow\.length=(\d+)", margin.remedy)
    covers = int(length[1]) if length else levels[0].covers
    mended = (Level(name="slow", covers=covers), levels[1])
    changed = ControlConfig(**{**vars(control), "rule": rule})
    assert judged(mended, late, changed)["slow"].margin_steps >= 0
    assert max(ages(mended, late, changed)) < covers


@pytest.mark.parametrize("late", [1, 4, 8])
def test_under_fifo_robots_are_without_an_intent_until_they_ask_after_it_has_come(late):
    control, levels = ControlConfig(rule="fifo", max_intent_age_steps=1000), two(2)
    margin = judged(levels, {"slow": late, "fast": 0}, control)["slow"]
    without = -(-late // H) * H
    assert margin.margin_steps == -without
    found = ages(levels, {"slow": late, "fast": 0}, control, at_requests=False)
    assert max(found) + 1 == levels[0].covers + without
    assert f", and then {without} steps pass without one; " in margin.text
    assert "control.rule=overlap" in margin.remedy
    assert judged(levels, {"slow": 0, "fast": 0}, control)["slow"].remedy == ""


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 14), st.integers(1, 6), st.integers(0, 12), st.integers(0, 12))
def test_of_three_levels_each_waits_for_the_requests_of_the_one_below(upper, middle, top_late, middle_late):
    levels, late = three(upper, middle), {"top": top_late, "middle": middle_late, "fast": 0}
    control = ControlConfig(rule="overlap", max_intent_age_steps=10_000)
    found = judged(levels, late, control)
    if min(found["top"].margin_steps, found["middle"].margin_steps) >= 0:
        assert max(ages(levels, late, control)) < levels[1].covers


SETTINGS = {"slow": ("action.chunks", H), "policy": ("action.horizon", 1)}
LATE = "an intent of 10 steps is used up 10 steps before the next one is in use; action.chunks=4 in training would do"


@pytest.mark.parametrize(
    ("levels", "late", "control", "said"),
    [
        (two(2), 8, {"rule": "overlap"}, LATE),
        (two(4), 8, {"rule": "overlap"}, "of the 20 steps of an intent 0 are left when the next one is in use"),
        (two(4), 8, {"rule": "event"}, "of the 20 steps of an intent 0 are left when the next one is in use"),
        (two(2), 8, {"rule": "event"}, LATE),
        (two(4), 8, {}, "and then 10 steps pass without one; control.rule=overlap would do"),
        (two(2), 8, {}, "and then 10 steps pass without one; control.rule=overlap with action.chunks=4 in training would do"),
        (ONE, 4, {}, "a chunk lasts for 5 steps"),
        (ONE, 8, {}, "a chunk lasts for 5 steps, then robots wait for 3 more; action.horizon=8 in training would do"),
        (ONE, 8, {"execute_steps": 2}, "action.horizon=8 in training with control.execute_steps=8 would do"),
        (ONE, 4, {"execute_steps": 2}, "lasts for 2 steps, then robots wait for 2 more; control.execute_steps=4 would do"),
        (ONE, 2, {"committed_steps": 1}, "go on for 1 step meanwhile, then robots wait for 1 more; control.committed_steps=2"),
    ],
)
def test_it_is_said_in_one_line(levels, late, control, said):
    name = levels[0].name
    text = judged(levels, {name: late}, ControlConfig(**control), lengthened_by=SETTINGS)[name].text
    assert text.startswith(f"{name}: {1000 * late / HZ:g} ms (one robot) are {late} steps at 80 Hz; ")
    assert said in text


def test_without_a_setting_that_lengthens_it_the_length_is_said():
    late, control = {"slow": 8}, ControlConfig(rule="overlap")
    assert judged(two(2), late, control)["slow"].remedy == "intents of at least 20 steps"
    assert judged(two(2), late, control, lengthened_by={"slow": ("x", 7)})["slow"].remedy == "x=3 in training"
    assert judged(ONE, {"policy": 8}, control)["policy"].remedy == "chunks of at least 8 steps"


def test_injected_delay_and_batches_are_said():
    latency = Latency.of([10.0, 20.0, 30.0], robots=14.25, injected_steps=10)
    [margin] = margins(two(4), {"slow": latency}, HZ, ControlConfig(rule="overlap"))
    assert margin.late_steps == 10 + 3
    assert margin.text.startswith("slow: 29 ms (14.2 robots a call) and 10 steps of injected delay are 13 steps at 80 Hz")


def test_a_margin_says_of_whom_it_is():
    levels, latency = two(4), Latency(p50_ms=25.0, p95_ms=90.0, robots=2.5)
    [of] = margins(levels, {"slow": latency}, HZ, ControlConfig(rule="overlap"))
    assert (of.level, of.p50_ms, of.p95_ms, of.robots, of.control_hz) == ("slow", 25.0, 90.0, 2.5, HZ)
    assert (of.late_steps, of.covers, of.margin_steps) == (8, 20, 0)


def test_what_is_injected_is_what_is_set_or_drawn():
    levels = two(2)
    fixed = Delays(DelayConfig(intent_steps=7, chunk_steps=2))
    assert injected_steps(fixed, levels) == {"slow": 7, "fast": 2}
    drawn = Delays(DelayConfig(intent_steps=7), {"slow": np.arange(101), "fast": np.zeros(3, np.int64)})
    assert injected_steps(drawn, levels) == {"slow": 95, "fast": 0}
    assert injected_steps(fixed, three(6, 3)) == {"top": 7, "middle": 7, "fast": 2}


def test_a_latency_of_measured_calls_is_their_median_and_their_95th_percentile():
    assert Latency.of(np.arange(101.0)) == Latency(p50_ms=50, p95_ms=95, robots=1, injected_steps=0)


@pytest.mark.parametrize(("seconds", "calls"), [(0.001, 15), (0.3, 4), (0.25, 4), (0.5, 3), (7.0, 3)])
def test_a_level_is_measured_fifteen_times_or_for_a_second_but_at_least_three_times(seconds, calls):
    class Slow(Answers):
        now = 0.0

        def infer(self, level, observations, above):
            self.now += seconds
            return super().infer(level, observations, above)

    policy = Slow(ONE)
    found = measure(policy, Observation(images={}, state=np.zeros(2, np.float32), instruction="go"), lambda: policy.now)
    assert len(policy.calls) == 1 + calls, "the first one is not counted"
    assert found["policy"].p50_ms == pytest.approx(1000 * seconds)


def test_every_level_is_measured_with_the_intent_that_it_reads():
    policy = Answers(three(6, 3))
    found = measure(policy, Observation(images={}, state=np.zeros(2, np.float32), instruction="go"))
    assert list(found) == ["top", "middle", "fast"]
    assert all(0 <= latency.p50_ms <= latency.p95_ms for latency in found.values())
    assert dict.fromkeys(name for name, _ in policy.calls) == dict.fromkeys(found)
    assert dict(policy.calls) == {"top": [None], "middle": ["top"], "fast": ["middle"]}
