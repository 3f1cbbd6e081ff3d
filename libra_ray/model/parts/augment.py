"""Random disturbances of what the levels see in training."""

from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from libra_ray.batch import Batch
from libra_ray.config import TrainConfig
from libra_ray.model.parts.draws import integers, normal


def augmented(batch: Batch, train: TrainConfig, generator: torch.Generator | None = None) -> Batch:
    """The batch with its pictures shifted and its proprioception disturbed at random, as configured."""

    def disturbed(state: Float[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        if not train.augment_state:
            return state
        return state + train.augment_state * normal(state.shape, state, generator)

    return replace(
        batch,
        plan_images=shift_pictures(batch.plan_images, train.augment_pixels, generator),
        images=shift_pictures(batch.images, train.augment_pixels, generator),
        plan_state=disturbed(batch.plan_state),
        state=disturbed(batch.state),
    )


def shift_pictures(
    images: UInt8[Tensor, "B T C height width"], pixels: int, generator: torch.Generator | None = None
) -> UInt8[Tensor, "B T C height width"]:
    """Random shifts of up to `pixels`, edges repeated (DrQ), the same for all pictures of a window."""
    if pixels == 0:
        return images
    batch, _, _, height, width = images.shape
    down, right = integers(2 * pixels + 1, (2, batch), images, generator)
    wide = _edges_repeated(_edges_repeated(images.permute(0, 1, 3, 4, 2), pixels, dim=2), pixels, dim=3)
    # All parts of a picture of its size, of which whole rows are copied: one look-up for each pixel takes ten times as long.
    parts = wide.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 5, 6, 4)
    return parts[torch.arange(batch, device=images.device), down, right].permute(0, 1, 4, 2, 3)


def _edges_repeated(pictures: UInt8[Tensor, "B T height width C"], pixels: int, *, dim: int) -> Tensor:
    """The pictures with so many of their outermost rows or columns on either side."""
    sizes = [pixels if axis == dim else -1 for axis in range(pictures.ndim)]
    first, last = (pictures.narrow(dim, at, 1).expand(sizes) for at in (0, pictures.shape[dim] - 1))
    return torch.cat([first, pictures, last], dim)
