"""Loading what comes from outside: the libraries' own lines stay away, ours is one."""

import logging

import pytest

from libra_ray.model.parts.pretrained import cannot_load

TALKATIVE = ("huggingface_hub.utils._http", "transformers.modeling_utils")
"""Who tells of every retry of a hub that is away, and of weights that do not fit."""


def levels() -> list[int]:
    return [logging.getLogger(name).getEffectiveLevel() for name in TALKATIVE]


def test_the_libraries_are_silent_while_a_model_loads_and_speak_afterwards():
    before, during = levels(), []

    def fail():
        during.extend(levels())
        raise OSError("away")

    with (
        pytest.raises(ValueError, match=r"^x='nobody/nothing' cannot be loaded .* \(away\); give `y`.*$"),
        cannot_load("x", "nobody/nothing", "vision", "y"),
    ):
        fail()
    assert during == [logging.ERROR] * len(TALKATIVE)
    assert levels() == before != during
