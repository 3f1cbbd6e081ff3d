"""Whole, frozen or by adapters: what trains, what is kept, and what a checkpoint of it answers."""

import sys

import pytest
import torch

from libra_ray import checkpoint
from libra_ray.config import from_tree
from libra_ray.model.parts.adapters import is_adapter, plain
from libra_ray.model.parts.backbone import TinyBackbone
from libra_ray.model.registry import make_system
from libra_ray.training.fine_tuning import start_from
from libra_ray.training.fit import Trainer
from tests.model import families, hugging_face
from tests.model.builders import SHAPE, make_batch, save_checkpoint, tiny_config, tiny_model
from tests.model.test_libra import answers

CPU = torch.device("cpu")
QUICK = {"train.lr": 1e-2, "train.warmup_steps": 0, "model.lora_rank": 2, "model.lora_alpha": 8.0}
PARTS = {
    "planner.train_vision": "planner.backbone.model.vision_tower.",
    "planner.train_language": "planner.backbone.",
    "planner.train_head": "planner.",
    "refiner.train_encoder": "refiner.eyes.model.",
    "refiner.train_transformer": "refiner.",
}
"""Setting -> how the names of the weights begin that it is about; those of another setting's longer beginning apart."""
LORA = {**QUICK, **dict.fromkeys(PARTS, "lora")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    hub = tmp_path_factory.mktemp("hub")
    backbone = families.write(hub / "internvl", families.internvl())
    return {"planner.backbone": str(backbone), "refiner.encoder": str(hugging_face.write_siglip(hub / "siglip"))}


def part_of(name: str) -> str:
    return max((setting for setting, beginning in PARTS.items() if name.startswith(beginning)), key=lambda s: len(PARTS[s]))


def trained(model, steps: int = 2) -> Trainer:
    trainer = Trainer(model, device=CPU)
    list(trainer.run([make_batch(model, 2, seed=step) for step in range(steps)]))
    return trainer


@pytest.mark.parametrize("way", ["frozen", "lora"])
@pytest.mark.parametrize("setting", PARTS)
def test_only_what_shall_train_changes(setting, way, sources):
    """Of a part with adapters these alone, of a frozen one nothing; all others as a whole."""
    model = tiny_model({**sources, **QUICK, setting: way, "planner.max_text_tokens": 12})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    own = {name for name, _ in model.named_parameters() if part_of(name) == setting}
    trainer = trained(model)
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert own, "the part has weights"
    assert {name for name in own & moved if not is_adapter(name)} == set()
    assert bool(own & moved) == (way == "lora")
    assert {part_of(name) for name in moved} >= PARTS.keys() - {setting}
    resting = {name for name in own if not is_adapter(name)}
    assert not resting & trainer.state()["model"].keys(), "they are in the policy's weights"


def test_a_checkpoint_of_adapters_answers_without_them(sources, tmp_path, monkeypatch):
    """Merged where it is loaded, for which `peft` is not needed."""
    trainer = trained(tiny_model({**sources, **LORA, "planner.max_text_tokens": 12}))
    model = trainer.model.eval()
    save_checkpoint(tmp_path / "checkpoint", model)
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    loaded = checkpoint.load(tmp_path / "checkpoint").model
    assert not any(name.partition(".")[0] == "peft" for name in sys.modules)
    assert not any(map(is_adapter, loaded.state_dict()))
    batch, base = make_batch(model, 2), dict(model.state_dict())
    merged = answers(loaded, batch)
    for mine, theirs in zip(merged, answers(model, batch), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    for name in base:
        if is_adapter(name):
            base[name].zero_()
    assert not torch.allclose(answers(model, batch)[1], merged[1], atol=1e-3), "they did change the answers"


def test_two_and_two_resumed_steps_with_adapters_are_four(sources, tmp_path):
    settings = {**sources, **LORA, "planner.max_text_tokens": 12, "train.steps": 4}
    whole, first = (Trainer(tiny_model(settings), device=CPU) for _ in range(2))
    batches = [make_batch(whole.model, 2, seed=step) for step in range(4)]
    list(whole.run(batches))
    list(first.run(batches[:2], until=2))
    save_checkpoint(tmp_path / "saved", first.model, first.step, first.state())
    other = tiny_model(settings)
    for weight in other.parameters():
        weight.data.add_(1)
    second = Trainer(other, device=CPU, state=checkpoint.load_trainer_state(tmp_path / "saved"))
    list(second.run(batches[2:]))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
        assert torch.equal(second.weights()[name], whole.weights()[name]), name


@pytest.mark.parametrize("after", ["full", "lora"])
def test_training_goes_on_from_a_checkpoint_of_adapters(after, sources, tmp_path):
    """What they had learned is then in the weights beside them."""
    source = trained(tiny_model({**sources, **LORA, "planner.max_text_tokens": 12})).model.eval()
    save_checkpoint(tmp_path / "checkpoint", source)
    ways = dict.fromkeys(PARTS, after)
    model = make_system(tiny_config({**sources, **QUICK, **ways, "planner.max_text_tokens": 12}), SHAPE).eval()
    taken = start_from(model, tmp_path / "checkpoint", tuple(model.parts()))
    assert set(taken) == {plain(name) for name in model.state_dict() if not is_adapter(name)}
    batch = make_batch(model, 2)
    for mine, theirs in zip(answers(model, batch), answers(source, batch), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_a_frozen_tower_is_seen_through_without_a_graph(sources):
    """Nothing of its forward pass is kept."""
    model = tiny_model({**sources, "planner.train_vision": "frozen", "planner.max_text_tokens": 12}).train()
    seen: list[torch.Tensor] = []
    tower = model.planner.backbone.model.vision_tower
    tower.register_forward_hook(lambda module, given, output: seen.append(output.last_hidden_state))
    batch = make_batch(model, 2)
    sum(model(batch, "ground_truth").terms.values()).backward()
    assert [hidden.requires_grad for hidden in seen] == [False]
    assert not any(module.training for module in tower.modules())
    assert model.planner.backbone.model.language_model.training


def test_a_tower_that_cannot_be_told_from_the_rest_trains_as_that_does(monkeypatch):
    monkeypatch.setattr(TinyBackbone, "vision", "")
    tiny_model({"planner.train_vision": "lora", "planner.train_language": "lora"})
    with pytest.raises(ValueError, match=r"planner\.train_vision=frozen .*; give planner\.train_language's full"):
        tiny_model({"planner.train_vision": "frozen"})


def test_without_anything_left_to_train_it_is_refused():
    with pytest.raises(ValueError, match="nothing is left to train"):
        tiny_model(dict.fromkeys(PARTS, "frozen"))


def test_a_former_setting_is_read_from_saved_configurations():
    for value, way in ((True, "frozen"), (False, "full")):
        planner = from_tree({"planner": {"freeze_backbone": value}}).planner
        assert (planner.train_vision, planner.train_language) == (way, way)
