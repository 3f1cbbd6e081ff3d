"""The laws of the dual system: who may influence whom."""

from dataclasses import replace

import pytest
import torch

from libra_ray.model.libra import Libra, RobotShape, augmented, sample_tokens
from libra_ray.model.parts.backbone import Text
from libra_ray.training.fit import Fit
from tests.model.builders import SHAPE, make_batch, tiny_config, tiny_model

ABLATIONS = {
    "published": {},
    "ddpm": {"refiner.objective": "ddpm"},
    "target": {"refiner.predicts": "target"},
    "ddpm_target": {"refiner.objective": "ddpm", "refiner.predicts": "target"},
    "language": {"refiner.see_language": True},
    "shared_eyes": {"refiner.vision": "shared"},
    "both": {"refiner.vision": "shared", "refiner.see_language": True},
    "stateless_planner": {"planner.see_state": False},
}
MONOLITHIC = {
    "monolithic": {"refiner.condition": "features", "refiner.vision": "shared"},
    "monolithic_own_eyes": {"refiner.condition": "features"},
}
every_ablation = pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS)
every_model = pytest.mark.parametrize("changes", (ABLATIONS | MONOLITHIC).values(), ids=ABLATIONS | MONOLITHIC)
monolithic = pytest.mark.parametrize("changes", MONOLITHIC.values(), ids=MONOLITHIC)


def said(batch) -> Text:
    return Text(ids=batch.text, mask=batch.text_mask)


def answers(model, batch, tokens=None, noise=None):
    """Plans, and chunks refined from ground-truth tokens."""
    horizon = model.config.action.horizon
    tokens = model.bins.encode(batch.actions)[:, :horizon] if tokens is None else tokens
    noise = torch.zeros(len(batch), horizon, SHAPE.action_dim) if noise is None else noise
    plan = model.plan(batch.plan_images, batch.plan_state, said(batch))
    return plan, model.refine(batch.images, batch.state, said(batch), tokens, noise)


def losses(model, batch, feed="truth"):
    """Losses with draws that are the same at every call."""
    return model(batch, feed, torch.Generator().manual_seed(7))


@every_model
def test_permuting_a_batch_permutes_its_answers(changes):
    model = tiny_model(changes)
    batch, order = make_batch(model), torch.tensor([3, 0, 5, 1, 4, 2])
    plan, chunk = answers(model, batch)
    shuffled_plan, shuffled_chunk = answers(model, batch.index(order))
    assert torch.equal(shuffled_plan, plan[order])
    torch.testing.assert_close(shuffled_chunk, chunk[order], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(chunk[order], chunk)


@every_model
def test_an_answer_depends_on_nobody_else_in_the_batch(changes):
    model = tiny_model(changes)
    batch, few = make_batch(model), torch.tensor([4, 1])
    plan, chunk = answers(model, batch)
    few_plan, few_chunk = answers(model, batch.index(few))
    assert torch.equal(few_plan, plan[few])
    torch.testing.assert_close(few_chunk, chunk[few], atol=1e-5, rtol=1e-5)


def gradients(model, found) -> list[torch.Tensor | None]:
    model.zero_grad()
    (found.diff + (0 if found.plan is None else found.plan)).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@every_model
@pytest.mark.parametrize("feed", ["truth", "planner"])
def test_masked_steps_never_influence_a_loss(changes, feed):
    """Neither its value nor any of its gradients."""
    model = tiny_model(changes)
    batch = make_batch(model, masked=3)
    assert not batch.action_mask.all()
    other = replace(batch, actions=torch.where(batch.action_mask[..., None], batch.actions, -0.9 * torch.ones(())))
    before, after = losses(model, batch, feed), losses(model, other, feed)
    assert (before.plan, before.diff, before.accuracy) == (after.plan, after.diff, after.accuracy)
    for one, two in zip(gradients(model, before), gradients(model, after), strict=True):
        assert torch.equal(one, two)


@every_model
def test_every_weight_takes_part(changes):
    """Data-parallel training waits for the gradient of each of them."""
    model = tiny_model(changes)
    found = gradients(model, losses(model, make_batch(model)))
    assert [name for (name, _), grad in zip(model.named_parameters(), found, strict=True) if grad is None] == []


@monolithic
def test_the_monolithic_baseline_reads_language_and_no_tokens(changes):
    model = tiny_model(changes)
    batch = make_batch(model)
    plan, chunk = answers(model, batch)
    assert (plan == model.bins.hidden).all()
    other_plan, other_chunk = answers(model, with_other_instruction(model, batch))
    assert torch.equal(plan, other_plan)
    assert not torch.allclose(chunk, other_chunk)
    assert torch.equal(chunk, answers(model, batch, torch.zeros_like(plan[:, : model.config.action.horizon]))[1])
    stale = replace(batch, plan_images=batch.plan_images.flip(0), plan_state=batch.plan_state.flip(0))
    assert torch.equal(chunk, answers(model, stale)[1]), "it looks at the fresh picture alone"


@monolithic
def test_the_monolithic_baseline_learns_through_one_loss(changes):
    model = tiny_model(changes)
    found = losses(model, make_batch(model))
    assert (found.plan, found.accuracy) == (None, None)
    found.diff.backward()
    assert gradient(model.planner.blocks) > 0
    assert gradient(model.planner.backbone) > 0
    assert gradient(model.refiner) > 0
    rows = [p.metrics for p in Fit(model, device=torch.device("cpu")).run([make_batch(model)] * 2)]
    for row in rows:
        assert not {"loss_plan", "plan_accuracy", "weight_plan", "teacher_forcing"} & row.keys()
        assert row["loss"] == row["loss_diff"]
        assert row["grad_norm_planner"] > 0


@monolithic
def test_the_monolithic_baseline_is_no_smaller(changes):
    """Equal budget: it has all parts of its dual twin but the classes and their codebook."""
    twin = tiny_model({"refiner.vision": changes.get("refiner.vision", "own")})
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (tiny_model(changes), twin))
    assert ours == pytest.approx(theirs, rel=0.05)


@monolithic
def test_what_the_monolithic_baseline_obeys_can_be_dropped(changes):
    """Without its planner's states it has no instruction, and can still be asked."""
    model = tiny_model({**changes, "refiner.condition_dropout": 1.0}).train()
    batch = make_batch(model)
    other = with_other_instruction(model, batch)
    assert losses(model, batch).diff == losses(model, other).diff
    assert losses(model.eval(), batch).diff != losses(model, other).diff


def test_unmasked_steps_do_influence_both_losses():
    model = tiny_model()
    batch = make_batch(model)
    other = replace(batch, actions=-batch.actions)
    assert losses(model, batch).plan != losses(model, other).plan
    assert losses(model, batch).diff != losses(model, other).diff


def with_other_instruction(model, batch):
    text = model.planner.tokenise(["close the window"] * len(batch))
    return replace(batch, text=text.ids, text_mask=text.mask)


def test_the_refiner_reads_no_instruction():
    model = tiny_model()
    batch = make_batch(model)
    other = with_other_instruction(model, batch)
    assert torch.equal(answers(model, batch)[1], answers(model, other)[1])
    logits = [model.planner(b.plan_images, b.plan_state, said(b)) for b in (batch, other)]
    assert not torch.allclose(*logits)


def test_the_ablation_opens_the_refiner_to_language():
    model = tiny_model({"refiner.see_language": True})
    batch = make_batch(model)
    assert not torch.allclose(answers(model, batch)[1], answers(model, with_other_instruction(model, batch))[1])


@every_ablation
def test_the_tokens_matter_and_so_does_hiding_them(changes):
    model = tiny_model(changes)
    batch = make_batch(model)
    context = model._look(batch.images, batch.state, said(batch)).context
    noisy, level = batch.actions[:, : model.config.action.horizon], torch.full((len(batch),), 0.5)
    tokens = (0, 1, model.bins.hidden)
    predictions = [model.refiner(noisy, level, torch.full(noisy.shape, token), context) for token in tokens]
    for one in range(3):
        assert not torch.allclose(predictions[one], predictions[one - 1])


@pytest.mark.parametrize("changes", [{}, {"refiner.condition": "features"}], ids=["tokens", "features"])
@pytest.mark.parametrize("objective", ["flow", "ddpm"])
@pytest.mark.parametrize("predicts", ["action", "target"])
def test_what_is_computed_before_the_solver_begins_changes_no_answer(changes, objective, predicts):
    model = tiny_model({"refiner.objective": objective, "refiner.predicts": predicts, **changes})
    batch = make_batch(model, 3)
    text = Text(ids=batch.text, mask=batch.text_mask)
    tokens = model.bins.encode(batch.actions)[:, : model.config.action.horizon]
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    sight = model._look(batch.images, batch.state, text)
    intent = tokens if sight.intent is None else sight.intent

    def predict(x, t):
        said = model.refiner(x, t, intent, sight.context)
        return said if model.says_target else model.objective.target_of(model._anchor(intent, said) + said, x, t)

    with torch.no_grad():
        slowly = model.objective.sample(predict, noise, model.config.refiner.denoising_steps).clamp(-1, 1)
    torch.testing.assert_close(model.refine(batch.images, batch.state, text, tokens, noise), slowly, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("field", ["images", "state"])
def test_the_refiner_sees_for_itself(field):
    model = tiny_model()
    batch = make_batch(model)
    other = replace(batch, **{field: getattr(batch, field).flip(0)})
    assert not torch.allclose(answers(model, batch)[1], answers(model, other)[1])
    assert torch.equal(answers(model, batch)[0], answers(model, other)[0])


@every_ablation
def test_actions_are_normalised_and_plans_are_classes(changes):
    model = tiny_model(changes)
    batch = make_batch(model)
    plan, chunk = answers(model, batch, noise=100 * torch.ones(len(batch), model.config.action.horizon, SHAPE.action_dim))
    assert plan.shape == (len(batch), model.config.action.plan_steps, SHAPE.action_dim)
    assert ((plan >= 0) & (plan < model.bins.count)).all()
    assert chunk.shape == (len(batch), model.config.action.horizon, SHAPE.action_dim)
    assert chunk.abs().max() <= 1


def gradient(part) -> float:
    return sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)


@pytest.mark.parametrize("feed", ["truth", "planner"])
def test_no_loss_reaches_the_other_system(feed):
    model = tiny_model()
    losses(model, make_batch(model), feed).diff.backward()
    assert gradient(model.planner) == 0
    assert gradient(model.refiner) > 0
    model.zero_grad()
    losses(model, make_batch(model), feed).plan.backward()
    assert gradient(model.planner) > 0
    assert gradient(model.refiner) == 0


def test_shared_eyes_learn_from_the_refiner_too():
    model = tiny_model({"refiner.vision": "shared"})
    losses(model, make_batch(model)).diff.backward()
    assert gradient(model.planner.backbone.eyes) > 0


def test_a_frozen_backbone_gets_no_gradient():
    model = tiny_model({"planner.freeze_backbone": True, "refiner.vision": "shared"})
    found = losses(model, make_batch(model))
    (found.plan + found.diff).backward()
    assert gradient(model.planner.backbone) == 0
    assert gradient(model.planner.blocks) > 0


def test_planner_tokens_are_samples_of_its_own_distribution():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(4000, 2, 1, 3)
    drawn = sample_tokens(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.5, 0.3]), atol=0.03, rtol=0)


def test_fed_with_its_own_tokens_the_refiner_no_longer_reads_the_truth():
    """What the untrained planner samples is not the truth, so that the two losses differ."""
    model = tiny_model()
    batch = make_batch(model)
    assert losses(model, batch, "truth").diff != losses(model, batch, "planner").diff
    assert losses(model, batch, "truth").plan == losses(model, batch, "planner").plan


def test_dropped_conditions_are_hidden_only_in_training():
    model = tiny_model({"refiner.condition_dropout": 1.0})
    batch = make_batch(model)
    other = replace(batch, actions=batch.actions.roll(1, 0))
    tokens = [model.bins.encode(b.actions) for b in (batch, other)]
    model.train()
    dropped = [model._refiner_loss(batch, t, torch.Generator().manual_seed(0)) for t in tokens]
    assert dropped[0] == dropped[1]
    model.eval()
    read = [model._refiner_loss(batch, t, torch.Generator().manual_seed(0)) for t in tokens]
    assert read[0] != read[1]


def test_pictures_are_shifted_only_in_training():
    model = tiny_model({"train.augment_pixels": 4})
    batch = make_batch(model)
    still = losses(model, batch)
    assert losses(tiny_model(), batch).plan == still.plan
    assert losses(model.train(), batch).plan != still.plan


def test_proprioception_is_disturbed_only_in_training():
    model = tiny_model({"train.augment_state": 0.05})
    batch = make_batch(model, 64)
    still = losses(model, batch)
    assert losses(tiny_model(), batch).plan == still.plan
    assert losses(model.train(), batch).plan != still.plan
    other = augmented(batch, model.config.train, torch.Generator().manual_seed(1))
    for before, after in ((batch.state, other.state), (batch.plan_state, other.plan_state)):
        assert 0.03 < (after - before).std() < 0.07
        assert abs((after - before).mean()) < 0.02
    assert not torch.equal(other.state - batch.state, other.plan_state - batch.plan_state)
    assert torch.equal(other.images, batch.images)


@pytest.mark.parametrize(("history", "cameras"), [(1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("vision", ["own", "shared"])
def test_histories_and_cameras_are_all_seen(history, cameras, vision):
    shape = RobotShape(action_dim=4, state_dim=5, cameras=cameras)
    model = tiny_model({"data.history": history, "refiner.vision": vision}, shape)
    batch = make_batch(model, 2)
    assert batch.images.shape[1] == history * cameras
    chunk = answers(model, batch)[1]
    for picture in range(history * cameras):
        images = batch.images.clone()
        images[:, picture] = 255 - images[:, picture]
        assert not torch.allclose(answers(model, replace(batch, images=images))[1], chunk)


PREDICTIONS = ("published", "ddpm", "target", "ddpm_target")
every_prediction = pytest.mark.parametrize("changes", [ABLATIONS[name] for name in PREDICTIONS], ids=PREDICTIONS)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
@pytest.mark.parametrize("steps", [1, 6])
def test_a_refiner_that_has_learned_nothing_answers_with_the_coarse_action(objective, steps):
    torch.manual_seed(0)
    model = Libra(tiny_config({"refiner.objective": objective, "refiner.denoising_steps": steps}), SHAPE).eval()
    batch = make_batch(model)
    tokens = model.bins.encode(batch.actions)[:, : model.config.action.horizon]
    for noise in (torch.zeros(tokens.shape), torch.randn(tokens.shape)):
        torch.testing.assert_close(answers(model, batch, tokens, noise)[1], model.bins.decode(tokens), atol=1e-4, rtol=0)


@every_prediction
def test_a_few_steps_overfit_a_tiny_batch(changes):
    steps = {"train.steps": 60, "train.log_every": 1, "train.lr": 5e-3, "train.warmup_steps": 5}
    model = tiny_model({**steps, "train.curriculum": "teacher", **changes})
    batch = make_batch(model, 4)
    rows = [progress.metrics for progress in Fit(model, device=torch.device("cpu")).run([batch] * 60)]
    assert rows[-1]["loss_plan"] < 0.2 * rows[0]["loss_plan"]
    assert rows[-1]["plan_accuracy"] == 1
    assert rows[-1]["loss_diff"] < 0.4 * rows[0]["loss_diff"]


@pytest.mark.parametrize("bins", [2, 3, 100])
@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_every_number_of_bins_works_on_the_same_data(bins, objective):
    model = tiny_model({"action.bins": bins, "refiner.objective": objective, "train.steps": 2, "train.curriculum": "planner"})
    batch = make_batch(model)
    assert losses(model, batch).plan < 3 * torch.tensor(float(bins)).log()
    rows = [p.metrics for p in Fit(model, device=torch.device("cpu")).run([batch] * 2)]
    assert all(row["loss"] < float("inf") for row in rows)
    plan, chunk = answers(model.eval(), batch)
    assert ((plan >= 0) & (plan < bins)).all()
    assert chunk.abs().max() <= 1


def test_tiny_tokens_are_bytes():
    model = tiny_model()
    most = tiny_config().planner.max_text_tokens
    text = model.planner.tokenise(["ab", "", "x" * most])
    assert text.ids.shape == (3, most)
    assert text.mask.sum(dim=1).tolist() == [2, 0, most]
    assert text.ids[0, :3].tolist() == [98, 99, 0]


def test_tiny_refuses_what_is_longer_than_its_tokens():
    """Cut to 64 bytes these two would be the same task."""
    one, other = (f"请用右手机械臂把桌子上的红色方块慢慢地放进{side}边的盒子里" for side in "左右")
    long = len(one.encode())
    with pytest.raises(
        ValueError, match=rf"{long - 64} tokens \(bytes\) too long; raise planner.max_text_tokens=64 .* {long}$"
    ):
        tiny_model().planner.tokenise(["ab", one])
    ids = tiny_model({"planner.max_text_tokens": long}).planner.tokenise([one, other]).ids
    assert not torch.equal(ids[0], ids[1])
