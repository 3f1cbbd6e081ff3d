"""The laws of coarse-to-fine: what teaches the coarse heads, where the flow begins, and what it regresses."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from libra_ray.model.coarse_to_fine import COARSE_ONLY
from libra_ray.model.parts.diffusion import FlowMatching
from libra_ray.model.registry import make_system
from libra_ray.model.system import seen_now
from libra_ray.training.fit import Trainer
from tests.model.builders import SHAPE, make_batch, tiny_config, tiny_model

SYSTEM = {"model.system": "coarse_to_fine"}
PREDICTS = pytest.mark.parametrize("predicts", ["action", "target"])


def model_of(**changes):
    return tiny_model(SYSTEM | {name.replace("__", "."): value for name, value in changes.items()})


def losses(model, batch):
    return model(batch, "", torch.Generator().manual_seed(7)).terms


def noise_for(model, batch):
    return torch.randn(len(batch), model.config.action.horizon, SHAPE.action_dim, generator=torch.Generator().manual_seed(3))


def answer(model, batch, noise=None, variant=""):
    noise = noise_for(model, batch) if noise is None else noise
    return model.infer("policy", seen_now(batch), {}, noise, variant)["actions"]


class Spy(FlowMatching):
    """The objective, with what it was given."""

    def corrupt(self, data, noise, u):
        object.__setattr__(self, "begin", noise)
        object.__setattr__(self, "made", super().corrupt(data, noise, u))
        return self.made

    def sample(self, predict, noise, steps):
        object.__setattr__(self, "began", noise)
        return super().sample(predict, noise, steps)


def test_the_coarse_heads_learn_by_cross_entropy():
    """By argmax and a squared error they would get no gradient at all."""
    model = model_of()
    batch = make_batch(model, masked=8)
    found = losses(model, batch)
    heads = list(model.planner.to_logits.parameters())
    gradients = torch.autograd.grad(found["coarse"], heads, retain_graph=True)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    head = [*model.planner.parameters()]
    assert set(torch.autograd.grad(found["flow"], head, allow_unused=True)) == {None}, "the flow teaches the flow alone"
    logits = model.planner.logits(model._read(seen_now(batch))[0])
    horizon = model.config.action.horizon
    rows = batch.offset[:, None] + torch.arange(horizon)
    actions = batch.actions.gather(1, rows[..., None].expand(-1, -1, SHAPE.action_dim))
    mask = batch.action_mask.gather(1, rows)
    classes = ((actions + 1) / 2 * 10).floor().long().clamp(0, 9)
    each = functional.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view(classes.shape)
    torch.testing.assert_close(found["coarse"], each[mask].mean())


def test_coarse_actions_are_the_centres_of_cells():
    """Decoded at edges, class k / (N - 1), the outermost classes would be -1 and 1."""
    model = model_of()
    batch = make_batch(model)
    with torch.no_grad():
        for chosen, centre in ((0, -0.9), (9, 0.9), (4, -0.1)):
            model.planner.to_logits.bias.view(-1, 10)[:] = 1e3 * functional.one_hot(torch.tensor(chosen), 10)
            torch.testing.assert_close(answer(model, batch, variant=COARSE_ONLY), torch.full((6, 5, 4), centre))


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5])
def test_the_flow_begins_at_the_coarse_action_and_a_little_noise(scale):
    """In training as at inference."""
    model = model_of(coarse_to_fine__noise=scale, refiner__noise_draws=1)
    model.refiner.objective = spy = Spy()
    batch, noise = make_batch(model, 64), noise_for(model, make_batch(model, 64))
    coarse = answer(model, batch, variant=COARSE_ONLY)
    answer(model, batch, noise)
    torch.testing.assert_close(spy.began, coarse + scale * noise)
    losses(model, batch)
    assert (spy.begin - coarse).std() == pytest.approx(scale, rel=0.1)
    assert (spy.begin - coarse).mean() == pytest.approx(0, abs=0.05)


def test_the_starting_noise_can_be_turned_down_at_inference_alone():
    model = model_of(refiner__sample_noise=0.0)
    batch = make_batch(model)
    assert torch.equal(answer(model, batch), answer(model, batch, torch.zeros(6, 5, 4)))


def test_the_loss_is_a_regression_of_the_velocity():
    """One question to the network at one point of the path: nothing is unrolled."""
    model, asked = model_of(refiner__predicts="target", refiner__noise_draws=1), []
    model.refiner.objective = spy = Spy()
    model.refiner.register_forward_hook(lambda module, given, output: asked.append(output))
    batch = make_batch(model)
    found = losses(model, batch)["flow"]
    rows = batch.offset[:, None] + torch.arange(5)
    actions = batch.actions.gather(1, rows[..., None].expand(-1, -1, SHAPE.action_dim))
    t = spy.made.t[:, None, None]
    torch.testing.assert_close(spy.made.x, (1 - t) * spy.begin + t * actions)
    assert len(asked) == 1
    torch.testing.assert_close(found, (asked[0] - (actions - spy.begin)).square().mean())
    assert (
        losses(model_of(refiner__predicts="target", refiner__noise_draws=1, coarse_to_fine__steps=50), batch)["flow"] == found
    )


def test_an_error_of_the_action_is_the_velocitys():
    """Where the network says the action, the loss is still the velocity's, but close to the path's end."""
    model, asked = model_of(refiner__noise_draws=1), []
    model.refiner.objective = spy = Spy()
    model.refiner.register_forward_hook(lambda module, given, output: asked.append(output))
    batch = make_batch(model, 64)
    found = losses(model, batch)["flow"]
    coarse = answer(model, batch, variant=COARSE_ONLY)
    velocity = spy.target_of(coarse + asked[0], spy.made.x, spy.made.t)
    bound = ((1 - spy.made.t).clamp(max=0.2) / 0.2).square()
    torch.testing.assert_close(found, (bound[:, None, None] * (velocity - spy.made.target).square()).mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_true_velocity_leads_from_the_coarse_action_to_the_fine_one(steps, monkeypatch):
    model, calls = model_of(refiner__predicts="target", coarse_to_fine__steps=steps), []
    batch, noise = make_batch(model), noise_for(model, make_batch(model))
    goal = batch.actions[:, :5]
    begin = answer(model, batch, variant=COARSE_ONLY) + 0.1 * noise
    monkeypatch.setattr(model.refiner, "denoise", lambda *given: calls.append(given) or goal - begin)
    torch.testing.assert_close(answer(model, batch, noise), goal)
    assert len(calls) == steps


def test_a_flow_that_has_learned_nothing_ends_at_the_coarse_action():
    torch.manual_seed(0)
    model = make_system(tiny_config(SYSTEM), SHAPE).eval()
    batch = make_batch(model)
    torch.testing.assert_close(answer(model, batch), answer(model, batch, variant=COARSE_ONLY), atol=1e-5, rtol=0)


@PREDICTS
def test_masked_steps_never_influence_a_loss(predicts):
    model = model_of(refiner__predicts=predicts)
    batch = make_batch(model, masked=8)
    other = replace(batch, actions=torch.where(batch.action_mask[..., None], batch.actions, -0.9 * torch.ones(())))
    assert losses(model, batch) == losses(model, other)
    assert losses(model, batch) != losses(model, replace(batch, actions=-batch.actions))


def test_what_is_committed_is_gone_on_from():
    model = model_of(refiner__max_committed_steps=2)
    batch = make_batch(model)
    committed = torch.full((6, 2, SHAPE.action_dim), 0.3)
    committed[3:] = torch.nan
    seen = replace(seen_now(batch), committed=committed)
    chunk, free = model.infer("policy", seen, {}, noise_for(model, batch))["actions"], answer(model, batch)
    torch.testing.assert_close(chunk[:3, :2], committed[:3])
    assert not torch.allclose(chunk[:3, 2:], free[:3, 2:])
    torch.testing.assert_close(chunk[3:], free[3:])


@PREDICTS
def test_a_few_steps_overfit_a_tiny_batch(predicts):
    steps = {"train__steps": 40, "train__log_every": 40, "train__lr": 5e-3, "train__warmup_steps": 5}
    model = model_of(refiner__predicts=predicts, action__bins=3, **steps)
    batch = make_batch(model, 4)
    before = losses(model, batch)["flow"].detach()
    trainer = Trainer(model, device=torch.device("cpu"))
    rows = [progress.metrics for progress in trainer.run([batch] * 40)]
    assert rows[-1]["coarse_accuracy"] == 1
    assert rows[-1]["loss_flow"] < 0.4 * before
    measured = model.eval().measure(batch, batch)
    assert measured["action_error"] < measured["action_error_coarse_only"]


def test_it_is_a_flow():
    with pytest.raises(ValueError, match=r"not from noise; give refiner\.objective=flow"):
        model_of(refiner__objective="ddpm")
