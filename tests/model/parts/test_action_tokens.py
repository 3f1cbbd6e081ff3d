"""The laws of coarse tokens: uniform cells, decoded at their centres."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libra_ray.model.parts.action_tokens import ActionTokenizer

ACTIONS = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20).map(torch.tensor)
COUNTS = st.integers(2, 500)


@given(actions=ACTIONS, count=COUNTS)
def test_round_trip_is_within_half_a_cell(actions, count):
    tokenizer = ActionTokenizer(count=count)
    assert ((tokenizer.decode(tokenizer.encode(actions)) - actions).abs() <= 1 / count + 1e-5).all()


@given(actions=ACTIONS, count=COUNTS)
def test_tokens_are_class_ids(actions, count):
    tokens = ActionTokenizer(count=count).encode(actions)
    assert tokens.dtype == torch.long
    assert ((tokens >= 0) & (tokens < count)).all()


@given(actions=st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=20), count=COUNTS)
def test_larger_actions_never_get_smaller_tokens(actions, count):
    tokens = ActionTokenizer(count=count).encode(torch.tensor(sorted(actions)))
    assert (tokens.diff() >= 0).all()


def test_many_bins_recover_the_action():
    actions = torch.linspace(-1, 1, 1001)
    errors = [
        (ActionTokenizer(count=n).decode(ActionTokenizer(count=n).encode(actions)) - actions).abs().max()
        for n in (10, 100, 1000, 10000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-4


@given(count=COUNTS)
def test_decodes_to_centres_which_encode_to_themselves(count):
    tokenizer, ids = ActionTokenizer(count=count), torch.arange(count)
    centres = tokenizer.decode(ids)
    width = 2 / count
    torch.testing.assert_close(centres[0], torch.tensor(-1 + width / 2))
    torch.testing.assert_close(centres[-1], torch.tensor(1 - width / 2))
    torch.testing.assert_close(centres.diff(), torch.full((count - 1,), width), rtol=1e-3, atol=1e-6)
    assert torch.equal(tokenizer.encode(centres), ids)


def test_values_outside_fall_into_the_outermost_cells():
    assert ActionTokenizer(count=7).encode(torch.tensor([-5.0, -1.0, 1.0, 5.0])).tolist() == [0, 0, 6, 6]


@given(count=COUNTS)
def test_the_hidden_token_means_no_intent(count):
    tokenizer = ActionTokenizer(count=count)
    assert tokenizer.mask_token not in tokenizer.encode(torch.linspace(-2, 2, 101))
    assert tokenizer.decode(torch.tensor([tokenizer.mask_token])).item() == 0


@pytest.mark.parametrize("count", [1, 0, -3])
def test_fewer_than_two_cells_are_refused(count):
    with pytest.raises(ValueError, match="at least 2"):
        ActionTokenizer(count=count)
