"""What a report says of the time between levels: re-plans, success by age, jerk, reactions, deadlines; nothing of old runs."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libra_ray.common.json_text import dump, parse
from libra_ray.report.asynchrony import (
    AGE_GROUPS,
    ALIKE_STEPS,
    EPISODES_PER_GROUP,
    DeadlineMisses,
    figures,
    measured_asynchrony,
    success_by_age,
)
from libra_ray.report.page import render_page
from libra_ray.report.publish import figures_of
from libra_ray.report.records import Report
from libra_ray.report.table import summary_table
from libra_ray.runs.results import (
    ChunkJerk,
    EpisodeAsynchrony,
    EpisodeReplans,
    EpisodeResult,
    Evaluation,
    GoalReaction,
    LevelLatencies,
    TrainingLog,
)
from libra_ray.stats.intervals import wilson
from tests.report import builders


def episode(seed=0, *, success=True, ages=(), controller="policy", **between):
    found = EpisodeAsynchrony(**between) if between else None
    return EpisodeResult(
        task="reach-v3",
        instruction="reach",
        controller=controller,
        seed=seed,
        success=success,
        steps=10,
        intent_age_steps=list(ages),
        asynchrony=found,
    )


def of(*episodes, latencies=None, covered_ms=None):
    return measured_asynchrony(episodes, latencies or {}, covered_ms or {})


def test_replans_of_all_episodes_are_added_up_value_by_value():
    tokens = {"level": "planner", "value": "tokens"}
    found = of(
        episode(0, replans=[EpisodeReplans(**tokens, shares=[0.0, 0.5], differences=[0.0, 2.0])]),
        episode(1, replans=[EpisodeReplans(**tokens, shares=[0.1], differences=[1.0])]),
        episode(2, replans=[EpisodeReplans(level="goal", value="pace", differences=[0.25])]),
        episode(3),
    )
    planner, goal = found.replans
    assert (planner.level, planner.value, planner.count, planner.share) == ("planner", "tokens", 3, pytest.approx(0.2))
    assert (planner.mean, planner.p50, planner.max) == (1.0, 1.0, 2.0)
    assert planner.p95 == pytest.approx(1.9)
    assert (goal.level, goal.count, goal.share, goal.mean) == ("goal", 1, None, 0.25)


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=60))
def test_groups_of_ages_hold_every_episode_once_and_tear_none_of_one_age_apart(known):
    episodes = [episode(i, success=success, ages=[age]) for i, (age, success) in enumerate(known)]
    groups = success_by_age(episodes)
    ages = sorted(age for age, _ in known)
    if not groups:
        count = min(AGE_GROUPS, len(known) // EPISODES_PER_GROUP)
        assert count < 2 or ages[-1] - ages[0] < ALIKE_STEPS or ages[len(ages) * (count - 1) // count] == ages[0]
        return
    assert 2 <= len(groups) <= AGE_GROUPS
    assert sum(group.episodes for group in groups) == len(known)
    assert sum(group.successes for group in groups) == sum(success for _, success in known)
    for before, after in pairwise(groups):
        assert before.highest < after.lowest
    for group in groups:
        inside = [success for age, success in known if group.lowest <= age <= group.highest]
        assert (len(inside), sum(inside)) == (group.episodes, group.successes)
        interval = wilson(group.successes, group.episodes)
        assert group.interval == (interval.low, interval.high)


def test_groups_of_different_ages_are_of_equal_size():
    rng = np.random.default_rng(0)
    groups = success_by_age([episode(i, ages=[i, i + 1], success=bool(rng.random() < 0.5)) for i in rng.permutation(40)])
    assert [group.episodes for group in groups] == [10] * AGE_GROUPS
    assert (groups[0].lowest, groups[-1].highest) == (0.5, 39.5)


def test_the_mean_over_an_episodes_actions_is_its_age_and_an_error_is_a_failure():
    episodes = [episode(i, ages=[0, 0, 0, 4] if i < 5 else [9, 9]) for i in range(10)]
    episodes[9] = replace(episodes[9], error="RuntimeError: boom")
    young, old = success_by_age(episodes)
    assert (young.lowest, young.highest, old.lowest, old.highest) == (1, 1, 9, 9)
    assert (young.successes, old.successes) == (5, 4)


def test_where_all_are_of_one_age_there_is_nothing_to_show():
    assert success_by_age([episode(i, ages=[2, 2 + i % 2]) for i in range(40)]) == []
    assert success_by_age([episode(i) for i in range(40)]) == []
    assert success_by_age([episode(i, ages=[i]) for i in range(9)]) == []


def test_the_jerk_is_a_mean_over_episodes_with_a_border():
    jerks = [ChunkJerk(boundary=3.0, within=1.0), ChunkJerk(boundary=1.0, within=None), ChunkJerk(boundary=None, within=9.0)]
    found = of(*(episode(i, jerk=jerk) for i, jerk in enumerate(jerks))).jerk
    assert (found.episodes, found.boundary, found.within, found.ratio) == (2, 2.0, 1.0, 2.0)
    smooth = of(episode(jerk=ChunkJerk(boundary=3.0, within=0.0))).jerk
    assert (smooth.within, smooth.ratio) == (0.0, None)


def test_episodes_that_ended_before_they_reacted_are_counted_apart():
    steps = [(1, 4), (3, None), (None, None)]
    reactions = [GoalReaction(moved_at=9, chunk_steps=chunk, intent_steps=intent) for chunk, intent in steps]
    found = of(*(episode(i, reaction=reaction) for i, reaction in enumerate(reactions)), episode(9)).reaction
    assert (found.moved, found.chunk.count, found.intent.count) == (3, 2, 1)
    assert (found.chunk.p50, found.intent.p95) == (2.0, 4.0)


def test_a_deadline_is_what_an_answer_covers():
    calls = {"planner": LevelLatencies(ms=[100.0, 250.0, 250.1, 400.0], robots=[1] * 4), "refiner": LevelLatencies()}
    found = of(latencies=calls, covered_ms={"planner": 250.0, "refiner": 12.5, "never asked": 1.0}).deadline_misses
    assert found == {
        "planner": DeadlineMisses(deadline_ms=250.0, count=2, share=0.5),
        "refiner": DeadlineMisses(deadline_ms=12.5, count=0, share=None),
    }


def test_of_an_earlier_version_nothing_is_said():
    report = builders.report(measured=Evaluation(results=[episode(i, ages=[1, 2]) for i in range(3)]))
    assert report.asynchrony is None
    assert "asynchrony" not in json.loads(dump(report))
    assert 'id="asynchrony"' not in render_page(report, [], TrainingLog())


def test_it_speaks_of_the_policy_alone():
    jerk = {name: ChunkJerk(boundary=float(i), within=1.0) for i, name in enumerate(("policy", "coarse_only"))}
    results = [episode(controller=name, jerk=found) for name, found in jerk.items()]
    assert builders.report(measured=Evaluation(results=results)).asynchrony.jerk.boundary == 0.0
    assert builders.report(measured=Evaluation(results=results[1:])).asynchrony.jerk.boundary == 1.0


def test_everything_is_on_the_page_in_the_table_and_in_the_tracker():
    report = builders.report()
    assert parse(Report, dump(report), "report.json") == report
    found, page, table = report.asynchrony, render_page(report, [], builders.training_log()), summary_table(report)
    assert len(found.success_by_age) > 1
    for words in (
        "Re-plan disagreement",
        "Jerk where chunks meet",
        "Reaction to a moved goal",
        "Deadline misses",
        "not a cause",
    ):
        assert words in page
    assert f"{100 * found.replans[0].share:.1f} %" in page
    assert "planner re-plans, tokens" in table
    assert "moved goal known to a chunk after" in table
    named = figures_of(report)
    tracked = {"success_policy", "intent_age_steps_p95", "latency_ms_refiner_p99", "held_share", "deadline_misses_planner"}
    tracked |= {"replan_planner_tokens_share", "replan_planner_tokens_difference_p95", "jerk_boundary", "jerk_ratio"}
    tracked |= {"reaction_chunk_steps_p50", "reaction_intent_steps_p95"}
    assert tracked <= set(named)
    assert all(re.fullmatch(r"[\w\-./: ]+", name) for name in named)
    assert named["replan_planner_tokens_share"] == found.replans[0].share
    assert figures(None) == {}
