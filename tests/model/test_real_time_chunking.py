"""Real-time chunking: a chunk goes on from what the robot executes while it is computed."""

import dataclasses

import pytest
import torch

from libra_ray.model.parts.chunks import Chunk, Prefix, chunk_of
from libra_ray.model.system import seen_now
from tests.model.builders import SHAPE, make_batch, tiny_model

MOST = 2
SYSTEMS = pytest.mark.parametrize("changes", [{}, {"model.system": "monolithic"}, {"refiner.predicts": "target"}])


def learned(changes):
    """A model that knows what a committed step is, as training would have it."""
    model = tiny_model({"refiner.max_committed_steps": MOST, **changes})
    model.refiner.is_committed.data.normal_(0, 0.1)
    return model


def answer(model, batch, committed=None):
    last = model.levels[-1]
    noise = torch.randn(len(batch), last.covers, SHAPE.action_dim, generator=torch.Generator().manual_seed(0))
    above = {} if last.reads is None else {"tokens": torch.ones(len(batch), last.covers, SHAPE.action_dim, dtype=torch.int64)}
    return model.infer(last.name, dataclasses.replace(seen_now(batch), committed=committed), above, noise)["actions"]


@SYSTEMS
def test_what_is_committed_comes_back_and_the_rest_goes_on_from_it(changes):
    model = learned(changes)
    batch, draws = make_batch(model, 3), torch.Generator().manual_seed(1)
    one, other = (torch.rand(3, MOST, SHAPE.action_dim, generator=draws) for _ in range(2))
    first, second = answer(model, batch, one), answer(model, batch, other)
    torch.testing.assert_close(first[:, :MOST], one)
    torch.testing.assert_close(second[:, :MOST], other)
    assert (first[:, MOST:] - second[:, MOST:]).abs().max() > 1e-4


@SYSTEMS
def test_who_waits_is_answered_as_if_there_were_nobody_else(changes):
    """Robots of one batch may be committed to two steps, to one, and to none."""
    model = learned(changes)
    batch = make_batch(model, 3)
    committed = torch.rand(3, MOST, SHAPE.action_dim)
    committed[1, 1:] = torch.nan
    committed[2] = torch.nan
    together = answer(model, batch, committed)
    torch.testing.assert_close(together[2], answer(model, batch)[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1, 0], committed[1, 0])
    assert not together.isnan().any()


@SYSTEMS
def test_more_than_was_learned_is_not_read(changes):
    model = learned(changes)
    batch, long = make_batch(model, 3), torch.rand(3, MOST + 2, SHAPE.action_dim)
    torch.testing.assert_close(answer(model, batch, long), answer(model, batch, long[:, :MOST]))


def test_a_refiner_that_did_not_learn_it_answers_by_itself():
    model = tiny_model()
    batch = make_batch(model, 3)
    torch.testing.assert_close(answer(model, batch, torch.rand(3, MOST, SHAPE.action_dim)), answer(model, batch))


def test_every_length_is_drawn_and_only_of_steps_that_there_are():
    actions = torch.rand(4000, 5, 3)
    mask = torch.arange(5) < torch.where(torch.arange(4000) % 2 == 0, 5, 1)[:, None]
    prefix = Prefix.drawn(Chunk(actions=actions, mask=mask), MOST, torch.Generator().manual_seed(0))
    lengths = prefix.mask[::2].sum(1)
    assert torch.bincount(lengths).tolist() == pytest.approx([2000 / 3] * 3, rel=0.15)
    assert (prefix.mask & ~mask).sum() == 0
    assert (prefix.mask.int().diff(dim=1) <= 0).all(), "it is the beginning"


@SYSTEMS
def test_committed_steps_are_not_learned_and_the_others_are_learned_under_them(changes, monkeypatch):
    """The loss does not change with what the network says of them; it does with what they are."""
    model = learned(changes)
    batch = make_batch(model, 4)
    horizon = model.config.action.horizon
    always = torch.zeros(1, horizon, dtype=torch.bool)
    always[:, :MOST] = True

    def drawn(cls, chunk, most, generator=None):
        return cls(actions=chunk.data, mask=always.expand(len(chunk.actions), -1) & chunk.mask)

    monkeypatch.setattr(Prefix, "drawn", classmethod(drawn))

    def loss(batch):
        torch.manual_seed(0)
        return model.losses(batch, model.schedule().phase).terms["diff"]

    before = loss(batch)
    steps = batch.offset[:, None] + torch.arange(MOST)
    moved = batch.actions.clone()
    moved[torch.arange(4)[:, None], steps] = -moved[torch.arange(4)[:, None], steps]
    assert loss(dataclasses.replace(batch, actions=moved)) != before
    said = model.refiner.denoise

    def wrong(*asked):
        return said(*asked) + 100 * always[..., None]

    monkeypatch.setattr(model.refiner, "denoise", wrong)
    torch.testing.assert_close(loss(batch), before)
    chunk = chunk_of(batch, horizon)
    assert chunk.mask[:, MOST:].any()
