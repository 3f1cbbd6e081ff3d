"""Vision encoders: small convolutional ones, and Hugging Face vision models by name or folder."""

import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from libra_ray.model.parts.pretrained import cannot_load, colours_of, load_checked, same_twice
from libra_ray.model.precision import matched

ENCODER_FOLDER = "encoder"
VISION_TOKENS = 4
"""Tokens that one picture becomes; each is a position-sensitive linear read-out of the whole feature map."""
MOST_LEADING = 16
"""Tokens before the patches that are no places: a class token, a few registers. Where there are more, they may be anything."""


@dataclass(frozen=True, kw_only=True)
class EncoderOutput:
    """`tokens` `(B, S, width)` of the pictures, and their `fine` maps `(B, T, rows, columns, channels)`."""

    tokens: Float[Tensor, "B S width"]
    fine: Float[Tensor, "B T rows columns channels"]


@dataclass(frozen=True, kw_only=True)
class SeenPictures:
    """What an encoder makes of pictures: `tokens` `(B, T * 4, width)`, and `patches` `(B, T, K, width)`, a token a place."""

    tokens: Float[Tensor, "B S width"]
    patches: Float[Tensor, "B T K width"]


class PictureEncoder(nn.Module, ABC):
    """An encoder of pictures of one size.

    Attributes:
        width: of its tokens.
        places: K, the patches of a picture.
        tower: how the names of the weights begin that are not learned anew; empty where all are.
    """

    width: int
    places: int
    tower = ""

    def forward(self, images: UInt8[Tensor, "B T C height width"]) -> Float[Tensor, "B S d"]:
        """Pictures to `S = T * 4` tokens."""
        return self.see(images).tokens

    @abstractmethod
    def see(self, images: UInt8[Tensor, "B T C height width"]) -> SeenPictures:
        """Tokens and patches."""


class ConvEncoder(PictureEncoder):
    """A few strided convolutions whose flattened map is projected onto a few tokens.

    The flattening keeps *where* things are, which pooling would lose and attention would have to learn from little data.
    The overlapping stride-4 stem costs half of two stride-2 layers on a CPU and localises as well.
    """

    CHANNELS = (32, 64, 96)

    def __init__(self, image_size: int, width: int, *, patches: bool = False) -> None:
        """With `patches` its coarse map is projected too, for `see`."""
        super().__init__()
        stem, middle, last = self.CHANNELS
        self.stem = nn.Sequential(nn.Conv2d(3, stem, kernel_size=6, stride=4, padding=1), nn.ReLU())
        self.deeper = nn.Sequential(
            nn.Conv2d(stem, middle, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(middle, last, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
        )
        with torch.no_grad():
            flat = self.deeper(self.stem(torch.zeros(1, 3, image_size, image_size))).numel()
        self.to_tokens = nn.Linear(flat, VISION_TOKENS * width)
        self.to_patches = nn.Sequential(nn.Linear(last, width), nn.LayerNorm(width)) if patches else None
        self.norm = nn.LayerNorm(width)
        self.width, self.places = width, flat // last

    def forward(self, images: UInt8[Tensor, "B T C height width"]) -> Float[Tensor, "B S d"]:
        """Pictures to `S = T * 4` tokens."""
        return self._tokens(self.deeper(self._fine(images)), len(images))

    def encode(self, images: UInt8[Tensor, "B T C height width"]) -> EncoderOutput:
        """The tokens, and the fine map that they were made from."""
        fine, batch = self._fine(images), len(images)
        tokens = self._tokens(self.deeper(fine), batch)
        return EncoderOutput(tokens=tokens, fine=rearrange(fine, "(b t) c h w -> b t h w c", b=batch))

    def see(self, images: UInt8[Tensor, "B T C height width"]) -> SeenPictures:
        """Tokens, and the coarse map that they were made from."""
        assert self.to_patches is not None, "an encoder without patches"
        coarse, batch = self.deeper(self._fine(images)), len(images)
        patches = self.to_patches(rearrange(coarse, "(b t) c h w -> b t (h w) c", b=batch))
        return SeenPictures(tokens=self._tokens(coarse, batch), patches=patches)

    def _fine(self, images: UInt8[Tensor, "B T C height width"]) -> Float[Tensor, "N channels rows columns"]:
        pixels = rearrange(images, "b t c h w -> (b t) c h w")
        # In place: fresh memory for every step of this would take longer than the arithmetic.
        pixels = pixels.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)
        fine: Tensor = self.stem(matched(pixels, self.norm.weight))
        return fine

    def _tokens(self, coarse: Float[Tensor, "N channels rows columns"], batch: int) -> Float[Tensor, "B S d"]:
        tokens: Tensor = self.norm(self.to_tokens(coarse.flatten(1)).view(batch, -1, self.width))
        return tokens


class InstructionAttention(nn.Module):
    """Finds what an instruction names in the pictures: attention of its queries over all cells of a fine map.

    An answer is the mean of what the cells show and of where they are, weighted by attention: a position finer than a cell.
    Queries and keys are directions and the scale is high: attention that began evenly spread would hardly ever leave that.
    """

    QUERIES = 4
    KEY = 32
    SCALE = 10.0

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.to_queries = nn.Linear(width, self.QUERIES * self.KEY)
        self.to_keys = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, self.KEY))
        self.scale = nn.Parameter(torch.tensor(self.SCALE))
        self.to_token = nn.Sequential(nn.Linear(channels + 2, width), nn.LayerNorm(width))

    def forward(
        self, fine: Float[Tensor, "B T rows columns channels"], sentence: Float[Tensor, "B width"]
    ) -> Float[Tensor, "B Q width"]:
        """`Q = T * 4` tokens: what each query found in each picture, and where."""
        return self.to_token(self.find(fine, sentence)).flatten(1, 2)

    def find(
        self, fine: Float[Tensor, "B T rows columns channels"], sentence: Float[Tensor, "B width"]
    ) -> Float[Tensor, "B T 4 channels+2"]:
        """What each query found, and its row and column in [-1, 1]."""
        queries = functional.normalize(self.to_queries(sentence).view(len(fine), 1, self.QUERIES, self.KEY), dim=-1)
        rows, columns = (torch.linspace(-1, 1, n, device=fine.device, dtype=fine.dtype) for n in fine.shape[2:4])
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        cells = fine.flatten(2, 3)
        keys = functional.normalize(self.to_keys(cells), dim=-1)
        attention = (self.scale * queries @ keys.transpose(-1, -2)).softmax(dim=-1)
        return torch.cat([attention @ cells, attention @ places], dim=-1)


class PretrainedEncoder(PictureEncoder):
    """A Hugging Face vision model (SigLIP, DINOv2, ConvNeXt, timm's, ...), its map mean-pooled by quadrant and projected.

    It sees the whole picture at the size, and in the scale of colours, that its own processor makes, however large the pictures
    are that its configuration speaks of. Width and grid are those of its first answer. It always runs as in evaluation: what
    it would drop, or normalise by batch, in training gives one picture two answers.

    Raises:
        ValueError: the model cannot be loaded, does not take pictures, answers none with a map, or not always with the same.
    """

    tower = "model."

    def __init__(self, source: str, image_size: int, width: int, *, pretrained: bool = True) -> None:
        """Load; without `pretrained` the weights stay random, because a checkpoint's will follow."""
        super().__init__()
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        with cannot_load("refiner.encoder", source, "vision", "conv"):
            self.processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
            # Who needs no weights makes the model on the device `meta`; its processor is asked all the same.
            with torch.device("cpu"):
                colours = colours_of(self.processor, image_size)
                # Of noise: of a picture without anything in it, a part may look like the whole.
                noise = torch.rand(1, 3, *colours.size, generator=torch.Generator().manual_seed(0))
            self.size, device = colours.size, torch.empty(0).device
            self.mean: Tensor
            self.std: Tensor
            self.register_buffer("mean", colours.mean.to(device), persistent=False)
            self.register_buffer("std", colours.std.to(device), persistent=False)
            noise = noise.to(device)
            if pretrained:
                model = load_checked(AutoModel, source, forward=lambda m: _hidden(_tower(m), noise))
                seen = same_twice(lambda: _hidden(_tower(model), noise))
            else:
                config = AutoConfig.from_pretrained(source, trust_remote_code=False)
                model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
                with torch.no_grad():
                    seen = _hidden(_tower(model), noise)
            self.model = _tower(model)
            # SigLIP's one token for the whole picture is read by nobody.
            self.model.use_head = False
            channels, rows, columns = self._map(seen).shape[1:]
        self.to_width = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)
        self.width, self.places = width, rows * columns

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        """Training mode, except for the model."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, images: UInt8[Tensor, "B T C height width"]) -> Float[Tensor, "B S d"]:
        """Pictures to `S = T * 4` tokens."""
        return self._tokens(functional.adaptive_avg_pool2d(self._grid(images), 2)).reshape(len(images), -1, self.width)

    def see(self, images: UInt8[Tensor, "B T C height width"]) -> SeenPictures:
        """Tokens, and the map that they were made from, projected alike."""
        grid, batch = self._grid(images), len(images)
        tokens = self._tokens(functional.adaptive_avg_pool2d(grid, 2)).reshape(batch, -1, self.width)
        return SeenPictures(tokens=tokens, patches=self._tokens(grid).reshape(batch, -1, self.places, self.width))

    def _grid(self, images: UInt8[Tensor, "B T C height width"]) -> Float[Tensor, "N d rows columns"]:
        pixels = rearrange(images, "b t c h w -> (b t) c h w").float() / 255
        if pixels.shape[-2:] != self.size:
            pixels = functional.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        seen = ((pixels - self.mean) / self.std).to(next(self.model.parameters()).dtype)
        return self._map(_hidden(self.model, seen))

    def _tokens(self, grid: Float[Tensor, "N d rows columns"]) -> Float[Tensor, "N K width"]:
        places = matched(rearrange(grid, "b d h w -> b (h w) d"), self.to_width.weight)
        tokens: Tensor = self.norm(self.to_width(places))
        return tokens

    def save_processor(self, folder: Path) -> None:
        """The image processor and the architecture's configuration: enough to rebuild the module without any hub."""
        self.processor.save_pretrained(folder / ENCODER_FOLDER)
        self.model.config.save_pretrained(folder / ENCODER_FOLDER)

    def _map(self, hidden: Tensor) -> Float[Tensor, "B d rows columns"]:
        """A model's answer as a map: channels first or last, or tokens in reading order behind those that are no places."""
        height, width = self.size

        def fits(rows: int, columns: int) -> bool:
            return rows * width == columns * height

        if hidden.ndim == 4 and fits(*hidden.shape[2:]):
            return hidden
        if hidden.ndim == 4 and fits(*hidden.shape[1:3]):
            return rearrange(hidden, "b h w d -> b d h w")
        if hidden.ndim != 3:
            raise ValueError(f"it answers a picture with {tuple(hidden.shape)}, which is neither a map nor tokens")
        count = hidden.shape[1]
        rows, columns = (math.isqrt(count * a // b) for a, b in (self.size, self.size[::-1]))
        patch = getattr(self.model.config, "patch_size", None)
        down, right = patch if isinstance(patch, list | tuple) else (patch, patch)
        # Some merge their patches into a coarser grid.
        if down and right and (height // down) * (width // right) <= count:
            rows, columns = height // down, width // right
        if not 0 <= count - rows * columns <= MOST_LEADING:
            raise ValueError(
                f"it answers a picture with {count} tokens, of which {rows}x{columns} may be places, but not the others"
            )
        return rearrange(hidden[:, count - rows * columns :], "b (h w) d -> b d h w", h=rows)


def _tower(model: nn.Module) -> Any:
    """The vision tower of a vision-language model."""
    return getattr(model, "vision_model", model)


def _hidden(model: nn.Module, pixels: Float[Tensor, "B 3 height width"]) -> Tensor:
    """A model's last hidden state, its positions stretched to the size of the pictures where it can do that."""
    takes = inspect.signature(model.forward).parameters
    stretched = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
    return model(pixel_values=pixels, **stretched).last_hidden_state


def make_encoder(
    source: str, image_size: int, width: int, folder: Path | None = None, *, patches: bool = False
) -> PictureEncoder:
    """`conv`, or the Hugging Face vision model of that name or folder; with `patches` for who reads them.

    With `folder` (a checkpoint) it is built from the files there, without weights of its own.
    """
    if source == "conv":
        return ConvEncoder(image_size, width, patches=patches)
    return PretrainedEncoder(str(folder / ENCODER_FOLDER) if folder else source, image_size, width, pretrained=folder is None)
