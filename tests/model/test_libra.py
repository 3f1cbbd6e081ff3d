"""The laws of the dual system: who may influence whom."""

from dataclasses import replace

import pytest
import torch

from libra_ray.model.libra import GROUND_TRUTH, SAMPLED, Libra, sample_tokens
from libra_ray.model.parts.augment import augmented
from libra_ray.model.system import seen_first, seen_now
from libra_ray.training.fit import Trainer
from libra_ray.types import RobotShape
from tests.model.builders import SHAPE, make_batch, tiny_config, tiny_model

ABLATIONS = {
    "published": {},
    "ddpm": {"refiner.objective": "ddpm"},
    "target": {"refiner.predicts": "target"},
    "ddpm_target": {"refiner.objective": "ddpm", "refiner.predicts": "target"},
    "language": {"refiner.see_language": True},
    "shared_encoder": {"refiner.vision": "shared"},
    "both": {"refiner.vision": "shared", "refiner.see_language": True},
    "stateless_planner": {"planner.see_state": False},
    "patches": {"refiner.vision_tokens": "patches"},
}
every_ablation = pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS)


def refined(model, batch, tokens=None, noise=None):
    """Chunks refined from the given tokens, by default the ground truth's."""
    horizon = model.config.action.horizon
    tokens = model.tokenizer.encode(batch.actions)[:, :horizon] if tokens is None else tokens
    noise = torch.zeros(len(batch), horizon, SHAPE.action_dim) if noise is None else noise
    return model.infer("refiner", seen_now(batch), {"tokens": tokens}, noise)["actions"]


def answers(model, batch, tokens=None, noise=None):
    """Plans, and chunks refined from ground-truth tokens."""
    return model.infer("planner", seen_first(batch), {})["tokens"], refined(model, batch, tokens, noise)


def losses(model, batch, phase=GROUND_TRUTH):
    """Losses with draws that are the same at every call."""
    return model(batch, phase, torch.Generator().manual_seed(7)).terms


@every_ablation
def test_permuting_a_batch_permutes_its_answers(changes):
    model = tiny_model(changes)
    batch, order = make_batch(model), torch.tensor([3, 0, 5, 1, 4, 2])
    plan, chunk = answers(model, batch)
    shuffled_plan, shuffled_chunk = answers(model, batch.index(order))
    assert torch.equal(shuffled_plan, plan[order])
    torch.testing.assert_close(shuffled_chunk, chunk[order], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(chunk[order], chunk)


@every_ablation
def test_an_answer_depends_on_nobody_else_in_the_batch(changes):
    model = tiny_model(changes)
    batch, few = make_batch(model), torch.tensor([4, 1])
    plan, chunk = answers(model, batch)
    few_plan, few_chunk = answers(model, batch.index(few))
    assert torch.equal(few_plan, plan[few])
    torch.testing.assert_close(few_chunk, chunk[few], atol=1e-5, rtol=1e-5)


def gradients(model, found) -> list[torch.Tensor | None]:
    model.zero_grad()
    sum(found.values()).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@every_ablation
@pytest.mark.parametrize("phase", [GROUND_TRUTH, SAMPLED])
def test_masked_steps_never_influence_a_loss(changes, phase):
    """Neither its value nor any of its gradients."""
    model = tiny_model(changes)
    batch = make_batch(model, masked=3)
    assert not batch.action_mask.all()
    other = replace(batch, actions=torch.where(batch.action_mask[..., None], batch.actions, -0.9 * torch.ones(())))
    before, after = losses(model, batch, phase), losses(model, other, phase)
    assert before == after
    for one, two in zip(gradients(model, before), gradients(model, after), strict=True):
        assert torch.equal(one, two)


@every_ablation
def test_every_weight_takes_part(changes):
    """Data-parallel training waits for the gradient of each of them."""
    model = tiny_model(changes)
    found = gradients(model, losses(model, make_batch(model)))
    assert [name for (name, _), grad in zip(model.named_parameters(), found, strict=True) if grad is None] == []


def test_unmasked_steps_do_influence_both_losses():
    model = tiny_model()
    batch = make_batch(model)
    other = replace(batch, actions=-batch.actions)
    assert losses(model, batch)["plan"] != losses(model, other)["plan"]
    assert losses(model, batch)["diff"] != losses(model, other)["diff"]


def with_other_instruction(model, batch):
    text = model.tokenise(["close the window"] * len(batch))
    return replace(batch, text=text.ids, text_mask=text.mask)


def test_the_refiner_reads_no_instruction():
    model = tiny_model()
    batch = make_batch(model)
    other = with_other_instruction(model, batch)
    assert torch.equal(answers(model, batch)[1], answers(model, other)[1])
    logits = [model.planner(b.plan_images, b.plan_state, seen_first(b).text) for b in (batch, other)]
    assert not torch.allclose(*logits)


def test_the_ablation_opens_the_refiner_to_language():
    model = tiny_model({"refiner.see_language": True})
    batch = make_batch(model)
    assert not torch.allclose(answers(model, batch)[1], answers(model, with_other_instruction(model, batch))[1])


@every_ablation
def test_the_tokens_matter_and_so_does_hiding_them(changes):
    model = tiny_model(changes)
    batch = make_batch(model)
    context = model._context(seen_now(batch))
    noisy, level = batch.actions[:, : model.config.action.horizon], torch.full((len(batch),), 0.5)
    tokens = (0, 1, model.tokenizer.mask_token)
    predictions = [model.refiner(noisy, level, torch.full(noisy.shape, token), context) for token in tokens]
    for one in range(3):
        assert not torch.allclose(predictions[one], predictions[one - 1])


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
@pytest.mark.parametrize("predicts", ["action", "target"])
@pytest.mark.parametrize("seen", ["pooled", "patches"])
def test_what_is_computed_before_the_solver_begins_changes_no_answer(objective, predicts, seen):
    model = tiny_model({"refiner.objective": objective, "refiner.predicts": predicts, "refiner.vision_tokens": seen})
    batch, refiner = make_batch(model, 3), model.refiner
    tokens = model.tokenizer.encode(batch.actions)[:, : model.config.action.horizon]
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    context = model._context(seen_now(batch))

    def predict(x, t):
        said = refiner(x, t, tokens, context)
        return said if predicts == "target" else refiner.objective.target_of(model.tokenizer.decode(tokens) + said, x, t)

    with torch.no_grad():
        slowly = refiner.objective.sample(predict, noise, model.config.refiner.denoising_steps).clamp(-1, 1)
    torch.testing.assert_close(refined(model, batch, tokens, noise), slowly, rtol=1e-4, atol=1e-4)


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
    assert ((plan >= 0) & (plan < model.tokenizer.count)).all()
    assert chunk.shape == (len(batch), model.config.action.horizon, SHAPE.action_dim)
    assert chunk.abs().max() <= 1


def gradient(part) -> float:
    return sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)


@pytest.mark.parametrize("phase", [GROUND_TRUTH, SAMPLED])
def test_no_loss_reaches_the_other_system(phase):
    model = tiny_model()
    losses(model, make_batch(model), phase)["diff"].backward()
    assert gradient(model.planner) == 0
    assert gradient(model.refiner) > 0
    model.zero_grad()
    losses(model, make_batch(model), phase)["plan"].backward()
    assert gradient(model.planner) > 0
    assert gradient(model.refiner) == 0


def test_a_shared_encoder_learns_from_the_refiner_too():
    model = tiny_model({"refiner.vision": "shared"})
    losses(model, make_batch(model))["diff"].backward()
    assert gradient(model.planner.backbone.eyes) > 0


def test_a_frozen_backbone_gets_no_gradient():
    model = tiny_model({"planner.train_vision": "frozen", "planner.train_language": "frozen", "refiner.vision": "shared"})
    found = losses(model, make_batch(model))
    sum(found.values()).backward()
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
    assert losses(model, batch, GROUND_TRUTH)["diff"] != losses(model, batch, SAMPLED)["diff"]
    assert losses(model, batch, GROUND_TRUTH)["plan"] == losses(model, batch, SAMPLED)["plan"]


def test_dropped_conditions_are_hidden_only_in_training():
    model = tiny_model({"refiner.condition_dropout": 1.0})
    batch = make_batch(model)
    other = replace(batch, actions=batch.actions.roll(1, 0))
    tokens = [model.tokenizer.encode(b.actions) for b in (batch, other)]
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
    assert losses(tiny_model(), batch)["plan"] == still["plan"]
    assert losses(model.train(), batch)["plan"] != still["plan"]


def test_proprioception_is_disturbed_only_in_training():
    model = tiny_model({"train.augment_state": 0.05})
    batch = make_batch(model, 64)
    still = losses(model, batch)
    assert losses(tiny_model(), batch)["plan"] == still["plan"]
    assert losses(model.train(), batch)["plan"] != still["plan"]
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


PREDICTIONS = ("published", "ddpm", "target", "ddpm_target", "patches")
every_prediction = pytest.mark.parametrize("changes", [ABLATIONS[name] for name in PREDICTIONS], ids=PREDICTIONS)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
@pytest.mark.parametrize("steps", [1, 6])
def test_a_refiner_that_has_learned_nothing_answers_with_the_coarse_action(objective, steps):
    torch.manual_seed(0)
    model = Libra(tiny_config({"refiner.objective": objective, "refiner.denoising_steps": steps}), SHAPE).eval()
    batch = make_batch(model)
    tokens = model.tokenizer.encode(batch.actions)[:, : model.config.action.horizon]
    for noise in (torch.zeros(tokens.shape), torch.randn(tokens.shape)):
        torch.testing.assert_close(answers(model, batch, tokens, noise)[1], model.tokenizer.decode(tokens), atol=1e-4, rtol=0)


@every_prediction
def test_a_few_steps_overfit_a_tiny_batch(changes):
    steps = {"train.steps": 60, "train.log_every": 1, "train.lr": 5e-3, "train.warmup_steps": 5}
    model = tiny_model({**steps, "train.curriculum": "teacher", **changes})
    batch = make_batch(model, 4)
    rows = [progress.metrics for progress in Trainer(model, device=torch.device("cpu")).run([batch] * 60)]
    assert rows[-1]["loss_plan"] < 0.2 * rows[0]["loss_plan"]
    assert rows[-1]["plan_accuracy"] == 1
    assert rows[-1]["loss_diff"] < 0.4 * rows[0]["loss_diff"]


@pytest.mark.parametrize("bins", [2, 3, 100])
@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_every_number_of_bins_works_on_the_same_data(bins, objective):
    model = tiny_model({"action.bins": bins, "refiner.objective": objective, "train.steps": 2, "train.curriculum": "planner"})
    batch = make_batch(model)
    assert losses(model, batch)["plan"] < 3 * torch.tensor(float(bins)).log()
    rows = [p.metrics for p in Trainer(model, device=torch.device("cpu")).run([batch] * 2)]
    assert all(row["loss"] < float("inf") for row in rows)
    plan, chunk = answers(model.eval(), batch)
    assert ((plan >= 0) & (plan < bins)).all()
    assert chunk.abs().max() <= 1


def test_tiny_tokens_are_bytes():
    model = tiny_model()
    most = tiny_config().planner.max_text_tokens
    text = model.tokenise(["ab", "", "x" * most])
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
