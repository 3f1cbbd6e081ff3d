"""Where a step's time goes, by a clock that is handed in."""

import itertools

import pytest
import torch

from libra_ray.training.speed import StepTimer


@pytest.fixture
def timer(monkeypatch):
    """Each reading of its clock is a second after the one before."""
    seconds = itertools.count()
    monkeypatch.setattr(StepTimer, "_now", lambda _: float(next(seconds)))
    return StepTimer(torch.device("cpu"), enabled=True)


def test_what_is_waited_within_a_part_is_none_of_it(timer):
    timer.begin()
    timer.enter("forward")
    for _ in range(3):
        with timer.within("communication"):
            pass
    timer.mark("forward")
    assert timer.take() == {"forward": 4, "communication": 3}


def test_what_comes_after_an_interruption_belongs_to_the_next_mark(timer):
    timer.begin()
    timer.enter("backward")
    timer.interrupt()
    timer.interrupt()
    timer.mark("communication")
    assert timer.take() == {"backward": 2, "communication": 1}


def test_outside_of_parts_nothing_is_counted(timer):
    """A validation gathers weights too."""
    timer.begin()
    timer.mark("optimiser")
    timer.interrupt()
    with timer.within("communication"):
        pass
    assert timer.take() == {"optimiser": 1}
