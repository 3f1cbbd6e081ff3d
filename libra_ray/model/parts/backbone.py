"""Vision-language backbones of the planner: a tiny one without downloads, and Hugging Face image-text-to-text models."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from libra_ray.config import PlannerConfig
from libra_ray.model.parts.adapters import Adaptable, Way
from libra_ray.model.parts.pretrained import cannot_load, load_checked, same_twice
from libra_ray.model.parts.prompts import Prompts, Text
from libra_ray.model.parts.readers import positions, reader_of
from libra_ray.model.parts.vision import VISION_TOKENS, ConvEncoder, InstructionAttention
from libra_ray.model.precision import matched, reads_are_free

PROCESSOR_FOLDER = "processor"


@dataclass(frozen=True, kw_only=True)
class BackboneOutput:
    """A backbone's output.

    Attributes:
        tokens: `(B, S, width)` hidden states, which the planner's head attends to.
        mask: `(B, S)`, False on padding; None where there is none, which only its values could tell of a mask of True.
        summary: `(B, summary_width)` the same in one vector, which modulates the head.
        pictures: `(B, K, width)` what was seen, `K` = `VISION_TOKENS` per picture, for a refiner that shares this encoder.
        sentence: `(B, width)` what was said (and, in a causal model, seen before it), for a refiner that may read it.
    """

    tokens: Float[Tensor, "B S width"]
    mask: Bool[Tensor, "B S"] | None
    summary: Float[Tensor, "B summary_width"]
    pictures: Float[Tensor, "B K width"]
    sentence: Float[Tensor, "B width"]

    def index(self, rows: Int[Tensor, " K"]) -> "BackboneOutput":
        """That of the given rows, in the given order."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values.items()}
        return BackboneOutput(**chosen)


@runtime_checkable
class Backbone(Protocol):
    """What the planner asks of a vision-language model."""

    width: int
    summary_width: int
    vision: str
    """How the names of its vision tower's weights begin; empty if there is no such part."""

    def tokenise(self, instructions: list[str]) -> Text:
        """Instructions as token ids of one common length, so that batches of any mixture can be stacked."""

    def __call__(self, images: UInt8[Tensor, "B T C height width"], text: Text) -> BackboneOutput:
        """Pictures and instruction to hidden states."""

    def save_processor(self, folder: Path) -> None:
        """Write what tokenises (and nothing else) under `folder`."""


class WithBackbone(Adaptable):
    """Sees and reads by a backbone, whose weights are `backbone.*`."""

    def __init__(self, backbone: object, config: PlannerConfig) -> None:
        """Take a `Backbone`; whatever else it is, its features are made elsewhere.

        Raises:
            ValueError: its vision tower shall train in another way than the rest, from which it cannot be told.
        """
        super().__init__()
        self.backbone = cast("nn.Module", backbone)
        self._training = config
        ways = self.ways()
        if "backbone." in ways and len(ways) == 2 and config.train_vision != config.train_language:
            raise ValueError(
                f"planner.train_vision={config.train_vision} is about a part that cannot be told from the rest of "
                f"planner.backbone={config.backbone!r}; give planner.train_language's {config.train_language}"
            )

    def ways(self) -> Mapping[str, Way]:
        """The backbone's two parts, and the head."""
        ways: dict[str, Way] = {"": self._training.train_head}
        if isinstance(self.backbone, nn.Module):
            ways["backbone."] = self._training.train_language
            if vision := cast("Backbone", self.backbone).vision:
                ways[f"backbone.{vision}"] = self._training.train_vision
        return ways

    def encode(self, images: UInt8[Tensor, "B T C height width"], text: Text) -> BackboneOutput:
        """The backbone's features alone."""
        return cast("BackboneOutput", self.backbone(images, text))

    def tokenise(self, instructions: list[str]) -> Text:
        """Instructions as the backbone's token ids."""
        return cast("Backbone", self.backbone).tokenise(instructions)

    def save_processor(self, folder: Path) -> None:
        """Write the backbone's tokeniser and architecture under `folder`."""
        cast("Backbone", self.backbone).save_processor(folder)


class GuidedEyes(nn.Module):
    """Sees pictures, and finds in them what a vector speaks of."""

    STAYS_FP32: tuple[str, ...] = ("gaze",)

    def __init__(self, image_size: int, pictures: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.summary_width = width * (pictures * (VISION_TOKENS + InstructionAttention.QUERIES) + 1)
        self.eyes = ConvEncoder(image_size, width)
        self.gaze = InstructionAttention(ConvEncoder.CHANNELS[0], width)

    def look(self, images: UInt8[Tensor, "B T C height width"], sentence: Float[Tensor, "B d"]) -> BackboneOutput:
        """Picture tokens, tokens of what the sentence names in the pictures, and the sentence itself."""
        seen = self.eyes.encode(images)
        narrow, wide = self.eyes.norm.weight, self.gaze.scale
        found = matched(self.gaze(matched(seen.fine, wide), matched(sentence, wide)), narrow)
        tokens = torch.cat([seen.tokens, found, sentence[:, None]], dim=1)
        return BackboneOutput(tokens=tokens, mask=None, summary=tokens.flatten(1), pictures=seen.tokens, sentence=sentence)


class TinyBackbone(GuidedEyes):
    """Random weights, byte-level tokeniser, no download: for two cores and for tests.

    Raises:
        ValueError: fewer tokens than it reads at once.
    """

    PAD = 0
    READ_AT_ONCE, AROUND = 8, 2
    """Bytes that a word's convolution spans, and zeros before and behind an instruction."""
    STAYS_FP32 = ("bytes", "position", "gaze")
    vision = "eyes."

    def __init__(self, image_size: int, pictures: int, width: int, max_text_tokens: int) -> None:
        super().__init__(image_size, pictures, width)
        if max_text_tokens < (least := self.READ_AT_ONCE - 2 * self.AROUND):
            raise ValueError(
                f"planner.max_text_tokens={max_text_tokens} is too small for planner.backbone=tiny; it must be at least {least}"
            )
        self.max_text_tokens = max_text_tokens
        self.bytes = nn.Embedding(257, width)
        self.position = nn.Parameter(torch.randn(max_text_tokens, width) * 0.02)
        self.words = nn.Conv1d(width, width, kernel_size=self.READ_AT_ONCE, stride=4, padding=self.AROUND)
        self.sentence = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def tokenise(self, instructions: list[str]) -> Text:
        """UTF-8 bytes plus one, zero-padded to `max_text_tokens`.

        Raises:
            ValueError: an instruction is longer than `max_text_tokens`: cut, two of them could become one.
        """
        ids = torch.zeros(len(instructions), self.max_text_tokens, dtype=torch.long)
        encoded = [instruction.strip().lower().encode() for instruction in instructions]
        longest = max(map(len, encoded), default=0)
        if longest > self.max_text_tokens:
            raise ValueError(
                f"an instruction is {longest - self.max_text_tokens} tokens (bytes) too long; raise "
                f"planner.max_text_tokens={self.max_text_tokens} to at least {longest}"
            )
        for row, codes in zip(ids, encoded, strict=True):
            row[: len(codes)] = torch.tensor(list(codes), dtype=torch.long) + 1
        return Text(ids=ids, mask=ids != self.PAD)

    def forward(self, images: UInt8[Tensor, "B T C height width"], text: Text) -> BackboneOutput:
        """Picture tokens, tokens of what the instruction names in the pictures, and one of the instruction itself."""
        if reads_are_free(text.ids):
            # A batch holds few different instructions: each is read once.
            unique, rows = torch.unique(text.ids, dim=0, return_inverse=True)
            sentence = self._sentence(unique)[rows]
        else:
            sentence = self._sentence(text.ids)
        return self.look(images, sentence)

    def _sentence(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B width"]:
        embedded = (self.bytes(ids) + self.position) * (ids != self.PAD)[..., None]
        words = functional.silu(self.words(matched(embedded.transpose(1, 2), self.words.weight)))
        sentence: Tensor = self.sentence(words.mean(dim=-1))
        return sentence

    def save_processor(self, folder: Path) -> None:
        """Nothing to write: bytes need no vocabulary."""


class PretrainedBackbone(nn.Module):
    """A Hugging Face image-text-to-text model, by name or local folder, without its language-model head.

    It must have one language decoder, and a processor that marks pictures by placeholder tokens. Pictures and prompt
    (placeholders for `pictures` pictures, then the instruction) both go through that processor.

    Raises:
        ValueError: the model cannot be loaded, is of another kind, lacks weights, or has two answers to one question.
    """

    def __init__(self, source: str, image_size: int, pictures: int, max_text_tokens: int, *, pretrained: bool = True) -> None:
        """Load; without `pretrained` the weights stay random, because a checkpoint's will follow."""
        super().__init__()
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        with cannot_load("planner.backbone", source, "image-text-to-text", "tiny"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            language = config.get_text_config(decoder=True)
            if config.is_encoder_decoder or language.is_encoder_decoder:
                raise ValueError("it is an encoder-decoder, and has no one decoder that reads pictures and words together")
            self.processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
            if pretrained:
                full = load_checked(AutoModelForImageTextToText, source)
            else:
                full = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, trust_remote_code=False)
            self.hf_config, self.model = full.config, full.base_model
            takes = set(inspect.signature(self.model.forward).parameters)
            if self.model is full or "pixel_values" not in takes:
                raise ValueError("below its head there is no one decoder that reads pictures and words together")
            tower = self.model.get_encoder(modality="image")
            self.vision = "" if tower is self.model else next(f"{n}." for n, m in self.named_modules() if m is tower)
            self.width = language.hidden_size
            self.pictures = pictures
            self.summary_width = self.width * (VISION_TOKENS * pictures + 1)
            # Who needs no weights makes the model on the device `meta`; prompts are read all the same.
            with torch.device("cpu"):
                self.prompts = Prompts(
                    self.processor,
                    image_size=image_size,
                    pictures=pictures,
                    max_text_tokens=max_text_tokens,
                    placeholder=getattr(config, "image_token_id", None),
                    takes=takes,
                    more=partial(positions, self.model),
                )
                self._read = reader_of(self.model, self.prompts.seen.of_one)
            if pretrained:
                text = self.tokenise([""])
                same_twice(lambda: self(self.prompts.noise, text).tokens)

    def tokenise(self, instructions: list[str]) -> Text:
        """Prompts with picture placeholders, each by the model's own processor, padded on the right to one length for all.

        Raises:
            ValueError: an instruction has the model's token for a picture in it, or is longer than `max_text_tokens`.
        """
        return self.prompts.tokenise(instructions)

    def forward(self, images: UInt8[Tensor, "B T C height width"], text: Text) -> BackboneOutput:
        """The language model's last hidden states over the whole prompt."""
        inputs = self.prompts.inputs(images, text)
        inputs["pixel_values"] = inputs["pixel_values"].to(next(self.model.parameters()).dtype)
        places = self.prompts.places(inputs["input_ids"])
        hidden = self._read(inputs, places)
        batch, mask = len(hidden), inputs["attention_mask"].bool()
        rows = torch.arange(batch, device=hidden.device)
        seen = hidden[rows[:, None], places].transpose(1, 2)
        pictures = functional.adaptive_avg_pool1d(seen, VISION_TOKENS * self.pictures).transpose(1, 2)
        sentence = hidden[rows, mask.sum(dim=1) - 1]
        summary = torch.cat([pictures.flatten(1), sentence], dim=1)
        return BackboneOutput(tokens=hidden, mask=mask, summary=summary, pictures=pictures, sentence=sentence)

    def save_processor(self, folder: Path) -> None:
        """The processor and the architecture's configuration: enough to rebuild the module without any hub."""
        self.processor.save_pretrained(folder / PROCESSOR_FOLDER)
        self.hf_config.save_pretrained(folder / PROCESSOR_FOLDER)


def make_backbone(config: PlannerConfig, image_size: int, pictures: int, folder: Path | None = None) -> Backbone:
    """The configured backbone; with `folder` (a checkpoint) it is built from the files there, without weights of its own."""
    if config.backbone == "tiny":
        return TinyBackbone(image_size, pictures, config.width, config.max_text_tokens)
    source = str(folder / PROCESSOR_FOLDER) if folder else config.backbone
    return PretrainedBackbone(source, image_size, pictures, config.max_text_tokens, pretrained=folder is None)


__all__ = [
    "PROCESSOR_FOLDER",
    "Backbone",
    "BackboneOutput",
    "PretrainedBackbone",
    "Text",
    "TinyBackbone",
    "WithBackbone",
    "make_backbone",
]
