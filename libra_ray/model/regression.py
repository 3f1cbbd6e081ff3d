"""The baseline without tokens and without noise: one network from pictures and words to the actions' mean."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from libra_ray.batch import Batch
from libra_ray.config import Config
from libra_ray.model.parts.augment import augmented
from libra_ray.model.parts.backbone import Text, make_backbone
from libra_ray.model.parts.chunks import chunk_of, masked_mean
from libra_ray.model.parts.planner import Planner
from libra_ray.model.precision import matched
from libra_ray.model.system import Losses, System, SystemInput, seen_now
from libra_ray.types import Level, RobotShape


class Regression(System):
    """E(a | o, l): of every step of a chunk a learned token, from whose hidden state its action is read."""

    STAYS_FP32 = ("head",)

    def __init__(self, config: Config, shape: RobotShape, folder: Path | None = None) -> None:
        super().__init__(config, shape)
        pictures, horizon = shape.cameras * config.data.history, config.action.horizon
        self.levels, self.intents = (Level(name="policy", covers=horizon),), {}
        backbone = make_backbone(config.planner, config.data.image_size, pictures, folder)
        self.planner = Planner(
            config.planner, backbone, plan_steps=horizon, dims=shape.action_dim, bins=0, state=shape.state_dim
        )
        self.head = nn.Linear(config.planner.width, shape.action_dim)

    def losses(self, batch: Batch, phase: str, generator: torch.Generator | None = None) -> Losses:
        """The mean squared error `action`, of normalised actions."""
        if self.training:
            batch = augmented(batch, self.config.train, generator)
        chunk = chunk_of(batch, self.config.action.horizon)
        errors = (self.predict(seen_now(batch)).float() - chunk.actions).square().mean(-1)
        return Losses(terms={"action": masked_mean(errors, chunk.mask)})

    def predict(self, seen: SystemInput) -> Float[Tensor, "B H D"]:
        """The normalised actions, unbounded, with their gradient."""
        hidden = self.planner.hidden_states(seen.images, seen.state, seen.text).hidden
        actions: Tensor = self.head(matched(hidden, self.head.weight))
        return actions

    @torch.no_grad()
    def infer(
        self, level: str, seen: SystemInput, above: Mapping[str, Tensor], noise: Tensor | None = None, variant: str = ""
    ) -> Mapping[str, Tensor]:
        """The next H `actions`."""
        return {"actions": self.predict(seen).clamp(-1, 1)}

    def noise_shape(self, level: str) -> None:
        """None: there is no noise."""

    def parts(self) -> Mapping[str, nn.Module]:
        """The vision-language head, and what reads actions from it."""
        return {"planner": self.planner, "head": self.head}

    def loss_weights(self) -> Mapping[str, float]:
        """One loss, of weight 1."""
        return {"action": 1.0}

    @classmethod
    def follows(cls, config: Config) -> tuple[str, ...]:
        """Those of its one network."""
        return ("planner.",)

    def stages(self) -> Mapping[str, Callable[..., object]]:
        """Those of the network."""
        return self.planner.stages()

    def tokenise(self, instructions: list[str]) -> Text:
        """By the backbone."""
        return self.planner.tokenise(instructions)

    def save_processor(self, folder: Path) -> None:
        """Of the backbone."""
        self.planner.save_processor(folder)
