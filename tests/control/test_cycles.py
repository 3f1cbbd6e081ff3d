"""How a level's intents follow one another is what a driven robot shows: when each is asked for, and when it is in use."""

import itertools

import numpy as np

from libra_ray.config import ControlConfig
from libra_ray.control.margin import asked_every
from libra_ray.types import Level
from tests.control.test_margin import RULES, Answers, driven, judged, three, two


def cycles(levels, late, control, steps=130):
    """By level above the last: steps between two requests to it, and from an intent's picture until the next is in use.

    In use is an intent where its reader is asked under it; by `fifo`, whose readers wait for it, where it can be.
    """
    policy = Answers(levels)
    _, had = driven(policy, late, control, steps=steps)
    found = {}
    for level in levels[:-1]:
        used = had[level.name] if control.rule == "fifo" else policy.read[level.name]
        replaced = {
            later - first for (_, first), (later, newer) in itertools.pairwise(used) if first != newer and first > steps // 3
        }
        asked = [step for step in policy.asked[level.name] if step > steps // 3]
        found[level.name] = set(np.diff(asked).tolist()), replaced
    return found


PACES = [
    {"horizon": 3},
    {"horizon": 4, "execute_steps": 3},
    {"horizon": 4, "committed_steps": 1},
    {"horizon": 4, "execute_steps": 2, "committed_steps": 2},
    {"horizon": 5, "committed_steps": 2},
]


def paced(rule, horizon, **steps):
    return ControlConfig(rule=rule, max_intent_age_steps=10_000, **steps), Level(name="fast", covers=horizon, reads="slow")


def as_is_said(levels, late, control):
    """Whether a driven robot asks levels, and has their next intents in use, when that is said.

    Where one is late those below it wait for it, which is not reckoned with; then only the first one is judged.
    """
    said, found, shown = asked_every(levels, late, control), judged(levels, late, control), cycles(levels, late, control)
    in_time = min(margin.margin_steps for margin in found.values()) >= 0
    for level in levels[:-1] if in_time else levels[:1]:
        # The last level's chunks are executed so much later.
        beyond = control.committed_steps if level is levels[-2] else 0
        replaced = level.covers - found[level.name].margin_steps - beyond
        if shown[level.name] != ({said[level.name]}, {replaced}):
            return False
    return True


@RULES
def test_a_level_is_asked_and_its_intents_replaced_when_that_is_said(rule):
    """Also where they come too late, or are shorter than a chunk."""
    for pace, covers, late in itertools.product(PACES, (2, 6, 13), (0, 3, 7)):
        control, fast = paced(rule, **pace)
        levels = Level(name="slow", covers=covers), fast
        assert as_is_said(levels, {"slow": late, "fast": control.committed_steps}, control), (pace, covers, late)


@RULES
def test_of_three_levels_each_is_asked_and_replaced_when_that_is_said(rule):
    """Where all come in time; by `fifo` the first one also where it does not, for it is asked whatever is done below."""
    loops = 0
    for pace, top, middle, top_late, middle_late in itertools.product(PACES[::3], (18, 25, 35), (6, 9), (0, 4, 9), (0, 3)):
        control, fast = paced(rule, **pace)
        upper = Level(name="top", covers=top), Level(name="slow", covers=middle, reads="top")
        levels, late = (*upper, fast), {"top": top_late, "slow": middle_late, "fast": control.committed_steps}
        if rule == "fifo" or min(margin.margin_steps for margin in judged(levels, late, control).values()) >= 0:
            assert as_is_said(levels, late, control), (pace, top, middle, top_late, middle_late)
            loops += 1
    assert loops >= 20


def test_no_chunk_is_asked_for_while_another_one_is_under_way():
    """However few steps of each are executed."""
    for execute, late in itertools.product((1, 2, 3), (0, 1, 2, 3, 4)):
        control, policy = ControlConfig(execute_steps=execute, max_intent_age_steps=10_000), Answers(two(4))
        driven(policy, {"slow": 0, "fast": late}, control, at_requests=False, steps=60)
        assert set(np.diff(policy.asked["fast"])[1:]) == {asked_every(policy.levels, {"fast": late}, control)["fast"]}


@RULES
def test_what_is_not_said_to_be_late_is_not(rule):
    control, levels = ControlConfig(rule=rule), three(6, 3)
    assert asked_every(levels, {}, control) == asked_every(levels, dict.fromkeys(("top", "middle", "fast"), 0), control)
