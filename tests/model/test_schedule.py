"""Schedules of training."""

from libra_ray.model.libra import Curriculum
from libra_ray.model.schedule import OneAfterAnother, Schedule
from tests.model.builders import tiny_config


def through(schedule, steps, accuracy=1.0):
    """Phase, learning parts and stretch at every step."""
    found = []
    for step in range(steps):
        learning = [part for part in ("a", "b") if schedule.learns(part)]
        found.append((schedule.phase, learning, schedule.stretch(steps)))
        schedule.advance(step + 1, {"plan_accuracy": accuracy})
    return found


def test_by_itself_nothing_changes():
    assert set(map(str, through(Schedule(), 3))) == {"('', ['a', 'b'], (0, 3))"}


def test_one_part_learns_after_another_each_with_its_own_learning_rate():
    found = through(OneAfterAnother(("a", "b"), Schedule(), 2, frozen=True), 5)
    assert found == [("a", ["a"], (0, 2))] * 2 + [("b", ["b"], (2, 5))] * 3
    together = through(OneAfterAnother(("a", "b"), Schedule(), 2, frozen=False), 3)
    assert together[-1] == ("b", ["a", "b"], (2, 3))
    assert through(OneAfterAnother(("a", "b"), Schedule(), 0, frozen=True), 2) == [("b", ["b"], (0, 2))] * 2


def test_the_first_parts_own_phases_go_on_inside_and_end_with_it():
    def schedule():
        changes = {"train.curriculum": "threshold", "train.tau": 0.5, "train.warmup_steps": 2}
        return OneAfterAnother(("a", "b"), Curriculum(tiny_config(changes).train), 4, frozen=True)

    whole = schedule()
    assert whole.phases == ("a_ground_truth", "a_sampled", "b")
    phases = [phase for phase, _, _ in through(whole, 6)]
    assert phases == ["a_ground_truth"] * 2 + ["a_sampled"] * 2 + ["b"] * 2
    for stop in range(6):
        first, second = schedule(), schedule()
        early = through(first, stop)
        second.restore(first.state())
        late = [phases[stop]] if stop == 5 else phases[stop:]
        assert [second.phase] == late[:1]
        assert len(early) == stop
