"""Random disturbances of what the levels see in training."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from libra_ray.batch import Batch
from libra_ray.config import TrainConfig
from libra_ray.model.parts.draws import normal
from libra_ray.model.parts.vision import shift_pictures


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
