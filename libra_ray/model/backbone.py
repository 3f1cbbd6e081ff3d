"""Vision-language backbones of the planner: a tiny one without downloads, and any Hugging Face image-text-to-text model."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from libra_ray.config import PlannerConfig
from libra_ray.model.pretrained import cannot_load
from libra_ray.model.vision import VISION_TOKENS, ConvEncoder, Gaze

PROCESSOR_FOLDER = "processor"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tokenised instructions: `ids` `(B, W)` int64 and `mask` `(B, W)`, False on padding."""

    ids: Int[Tensor, "B W"]
    mask: Bool[Tensor, "B W"]


@dataclass(frozen=True, kw_only=True)
class Features:
    """A backbone's output.

    Attributes:
        tokens: `(B, S, width)` hidden states, which the planner's head attends to; `mask` `(B, S)` is False on padding.
        summary: `(B, summary_width)` the same in one vector, which steers the head.
        pictures: `(B, K, width)` what was seen, `K` = `VISION_TOKENS` per picture, for a refiner that shares these eyes.
        sentence: `(B, width)` what was said (and, in a causal model, seen before it), for a refiner that may read it.
    """

    tokens: Float[Tensor, "B S width"]
    mask: Bool[Tensor, "B S"]
    summary: Float[Tensor, "B summary_width"]
    pictures: Float[Tensor, "B K width"]
    sentence: Float[Tensor, "B width"]


@runtime_checkable
class Backbone(Protocol):
    """What the planner asks of a vision-language model."""

    width: int
    summary_width: int

    def tokenise(self, instructions: list[str]) -> Text:
        """Instructions as token ids of one common length, so that batches of any mixture can be stacked."""

    def __call__(self, images: UInt8[Tensor, "B T C height width"], text: Text) -> Features:
        """Pictures and instruction to hidden states."""

    def save_processor(self, folder: Path) -> None:
        """Write what tokenises (and nothing else) under `folder`."""


class TinyBackbone(nn.Module):
    """Random weights, byte-level tokeniser, no download: for two cores and for tests."""

    PAD = 0

    def __init__(self, image_size: int, pictures: int, width: int, max_text_tokens: int) -> None:
        super().__init__()
        self.width = width
        self.summary_width = width * (pictures * (VISION_TOKENS + Gaze.QUERIES) + 1)
        self.max_text_tokens = max_text_tokens
        self.eyes = ConvEncoder(image_size, width)
        self.gaze = Gaze(ConvEncoder.CHANNELS[0], width)
        self.bytes = nn.Embedding(257, width)
        self.position = nn.Parameter(torch.randn(max_text_tokens, width) * 0.02)
        self.words = nn.Conv1d(width, width, kernel_size=8, stride=4, padding=2)
        self.sentence = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def tokenise(self, instructions: list[str]) -> Text:
        """UTF-8 bytes plus one, cut and zero-padded to `max_text_tokens`."""
        ids = torch.zeros(len(instructions), self.max_text_tokens, dtype=torch.long)
        for row, instruction in zip(ids, instructions, strict=True):
            codes = list(instruction.strip().lower().encode())[: self.max_text_tokens]
            row[: len(codes)] = torch.tensor(codes, dtype=torch.long) + 1
        return Text(ids=ids, mask=ids != self.PAD)

    def forward(self, images: UInt8[Tensor, "B T C height width"], text: Text) -> Features:
        """Picture tokens, tokens of what the instruction names in the pictures, and one of the instruction itself."""
        seen = self.eyes.see(images)
        # A batch holds few different instructions: each is read once.
        unique, rows = torch.unique(text.ids, dim=0, return_inverse=True)
        embedded = (self.bytes(unique) + self.position) * (unique != self.PAD)[..., None]
        words = functional.silu(self.words(embedded.transpose(1, 2)))
        sentence = self.sentence(words.mean(dim=-1))[rows]
        tokens = torch.cat([seen.tokens, self.gaze(seen.fine, sentence), sentence[:, None]], dim=1)
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        return Features(tokens=tokens, mask=mask, summary=tokens.flatten(1), pictures=seen.tokens, sentence=sentence)

    def save_processor(self, folder: Path) -> None:
        """Nothing to write: bytes need no vocabulary."""


class PretrainedBackbone(nn.Module):
    """Any Hugging Face image-text-to-text model, by name or local folder, without its language-model head.

    Pictures and prompt (placeholders for `pictures` pictures, then the instruction) both go through the model's own processor.

    Raises:
        ValueError: the model cannot be loaded as an image-text-to-text model.
    """

    def __init__(self, source: str, image_size: int, pictures: int, max_text_tokens: int, *, pretrained: bool = True) -> None:
        """Load; without `pretrained` the weights stay random, because a checkpoint's will follow."""
        super().__init__()
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        with cannot_load("planner.backbone", source, "image-text-to-text", "tiny"):
            self.processor = AutoProcessor.from_pretrained(source)
            if pretrained:
                full = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
            else:
                full = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(source))
            self.hf_config, self.model = full.config, full.model
            self.picture_token = getattr(full.config, "image_token_id", None) or full.config.image_token_index
        self.width = full.config.get_text_config().hidden_size
        self.summary_width = self.width * (VISION_TOKENS * pictures + 1)
        self.image_size, self.pictures, self.max_text_tokens = image_size, pictures, max_text_tokens
        self.takes = set(inspect.signature(self.model.forward).parameters)

    def tokenise(self, instructions: list[str]) -> Text:
        """Prompts with picture placeholders, each by the model's own processor, padded on the right to one length for all.

        One at a time, so that no instruction's tokens depend on its company: many processors pad on the left.

        Raises:
            ValueError: an instruction has the model's token for a picture in it, or is longer than `max_text_tokens`.
        """
        blank = torch.zeros(1, self.pictures, 3, self.image_size, self.image_size, dtype=torch.uint8)
        mark = self.processor.image_token
        for instruction in instructions:
            if mark in instruction:
                raise ValueError(f"the instruction {instruction!r} has {mark!r} in it, which marks a picture")
        prompts = [self._processed(blank, instruction)["input_ids"][0] for instruction in ("", *instructions)]
        # The placeholders' number depends on the picture size alone, so all prompts fit into one constant length.
        length = len(prompts.pop(0)) + self.max_text_tokens
        longest = max(map(len, prompts))
        if longest > length:
            raise ValueError(
                f"an instruction is {longest - length} tokens too long; raise planner.max_text_tokens={self.max_text_tokens}"
            )
        pad = self.processor.tokenizer.pad_token_id or 0
        return Text(
            ids=torch.stack([functional.pad(ids, (0, length - len(ids)), value=pad) for ids in prompts]),
            mask=torch.stack([torch.arange(length) < len(ids) for ids in prompts]),
        )

    def forward(self, images: UInt8[Tensor, "B T C height width"], text: Text) -> Features:
        """The language model's last hidden states over the whole prompt."""
        inputs = {name: value.to(images.device) for name, value in self._processed(images, "").items() if name in self.takes}
        inputs["pixel_values"] = inputs["pixel_values"].to(next(self.model.parameters()).dtype)
        shown = text.ids == self.picture_token
        inputs |= {"input_ids": text.ids, "attention_mask": text.mask.long()}
        if "mm_token_type_ids" in self.takes:
            inputs["mm_token_type_ids"] = shown.long()
        hidden = self.model(**inputs).last_hidden_state
        batch = len(hidden)
        seen = hidden[shown].view(batch, -1, self.width).transpose(1, 2)
        pictures = functional.adaptive_avg_pool1d(seen, VISION_TOKENS * self.pictures).transpose(1, 2)
        sentence = hidden[torch.arange(batch), text.mask.sum(dim=1) - 1]
        summary = torch.cat([pictures.flatten(1), sentence], dim=1)
        return Features(tokens=hidden, mask=text.mask, summary=summary, pictures=pictures, sentence=sentence)

    def save_processor(self, folder: Path) -> None:
        """The processor and the architecture's configuration: enough to rebuild the module without any hub."""
        self.processor.save_pretrained(folder / PROCESSOR_FOLDER)
        self.hf_config.save_pretrained(folder / PROCESSOR_FOLDER)

    def _processed(self, images: UInt8[Tensor, "B T C height width"], instruction: str) -> dict[str, Tensor]:
        """The processor's answer to the same instruction under every window's pictures."""
        prompts = [self._prompt(instruction)] * len(images)
        return dict(self.processor(text=prompts, images=[list(window) for window in images], return_tensors="pt"))

    def _prompt(self, instruction: str) -> str:
        content: list[dict[str, str]] = [{"type": "image"}] * self.pictures + [{"type": "text", "text": instruction}]
        if getattr(self.processor, "chat_template", None):
            return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=False)
        return self.processor.image_token * self.pictures + instruction


def make_backbone(config: PlannerConfig, image_size: int, pictures: int, folder: Path | None = None) -> Backbone:
    """The configured backbone; with `folder` (a checkpoint) it is built from the files there, without weights of its own."""
    if config.backbone == "tiny":
        return TinyBackbone(image_size, pictures, config.width, config.max_text_tokens)
    source = str(folder / PROCESSOR_FOLDER) if folder else config.backbone
    return PretrainedBackbone(source, image_size, pictures, config.max_text_tokens, pretrained=folder is None)
