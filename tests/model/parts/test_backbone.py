"""The real Hugging Face loading path, on model folders that the tests write themselves."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from libra_ray import checkpoint
from libra_ray.model.parts.backbone import Backbone, PretrainedBackbone, make_backbone
from libra_ray.model.parts.vision import PretrainedEncoder
from libra_ray.model.registry import make_system
from libra_ray.model.system import System, seen_first
from libra_ray.policy import SystemPolicy, act
from libra_ray.training.fit import Trainer
from tests.model import families, hugging_face
from tests.model.builders import SHAPE, make_batch, make_observation, save_checkpoint, tiny_config, tiny_model
from tests.model.test_libra import answers, losses

SOURCES = ("llava", "internvl", "mllama")
"""One without a chat template, the paper's, and one that reads what its processor says of each token."""


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory) -> Path:
    """A model folder, as the hub has it."""
    return families.write(tmp_path_factory.mktemp("hub") / request.param, families.FAMILIES[request.param]())


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory) -> Path:
    return hugging_face.write_siglip(tmp_path_factory.mktemp("hub") / "siglip")


def pretrained(source: Path, changes=None) -> System:
    return tiny_model({"planner.backbone": str(source), "planner.max_text_tokens": 12, **(changes or {})})


def test_the_weights_are_those_of_the_folder(source):
    from transformers import AutoModelForImageTextToText

    mine = pretrained(source).planner.backbone.model.state_dict()
    theirs = AutoModelForImageTextToText.from_pretrained(source).model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_instruction_and_pictures_are_both_read(source):
    model = pretrained(source)
    batch = make_batch(model, 2)
    logits = model.planner(batch.plan_images, batch.plan_state, seen_first(batch).text)
    other, text = replace(batch, text=batch.text.flip(0), text_mask=batch.text_mask.flip(0)), seen_first(batch).text
    assert not torch.allclose(model.planner(batch.plan_images, batch.plan_state, seen_first(other).text), logits, atol=1e-4)
    assert not torch.allclose(model.planner(batch.plan_images.flip(0), batch.plan_state, text), logits, atol=1e-4)


def test_an_answer_depends_on_nobody_else_in_the_batch(source):
    """Instructions of different lengths are mixed, tokenised together or alone."""
    model = pretrained(source)
    instructions = ["open", "press the red button down", "close the drawer"]
    together = model.planner.tokenise(instructions)
    batch = make_batch(model, 3)
    logits = model.planner(batch.plan_images, batch.plan_state, together)
    for row, instruction in enumerate(instructions):
        alone = model.planner.tokenise([instruction])
        assert torch.equal(alone.ids[0], together.ids[row])
        assert torch.equal(alone.mask[0], together.mask[row])
        only = torch.tensor([row])
        answer = model.planner(batch.plan_images[only], batch.plan_state[only], alone)
        torch.testing.assert_close(answer, logits[only], atol=1e-4, rtol=1e-4)


def test_padding_is_never_read(source):
    model = pretrained(source, {"refiner.vision": "shared", "refiner.see_language": True})
    batch = make_batch(model, 2)
    unknown = model.planner.backbone.processor.tokenizer.unk_token_id
    junk = replace(batch, text=torch.where(batch.text_mask, batch.text, unknown))
    assert not torch.equal(junk.text, batch.text)
    logits = [model.planner(b.plan_images, b.plan_state, seen_first(b).text) for b in (batch, junk)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answers(model, batch)[1], answers(model, junk)[1], atol=1e-4, rtol=1e-4)


def test_too_long_instructions_are_refused(source):
    with pytest.raises(ValueError, match=r"too long; raise planner\.max_text_tokens"):
        pretrained(source).planner.tokenise(["open the door " * 10])


@pytest.mark.parametrize("history", [1, 2])
def test_the_ablations_share_the_encoder_and_the_words(source, history):
    model = pretrained(source, {"refiner.vision": "shared", "refiner.see_language": True, "data.history": history})
    batch = make_batch(model, 2)
    chunk = answers(model, batch)[1]
    swapped = replace(batch, text=batch.text.flip(0), text_mask=batch.text_mask.flip(0))
    assert not torch.allclose(answers(model, swapped)[1], chunk)
    for picture in range(history):
        images = batch.images.clone()
        images[:, picture] = 255 - images[:, picture]
        assert not torch.allclose(answers(model, replace(batch, images=images))[1], chunk)


def test_a_shared_eye_is_not_told_the_instruction(source):
    """Both prompts begin with the pictures, and a causal model's picture tokens cannot know what follows."""
    model = pretrained(source, {"refiner.vision": "shared"})
    batch = make_batch(model, 2)
    swapped = replace(batch, text=batch.text.flip(0), text_mask=batch.text_mask.flip(0))
    torch.testing.assert_close(answers(model, swapped)[1], answers(model, batch)[1], atol=1e-5, rtol=1e-5)


def parameters(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("frozen", [True, False])
def test_freezing_keeps_the_backbone_as_it_was(source, frozen):
    way = "frozen" if frozen else "full"
    ways = {"planner.train_vision": way, "planner.train_language": way}
    model = pretrained(source, {**ways, "train.steps": 2, "train.lr": 1e-2})
    backbone, head = parameters(model.planner.backbone), parameters(model.planner.blocks)
    list(Trainer(model, device=torch.device("cpu")).run([make_batch(model, 2)] * 2))
    unchanged = [torch.equal(*pair) for pair in zip(backbone, parameters(model.planner.backbone), strict=True)]
    assert all(unchanged) is frozen
    assert not any(torch.equal(*pair) for pair in zip(head, parameters(model.planner.blocks), strict=True))


def test_a_checkpoint_alone_is_enough(source, vision_model, tmp_path):
    """Neither the backbone's nor the encoder's folder is needed once a checkpoint is written."""
    hub = tmp_path / "hub"
    shutil.copytree(source, hub / "language")
    shutil.copytree(vision_model, hub / "eyes")
    model = pretrained(hub / "language", {"refiner.encoder": str(hub / "eyes")})
    # What the checkpoint holds must win over what the folder held.
    for parameter in model.parameters():
        parameter.data += 0.01
    save_checkpoint(tmp_path / "checkpoint", model)
    shutil.rmtree(hub)
    loaded = checkpoint.load(tmp_path / "checkpoint")
    batch = make_batch(model, 2)
    for mine, theirs in zip(answers(loaded.model, batch), answers(model, batch), strict=True):
        assert torch.equal(mine, theirs)
    seen = [make_observation(robot) for robot in range(2)]
    policy = SystemPolicy(loaded)
    assert all(np.isfinite(chunk.actions).all() for chunk in act(policy, seen))


def test_a_changed_tokeniser_is_noticed(source, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", pretrained(source))
    path = tmp_path / "checkpoint" / "processor" / "tokenizer.json"
    path.write_text(path.read_text().replace('"open"', '"shut"'))
    with pytest.raises(ValueError, match="changed after it was written"):
        checkpoint.load(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("key", "valid"), [("planner.backbone", "`tiny`"), ("refiner.encoder", "`conv`")], ids=["backbone", "encoder"]
)
@pytest.mark.parametrize("name", ["nobody/has-this-model", "folder"])
def test_unknown_models_are_refused(key, valid, name, tmp_path):
    (tmp_path / "folder").mkdir()
    given = str(tmp_path / "folder") if name == "folder" else name
    with pytest.raises(ValueError, match=valid) as refusal:
        make_system(tiny_config({key: given}), SHAPE)
    assert given in str(refusal.value)
    assert "local model folder" in str(refusal.value)


def test_a_name_of_the_hub_is_the_model_that_this_machine_has_of_it(source, vision_model, tmp_path):
    """And a checkpoint of it needs neither the hub nor what was downloaded."""
    folders = {"planner.backbone": source, "refiner.encoder": vision_model}
    names = {"planner.backbone": "nobody/speaks", "refiner.encoder": "nobody/sees"}
    kept = {key: Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}") for key, name in names.items()}
    for key, place in kept.items():
        shutil.copytree(folders[key], place / "snapshots" / "7")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("7")
    named = tiny_model(names)
    for name, value in tiny_model({key: str(folder) for key, folder in folders.items()}).state_dict().items():
        assert torch.equal(named.state_dict()[name], value)
    save_checkpoint(tmp_path / "checkpoint", named)
    for place in kept.values():
        shutil.rmtree(place)
    again = checkpoint.load(tmp_path / "checkpoint").model
    assert all(torch.equal(again.state_dict()[name], value) for name, value in named.state_dict().items())


def test_a_vision_model_is_no_backbone(vision_model):
    with pytest.raises(ValueError, match="image-text-to-text"):
        pretrained(vision_model)


def test_the_refiner_sees_through_a_pretrained_encoder(vision_model):
    model = tiny_model({"refiner.encoder": str(vision_model), "data.history": 2})
    batch = make_batch(model, 2)
    chunk = answers(model, batch)[1]
    for picture in range(2):
        images = batch.images.clone()
        images[:, picture] = 255 - images[:, picture]
        assert not torch.allclose(answers(model, replace(batch, images=images))[1], chunk)
    losses(model, batch)["diff"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.refiner.eyes.model.parameters())


@pytest.mark.parametrize(("token", "top", "left"), [(0, 0, 0), (1, 0, 16), (2, 16, 0), (3, 16, 16)])
def test_quadrants_keep_where_things_are(vision_model, token, top, left):
    """A change in one corner moves that corner's token most, on the average of the random projections."""
    plain = torch.full((1, 1, 3, 32, 32), 128, dtype=torch.uint8)
    marked = plain.clone()
    marked[..., top : top + 16, left : left + 16] = 255
    moved = torch.zeros(4)
    for seed in range(8):
        torch.manual_seed(seed)
        encoder = PretrainedEncoder(str(vision_model), 32, 32)
        moved += (encoder(marked) - encoder(plain)).norm(dim=-1)[0].detach()
    assert moved.argmax() == token


def test_both_backbones_keep_the_protocol(source):
    config = tiny_config().planner
    assert isinstance(make_backbone(config, 32, 1), Backbone)
    assert isinstance(PretrainedBackbone(str(source), 32, 1, 12), Backbone)
