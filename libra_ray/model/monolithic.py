"""The monolithic baseline of the paper's component table: Libra's parts at the same size, as one level with one loss."""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from libra_ray.batch import Batch
from libra_ray.config import Config
from libra_ray.model.libra import dropped
from libra_ray.model.parts.augment import augmented
from libra_ray.model.parts.backbone import Backbone, make_backbone
from libra_ray.model.parts.chunks import chunk_of
from libra_ray.model.parts.diffusion import Denoised
from libra_ray.model.parts.planner import Planner
from libra_ray.model.parts.refiner import Refiner, RefinerContext, followed
from libra_ray.model.planner_and_refiner import PlannerAndRefiner
from libra_ray.model.system import Losses, SystemInput, seen_now
from libra_ray.types import Level, RobotShape


class Monolithic(PlannerAndRefiner):
    """P(a | o, l) by one network: hidden states of the vision-language head stand where Libra's coarse tokens would.

    They are computed from the same fresh picture as the actions, so that nothing runs ahead and nothing is old. With
    `refiner.vision` own or shared it is the component table's `+ own encoder` or `monolithic diffusion`.
    """

    def __init__(self, config: Config, shape: RobotShape, folder: Path | None = None) -> None:
        super().__init__(config, shape)
        pictures, horizon = shape.cameras * config.data.history, config.action.horizon
        self.levels, self.intents = (Level(name="policy", covers=horizon),), {}
        backbone: Backbone = make_backbone(config.planner, config.data.image_size, pictures, folder)
        common = {"dims": shape.action_dim, "state": shape.state_dim, "bins": 0}
        self.planner = Planner(config.planner, backbone, plan_steps=horizon, **common)
        self.refiner = Refiner(
            config.refiner,
            image_size=config.data.image_size,
            pictures=pictures,
            horizon=horizon,
            feature_width=backbone.width,
            hidden_width=config.planner.width,
            folder=folder,
            **common,
        )

    def losses(self, batch: Batch, phase: str, generator: torch.Generator | None = None) -> Losses:
        """The denoising loss `diff`."""
        if self.training:
            batch = augmented(batch, self.config.train, generator)
        chunk, (intent, context) = chunk_of(batch, self.config.action.horizon), self._read(seen_now(batch))
        share = self.config.refiner.condition_dropout if self.training else 0.0
        intent = dropped(intent, share, 0, generator)
        return Losses(terms={"diff": self.refiner.loss(chunk, intent, context, self._origin, generator)})

    @torch.no_grad()
    def infer(
        self, level: str, seen: SystemInput, above: Mapping[str, Tensor], noise: Tensor | None = None, variant: str = ""
    ) -> Mapping[str, Tensor]:
        """The next H `actions`."""
        assert noise is not None, "denoising begins with noise"
        intent, context = self._read(seen)
        return {"actions": self.refiner.sample(intent, context, self._origin, noise, seen.committed)}

    def loss_weights(self) -> Mapping[str, float]:
        """That of the denoising loss."""
        return {"diff": self.config.train.lambda_diff}

    @classmethod
    def follows(cls, config: Config) -> tuple[str, ...]:
        """Those of both networks."""
        return ("planner.", *followed(config.refiner), "train.lambda_diff")

    def denoised_by(self) -> Denoised:
        """The one level."""
        return Denoised(level=self.levels[-1].name, setting="refiner.denoising_steps", most=self.config.refiner.train_timesteps)

    def _read(self, seen: SystemInput) -> tuple[Float[Tensor, "B H read"], RefinerContext]:
        """The hidden states that stand for an intent, and what the refiner sees."""
        reading = self.planner.hidden_states(seen.images, seen.state, seen.text)
        return reading.hidden, self.context_of(seen, reading.features)

    def _origin(self, intent: Float[Tensor, "B H read"]) -> Float[Tensor, "B H D"]:
        """Answers are counted from 0: there is no coarse action."""
        return intent.new_zeros(*intent.shape[:2], self.shape.action_dim)
