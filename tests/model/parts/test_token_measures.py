"""The laws of the offline measures: known entropies, known variances, and an answer that depends on nothing else."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from libra_ray.model.parts.action_tokens import ActionTokenizer
from libra_ray.model.parts.chunks import chunk_of
from libra_ray.model.parts.token_measures import BinMeans, groups_of, token_entropy
from libra_ray.training.fit import Trainer
from tests.model.builders import make_batch, tiny_config, tiny_model
from tests.training.builders import training_data

CPU = torch.device("cpu")
MONOLITHIC = {"model.system": "monolithic"}


def drawn(bins, size=(20000, 2, 3), seed=0):
    return torch.randint(0, bins, size, generator=torch.Generator().manual_seed(seed))


def all_of(tokens):
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("bins", [2, 3, 100])
def test_uniform_tokens_have_the_largest_entropy_and_constant_ones_none(bins):
    tokens = drawn(bins)
    assert token_entropy(tokens, all_of(tokens), bins) == pytest.approx(math.log(bins), abs=2e-3)
    assert token_entropy(torch.full_like(tokens, bins - 1), all_of(tokens), bins) == 0


def test_the_entropy_is_that_of_the_distribution():
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
    tokens = torch.multinomial(shares, 60000, replacement=True, generator=torch.Generator().manual_seed(0)).view(-1, 1, 1)
    assert token_entropy(tokens, all_of(tokens), 4) == pytest.approx(1.75 * math.log(2), abs=5e-3)


def test_steps_and_dimensions_are_told_apart():
    """Each place says one thing only, but every place another: nothing is uncertain."""
    tokens = torch.arange(6).view(1, 2, 3).expand(50, -1, -1)
    assert token_entropy(tokens, all_of(tokens), 6) == 0


def test_what_the_task_decides_is_not_uncertain_within_it():
    groups = torch.arange(3000) % 4
    tokens = groups[:, None, None].expand(-1, 2, 3)
    assert token_entropy(tokens, all_of(tokens), 4) == pytest.approx(math.log(4), abs=2e-3)
    assert token_entropy(tokens, all_of(tokens), 4, groups) == 0


def test_few_windows_are_corrected_for():
    """30 draws of 8 classes: the plain estimate is biased by about 7 / 60 nats, the corrected one by far less."""
    found = [token_entropy(drawn(8, (30, 1, 1), seed), all_of(torch.zeros(30, 1)), 8) for seed in range(200)]
    assert np.mean(found) == pytest.approx(math.log(8), abs=0.04)
    assert max(found) <= math.log(8) + 1e-9


def test_masked_steps_say_nothing():
    tokens, mask = drawn(5), torch.rand(20000, 2, generator=torch.Generator().manual_seed(1)) < 0.7
    other = tokens.masked_fill(~mask[..., None], 3)
    actions, strange = (
        ActionTokenizer(count=5).decode(tokens),
        torch.where(mask[..., None], ActionTokenizer(count=5).decode(tokens), 0.9),
    )
    assert token_entropy(tokens, mask, 5) == token_entropy(other, mask, 5)
    for values in (actions, strange):
        means = BinMeans.of(ActionTokenizer(count=5), values, mask)
        torch.testing.assert_close(means.means, ActionTokenizer(count=5).decode(torch.arange(5)).expand(3, -1))
        assert means.residual_share(values, mask) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("bins", [2, 3, 10, 100])
def test_uniform_actions_leave_one_part_in_n_squared(bins):
    """Variance 1/3 in all, (1/N)^2 / 3 within a bin."""
    actions = torch.rand(50000, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    means = BinMeans.of(ActionTokenizer(count=bins), actions, all_of(actions))
    assert means.residual_share(actions, all_of(actions)) == pytest.approx(1 / bins**2, rel=0.02)


def test_the_mean_of_a_bin_explains_nothing_and_the_action_itself_everything():
    model = tiny_model()
    batch = make_batch(model, 40, masked=2)
    chunk = chunk_of(batch, model.config.action.horizon)
    means = BinMeans.of(model.tokenizer, chunk.actions, chunk.mask)
    assert means.explained(means.decode(chunk.actions), chunk) == pytest.approx(0, abs=1e-5)
    assert means.explained(chunk.actions, chunk) == 1
    assert means.explained(model.tokenizer.decode(model.tokenizer.encode(chunk.actions)), chunk) < 0, (
        "centres are no better than means"
    )
    spoilt = torch.where(chunk.mask[..., None], chunk.actions, -7.0)
    assert means.explained(spoilt, chunk) == 1


def measured(model, batch):
    everything = replace(batch, plan_images=batch.plan_images[:, :0], images=batch.images[:, :0])
    return model.measure(batch, everything)


def test_measures_are_the_same_at_every_call_and_disturb_no_draw():
    model = tiny_model()
    batch = make_batch(model, 12, masked=3)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = measured(model, batch)
    assert torch.rand(1) == expected
    assert measured(model, batch) == first
    other = replace(batch, actions=torch.where(batch.action_mask[..., None], batch.actions, -0.9 * torch.ones(())))
    assert measured(model, other) == first


def test_every_measure_is_a_finite_number():
    model = tiny_model()
    found = measured(model, make_batch(model, 12))
    assert {"loss_plan", "loss_diff", "plan_accuracy", "action_error", "coarse_error"} < found.keys()
    assert all(math.isfinite(value) for value in found.values())
    left = found["residual_share"] * (1 - found["explained_truth"])
    assert found["variance_explained"] == pytest.approx(1 - left)


def test_a_monolithic_model_has_no_tokens_to_measure():
    model = tiny_model(MONOLITHIC)
    found = measured(model, make_batch(model, 12))
    assert set(found) == {"loss_diff", "action_error"}


def test_learning_shows():
    """Two bins leave much to the refiner; what both systems learn on a batch they are measured on must show there."""
    settings = {"train.steps": 60, "train.lr": 5e-3, "train.warmup_steps": 5, "action.bins": 2, "train.curriculum": "teacher"}
    model = tiny_model(settings)
    batch = make_batch(model, 4)
    before = measured(model, batch)
    list(Trainer(model, device=CPU).run([batch] * 60))
    after = measured(model.eval(), batch)
    assert after["plan_accuracy"] == 1
    assert after["plan_resolved"] > 0.9 > 0 > before["plan_resolved"]
    assert 1 - after["explained_truth"] < (1 - before["explained_truth"]) / 3
    assert after["explained_planner"] == pytest.approx(after["explained_truth"]), "the planner says the truth now"
    assert after["coarse_error"] < before["coarse_error"]
    assert (after["token_entropy"], after["residual_share"]) == (before["token_entropy"], before["residual_share"])


@pytest.mark.parametrize("changes", [{}, MONOLITHIC], ids=["dual", "monolithic"])
def test_held_out_episodes_are_measured_in_training(changes):
    config = tiny_config({"train.validate_every": 2, **changes})
    data = training_data(config)
    torch.manual_seed(0)
    model = data.make_model()
    with data.stream(model, rank=0, world=1, start_step=0) as stream:
        rows = [p.metrics for p in Trainer(model, device=CPU).run(stream, data.validator(CPU))]
    assert ["val_loss_diff" in row for row in rows] == [False, True, False, True]
    assert rows[-1]["val_loss_diff"] > 0
    if not changes:
        unseen = data.windows(model, data.split.holdout, pictures=False)
        assert len(groups_of(unseen.batch(np.arange(len(unseen)), np.random.default_rng(0))).unique()) == 2
        assert len(unseen) == 25
