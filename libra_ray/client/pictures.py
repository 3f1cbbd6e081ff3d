"""Pictures as they travel."""

import io

import numpy as np
from numpy.typing import NDArray


def jpeg(picture: NDArray[np.uint8], quality: int = 90) -> bytes:
    """The JPEG of an `(height, width, 3)` RGB picture."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
