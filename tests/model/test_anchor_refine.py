"""The laws of AnchorRefine: who learns when, what the residual is asked for, and what each ablation changes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from libra_ray.model.anchor_refine import ANCHOR, ANCHOR_ONLY, RESIDUAL, UNKNOWN
from libra_ray.model.registry import make_system
from libra_ray.model.system import seen_first, seen_now
from libra_ray.spec import NO_GRIPPER, VectorSpec
from libra_ray.training.data import make_model
from libra_ray.training.fit import Trainer, learning_rate
from tests.model.builders import SHAPE, make_batch, save_checkpoint, tiny_config, tiny_model

CPU = torch.device("cpu")
GRIPPER, ARM = SHAPE.action_dim - 1, slice(SHAPE.action_dim - 1)
FORMS = {
    "regression": {},
    "two_levels": {"levels": "two"},
    "own_context": {"levels": "two", "context": "own"},
    "diffusion": {"backbone": "diffusion"},
    "libra_two_levels": {"backbone": "libra", "levels": "two"},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
two_forms = pytest.mark.parametrize("form", [FORMS["regression"], FORMS["two_levels"]], ids=["one_level", "two_levels"])


def settings(**changes):
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return {"model.system": "anchor_refine"} | {n if "." in n else f"anchor_refine.{n}": v for n, v in given.items()}


def losses(model, batch, phase=RESIDUAL):
    return model(batch, phase, torch.Generator().manual_seed(7))


def gradient(part) -> float:
    return sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)


def answer(model, batch, variant=""):
    """The chunks for the present pictures, under the anchors of the plans'."""
    first = model.levels[0]
    shape = model.noise_shape(first.name)
    noise = None if shape is None else torch.zeros(len(batch), *shape)
    if not model.two:
        return model.infer(first.name, seen_now(batch), {}, noise, variant)["actions"]
    anchor = model.infer(ANCHOR, seen_first(batch), {}, noise, variant)
    above = model.aligned(model.levels[1], anchor, batch.offset)
    return model.infer(RESIDUAL, seen_now(batch), above, None, variant)["actions"]


def chunk(batch, horizon=5):
    rows = batch.offset[:, None] + torch.arange(horizon)
    return batch.actions.gather(1, rows[..., None].expand(-1, -1, SHAPE.action_dim))


@every_form
def test_no_loss_of_the_second_phase_reaches_the_anchor(form):
    model = tiny_model(settings(**form)).train()
    batch = make_batch(model)
    found = losses(model, batch)
    assert found.terms.keys() == {"residual", "gripper"}
    sum(found.terms.values()).backward()
    assert [name for name, p in model.anchor.named_parameters() if p.grad is not None] == []
    assert gradient(model.residual) > 0
    model.zero_grad()
    first = losses(model, batch, model.schedule().phases[0])
    assert first.terms.keys() == set(model.anchor.loss_weights())
    sum(first.terms.values()).backward()
    assert gradient(model.anchor) > 0
    assert gradient(model.residual) == 0


@two_forms
def test_without_the_stop_gradient_it_does(form):
    model = tiny_model(settings(**form, stop_gradient=False))
    losses(model, make_batch(model)).terms["residual"].backward()
    assert gradient(model.anchor) > 0


def trained(model, steps, state=None):
    trainer = Trainer(model, device=CPU, state=state)
    rows = [p.metrics for p in trainer.run([make_batch(model, 4, seed=s) for s in range(steps)][trainer.step :], until=steps)]
    return trainer, rows


def copied(tensors):
    return {name: value.clone() for name, value in tensors.items()}


def averages(trainer):
    """Of the anchor's weights."""
    return {n.removeprefix("anchor."): v.clone() for n, v in trainer.weights().items() if n.startswith("anchor.")}


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_anchor_stays_what_the_policy_runs_with(stop_gradient):
    """From the first step of the second phase its weights are the average of the first, and nothing moves them any more."""
    strong = {"train.weight_decay": 0.5, "train.lr": 1e-2, "train.steps": 6, "anchor_share": 0.5}
    model = tiny_model(settings(**strong, stop_gradient=stop_gradient))
    first, _ = trained(model, 3)
    settled, average = copied(model.anchor.state_dict()), averages(first)
    assert all(torch.equal(settled[name], average[name]) for name in settled) is stop_gradient
    before = copied(model.residual.state_dict())
    last, rows = trained(model, 6, copy.deepcopy(first.state()))
    assert not all(torch.equal(before[name], now) for name, now in model.residual.state_dict().items())
    for now in (model.anchor.state_dict(), averages(last)):
        assert all(torch.equal(settled[name], value) for name, value in now.items()) is stop_gradient
    assert {row["grad_norm_anchor"] > 0 for row in rows} == {not stop_gradient}


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_run_resumed_before_at_or_after_the_change_is_the_unbroken_one(stop):
    changes = settings(**{"train.steps": 6, "anchor_share": 0.5, "train.augment_pixels": 2, "backbone": "diffusion"})
    whole, rows = trained(tiny_model(changes), 6)
    assert [row["phase_residual"] for row in rows] == [0, 0, 0, 1, 1, 1]
    first, early = trained(tiny_model(changes), stop)
    second, late = trained(tiny_model(changes), 6, copy.deepcopy(first.state()))
    assert all(torch.equal(second.weights()[name], value) for name, value in whole.weights().items())
    assert all(torch.equal(second.model.state_dict()[name], value) for name, value in whole.model.state_dict().items())
    assert [row["loss"] for row in early + late] == [row["loss"] for row in rows]
    assert second.schedule.state() == whole.schedule.state()


def test_each_phase_has_a_learning_rate_that_rises_and_falls():
    config = tiny_config(settings(**{"train.steps": 20, "train.warmup_steps": 2, "anchor_share": 0.5}))
    _, rows = trained(make_system(config, SHAPE), 20)
    rates = [row["lr"] for row in rows]
    assert rates[:10] == rates[10:] == [learning_rate(config.train, step, 10) for step in range(10)]


def test_the_frozen_anchor_neither_drops_out_nor_counts():
    model = tiny_model(settings(backbone="regression"))
    model.anchor.planner.backbone.extra = nn.Dropout(0.5)
    model.train()
    losses(model, make_batch(model), ANCHOR)
    assert model.anchor.planner.backbone.extra.training
    losses(model, make_batch(model), RESIDUAL)
    assert model.training
    assert model.residual.training
    assert not any(module.training for module in model.anchor.modules())


@every_form
def test_the_residual_is_what_the_anchor_lacks(form, monkeypatch):
    model = tiny_model(settings(**form))
    batch = make_batch(model)
    anchor, known, _ = model._read_batch(batch, torch.Generator().manual_seed(7))
    assert known.all()
    monkeypatch.setattr(model, "_said", lambda features, state, anchor, known: chunk(batch) - anchor)
    found = losses(model, batch)
    assert found.terms["residual"] == 0
    torch.testing.assert_close(answer(model, batch)[..., ARM], chunk(batch)[..., ARM])
    share = (chunk(batch) - anchor)[..., ARM].square().mean().sqrt() / chunk(batch)[..., ARM].square().mean().sqrt()
    torch.testing.assert_close(found.metrics["residual_share"], share)


@every_form
def test_an_untrained_residual_leaves_the_anchor_as_it_is(form):
    torch.manual_seed(0)
    model = make_system(tiny_config(settings(**form)), SHAPE).eval()
    batch = make_batch(model)
    torch.testing.assert_close(answer(model, batch), answer(model, batch, ANCHOR_ONLY))
    opened = tiny_model(settings(**form))
    assert not torch.allclose(answer(opened, batch), answer(opened, batch, ANCHOR_ONLY))


def test_the_ablation_predicts_the_action_itself(monkeypatch):
    model = tiny_model(settings(predicts="action"))
    batch = make_batch(model)
    monkeypatch.setattr(model, "_said", lambda features, state, anchor, known: chunk(batch))
    assert losses(model, batch).terms["residual"] == 0
    torch.testing.assert_close(answer(model, batch)[..., ARM], chunk(batch)[..., ARM])


@pytest.mark.parametrize("see_anchor", [False, True])
def test_only_the_ablation_reads_the_anchor(see_anchor):
    model = tiny_model(settings(see_anchor=see_anchor))
    batch = make_batch(model)
    anchor, known, features = model._read_batch(batch, None)
    one, other = (model._said(features, batch.state, given, known) for given in (anchor, -anchor))
    assert torch.equal(one, other) is not see_anchor


def right_of(batch):
    return torch.where(chunk(batch)[..., GRIPPER] > 0, 1.0, -1.0)


def test_the_gripper_is_carried_across_exactly_where_the_anchor_is_wrong(monkeypatch):
    model = tiny_model(settings(gripper_margin=0.2))
    batch = make_batch(model)
    q = (model._read_batch(batch, None)[0][..., GRIPPER] + 1) / 2
    wrong = torch.where(q > 0.5, 1.0, -1.0) != right_of(batch)
    assert 0 < wrong.float().mean() < 1
    wanted = wrong * right_of(batch) * ((q - 0.5).abs() + 0.2)
    monkeypatch.setattr(
        model, "_said", lambda *given: torch.zeros(6, 5, 4).index_copy(-1, torch.tensor(GRIPPER), wanted[..., None])
    )
    found = losses(model, batch)
    torch.testing.assert_close(found.terms["gripper"], torch.tensor(0.0))
    assert found.metrics["gripper_error"] == 0
    torch.testing.assert_close(found.metrics["gripper_error_anchor"], wrong.float().mean())
    assert torch.equal(answer(model, batch)[..., GRIPPER], right_of(batch))
    assert torch.equal(answer(model, batch, ANCHOR_ONLY)[..., GRIPPER], torch.where(q > 0.5, 1.0, -1.0))


def test_the_naive_loss_wants_all_of_the_probability(monkeypatch):
    model = tiny_model(settings(gripper_refinement="naive"))
    batch = make_batch(model)
    q = (model._read_batch(batch, None)[0][..., GRIPPER] + 1) / 2
    wanted = (chunk(batch)[..., GRIPPER] + 1) / 2 - q
    monkeypatch.setattr(
        model, "_said", lambda *given: torch.zeros(6, 5, 4).index_copy(-1, torch.tensor(GRIPPER), wanted[..., None])
    )
    torch.testing.assert_close(losses(model, batch).terms["gripper"], torch.tensor(0.0))


@pytest.mark.parametrize("changes", [{"gripper_refinement": "none"}, {"gripper": "none"}])
def test_without_refinement_the_gripper_has_no_loss(changes):
    model = tiny_model(settings(**changes))
    batch = make_batch(model)
    found = losses(model, batch)
    assert found.terms.keys() == {"residual"} == model.loss_weights().keys() - model.anchor.loss_weights().keys()
    done, anchor = answer(model, batch)[..., GRIPPER], answer(model, batch, ANCHOR_ONLY)[..., GRIPPER]
    if "gripper" in changes:
        assert "gripper_error" not in found.metrics
        assert done.unique().numel() > 2, "refined like every other dimension"
    else:
        assert found.metrics["gripper_error"] == found.metrics["gripper_error_anchor"]
        assert torch.equal(done, anchor)
        assert set(done.unique().tolist()) <= {-1, 1}


@pytest.mark.parametrize(("declared", "found"), [(None, GRIPPER), (1, 1), (NO_GRIPPER, None)])
def test_the_gripper_is_the_one_that_the_data_declare(declared, found):
    shape = replace(SHAPE, action=VectorSpec(gripper=declared))
    assert make_system(tiny_config(settings()), shape).gripper == found
    assert make_system(tiny_config(settings(gripper="last")), shape).gripper == GRIPPER, "unless the settings say otherwise"


def test_any_dimension_can_be_the_gripper():
    model = tiny_model(settings(gripper="1"))
    done = answer(model, make_batch(model))
    assert set(done[..., 1].unique().tolist()) <= {-1, 1}
    assert done[..., GRIPPER].unique().numel() > 2


@pytest.mark.parametrize("form", [FORMS["two_levels"], FORMS["own_context"], FORMS["libra_two_levels"]])
def test_of_two_levels_each_sees_its_own_picture(form):
    model = tiny_model(settings(**form))
    batch = make_batch(model)
    fresh, stale = replace(batch, images=batch.images.flip(0)), replace(batch, plan_images=batch.plan_images.flip(0))
    assert torch.equal(answer(model, batch, ANCHOR_ONLY), answer(model, fresh, ANCHOR_ONLY))
    assert not torch.allclose(answer(model, batch, ANCHOR_ONLY), answer(model, stale, ANCHOR_ONLY))
    assert not torch.allclose(answer(model, batch), answer(model, fresh))
    learned, slow = (
        [model._read_batch(b, torch.Generator().manual_seed(7)) for b in (batch, other)] for other in (fresh, stale)
    )
    assert torch.equal(learned[0][0], learned[1][0])
    assert not torch.allclose(learned[0][2].tokens, learned[1][2].tokens)
    assert not torch.allclose(slow[0][0], slow[1][0])
    assert torch.equal(slow[0][2].tokens, slow[1][2].tokens)


def test_one_level_sees_the_present_alone_and_asks_its_backbone_once():
    model, asked = tiny_model(settings(backbone="diffusion")), []
    batch = make_batch(model)
    stale = replace(batch, plan_images=batch.plan_images.flip(0), plan_state=batch.plan_state.flip(0))
    for phase in (ANCHOR, RESIDUAL):
        assert losses(model, batch, phase).terms == losses(model, stale, phase).terms
    model.anchor.planner.backbone.register_forward_hook(lambda *given: asked.append(given))
    answer(model, batch)
    assert len(asked) == 1


def test_where_there_is_no_anchor_the_head_says_the_whole_action():
    """Past the plan's end, and in the share of windows that hides it."""
    model = tiny_model(settings(levels="two", **{"refiner.condition_dropout": 1.0}))
    batch = make_batch(model)
    anchor, known, features = model.train()._read_batch(batch, None)
    assert not known.any()
    assert not anchor.any()
    model.eval()
    late = replace(batch, offset=torch.full((6,), model.levels[0].covers - 2))
    _, known, _ = model._read_batch(late, None)
    assert known.tolist() == [[True, True, False, False, False]] * 6
    model.residual["head"].without_anchor.data.normal_()
    said = [model._said(features, batch.state, anchor, known) for known in (known, torch.ones_like(known))]
    assert not torch.allclose(*said)
    blank = {"anchor": torch.full((6, 5, 4), float(UNKNOWN))}
    assert model.infer(RESIDUAL, seen_now(batch), blank)["actions"].abs().max() <= 1


@pytest.mark.parametrize("form", [FORMS["two_levels"], FORMS["own_context"], FORMS["libra_two_levels"]])
def test_the_anchor_alone_is_its_chunk_as_far_as_it_reaches_and_nothing_beyond(form):
    """Its gripper as one of both ends, whichever it is nearer to; without an anchor no end is meant, least of all one alone."""
    model = tiny_model(settings(**form))
    batch = make_batch(model)
    steps = model.levels[0].covers
    plan = torch.linspace(-1, 1, 6 * steps * SHAPE.action_dim).view(6, steps, -1)
    plan[..., GRIPPER] = torch.linspace(-1, 1, 6 * steps).view(6, steps)
    for age in range(steps + 3):
        above = model.aligned(model.levels[1], {"anchor": plan}, torch.full((6,), age))
        done = model.infer(RESIDUAL, seen_now(batch), above, None, ANCHOR_ONLY)["actions"]
        left = plan[:, age : age + 5]
        known, beyond = done[:, : left.shape[1]], done[:, left.shape[1] :]
        assert torch.equal(known[..., ARM], left[..., ARM])
        assert torch.equal(known[..., GRIPPER], torch.where(left[..., GRIPPER] > 0, 1.0, -1.0))
        assert not beyond.any()


@pytest.mark.parametrize("refinement", ["decision", "naive", "none"])
def test_where_there_is_no_anchor_the_gripper_is_the_heads_or_nobodys(refinement, monkeypatch):
    model = tiny_model(settings(levels="two", gripper_refinement=refinement))
    batch = make_batch(model)
    blank = {"anchor": torch.full((6, 5, 4), float(UNKNOWN))}
    for word in (-0.3, 0.3):
        monkeypatch.setattr(model, "_said", lambda *given, word=word: torch.full((6, 5, 4), word))
        done = model.infer(RESIDUAL, seen_now(batch), blank)["actions"][..., GRIPPER]
        assert done.unique().tolist() == ([0] if refinement == "none" else [np.sign(word)])


@every_form
def test_masked_steps_never_influence_a_loss(form):
    model = tiny_model(settings(**form))
    batch = make_batch(model, masked=8)
    other = replace(batch, actions=torch.where(batch.action_mask[..., None], batch.actions, -0.9 * torch.ones(())))
    for phase in model.schedule().phases:
        assert losses(model, batch, phase).terms == losses(model, other, phase).terms


def test_the_residual_learns_what_an_early_anchor_lacks():
    steps = {"train.steps": 50, "train.log_every": 50, "train.lr": 5e-3, "train.warmup_steps": 5, "train.ema_decay": 0.9}
    model = tiny_model(settings(**steps, anchor_share=0.2, lambda_gripper=1.0))
    batch = make_batch(model, 4)
    list(Trainer(model, device=CPU).run([batch] * 50))
    measured = model.eval().measure(batch, batch)
    assert measured["action_error"] < 0.7 * measured["action_error_anchor_only"]
    assert measured["gripper_error"] < measured["gripper_error_anchor"]


def test_a_whole_anchor_can_be_taken_from_elsewhere(tmp_path):
    source = tiny_model(settings())
    save_checkpoint(tmp_path / "checkpoint", source)
    given = {
        "train.start_from": str(tmp_path / "checkpoint"),
        "train.start_parts": "anchor",
        "train.seed": 5,
        "anchor_share": 0,
    }
    model = make_model(tiny_config(settings(**given)), SHAPE)
    trained(model, 3)
    assert all(torch.equal(value, source.anchor.state_dict()[name]) for name, value in model.anchor.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchor_share": 1}, "no step to the residual"),
        ({"anchor_share": 0}, "give train.start_from"),
        ({"gripper": "first"}, "give last, none, or its number"),
        ({"gripper": "7"}, "have 4 dimensions"),
        ({"gripper_margin": 0}, "above 0"),
        ({"stop_gradient": False, "backbone": "libra"}, "give anchor_refine.backbone=regression"),
        ({"train.balance": "gradient"}, "learned one after another; give fixed"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(settings(**changes))
