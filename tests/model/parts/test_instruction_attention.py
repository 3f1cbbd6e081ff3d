"""What the attention finds does not depend on where it is, and where it is found follows it."""

import pytest
import torch

from libra_ray.model.parts.vision import InstructionAttention

CHANNELS, SIZE = 6, 8


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return InstructionAttention(CHANNELS, 16).eval()


def scene(row, column, attention, sentence):
    """One cell is what the first query looks for; the others are what it looks for least."""
    wanted = attention.to_queries(sentence).view(attention.QUERIES, attention.KEY)[0]
    colours = torch.randn(2000, CHANNELS, generator=torch.Generator().manual_seed(1))
    order = (torch.nn.functional.normalize(attention.to_keys(colours), dim=-1) @ wanted).argsort()
    fine = colours[order[0]].expand(1, 1, SIZE, SIZE, CHANNELS).clone()
    fine[0, 0, row, column] = colours[order[-1]]
    return fine


@torch.no_grad()
@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 5), (7, 3)])
def test_a_thing_is_found_where_it_is(attention, row, column):
    sentence = torch.randn(1, 16, generator=torch.Generator().manual_seed(2))
    attention.scale.fill_(100.0)
    found = attention.find(scene(row, column, attention, sentence), sentence)[0, 0, 0, -2:]
    torch.testing.assert_close(found, 2 * torch.tensor([row, column]) / (SIZE - 1) - 1, atol=0.01, rtol=0)


@torch.no_grad()
def test_what_is_found_stays_the_same_wherever_it_is(attention):
    fine, sentence = torch.randn(2, 3, SIZE, SIZE, CHANNELS), torch.randn(2, 16)
    before, after = attention.find(fine, sentence), attention.find(fine.roll((2, 3), (2, 3)), sentence)
    torch.testing.assert_close(after[..., :-2], before[..., :-2])
    assert not torch.allclose(after[..., -2:], before[..., -2:])


@torch.no_grad()
def test_another_sentence_finds_something_else(attention):
    fine, sentence = torch.randn(1, 1, SIZE, SIZE, CHANNELS), torch.randn(2, 16)
    first, second = (attention.find(fine, one[None]) for one in sentence)
    assert not torch.allclose(first, second, atol=0.01)
    assert attention(fine, sentence[:1]).shape == (1, attention.QUERIES, 16)
