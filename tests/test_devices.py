"""Training, measuring, resuming and inference keep to the device they are told; shown on one that this machine emulates."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from libra_ray import checkpoint
from libra_ray.policy import act, load_policy
from libra_ray.runs.results import SPEED
from libra_ray.training.fit import Trainer
from libra_ray.training.saving import BackgroundSaver
from tests.devices import EMULATED, Elsewhere, emulated_device
from tests.model import families, hugging_face
from tests.model.builders import make_observation, save_checkpoint, tiny_config, tiny_model
from tests.training.builders import training_data

RANDOM = {"train.augment_pixels": 2, "train.augment_state": 0.1, "refiner.condition_dropout": 0.5, "refiner.max_staleness": 2}
MONOLITHIC = {"model.system": "monolithic"}
SHARED = {"refiner.vision": "shared", "refiner.see_language": "true"}
SETTINGS = {
    "own": {**RANDOM, "train.curriculum": "threshold", "train.tau": 0.0, "train.balance": "uncertainty"},
    "shared": {**SHARED, "train.balance": "gradient", "train.balance_every": 1, "train.curriculum": "planner"},
    "published": {"refiner.objective": "ddpm", "refiner.predicts": "target", "data.history": 2},
    "monolithic": {**MONOLITHIC, "refiner.vision": "shared", "refiner.objective": "ddpm"},
    "frozen": {
        "planner.train_vision": "frozen",
        "planner.train_language": "lora",
        "train.lambda_plan": 0.0,
        "action.bins": 3,
    },
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> dict[str, str]:
    """Settings of a model from outside, in both systems."""
    hub = tmp_path_factory.mktemp("hub")
    sources = {
        "planner.backbone": families.write(hub / "llava", families.FAMILIES["llava"]()),
        "refiner.encoder": hugging_face.write_siglip(hub / "s"),
    }
    return {name: str(folder) for name, folder in sources.items()}


def trained(config, block, folder):
    """Two steps with a validation, saved; two more by another process's objects. Their `Trainer` and all rows."""
    data = training_data(config)
    torch.manual_seed(0)
    # Transformers has a use of its own for the emulated device's inner name.
    model, other = data.make_model(), data.make_model(begun=True)
    with block as device:
        first = Trainer(model.to(device), device=device)
        with data.stream(first.model, rank=0, world=1, start_step=0) as batches:
            rows = [p.metrics for p in first.run(batches, data.validator(device), until=2)]
        with BackgroundSaver(first, data) as saver:
            saver.begin(folder)
        trainer = Trainer(other.to(device), device=device, state=checkpoint.load_trainer_state(folder))
        with data.stream(trainer.model, rank=0, world=1, start_step=2) as batches:
            rows += [p.metrics for p in trainer.run(batches, data.validator(device))]
    return trainer, rows


@pytest.mark.parametrize("name", [*SETTINGS, "pretrained"])
def test_training_stays_on_its_device_and_learns_what_it_learns_on_a_cpu(name, pretrained, tmp_path):
    changes = pretrained if name == "pretrained" else SETTINGS[name]
    config = tiny_config({"train.validate_every": 2, "train.precision": "fp32", "train.batch_size": 4, **changes})
    trainer, rows = trained(config, emulated_device(), tmp_path / "there")
    states = [value for state in trainer.optimiser.state.values() for value in state.values()]
    for tensor in [*trainer.model.state_dict().values(), *trainer.weights().values(), *states]:
        assert isinstance(tensor, Elsewhere)
    _, expected = trained(config, nullcontext(torch.device("cpu")), tmp_path / "here")
    assert len(rows) == len(expected) == 4
    for row, same in zip(rows, expected, strict=True):
        assert row.keys() == same.keys()
        measures = [key for key in row if key not in SPEED]
        assert [row[key] for key in measures] == pytest.approx([same[key] for key in measures], rel=2e-3, abs=1e-4)
    assert "val_loss_diff" in rows[1]


@pytest.mark.parametrize(("changes", "variant"), [({}, ""), ({}, "coarse_only"), (MONOLITHIC, ""), (SHARED, "")])
def test_a_policy_answers_from_its_device_as_on_a_cpu(changes, variant, tmp_path):
    save_checkpoint(tmp_path / "saved", tiny_model(changes))
    seen = [make_observation(robot) for robot in range(3)]
    expected = load_policy(tmp_path / "saved", variant=variant)
    with emulated_device() as device:
        policy = load_policy(tmp_path / "saved", device, variant=variant)
        assert {p.device for p in policy.model.parameters()} == {EMULATED}
        chunks = act(policy, seen)
    for chunk, other in zip(chunks, act(expected, seen), strict=True):
        np.testing.assert_allclose(chunk.actions, other.actions, atol=1e-4)


def test_the_emulated_device_refuses_what_a_real_one_does():
    with emulated_device() as device:
        there = torch.arange(3.0, device=device)
        assert (there.clamp(max=1).tolist(), float(there.sum()), there.to("cpu").numpy().tolist()) == ([0, 1, 1], 3, [0, 1, 2])
        with pytest.raises(RuntimeError, match="found at least two, cuda:0 and cpu"):
            there.clamp(max=torch.tensor(2.0))
        with pytest.raises(RuntimeError, match="found at least two"):
            torch.hypot(torch.zeros(()), there)
        with pytest.raises(RuntimeError, match="found at least two"):
            there + torch.ones(3)
        for convert in (np.asarray, lambda tensor: tensor.numpy()):
            with pytest.raises(TypeError, match="can't convert cuda:0"):
                convert(there)
