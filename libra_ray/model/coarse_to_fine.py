"""Coarse-to-fine: parallel token heads, and a flow that starts from their decoded action (method.md, pattern 1)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from libra_ray.batch import Batch
from libra_ray.config import Config
from libra_ray.model.parts.action_tokens import ActionTokenizer
from libra_ray.model.parts.augment import augmented
from libra_ray.model.parts.backbone import make_backbone
from libra_ray.model.parts.chunks import chunk_of
from libra_ray.model.parts.diffusion import Denoised
from libra_ray.model.parts.planner import Planner, plan_accuracy, plan_loss
from libra_ray.model.parts.refiner import Refiner, RefinerContext, followed
from libra_ray.model.planner_and_refiner import PlannerAndRefiner
from libra_ray.model.system import Losses, SystemInput, seen_now
from libra_ray.types import Level, RobotShape

COARSE_ONLY = "coarse_only"


class CoarseToFine(PlannerAndRefiner):
    """One level: a shared head says one class per step and dimension, and a flow carries their centres to the actions.

    The flow's path begins at the decoded coarse action plus noise of scale `coarse_to_fine.noise`, in training as at inference,
    and its network regresses the path's velocity (`refiner.predicts`). It reads the head's hidden states, and sees by its own
    encoder. Its loss stops at both: in the head it would drown the cross-entropy, which is small beside a velocity's error.

    Coarse and fine see the same picture, so nothing of it is ever old or missing: `refiner.condition_dropout` has no use here.
    The variant `coarse_only` executes the classes' centres.
    """

    variants = (COARSE_ONLY,)

    def __init__(self, config: Config, shape: RobotShape, folder: Path | None = None) -> None:
        super().__init__(config, shape)
        pictures, horizon = shape.cameras * config.data.history, config.action.horizon
        self.levels, self.intents = (Level(name="policy", covers=horizon),), {}
        self.tokenizer = ActionTokenizer(count=config.action.bins)
        backbone = make_backbone(config.planner, config.data.image_size, pictures, folder)
        common = {"dims": shape.action_dim, "state": shape.state_dim}
        self.planner = Planner(config.planner, backbone, plan_steps=horizon, bins=config.action.bins, **common)
        self.refiner = Refiner(
            replace(config.refiner, denoising_steps=config.coarse_to_fine.steps),
            image_size=config.data.image_size,
            pictures=pictures,
            horizon=horizon,
            feature_width=backbone.width,
            hidden_width=config.planner.width,
            folder=folder,
            **common,
        )

    def losses(self, batch: Batch, phase: str, generator: torch.Generator | None = None) -> Losses:
        """The token heads' cross-entropy `coarse` and the velocity's loss `flow`; the metric `coarse_accuracy` in [0, 1]."""
        if self.training:
            batch = augmented(batch, self.config.train, generator)
        chunk, (hidden, context) = chunk_of(batch, self.config.action.horizon), self._read(seen_now(batch))
        logits, truth = self.planner.logits(hidden), self.tokenizer.encode(chunk.actions)
        flow = self.refiner.loss(chunk, hidden.detach(), context, self._coarse, generator, begin=self._begin)
        return Losses(
            terms={"coarse": plan_loss(logits, truth, chunk.mask), "flow": flow},
            metrics={"coarse_accuracy": plan_accuracy(logits, truth, chunk.mask).detach()},
        )

    @torch.no_grad()
    def infer(
        self, level: str, seen: SystemInput, above: Mapping[str, Tensor], noise: Tensor | None = None, variant: str = ""
    ) -> Mapping[str, Tensor]:
        """The next H `actions`."""
        if variant == COARSE_ONLY:
            return {"actions": self._coarse(self.planner.hidden_states(seen.images, seen.state, seen.text).hidden)}
        assert noise is not None, "the flow begins with noise around the coarse action"
        hidden, context = self._read(seen)
        return {"actions": self.refiner.sample(hidden, context, self._coarse, noise, seen.committed, begin=self._begin)}

    def loss_weights(self) -> Mapping[str, float]:
        """The lambdas, of the cross-entropy and of the velocity's loss."""
        return {"coarse": self.config.train.lambda_plan, "flow": self.config.train.lambda_diff}

    def reached(self) -> Mapping[str, list[nn.Parameter]]:
        """Each loss its own network, and both the backbone where the flow sees through it."""
        shared = self.planner.backbone.parameters() if self.sees_through_planner else ()
        reached = {"coarse": [*self.planner.parameters()], "flow": [*shared, *self.refiner.parameters()]}
        return {name: [p for p in weights if p.requires_grad] for name, weights in reached.items()}

    @classmethod
    def follows(cls, config: Config) -> tuple[str, ...]:
        """Those of both networks, but for what it has in place of them, or no use for."""
        unused = ("refiner.denoising_steps", "refiner.condition_dropout")
        refiner = [name for name in followed(config.refiner) if name not in unused]
        return ("action.bins", "planner.", *refiner, "coarse_to_fine.", "train.lambda_plan", "train.lambda_diff")

    def denoised_by(self) -> Denoised:
        """The flow's steps."""
        return Denoised(level=self.levels[-1].name, setting="coarse_to_fine.steps", most=self.config.refiner.train_timesteps)

    def _read(self, seen: SystemInput) -> tuple[Float[Tensor, "B H d"], RefinerContext]:
        """The head's hidden states, and what the flow sees."""
        said = self.planner.hidden_states(seen.images, seen.state, seen.text)
        return said.hidden, self.context_of(seen, said.features)

    def _coarse(self, hidden: Float[Tensor, "B H d"]) -> Float[Tensor, "B H D"]:
        """The centres of the most likely classes."""
        return self.tokenizer.decode(self.planner.logits(hidden).argmax(-1))

    def _begin(self, hidden: Float[Tensor, "B H d"], noise: Float[Tensor, "B H D"]) -> Float[Tensor, "B H D"]:
        """Where the flow begins."""
        return self._coarse(hidden).to(noise) + self.config.coarse_to_fine.noise * noise
