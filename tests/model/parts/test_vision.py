"""Vision models from outside: whatever they call their sizes, and how they answer; tiny ones of the true architectures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from libra_ray import checkpoint
from libra_ray.model.parts.vision import PretrainedEncoder, _hidden, make_encoder
from tests.model import vision_models
from tests.model.builders import make_batch, save_checkpoint, tiny_model
from tests.model.test_libra import answers, losses

SIZE = vision_models.SIZE


@pytest.fixture(scope="module", params=vision_models.SEEING)
def vision_model(request, tmp_path_factory) -> Path:
    """A model folder of every family, as the hub has it."""
    torch.manual_seed(0)
    return vision_models.SEEING[request.param](tmp_path_factory.mktemp("hub") / request.param)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return vision_models.vit(tmp_path_factory.mktemp("hub") / "vit")


@pytest.fixture
def damaged(vit, tmp_path) -> Path:
    return Path(shutil.copytree(vit, tmp_path / "damaged"))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_each_quadrant_has_its_token(vision_model):
    """Of all pixels, those of its own corner move a token most."""
    encoder = make_encoder(str(vision_model), 32, 8)
    seen = torch.rand(1, 3, *encoder.size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    pooled = functional.adaptive_avg_pool2d(encoder._map(_hidden(encoder.model, seen)), 2)[0].flatten(1)
    tokens = encoder.to_width(pooled.T)
    moved = [sum(torch.autograd.grad(value, seen, retain_graph=True)[0].square() for value in token) for token in tokens]
    strength = torch.cat(moved).sum(dim=1, keepdim=True)
    by_quadrant = functional.adaptive_avg_pool2d(strength, 2).flatten(1)
    assert by_quadrant.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_the_size_is_the_processors(vision_model):
    """Not the configuration's, by which DINOv2 would see seven times as many pixels."""
    encoder = make_encoder(str(vision_model), 32, 32)
    picture = encoder.processor(images=torch.zeros(32, 32, 3, dtype=torch.uint8).numpy(), return_tensors="pt")
    assert encoder.size == tuple(picture["pixel_values"].shape[-2:])


def test_colours_are_scaled_as_by_the_processor(vision_model):
    encoder = make_encoder(str(vision_model), 32, 32)
    colour = torch.tensor([10, 200, 90], dtype=torch.uint8)
    theirs = encoder.processor(images=colour.expand(32, 32, 3).numpy(), return_tensors="pt")["pixel_values"]
    ours = (colour.view(1, 3, 1, 1) / 255 - encoder.mean) / encoder.std
    torch.testing.assert_close(ours.expand_as(theirs), theirs, atol=0.02, rtol=0.02)


def test_it_learns_and_comes_back_from_a_checkpoint_alone(vision_model, tmp_path):
    hub = Path(shutil.copytree(vision_model, tmp_path / "hub"))
    model = tiny_model({"refiner.encoder": str(hub), "data.history": 2}).train()
    batch = make_batch(model, 2)
    losses(model, batch)["diff"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.refiner.eyes.model.parameters())
    for parameter in model.parameters():
        parameter.data += 0.01
    save_checkpoint(tmp_path / "checkpoint", model.eval())
    shutil.rmtree(hub)
    loaded = checkpoint.load(tmp_path / "checkpoint").model
    for mine, theirs in zip(answers(loaded, batch), answers(model, batch), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_the_same_picture_has_one_answer_in_training_too(vision_model):
    """Neither dropout nor the rest of the batch changes what is seen."""
    encoder = make_encoder(str(vision_model), 32, 32).train()
    pictures = torch.randint(0, 256, (3, 1, 3, 32, 32), dtype=torch.uint8)
    together = encoder(pictures)
    torch.testing.assert_close(encoder(pictures[1:2]), together[1:2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoder.eval()(pictures), together, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["conv", "siglip", "dinov2", "dinov2_registers", "dinov3"])
def test_a_refiner_attends_to_the_places_of_pictures(family, tmp_path):
    """To each of them, of each picture, where the pooled tokens are shut out."""
    source = family if family == "conv" else str(vision_models.SEEING[family](tmp_path / family))
    changes = {"refiner.encoder": source, "refiner.vision_tokens": "patches", "data.history": 2}
    model = tiny_model(changes)
    model.refiner.from_pictures.weight.data.zero_()
    batch, seen = make_batch(model, 1), []
    places = model.refiner.eyes.places
    assert places == (4 if family == "conv" else 16)
    model.refiner.eyes.register_forward_hook(lambda module, given, output: seen.append(output))
    chunk = answers(model, batch)[1]
    for picture in range(2):
        for row, column in ((0, 0), (0, 24), (24, 0), (24, 24)):
            images = batch.images.clone()
            images[:, picture, :, row : row + 8, column : column + 8] ^= 255
            assert not torch.allclose(answers(model, replace(batch, images=images))[1], chunk, atol=1e-6)
    losses(model, batch)["diff"].backward()
    assert all(block.attention.to_seen.weight.grad.any() for block in model.refiner.blocks)
    assert model.refiner.place.grad.flatten(0, 1).any(dim=1).all()
    assert not seen, "pictures are looked at once, for tokens and places together"


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (vision_models.mae, "drawn at random"),
        (vision_models.naflex, "its processor makes"),
        (vision_models.yolos, "36 tokens|37 tokens"),
    ],
)
def test_what_does_not_see_pictures_is_refused_in_one_line(write, reason, tmp_path):
    folder = write(tmp_path / "model")
    with pytest.raises(ValueError, match=reason) as refusal:
        make_encoder(str(folder), 32, 32)
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_weights_are_refused_by_name(damaged):
    change_weights(
        damaged, lambda weights: [weights.pop(n) for n in list(weights) if n.endswith("mlp.fc1.weight") or "query" in n]
    )
    with pytest.raises(ValueError, match=r"refiner\.encoder.*weights.*is missing") as refusal:
        PretrainedEncoder(str(damaged), 32, 32)
    assert "\n" not in str(refusal.value)


def test_weights_that_we_do_not_use_may_be_missing(damaged):
    change_weights(damaged, lambda weights: [weights.pop(name) for name in list(weights) if "pooler" in name])
    PretrainedEncoder(str(damaged), 32, 32)


def test_weights_of_another_shape_are_refused_by_name(damaged):
    def change(weights):
        name = next(n for n in weights if n.endswith(("layernorm.weight", "layernorm_before.weight")))
        weights[name] = torch.ones(7)

    change_weights(damaged, change)
    with pytest.raises(ValueError, match=r"layernorm\w*\.weight is 7, not 32"):
        PretrainedEncoder(str(damaged), 32, 32)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\x00" * 64])
def test_damaged_files_are_refused_in_one_line(name, content, damaged):
    (damaged / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"refiner\.encoder") as refusal:
        PretrainedEncoder(str(damaged), 32, 32)
    assert "\n" not in str(refusal.value)


def test_a_configuration_of_other_types_is_refused_in_one_line(damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(ValueError, match=r"refiner\.encoder") as refusal:
        PretrainedEncoder(str(damaged), 32, 32)
    assert "\n" not in str(refusal.value)
