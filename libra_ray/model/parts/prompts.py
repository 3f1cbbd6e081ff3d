"""Pictures and instructions as the inputs of a Hugging Face vision-language model, by the model's own processor."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from torch.nn import functional

from libra_ray.model.parts.picture_inputs import PictureInputs

PROBE = "open the door"
"""An instruction to try a processor with."""
TILING = ("do_image_splitting", "do_pan_and_scan", "crop_to_patches")
"""What the processors of different families call it to cut a picture into tiles and to show it as a whole besides."""
SOFT_TOKENS = (70, 140, 280, 560)
"""Picture sizes, in tokens, among which a processor with `max_soft_tokens` lets choose."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tokenised instructions, one row each: `ids` `(B, W)` int64 and `mask` `(B, W)`, False on padding.

    A row may go on, behind the token ids, with what else a model's processor says of each token: its backbone reads that apart.
    """

    ids: Int[Tensor, "B W"]
    mask: Bool[Tensor, "B W"]


class Prompts:
    """A processor at work: a prompt is `pictures` pictures, marked by placeholder tokens, and an instruction.

    What a processor says of every token (ids, token types, which picture it may look at) belongs to the instruction, and is
    padded on the right to one length for all. What it says of the pictures does not depend on the instruction.

    Args:
        processor: whose options for cutting pictures into tiles are changed so as to follow the pictures' size.
        image_size: height and width of the pictures.
        pictures: pictures in a prompt.
        max_text_tokens: room for an instruction.
        placeholder: id of the token that the model replaces by what it sees; None if it has none.
        takes: names of the model's inputs.
        more: of what the processor says of one prompt, what else belongs to its tokens.

    Raises:
        ValueError: the processor does not mark pictures by placeholder tokens, or by a number that depends on what they show.
    """

    def __init__(
        self,
        processor: Any,
        *,
        image_size: int,
        pictures: int,
        max_text_tokens: int,
        placeholder: int | None,
        takes: set[str],
        more: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda said: {},
    ) -> None:
        self.processor, self.pictures, self.max_text_tokens = processor, pictures, max_text_tokens
        if placeholder is None or not getattr(processor, "image_token", None):
            raise ValueError("its processor marks pictures by no placeholder token")
        self.placeholder, self.takes, self._more = placeholder, takes, more
        follow_pictures(processor.image_processor, image_size)
        self._write = self._writer()
        self.blank = torch.zeros(1, pictures, 3, image_size, image_size, dtype=torch.uint8)
        self.noise = torch.randint(0, 256, self.blank.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        self._shown: Callable[[Tensor], Any] = list
        try:
            empty = self._said(self.blank, "")
        except TypeError:
            # Some take no tensors.
            self._shown = _as_pil
            empty = self._said(self.blank, "")
        probe = self._said(self.noise, PROBE)
        marked = [int((said["input_ids"] == placeholder).sum()) for said in (empty, probe)]
        if marked[0] < pictures or marked[0] != marked[1]:
            raise ValueError(
                f"its processor marks {pictures} pictures by {marked[0]} placeholder tokens, or by {marked[1]} if they show "
                f"something else; it must be a constant number, and at least one each"
            )
        self.room, self.placeholders = empty["input_ids"].shape[1] + max_text_tokens, marked[0]
        self.per_token = self._per_token(empty, probe)
        names = [name for name in probe if name not in self.per_token and name != "attention_mask"]
        self.seen = PictureInputs(processor, lambda images: self._processed(images, ""), self.noise, names)
        frame = {*processor.tokenizer.all_special_ids} & {*empty["input_ids"][0].tolist()}
        tokens = [*processor.tokenizer.convert_ids_to_tokens([*frame, placeholder]), processor.image_token]
        self.marks = sorted({token for token in (*tokens, *processor.all_special_multimodal_tokens) if token})

    def tokenise(self, instructions: list[str]) -> Text:
        """Prompts, each by itself, so that none depends on the others: many processors pad on the left.

        Raises:
            ValueError: an instruction has a token of the frame of a prompt in it, or is longer than `max_text_tokens`.
        """
        said = [self._of_one(instruction) for instruction in instructions]
        longest = max(len(one["input_ids"]) for one in said)
        if longest > self.room:
            raise ValueError(
                f"an instruction is {longest - self.room} tokens too long; "
                f"raise planner.max_text_tokens={self.max_text_tokens} to {self.max_text_tokens + longest - self.room}"
            )
        pad = {"input_ids": self.processor.tokenizer.pad_token_id or 0}
        mask = torch.stack([torch.arange(self.room) < len(one["input_ids"]) for one in said])
        ids, masks = [], []
        for name, shape in self.per_token.items():
            rows = [_pad(one[name], self.room, pad.get(name, 0)) for one in said]
            ids.append(torch.stack(rows).long().flatten(1))
            masks.append(mask.repeat_interleave(math.prod(shape), dim=1))
        return Text(ids=torch.cat(ids, dim=1), mask=torch.cat(masks, dim=1))

    def inputs(self, images: UInt8[Tensor, "B T C height width"], text: Text) -> dict[str, Tensor]:
        """What the model is asked, on the device of `images`."""
        widths = [self.room * math.prod(shape) for shape in self.per_token.values()]
        parts = zip(self.per_token.items(), text.ids.split(widths, dim=1), strict=True)
        said = {name: part.view(len(part), self.room, *shape) for (name, shape), part in parts}
        return {**self.seen(images), **said, "attention_mask": text.mask[:, : self.room].long()}

    def places(self, ids: Int[Tensor, "B S"]) -> Int[Tensor, "B K"]:
        """Where the placeholders stand, in their order; there are equally many in every row."""
        return (ids != self.placeholder).byte().argsort(dim=1, stable=True)[:, : self.placeholders]

    def _of_one(self, instruction: str) -> dict[str, Tensor]:
        for mark in self.marks:
            if mark in instruction:
                raise ValueError(
                    f"the instruction {instruction!r} has {mark!r} in it, by which the model's prompts are put together"
                )
        return {name: value[0] for name, value in self._said(self.blank, instruction).items() if name in self.per_token}

    def _said(self, window: UInt8[Tensor, "1 T C height width"], instruction: str) -> dict[str, Tensor]:
        """All that is said of one prompt."""
        said = self._processed(window, instruction)
        return {**said, **self._more(said)}

    def _processed(self, images: UInt8[Tensor, "B T C height width"], instruction: str) -> dict[str, Tensor]:
        """The processor's answer to the same instruction under every window's pictures: the model's inputs."""
        prompt = self._write(instruction)
        begin = self.processor.tokenizer.bos_token
        # A template that writes the token a text begins with would have it twice.
        options = {"add_special_tokens": False} if begin and prompt.startswith(begin) else {}
        shown = [self._shown(window) for window in images]
        said = self.processor(text=[prompt] * len(images), images=shown, return_tensors="pt", **options)
        return {name: value for name, value in said.items() if name in self.takes}

    def _per_token(self, empty: Mapping[str, Tensor], probe: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The inputs that have a value for every token of a prompt, and those values' shapes; the ids first."""
        lengths = [len(said["input_ids"][0]) for said in (empty, probe)]
        if lengths[0] == lengths[1]:
            raise ValueError("its processor makes prompts of one length, so that their padding cannot be told from their words")

        def follows_words(name: str) -> bool:
            return all(said[name].shape[:2] == (1, length) for said, length in zip((empty, probe), lengths, strict=True))

        names = ["input_ids", *(name for name in probe if name not in ("input_ids", "attention_mask") and follows_words(name))]
        return {name: tuple(probe[name].shape[2:]) for name in names}

    def _writer(self) -> Callable[[str], str]:
        """How prompts are written: by a chat template where there is one, the processor's or else its tokeniser's."""
        mark = self.processor.image_token

        def plain(instruction: str) -> str:
            return mark * self.pictures + instruction

        def structured(instruction: str) -> list[dict[str, str]]:
            return [{"type": "image"}] * self.pictures + [{"type": "text", "text": instruction}]

        speakers = (self.processor, self.processor.tokenizer)
        speaker = next((one for one in speakers if getattr(one, "chat_template", None)), None)
        if speaker is None:
            return plain
        for content in (structured, plain):

            def write(instruction: str, content: Callable[[str], Any] = content) -> str:
                message = {"role": "user", "content": content(instruction)}
                return speaker.apply_chat_template([message], tokenize=False, add_generation_prompt=False)

            # A template that is written for contents of the other kind fails, or leaves something out.
            with contextlib.suppress(TemplateError, TypeError):
                prompt = write(PROBE)
                if prompt.count(mark) == self.pictures and PROBE in prompt:
                    return write
        raise ValueError(f"its chat template has no place for {self.pictures} pictures ({mark}) and an instruction")


def follow_pictures(image_processor: Any, image_size: int) -> None:
    """Let a processor cut pictures into tiles only where they are larger than a tile, and enlarge them no more than it must."""
    tile = _edge(getattr(image_processor, "max_image_size", None)) or getattr(image_processor, "tile_size", 0)
    whole = _edge(getattr(image_processor, "size", None))
    for option in TILING:
        if getattr(image_processor, option, None) and image_size <= (tile or whole):
            setattr(image_processor, option, False)
    if tile and whole > tile and hasattr(image_processor, "max_image_size"):
        needed = min(whole, math.ceil(image_size / tile) * tile)
        image_processor.size = type(image_processor.size)(longest_edge=needed)
    if hasattr(image_processor, "max_soft_tokens"):
        side = math.ceil(image_size / (image_processor.patch_size * image_processor.pooling_kernel_size))
        enough = [tokens for tokens in SOFT_TOKENS if tokens >= side**2]
        image_processor.max_soft_tokens = min([*enough, image_processor.max_soft_tokens])


def _edge(size: Any) -> int:
    """The longest side that a size of a processor allows, in pixels; 0 if it says none."""
    return max((value for value in dict(size or {}).values() if isinstance(value, int)), default=0)


def _as_pil(window: UInt8[Tensor, "T C height width"]) -> list[Image.Image]:
    return [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in window]


def _pad(value: Tensor, length: int, fill: int) -> Tensor:
    """`value` with `fill` behind it up to `length`."""
    return functional.pad(value, (0, 0) * (value.ndim - 1) + (0, length - len(value)), value=fill)
