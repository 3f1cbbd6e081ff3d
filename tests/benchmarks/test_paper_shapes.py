"""The presets' shapes without a hub: what they weigh, and that the same families, scaled down, train."""

import pytest
import torch

from benchmarks.paper_shapes import paper_system, weights_of
from libra_ray.training.fit import Trainer
from tests.model.builders import make_batch, open_gates


@pytest.mark.parametrize(("scale", "least", "most"), [("paper", 2.7e9, 2.9e9), ("small", 0.4e9, 0.6e9)])
def test_the_presets_weigh_what_they_say(scale, least, most):
    assert least < weights_of(scale)["all"] < most


def test_the_same_families_scaled_down_train_a_step():
    torch.manual_seed(0)
    model = open_gates(paper_system("tiny", {"train.steps": 1, "train.lr": 1e-2, "train.warmup_steps": 0}))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    (progress,) = Trainer(model, device=torch.device("cpu")).run([make_batch(model, 2)])
    assert all(progress.metrics[f"loss_{name}"] > 0 for name in ("plan", "diff"))
    moved = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
    for part in ("planner.backbone.model.vision", "planner.backbone.model.language", "planner.blocks", "refiner.eyes.model",
                 "refiner.blocks.0.attention.to_seen", "refiner.place"):  # fmt: skip
        assert any(name.startswith(part) for name in moved), part
