"""Encoded pictures, as a dataset without videos keeps them in its parquet files, and what kind of pictures they are."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from libra_ray.data.checks import DatasetError

Kind = Literal["colour", "grey", "deep"]
"""`colour`: three channels; `grey`: one of at most 8 bits; `deep`: one of more bits, such as depth in millimetres."""
_GREY = {"L", "LA", "1"}
_COLOUR = {"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"}
_ALPHA = {"RGBA", "RGBa", "LA", "PA"}

QUANTILES = 1, 10, 50, 90, 99
"""Those that LeRobot keeps, in percent."""


@dataclass(frozen=True, kw_only=True)
class PictureFormat:
    """Size in pixels and kind of a picture; `alpha` where it also has a transparency."""

    height: int
    width: int
    kind: Kind
    alpha: bool = False

    @property
    def words(self) -> str:
        """Kind and size, for messages."""
        kinds = {"colour": "colour", "grey": "greyscale", "deep": "one channel of more than 8 bits"}
        return f"{kinds[self.kind]}, {self.height}x{self.width} pixels"

    @classmethod
    def of_image(cls, image: Image.Image) -> "PictureFormat":
        """Of an opened picture, by its mode."""
        kind: Kind = "colour" if image.mode in _COLOUR else "grey" if image.mode in _GREY else "deep"
        return cls(height=image.height, width=image.width, kind=kind, alpha=image.mode in _ALPHA)

    @classmethod
    def of_stream(cls, stream: av.VideoStream) -> "PictureFormat":
        """Of a video, by its pixel format."""
        pixels = stream.codec_context.format
        channels = [c for c in pixels.components if not c.is_alpha] if pixels is not None else []
        one = len(channels) == 1 and pixels is not None and not pixels.has_palette
        kind: Kind = "colour" if not one else "grey" if channels[0].bits <= 8 else "deep"
        return cls(height=stream.height, width=stream.width, kind=kind)


def open_image(value: Any, root: Path, what: str) -> Image.Image:
    """The picture that a row of an image column holds, not yet decoded.

    Args:
        value: `bytes` of a picture file, or the `path` of one below `root`.
        root: the dataset's folder.
        what: which picture it is, for messages.

    Raises:
        DatasetError: there is none, or it cannot be read.
    """
    if value is None or (isinstance(value, dict) and not (value.get("bytes") or value.get("path"))):
        raise DatasetError(
            f"{what}: the picture is missing (null); record the episode again, or leave the camera out with data.cameras"
        )
    if not isinstance(value, dict):
        raise DatasetError(
            f"{what}: no encoded picture (bytes or path) but {type(value).__name__}; leave the camera out with data.cameras"
        )
    try:
        return Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else root / value["path"])
    except OSError as error:
        raise _damaged(what, error) from error


def rgb_of(image: Image.Image, what: str) -> NDArray[np.uint8]:
    """`(height, width, 3)` uint8 of a picture of kind `colour` or `grey`.

    Raises:
        DatasetError: the picture's data are damaged.
    """
    try:
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(what, error) from error


def _damaged(what: str, error: Exception) -> DatasetError:
    return DatasetError(f"{what}: the picture cannot be read ({error}); record the episode again, or copy the dataset again")


def picture_statistics(pictures: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """LeRobot's statistics by channel of `(n, height, width, channels)` pictures, as shares of 255 and `(channels, 1, 1)`.

    Exact, from how often each of the 256 values is there; LeRobot's own function estimates the quantiles, and takes longer than
    everything else about an episode.
    """
    channels = np.moveaxis(pictures, -1, 0).reshape(pictures.shape[-1], -1)
    often = np.stack([np.bincount(channel, minlength=256) for channel in channels])
    values, shares = np.arange(256) / 255, often / often.sum(1, keepdims=True)
    mean = shares @ values
    found = {
        "min": values[(often > 0).argmax(1)],
        "max": values[255 - (often[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(shares @ values**2 - mean**2, 0)),
    }
    below = shares.cumsum(1)
    found |= {f"q{percent:02d}": values[(below >= percent / 100).argmax(1)] for percent in QUANTILES}
    return {name: value[:, None, None] for name, value in found.items()} | {"count": np.array([len(pictures)])}
