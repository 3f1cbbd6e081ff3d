"""What one robot knows of one level above the last."""

import numpy as np

from libra_ray.control.intent_state import Coming, IntentState
from libra_ray.types import Intent


def intent(first_step: int, value: float = 0.0) -> Intent:
    return Intent(level="planner", values={"plan": np.full((10, 1), value)}, first_step=first_step, covers=10)


def test_how_long_an_intent_took_is_counted_to_its_first_use_but_for_the_episodes_first():
    state = IntentState(pending=[Coming(step=0, intent=intent(0))], requested=True)
    state.adopt(3)
    assert state.took_steps == 0
    state.pending = [Coming(step=8, intent=intent(5))]
    state.adopt(10)
    assert state.took_steps == 5


def test_of_two_intents_of_one_observation_the_later_answer_is_used_and_an_older_observation_never():
    state = IntentState(pending=[Coming(step=4, intent=intent(4, 2.0)), Coming(step=2, intent=intent(4, 1.0))])
    state.adopt(5)
    assert state.current is not None
    assert state.current.values["plan"][0, 0] == 2.0
    state.pending = [Coming(step=6, intent=intent(3, 3.0))]
    state.adopt(6)
    assert state.current.values["plan"][0, 0] == 2.0
