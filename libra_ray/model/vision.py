"""Eyes: small convolutional encoders, and Hugging Face vision models by name or folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from libra_ray.model.pretrained import cannot_load

ENCODER_FOLDER = "encoder"
VISION_TOKENS = 4
"""Tokens that one picture becomes; each is a position-sensitive linear read-out of the whole feature map."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """`tokens` `(B, S, width)` of the pictures, and their `fine` maps `(B, T, rows, columns, channels)`."""

    tokens: Float[Tensor, "B S width"]
    fine: Float[Tensor, "B T rows columns channels"]


class ConvEncoder(nn.Module):
    """A few strided convolutions whose flattened map is projected onto a few tokens.

    The flattening keeps *where* things are, which pooling would lose and attention would have to learn from little data.
    The overlapping stride-4 stem costs half of two stride-2 layers on a CPU and localises as well.
    """

    CHANNELS = (32, 64, 96)

    def __init__(self, image_size: int, width: int) -> None:
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
        self.norm = nn.LayerNorm(width)
        self.width = width

    def forward(self, images: UInt8[Tensor, "B T C height width"]) -> Float[Tensor, "B S d"]:
        """Pictures to `S = T * 4` tokens."""
        return self.see(images).tokens

    def see(self, images: UInt8[Tensor, "B T C height width"]) -> Seen:
        """The tokens, and the fine map that they were made from."""
        batch = len(images)
        pixels = rearrange(images, "b t c h w -> (b t) c h w")
        # In place: fresh memory for every step of this would take longer than the arithmetic.
        pixels = pixels.to(self.norm.weight.dtype, memory_format=torch.channels_last).div_(127.5).sub_(1)
        fine = self.stem(pixels)
        tokens = self.to_tokens(self.deeper(fine).flatten(1)).view(batch, -1, self.width)
        return Seen(tokens=self.norm(tokens), fine=rearrange(fine, "(b t) c h w -> b t h w c", b=batch))


class Gaze(nn.Module):
    """Where in the pictures the things are that a sentence names: attention of its queries over all cells of a fine map.

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


class PretrainedEncoder(nn.Module):
    """A Hugging Face vision model (SigLIP, DINOv2, ...), its patch tokens mean-pooled by quadrant and projected.

    Raises:
        ValueError: the model cannot be loaded as a vision model.
    """

    def __init__(self, source: str, width: int, *, pretrained: bool = True) -> None:
        """Load; without `pretrained` the weights stay random, because a checkpoint's will follow."""
        super().__init__()
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        with cannot_load("refiner.encoder", source, "vision", "conv"):
            self.processor = AutoImageProcessor.from_pretrained(source)
            if pretrained:
                model = AutoModel.from_pretrained(source, dtype=torch.float32)
            else:
                model = AutoModel.from_config(AutoConfig.from_pretrained(source))
        self.model = getattr(model, "vision_model", model)
        size = self.model.config.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(self.processor.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.processor.image_std).view(1, 3, 1, 1), persistent=False)
        self.to_width = nn.Linear(self.model.config.hidden_size, width)
        self.norm = nn.LayerNorm(width)
        self.width = width

    def forward(self, images: UInt8[Tensor, "B T C height width"]) -> Float[Tensor, "B S d"]:
        """Pictures to `S = T * 4` tokens."""
        batch = len(images)
        pixels = rearrange(images, "b t c h w -> (b t) c h w").float() / 255
        pixels = functional.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        hidden = self.model(pixel_values=(pixels - self.mean) / self.std).last_hidden_state
        side = int(hidden.shape[1] ** 0.5)
        grid = rearrange(hidden[:, -side * side :], "b (h w) d -> b d h w", h=side)
        pooled = rearrange(functional.adaptive_avg_pool2d(grid, 2), "b d h w -> b (h w) d")
        return self.norm(self.to_width(pooled)).reshape(batch, -1, self.width)

    def save_processor(self, folder: Path) -> None:
        """The image processor and the architecture's configuration: enough to rebuild the module without any hub."""
        self.processor.save_pretrained(folder / ENCODER_FOLDER)
        self.model.config.save_pretrained(folder / ENCODER_FOLDER)


def make_encoder(source: str, image_size: int, width: int, folder: Path | None = None) -> nn.Module:
    """`conv`, or the Hugging Face vision model of that name or folder.

    With `folder` (a checkpoint) it is built from the files there, without weights of its own.
    """
    if source == "conv":
        return ConvEncoder(image_size, width)
    return PretrainedEncoder(str(folder / ENCODER_FOLDER) if folder else source, width, pretrained=folder is None)


def shift_pictures(
    images: UInt8[Tensor, "B T C height width"], pixels: int, generator: torch.Generator | None = None
) -> UInt8[Tensor, "B T C height width"]:
    """Random shifts of up to `pixels`, edges repeated (DrQ), the same for all pictures of a window."""
    if pixels == 0:
        return images
    batch, _, _, height, width = images.shape
    offsets = torch.randint(0, 2 * pixels + 1, (2, batch, 1), generator=generator).to(images.device)
    rows = (torch.arange(height, device=images.device) + offsets[0] - pixels).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + offsets[1] - pixels).clamp(0, width - 1)
    window = torch.arange(batch, device=images.device)[:, None, None]
    return images.permute(0, 3, 4, 1, 2)[window, rows[:, :, None], columns[:, None, :]].permute(0, 3, 4, 1, 2)
