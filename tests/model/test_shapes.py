"""Shape annotations are law in tests: a tensor of another shape is refused where it enters, not where it surprises."""

from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError

from libra_ray.model.parts.action_tokens import ActionTokenizer
from tests.model.builders import make_batch, tiny_model
from tests.model.test_libra import answers


def test_a_batch_of_two_sizes_is_refused():
    batch = make_batch(tiny_model())
    with pytest.raises(TypeCheckError, match="state"):
        replace(batch, state=batch.state[:3])


def test_floats_are_no_pictures():
    batch = make_batch(tiny_model())
    with pytest.raises(TypeCheckError, match="images"):
        replace(batch, images=batch.images.float())


def test_tokens_of_another_length_than_the_noise_are_refused():
    model = tiny_model()
    batch = make_batch(model)
    with pytest.raises(TypeCheckError, match="noise"):
        answers(model, batch, noise=torch.zeros(len(batch), 3, 4))


def test_actions_are_no_tokens():
    with pytest.raises(TypeCheckError):
        ActionTokenizer(count=3).decode(torch.zeros(2, 3))
