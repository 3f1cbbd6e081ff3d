"""Every family of vision-language models, as the model's own processor and forward have it."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from libra_ray.model.parts.backbone import PROCESSOR_FOLDER, PretrainedBackbone, Text
from libra_ray.model.parts.prompts import Prompts
from tests.model import families
from tests.model.families import FAMILIES, OTHERS

SIZE, PICTURES, ROOM = 32, 2, 48
INSTRUCTIONS = ["open the door", "push", "close the window to the red drawer"]


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory) -> Path:
    return families.write(tmp_path_factory.mktemp("hub") / request.param, FAMILIES[request.param]())


@pytest.fixture(scope="module")
def backbone(source) -> PretrainedBackbone:
    return load(source)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return families.write(tmp_path_factory.mktemp("hub") / "llava", families.llava())


def load(source: Path, pretrained: bool = True, **changes: int) -> PretrainedBackbone:
    given = {"image_size": SIZE, "pictures": PICTURES, "max_text_tokens": ROOM, **changes}
    return PretrainedBackbone(str(source), **given, pretrained=pretrained).eval()


def windows(count: int = len(INSTRUCTIONS), size: int = SIZE) -> torch.Tensor:
    shape = (count, PICTURES, 3, size, size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@torch.no_grad()
def own_answer(source: Path, processor: hf.ProcessorMixin, window: torch.Tensor, instruction: str) -> torch.Tensor:
    """What the model itself says of one prompt, alone and unpadded, asked in the way that its documentation shows."""
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in window]
    if processor.chat_template:
        content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": instruction}]
        given = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **given)
    else:
        prompt = processor.image_token * len(pictures) + instruction
        inputs = processor(text=[prompt], images=[pictures], return_tensors="pt")
    inputs.pop("labels", None)
    model = hf.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    return model(**inputs, output_hidden_states=True).hidden_states[-1][0]


def test_the_features_are_the_models_own(source, backbone, tmp_path):
    """Of every prompt in a mixture: token types and attention masks are those of this prompt, pictures have their places."""
    images, text = windows(), backbone.tokenise(INSTRUCTIONS)
    with torch.no_grad():
        features = backbone(images, text)
    backbone.save_processor(tmp_path)
    processor = hf.AutoProcessor.from_pretrained(tmp_path / PROCESSOR_FOLDER)
    for row, instruction in enumerate(INSTRUCTIONS):
        answer = own_answer(source, processor, images[row], instruction)
        torch.testing.assert_close(features.tokens[row][features.mask[row]], answer, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(features.sentence[row], answer[-1], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(features.sentence[0], features.sentence[1], atol=1e-3)


def test_nothing_depends_on_the_rest_of_the_batch(backbone):
    images, together = windows(), backbone.tokenise(INSTRUCTIONS)
    with torch.no_grad():
        features = backbone(images, together)
        for row, instruction in enumerate(INSTRUCTIONS):
            alone = backbone.tokenise([instruction])
            assert torch.equal(alone.ids[0], together.ids[row])
            assert torch.equal(alone.mask[0], together.mask[row])
            own = backbone(images[row : row + 1], alone)
            torch.testing.assert_close(own.summary[0], features.summary[row], atol=1e-4, rtol=1e-3)


def test_pictures_and_words_are_both_read(backbone):
    images, text = windows(), backbone.tokenise(INSTRUCTIONS)
    with torch.no_grad():
        features = backbone(images, text)
        for picture in range(PICTURES):
            changed = images.clone()
            changed[:, picture] = 255 - changed[:, picture]
            moved = (backbone(changed, text).pictures - features.pictures).abs().amax(dim=(1, 2))
            assert (moved > 1e-5).all()
        swapped = Text(ids=text.ids.flip(0), mask=text.mask.flip(0))
        assert not torch.allclose(backbone(images, swapped).sentence, features.sentence, atol=1e-3)


def test_the_order_of_pictures_is_read(backbone):
    images, text = windows(), backbone.tokenise(INSTRUCTIONS)
    with torch.no_grad():
        assert not torch.allclose(backbone(images.flip(1), text).sentence, backbone(images, text).sentence, atol=1e-5)


def test_pictures_are_made_in_one_batch(backbone):
    """By the model's own image processor, on the device where they are."""
    assert backbone.prompts.seen.is_batched


def test_both_parts_learn(backbone):
    """The vision tower's weights and the language model's, each known by its names."""
    backbone.zero_grad()
    backbone(windows(), backbone.tokenise(INSTRUCTIONS)).sentence.square().sum().backward()
    learned = [name for name, weight in backbone.named_parameters() if weight.grad is not None and weight.grad.any()]
    assert {name.startswith(backbone.vision) for name in learned} == {True, False}


class Watched(TorchDispatchMode):
    """Refuses what makes a host wait for its device, or a CUDA graph impossible: copies from one to the other."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            assert args[-1 if func is torch.ops.aten.copy_.default else 0].device == made.device, "a copy between devices"
        return made


STATIC = ["smolvlm", "internvl", "internvl3_5", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("name", STATIC)
def test_values_are_never_looked_at(name, tmp_path):
    """On a device without values any look at one fails; what is constant lies there after the first batch of its size."""
    backbone = load(families.write(tmp_path / name, FAMILIES[name]()))
    text, images = backbone.tokenise(INSTRUCTIONS), windows().to("meta")
    text = Text(ids=text.ids.to("meta"), mask=text.mask.to("meta"))
    backbone.to("meta")(images, text)
    with Watched():
        assert backbone(images, text).tokens.is_meta


@pytest.mark.parametrize("name", [name for name in STATIC if name != "internvl3_5"])
def test_every_layer_compiles_as_a_whole(name, tmp_path):
    """No look at a value, nor a hook, breaks it in two; a copy is a backbone of its own, compiled layers or not."""
    backbone = load(families.write(tmp_path / name, FAMILIES[name]()))
    torch._dynamo.reset()
    images, text = windows(2), backbone.tokenise(INSTRUCTIONS[:2])
    with torch.no_grad():
        features, again = backbone(images, text), copy.deepcopy(backbone)
        for weight in backbone.model.get_encoder(modality="image").parameters():
            weight.zero_()
        assert not torch.allclose(backbone(images, text).tokens, features.tokens, atol=1e-3)
        for layers in [module for module in again.modules() if isinstance(module, torch.nn.ModuleList)]:
            for layer in layers:
                layer.compile(backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(again(images, text).tokens, features.tokens, atol=1e-4, rtol=1e-4)


class Touchy(hf.CLIPImageProcessor):
    """Takes no tensors."""

    def __call__(self, images: list, **options: object) -> hf.BatchFeature:
        if any(isinstance(picture, torch.Tensor) for window in images for picture in window):
            raise TypeError("give pictures")
        return super().__call__(images, **options)


def test_a_processor_without_batches_is_asked_every_time_and_that_is_said_once(caplog):
    _, config, made = families.llava()
    plain = prompts(made, config.image_token_id, pictures=2)
    made.image_processor = Touchy(**made.image_processor.to_dict())
    touchy = prompts(made, config.image_token_id, pictures=2)
    text = touchy.tokenise(INSTRUCTIONS)
    theirs, ours = touchy.inputs(windows(), text), plain.inputs(windows(), text)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)
    assert [record.getMessage() for record in caplog.records if "on the CPU" in record.getMessage()] == [
        "LlavaProcessor makes its pictures on the CPU, window by window: it cannot be called on a batch of tensors"
    ]


def test_it_comes_back_from_what_it_saves(backbone, tmp_path):
    backbone.save_processor(tmp_path)
    again = load(tmp_path / PROCESSOR_FOLDER, pretrained=False)
    again.load_state_dict(backbone.state_dict())
    text = backbone.tokenise(INSTRUCTIONS)
    assert torch.equal(again.tokenise(INSTRUCTIONS).ids, text.ids)
    with torch.no_grad():
        assert torch.equal(again(windows(), text).tokens, backbone(windows(), text).tokens)


def test_the_sign_for_a_picture_is_no_instruction(backbone):
    processor = backbone.processor
    for mark in (processor.image_token, processor.tokenizer.convert_ids_to_tokens(backbone.prompts.placeholder)):
        with pytest.raises(ValueError, match=r"has .* in it") as refusal:
            backbone.tokenise(["open the door", f"open {mark} door"])
        assert repr(mark) in str(refusal.value)


PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text()


def test_the_page_says_what_was_tried(backbone):
    of_each_token = ", ".join(f"`{name}`" for name in list(backbone.prompts.per_token)[1:]) or "–"
    assert f"| `{backbone.hf_config.architectures[0]}` | {of_each_token} |\n" in PAGE


def test_the_page_claims_no_more():
    tried = {made()[0].__name__ for made in (*FAMILIES.values(), *(made for made, _ in OTHERS.values()))}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == tried


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_kinds_are_refused(name, tmp_path):
    made, reason = OTHERS[name]
    with pytest.raises(ValueError, match=reason) as refusal:
        load(families.write(tmp_path / name, made()))
    assert "\n" not in str(refusal.value)
    assert "planner.backbone" in str(refusal.value)
    assert f"| `{made()[0].__name__}` | {reason} |\n" in PAGE


def smolvlm(tile: int) -> tuple[hf.ProcessorMixin, int]:
    """SmolVLM's processor, which shows a picture as sixteen tiles and as a whole; id of the placeholder."""
    _, config, processor = families.smolvlm()
    sizes = {"size": {"longest_edge": 4 * tile}, "max_image_size": {"longest_edge": tile}}
    processor.image_processor = hf.SmolVLMImageProcessor(**sizes)
    return processor, config.image_token_id


def prompts(processor: hf.ProcessorMixin, placeholder: int | None, size: int = SIZE, pictures: int = 1) -> Prompts:
    takes = {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    given = {"image_size": size, "pictures": pictures, "max_text_tokens": ROOM, "takes": takes}
    return Prompts(processor, placeholder=placeholder, **given)


@pytest.mark.parametrize(("size", "tiles"), [(32, 1), (64, 1), (65, 2 * 2 + 1), (128, 2 * 2 + 1), (300, 4 * 4 + 1)])
def test_tiles_follow_the_picture(size, tiles):
    made = prompts(*smolvlm(tile=64), size=size)
    assert made.inputs(made.noise, made.tokenise(["open"]))["pixel_values"].shape[1:] == (tiles, 3, 64, 64)


@pytest.mark.parametrize(("name", "size", "tokens"), [
    ("idefics3", 28, 1), ("idefics2", 28, 4), ("internvl", 28, 1), ("ovis2", 28, 4), ("lfm2_vl", 28, 1), ("gemma4", 32, 64),
])  # fmt: skip
def test_a_small_picture_is_not_cut(name, size, tokens):
    _, config, processor = FAMILIES[name]()
    made = prompts(processor, config.image_token_id, size)
    assert (made.tokenise(["open"]).ids == made.placeholder).sum() == tokens


def test_a_model_without_a_placeholder_is_refused():
    with pytest.raises(ValueError, match="by no placeholder token"):
        prompts(families.llava()[2], None)
    with pytest.raises(ValueError, match="marks 1 pictures by 0 placeholder tokens"):
        prompts(families.llava()[2], 4321)


class Squinting(hf.LlavaProcessor):
    """Spends more tokens on a picture that shows more."""

    def replace_image_token(self, image_inputs: dict, image_idx: int, **_: object) -> str:
        return self.image_token * (2 if image_inputs["pixel_values"][image_idx].std(dim=(1, 2)).max() > 0.1 else 1)


def test_a_number_of_placeholders_that_depends_on_what_is_shown_is_refused():
    _, config, made = families.llava()
    squinting = Squinting(made.image_processor, made.tokenizer, patch_size=14, vision_feature_select_strategy="default")
    with pytest.raises(ValueError, match="must be a constant number"):
        prompts(squinting, config.image_token_id)


MULTIMODAL = families.chat("<image>")
WORDS_ALONE = "{% for message in messages %}{{ 'user ' + message['content'] + ' to' }}{% endfor %}"
SPLITTING = "{% for message in messages %}user {{ message['content'].split('to')[0] }} to{% endfor %}"


@pytest.mark.parametrize("template", [MULTIMODAL, WORDS_ALONE, SPLITTING], ids=["pictures", "words", "methods"])
@pytest.mark.parametrize("where", ["processor", "tokeniser"])
def test_a_chat_template_is_used_wherever_it_lies(template, where, llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "llava")
    if where == "processor":
        (folder / "chat_template.jinja").write_text(template)
        assert hf.AutoProcessor.from_pretrained(folder).chat_template == template
    else:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        assert hf.AutoProcessor.from_pretrained(folder).chat_template is None
    backbone = load(folder)
    text = backbone.tokenise(["open the door"])
    words = backbone.processor.tokenizer.decode(text.ids[0][text.mask[0]]).replace("<image>", "").split()
    assert words == ["user", "open", "the", "door", "to"]


def test_a_chat_template_without_a_place_for_pictures_is_refused(llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "llava")
    (folder / "chat_template.jinja").write_text("user to")
    with pytest.raises(ValueError, match="chat template has no place for 2 pictures"):
        load(folder)


def rewrite(folder: Path, change) -> None:
    """Change a folder's weights."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def half(weights: dict) -> dict:
    return dict(sorted(weights.items())[::2])


def misshapen(weights: dict) -> dict:
    return {name: value[..., :-1].clone() if name.endswith("q_proj.weight") else value for name, value in weights.items()}


def poisoned(weights: dict) -> dict:
    return {name: value * float("nan") if name.endswith("embed_tokens.weight") else value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [(half, r"\w+\.weight is missing.* and \d+ more"), (misshapen, r"q_proj.weight is 32x31, not 32x32"), (poisoned, "finite")],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, said, llava, tmp_path, capfd):
    folder = shutil.copytree(llava, tmp_path / "llava")
    rewrite(folder, change)
    with pytest.raises(ValueError, match=said) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["cut off", "text", "configuration", "tokeniser"])
def test_damaged_folders_are_refused_in_one_line(damage, llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "llava")
    weights = folder / "model.safetensors"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "text":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "configuration":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "text_config": {"model_type": "llama", "hidden_size": "wide"}})
        )
    else:
        (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"planner\.backbone=.*cannot be loaded") as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)


def test_a_head_that_nobody_reads_may_be_missing(llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "llava")
    rewrite(folder, lambda weights: {name: value for name, value in weights.items() if "lm_head" not in name})
    text = load(folder).tokenise(INSTRUCTIONS)
    assert torch.equal(load(folder)(windows(), text).tokens, load(llava)(windows(), text).tokens)


def test_a_model_with_two_answers_to_one_question_is_refused(llava, monkeypatch):
    looked = hf.LlamaModel.forward

    def forgetful(self, *args, **kwargs):
        said = looked(self, *args, **kwargs)
        said.last_hidden_state = torch.nn.functional.dropout(said.last_hidden_state)
        return said

    monkeypatch.setattr(hf.LlamaModel, "forward", forgetful)
    with pytest.raises(ValueError, match="answers the same question differently"):
        load(llava)
