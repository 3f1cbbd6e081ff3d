"""Image processors that want Pillow's Lanczos filter, on a batch of tensors: torchvision has it on no GPU."""

from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend, TorchvisionBackend

LANCZOS = Image.Resampling.LANCZOS
FIXED_POINT = 2**22
"""Of a weight 1 in Pillow's whole numbers."""


class LanczosBackend(TorchvisionBackend):
    """Scales as Pillow does: along the rows, then along the columns, each time to whole grey levels."""

    def resize(self, image: Tensor, size: Any, resample: Any = None, **options: Any) -> Tensor:
        """As `TorchvisionBackend.resize`; a filter other than Lanczos, or a size by one edge, is left to that."""
        if resample != LANCZOS or not (size.height and size.width):
            return super().resize(image, size, resample, **options)
        height, width = image.shape[-2:]
        across, down = _matrix(width, size.width, image.device), _matrix(height, size.height, image.device)
        rows = _whole(image.double() @ across)
        return _whole(down.T @ rows).to(image.dtype)


def on_tensors(image_processor: Any) -> Any:
    """The same image processor for tensors on any device, where it is one of Pillow's."""
    if not isinstance(image_processor, PilBackend):
        return image_processor
    found = getattr(transformers, type(image_processor).__name__.removesuffix("Pil"), None)
    if not (isinstance(found, type) and issubclass(found, TorchvisionBackend)):
        return image_processor
    return type(found.__name__, (found, LanczosBackend), {})(**image_processor.to_dict())


def _whole(levels: Tensor) -> Tensor:
    return (levels + 0.5).floor().clamp(0, 255)


@cache
def _matrix(before: int, after: int, device: torch.device) -> Float[Tensor, "before after"]:
    """What Pillow makes of a row in which one pixel is 1, for every pixel, in its fixed point."""
    rows = Image.fromarray(np.eye(before, dtype=np.float32)).resize((after, before), LANCZOS)
    whole = np.rint(np.asarray(rows).astype(np.float64) * FIXED_POINT) / FIXED_POINT
    return torch.from_numpy(whole).to(device)
