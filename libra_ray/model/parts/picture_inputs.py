"""What a processor makes of pictures, made in one batched call on the pictures' device."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

PIXELS = "pixel_values"
SAME_PIXELS = 0.02
"""Largest difference between two ways to scale one picture, in units of the colours' spread: about one grey level of 256."""
Processed = Callable[[UInt8[Tensor, "B T C height width"]], Mapping[str, Tensor]]


class PictureInputs:
    """The part of a model's inputs that belongs to the pictures, for any number of windows of one size.

    Pixels are made by the processor's own image processor, called as the processor calls it. Whatever else is said of pictures
    follows from their size, and is made once. Both are compared with the processor itself; where they differ, it is asked every
    time, on the CPU, and a line in the log says so.
    """

    def __init__(self, processor: Any, processed: Processed, noise: Tensor, names: Iterable[str]) -> None:
        """Find out.

        Args:
            processor: whose image processor is called.
            processed: the whole processor, under any text.
            noise: pictures of one window.
            names: of the inputs that belong to pictures.
        """
        from libra_ray.model.parts.lanczos import on_tensors

        self._processed, self._names = processed, [*names]
        own, windows = processor.image_processor, torch.cat([noise, 255 - noise])
        processor.image_processor = overheard = _Overheard(own)
        try:
            self._given = self._only(processed(windows))
        finally:
            processor.image_processor = own
        self._image_processor = on_tensors(own)
        one = self._only(processed(noise))
        self._constants = {torch.device("cpu"): {name: value for name, value in one.items() if name != PIXELS}}
        # Padding to one size, where all have one already, copies them one by one.
        self.is_batched = any(self._agrees(windows, {**overheard.options, **more}) for more in ({"do_pad": False}, {}))
        del self._given
        if not self.is_batched:
            logging.getLogger(__name__).warning(
                "%s makes its pictures on the CPU, window by window: it cannot be called on a batch of tensors",
                type(processor).__name__,
            )

    def __call__(self, images: UInt8[Tensor, "B T C height width"]) -> dict[str, Tensor]:
        """The inputs, on the device of `images`; without reading a value of theirs."""
        if not self.is_batched:
            return {name: value.to(images.device) for name, value in self._only(self._processed(images.cpu())).items()}
        constants = self.of_one(images.device).items()
        repeated = {name: value.repeat(len(images), *[1] * (value.ndim - 1)) for name, value in constants}
        return {**repeated, PIXELS: self._pixels(images)}

    def of_one(self, device: torch.device) -> Mapping[str, Tensor]:
        """What is said of one window's pictures beside their pixels."""
        if device not in self._constants:
            first = next(iter(self._constants.values()))
            self._constants[device] = {name: value.to(device) for name, value in first.items()}
        return self._constants[device]

    def _pixels(self, images: Tensor) -> Tensor:
        shown = [list(window) for window in images]
        # In the arithmetic of a training step grey levels would be lost.
        with torch.autocast("cpu" if images.is_meta else images.device.type, enabled=False):
            pixels: Tensor = self._image_processor(shown, **self._options)[PIXELS]
        return pixels

    def _only(self, said: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: said[name] for name in self._names if name in said}

    def _agrees(self, windows: Tensor, options: Mapping[str, Any]) -> bool:
        """Whether this is what the processor says of two windows, its image processor called with these options."""
        self._options, self.is_batched = options, True
        try:
            found = self(windows)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
            # Some take no tensors, or no lists of lists.
            return False
        if found.keys() != self._given.keys() or any(found[name].shape != value.shape for name, value in self._given.items()):
            return False
        return all(torch.allclose(found[name].float(), value.float(), atol=SAME_PIXELS) for name, value in self._given.items())


class _Overheard:
    """An image processor, and the options that it was last called with."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self.options: dict[str, Any] = {}

    def __call__(self, images: Any, **options: Any) -> Any:
        self.options = options
        return self._image_processor(images, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)
