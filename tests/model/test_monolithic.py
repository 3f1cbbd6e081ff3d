"""The laws of the monolithic baseline: one level, one loss, the same size as its dual twin."""

from dataclasses import replace

import pytest
import torch

from libra_ray.model.system import seen_now
from libra_ray.training.fit import Trainer
from tests.model.builders import SHAPE, make_batch, tiny_model

MONOLITHIC = {
    "shared_encoder": {"model.system": "monolithic", "refiner.vision": "shared"},
    "own_encoder": {"model.system": "monolithic"},
}
monolithic = pytest.mark.parametrize("changes", MONOLITHIC.values(), ids=MONOLITHIC)


def answer(model, batch):
    noise = torch.zeros(len(batch), model.config.action.horizon, SHAPE.action_dim)
    return model.infer("policy", seen_now(batch), {}, noise)["actions"]


def loss(model, batch):
    """The loss with draws that are the same at every call."""
    return model(batch, "", torch.Generator().manual_seed(7)).terms["diff"]


def gradient(part) -> float:
    return sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)


def with_other_instruction(model, batch):
    text = model.tokenise(["close the window"] * len(batch))
    return replace(batch, text=text.ids, text_mask=text.mask)


@monolithic
def test_it_reads_the_instruction_and_the_fresh_picture_alone(changes):
    model = tiny_model(changes)
    batch = make_batch(model)
    chunk = answer(model, batch)
    assert not torch.allclose(chunk, answer(model, with_other_instruction(model, batch)))
    stale = replace(batch, plan_images=batch.plan_images.flip(0), plan_state=batch.plan_state.flip(0))
    assert torch.equal(chunk, answer(model, stale))
    assert not torch.allclose(chunk, answer(model, replace(batch, images=batch.images.flip(0))))


@monolithic
def test_it_learns_through_one_loss(changes):
    model = tiny_model(changes)
    assert list(model(make_batch(model), "").terms) == ["diff"]
    loss(model, make_batch(model)).backward()
    assert gradient(model.planner.blocks) > 0
    assert gradient(model.planner.backbone) > 0
    assert gradient(model.refiner) > 0
    rows = [p.metrics for p in Trainer(model, device=torch.device("cpu")).run([make_batch(model)] * 2)]
    for row in rows:
        assert not {"loss_plan", "plan_accuracy", "weight_plan"} & row.keys()
        assert not any(name.startswith("phase_") for name in row)
        assert row["loss"] == row["loss_diff"]
        assert row["grad_norm_planner"] > 0


@monolithic
def test_it_is_no_smaller(changes):
    """Equal budget: it has all parts of its dual twin but the classes and their codebook."""
    twin = tiny_model({"refiner.vision": changes.get("refiner.vision", "own")})
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (tiny_model(changes), twin))
    assert ours == pytest.approx(theirs, rel=0.05)


@monolithic
def test_its_condition_can_be_dropped(changes):
    """Without its head's states it has no instruction, and can still be asked."""
    model = tiny_model({**changes, "refiner.condition_dropout": 1.0}).train()
    batch = make_batch(model)
    other = with_other_instruction(model, batch)
    assert loss(model, batch) == loss(model, other)
    assert loss(model.eval(), batch) != loss(model, other)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
@pytest.mark.parametrize("predicts", ["action", "target"])
def test_what_is_computed_before_the_solver_begins_changes_no_answer(objective, predicts):
    changes = {"model.system": "monolithic", "refiner.objective": objective, "refiner.predicts": predicts}
    model = tiny_model(changes)
    batch, refiner = make_batch(model, 3), model.refiner
    noise = torch.randn(3, model.config.action.horizon, SHAPE.action_dim, generator=torch.Generator().manual_seed(0))
    intent, context = model._read(seen_now(batch))

    def predict(x, t):
        said = refiner(x, t, intent, context)
        return said if predicts == "target" else refiner.objective.target_of(said, x, t)

    with torch.no_grad():
        slowly = refiner.objective.sample(predict, noise, model.config.refiner.denoising_steps).clamp(-1, 1)
        found = model.infer("policy", seen_now(batch), {}, noise)["actions"]
    torch.testing.assert_close(found, slowly, rtol=1e-4, atol=1e-4)
