"""Model folders as the hub has them, with random weights, small enough to be written by a test."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

WORDS = ["open", "close", "press", "push", "the", "a", "drawer", "window", "button", "door", "down", "to", "of", "red"]
SIZE, PATCH = 28, 14
LANGUAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_llava(folder: Path) -> Path:
    """LLaVA: CLIP eyes, a Llama, no chat template."""
    tokenizer = _tokenizer(image_token="<image>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=SIZE, patch_size=PATCH, projection_dim=32),
        text_config=LlamaConfig(**LANGUAGE, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE // PATCH) ** 2,
    )
    return _write(folder, LlavaForConditionalGeneration, config, processor)


def write_internvl(folder: Path) -> Path:
    """InternVL, the family of the paper's backbone: its own eyes, pixel shuffle, a Qwen, a chat template, left padding."""
    tokenizer = _tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size={"height": SIZE, "width": SIZE}),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(),
        image_seq_length=(SIZE // PATCH // 2) ** 2,
        chat_template=(
            "{% for message in messages %}user {% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<IMG_CONTEXT> {% else %}{{ part['text'] }}{% endif %}{% endfor %} to{% endfor %}"
        ),
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**VISION, image_size=[SIZE, SIZE], patch_size=[PATCH, PATCH]),
        text_config=Qwen2Config(**LANGUAGE, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
    )
    return _write(folder, InternVLForConditionalGeneration, config, processor)


def write_siglip(folder: Path) -> Path:
    """SigLIP's vision tower, the paper's encoder of the refiner."""
    config = SiglipVisionConfig(**VISION, image_size=SIZE, patch_size=PATCH)
    return _write(folder, SiglipVisionModel, config, SiglipImageProcessor(size={"height": SIZE, "width": SIZE}))


def _tokenizer(**image_tokens: str) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>", *image_tokens.values()]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=image_tokens,
    )


def _write(folder: Path, kind: type, config: object, processor: object) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
