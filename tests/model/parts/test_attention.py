"""Laws of the building blocks."""

import pytest
import torch

from libra_ray.model.parts.attention import FEW, Attention


@pytest.mark.parametrize("padded", [0, 2])
@pytest.mark.parametrize("length", [7, FEW + 1])
def test_attention_says_the_same_whether_or_not_it_is_being_trained(length, padded):
    torch.manual_seed(0)
    attention, x = Attention(16, heads=4), torch.randn(3, length, 16)
    mask = (torch.arange(length) < length - padded).expand(3, -1) if padded else None
    trained = attention(x, mask)
    with torch.no_grad():
        torch.testing.assert_close(trained, attention(x, mask))


def test_rows_of_one_observation_look_at_it_as_each_would_alone():
    """Its keys and values are those of all of them, and what others see is no concern of theirs."""
    torch.manual_seed(0)
    attention, x, seen = Attention(16, heads=4, sees=True), torch.randn(6, 5, 16), torch.randn(2, 9, 16)
    together = attention(x, seen=attention.seen(seen))
    for row in range(6):
        alone = attention(x[row : row + 1], seen=attention.seen(seen[row // 3][None]))
        torch.testing.assert_close(together[row : row + 1], alone)
    assert not torch.allclose(attention(x, seen=attention.seen(seen.flip(0))), together)


def test_nobody_attends_to_padding():
    torch.manual_seed(0)
    attention, x = Attention(16, heads=4), torch.randn(2, 6, 16)
    mask = (torch.arange(6) < 4).expand(2, -1)
    other = x.clone()
    other[:, 4:] = 100
    torch.testing.assert_close(attention(x, mask)[:, :4], attention(other, mask)[:, :4])
