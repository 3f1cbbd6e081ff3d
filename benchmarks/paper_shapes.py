"""The presets' pretrained models as their configurations alone: random weights of the true shapes, without any hub.

A folder holds what a checkpoint holds beside its weights: both architectures and their processors, with a tokeniser of a few
words. `make_system` builds the model from it on whatever device is current.

    with torch.device("cuda"):
        system = paper_system("paper")
    uv run -m benchmarks.paper_shapes      # what the scales weigh
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.files import command_line
from libra_ray.config import Config, override, preset
from libra_ray.model.parts.adapters import adapt
from libra_ray.model.parts.backbone import PROCESSOR_FOLDER
from libra_ray.model.parts.vision import ENCODER_FOLDER
from libra_ray.model.registry import make_system
from libra_ray.model.system import System
from libra_ray.types import RobotShape

Scale = Literal["paper", "small", "tiny"]
SHAPE = RobotShape(action_dim=7, state_dim=8, cameras=1)
WORDS = ("open", "close", "push", "the", "door", "drawer", "window", "button", "down")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = (
    "{% for message in messages %}user {% for part in message['content'] %}{% if part['type'] == 'image' %}MARK"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
TINY_CHANGES: Mapping[str, Any] = MappingProxyType(
    {
        "planner.width": 32, "planner.heads": 4, "planner.depth": 1, "planner.max_text_tokens": 16, "refiner.width": 32,
        "refiner.heads": 4, "refiner.depth": 1, "data.image_size": 32, "train.batch_size": 2, "train.accumulate": 1,
        "ray.use_gpu": False,
    }
)  # fmt: skip
"""The preset `paper`, scaled down."""


def paper_config(scale: Scale = "paper", changes: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """The preset of that name; of `tiny`, the preset `paper` scaled down to a CPU."""
    config = preset("small" if scale == "small" else "paper")
    return override(override(config, TINY_CHANGES if scale == "tiny" else {}), changes)


def paper_system(
    scale: Scale = "paper", changes: Mapping[str, Any] = MappingProxyType({}), shape: RobotShape = SHAPE
) -> System:
    """That model with random weights, on the current device (`with torch.device(...)`); on `meta` it takes no memory."""
    with tempfile.TemporaryDirectory() as folder:
        write_architectures(Path(folder), scale)
        config = paper_config(scale, changes)
        system = make_system(config, shape, Path(folder))
    adapt(system, config.model)
    return system


def write_architectures(folder: Path, scale: Scale) -> None:
    """Both pretrained parts' configurations and processors, as a checkpoint has them."""
    config, processor = smolvlm() if scale == "small" else internvl(scale)
    for part in (config, processor):
        part.save_pretrained(folder / PROCESSOR_FOLDER)
    for part in siglip(scale):
        part.save_pretrained(folder / ENCODER_FOLDER)


def internvl(scale: Scale) -> tuple[hf.PreTrainedConfig, hf.ProcessorMixin]:
    """InternVL3-2B: a ViT of 300 million weights at 448 pixels, and a language model of 1.5 billion."""
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = _words(**named)
    side, patch = (28, 14) if scale == "tiny" else (448, 14)
    vision: dict[str, Any] = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "attention_bias": True,
    }  # fmt: skip
    text: dict[str, Any] = {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151674, "rope_theta": 1e6,
    }  # fmt: skip
    if scale == "tiny":
        vision |= _TINY
        text |= {**_TINY, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**vision, image_size=[side, side], patch_size=[patch, patch]),
        text_config=hf.Qwen2Config(**text),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size={"height": side, "width": side}, crop_to_patches=True),
        tokenizer,
        hf.InternVLVideoProcessor(),
        image_seq_length=(side // patch // 2) ** 2,
        chat_template=TEMPLATE.replace("MARK", "<IMG_CONTEXT>"),
    )
    return config, processor


def smolvlm() -> tuple[hf.PreTrainedConfig, hf.ProcessorMixin]:
    """SmolVLM2-256M: SigLIP base at 512 pixels, and SmolLM2-135M."""
    tiles = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    named = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>", "video_token": "<video>",
    }  # fmt: skip
    tokenizer = _words(*tiles, **named)
    text = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49280,
    }  # fmt: skip
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 512,
        "patch_size": 16,
    }  # fmt: skip
    edges = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    config = hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**text),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
        scale_factor=4,
    )
    processor = hf.SmolVLMProcessor(
        image_processor=hf.SmolVLMImageProcessor(**edges),
        tokenizer=tokenizer,
        video_processor=hf.SmolVLMVideoProcessor(**edges),
        image_seq_len=64,
        chat_template=TEMPLATE.replace("MARK", "<image>"),
    )
    return config, processor


def siglip(scale: Scale) -> tuple[hf.PreTrainedConfig, hf.SiglipImageProcessor]:
    """The refiner's encoder: SigLIP so400m, or base, at 224 pixels."""
    sizes: dict[Scale, dict[str, Any]] = {
        "paper": {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "patch_size": 14, "image_size": 224,
        },
        "small": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "patch_size": 16, "image_size": 224,
        },
        "tiny": {**_TINY, "patch_size": 14, "image_size": 28},
    }  # fmt: skip
    side = sizes[scale]["image_size"]
    return hf.SiglipVisionConfig(**sizes[scale]), hf.SiglipImageProcessor(size={"height": side, "width": side})


_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def _words(*tokens: str, **named: str) -> hf.PreTrainedTokenizerFast:
    """A word-level tokeniser with the processor's special tokens."""
    words = [*SPECIAL.values(), *tokens, *named.values(), *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, SPECIAL["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL, extra_special_tokens=named)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def weights_of(scale: Scale) -> Mapping[str, int]:
    """The number of weights of each part, and of all."""
    with torch.device("meta"):
        system = paper_system(scale)
    beginnings = {"planner's backbone": "planner.backbone.", "planner": "planner.", "refiner's encoder": "refiner.eyes."}
    beginnings |= {"refiner": "refiner.", "all": ""}
    return {
        part: sum(weight.numel() for name, weight in system.named_parameters() if name.startswith(beginning))
        for part, beginning in beginnings.items()
    }


def main() -> None:
    """Print them."""
    command_line("paper_shapes", __doc__).parse_args()
    scales: tuple[Scale, ...] = ("paper", "small", "tiny")
    for scale in scales:
        for name, count in weights_of(scale).items():
            print(f"{scale:6} {name:20} {count / 1e6:10.2f} M")


if __name__ == "__main__":
    main()
