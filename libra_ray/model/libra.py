"""Libra: planner and refiner joined, trained together and run apart."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from libra_ray.batch import Batch
from libra_ray.config import Config, TrainConfig
from libra_ray.model.parts.action_tokens import Bins
from libra_ray.model.parts.backbone import Backbone, Text, make_backbone
from libra_ray.model.parts.diffusion import Objective, make_objective
from libra_ray.model.parts.planner import Planner, masked_mean, plan_accuracy, plan_loss
from libra_ray.model.parts.refiner import Refiner
from libra_ray.model.parts.vision import shift_pictures

Feed = Literal["truth", "planner"]
"""Whose tokens the refiner reads in training: ground truth, or samples from the planner."""


@dataclass(frozen=True, kw_only=True)
class RobotShape:
    """What a data set fixes about a model: dimensions of action and state, cameras."""

    action_dim: int
    state_dim: int
    cameras: int


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Both systems' losses on one batch, unweighted; `accuracy` is the planner's, in [0, 1].

    The monolithic baseline has no planner's loss: `plan` and `accuracy` are None.
    """

    diff: Float[Tensor, ""]
    plan: Float[Tensor, ""] | None = None
    accuracy: Float[Tensor, ""] | None = None


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What the refiner sees: `context` `(B, width)`; a monolithic one also the hidden states `(B, H, read)` it obeys."""

    context: Float[Tensor, "B d"]
    intent: Float[Tensor, "B H read"] | None = None


class Libra(nn.Module):
    """The dual system of method.md, Libra-VLA: P(a | o, l) = P(fine | coarse, o) P(coarse | o, l).

    With `refiner.condition=features` it is the monolithic baseline of the paper's component table, P(a | o, l) by one loss: the
    same parts at the same size, but the planner's hidden states stand where the coarse tokens' codes would, computed from the
    refiner's own fresh picture. Its plans say nothing.
    """

    def __init__(self, config: Config, shape: RobotShape, folder: Path | None = None) -> None:
        """Build from a configuration; `folder` is a checkpoint whose architectures replace the configured sources."""
        super().__init__()
        self.config, self.shape = config, shape
        pictures = shape.cameras * config.data.history
        self.bins = Bins(count=config.action.bins)
        self.objective: Objective = make_objective(config.refiner.objective, config.refiner.train_timesteps)
        backbone: Backbone = make_backbone(config.planner, config.sim.image_size, pictures, folder)
        self.monolithic = config.refiner.condition == "features"
        self.says_target = config.refiner.predicts == "target"
        common = {"dims": shape.action_dim, "state": shape.state_dim}
        self.planner = Planner(
            config.planner,
            backbone,
            plan_steps=config.action.horizon if self.monolithic else config.action.plan_steps,
            bins=0 if self.monolithic else config.action.bins,
            **common,
        )
        self.refiner = Refiner(
            config.refiner,
            bins=config.action.bins,
            image_size=config.sim.image_size,
            pictures=pictures,
            horizon=config.action.horizon,
            seen=backbone.width,
            read=config.planner.width,
            folder=folder,
            **common,
        )

    def forward(self, batch: Batch, feed: Feed, generator: torch.Generator | None = None) -> Losses:
        """Both losses on a batch, which is augmented in training mode."""
        if self.training:
            batch = augmented(batch, self.config.train, generator)
        if self.monolithic:
            return Losses(diff=self._refiner_loss(batch, None, generator))
        logits = self.planner(batch.plan_images, batch.plan_state, Text(ids=batch.text, mask=batch.text_mask))
        truth = self.bins.encode(batch.actions)
        tokens = truth if feed == "truth" else sample_tokens(logits.detach(), generator)
        return Losses(
            plan=plan_loss(logits, truth, batch.action_mask),
            diff=self._refiner_loss(batch, tokens, generator),
            accuracy=plan_accuracy(logits, truth, batch.action_mask).detach(),
        )

    @torch.no_grad()
    def plan(
        self, images: UInt8[Tensor, "B T C height width"], state: Float[Tensor, "B S"], text: Text
    ) -> Int[Tensor, "B L D"]:
        """The most likely coarse tokens for the next L steps; the monolithic baseline hides them all."""
        if self.monolithic:
            steps = (len(images), self.config.action.plan_steps, self.shape.action_dim)
            return torch.full(steps, self.bins.hidden, device=images.device)
        return self.planner(images, state, text).argmax(-1)

    @torch.no_grad()
    def refine(
        self,
        images: UInt8[Tensor, "B T C height width"],
        state: Float[Tensor, "B S"],
        text: Text,
        tokens: Int[Tensor, "B H D"],
        noise: Float[Tensor, "B H D"],
    ) -> Float[Tensor, "B H D"]:
        """Normalised actions in [-1, 1] from what is seen now and the coarse tokens of the H steps to come.

        `text` is read only by the ablations that open the refiner to language or to the planner's features, and by the
        monolithic baseline, which reads no `tokens`.
        """
        sight, steps = self._look(images, state, text), self.config.refiner.denoising_steps
        intent = tokens if sight.intent is None else sight.intent

        # The solver asks once per level, in their order: whatever does not depend on the noisy actions is computed before.
        steering = iter(self.refiner.steer(self.objective.times(steps).to(noise), sight.context))
        obeyed, anchor = self.refiner.obey(intent), self._anchor(intent, noise)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            said = self.refiner.say(x, obeyed, next(steering))
            return said if self.says_target else self.objective.target_of(anchor + said, x, t)

        return self.objective.sample(predict, noise, steps).clamp(-1, 1)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Trained parameters that both losses reach: the backbone's, where the refiner looks through it."""
        refiner = self.config.refiner
        if self.monolithic or (refiner.vision == "own" and not refiner.see_language):
            return []
        return [p for p in self.planner.backbone.parameters() if p.requires_grad]

    def save_processor(self, folder: Path) -> None:
        """Write under `folder` what rebuilds pretrained parts without their source: tokenisers, processors, architectures."""
        self.planner.save_processor(folder)
        self.refiner.save_processor(folder)

    def _look(self, images: UInt8[Tensor, "B T C height width"], state: Float[Tensor, "B S"], text: Text) -> Sight:
        """What the refiner sees; the planner is asked only by the ablations that share its eyes or its mind."""
        config = self.config.refiner
        if not self.monolithic and config.vision == "own" and not config.see_language:
            return Sight(context=self.refiner.look(images, state))
        reading = self.planner.read(images, state, text) if self.monolithic else None
        features = reading.features if reading else self.planner.look(images, text)
        shared = features.pictures if config.vision == "shared" else None
        language = features.sentence if config.see_language else None
        return Sight(context=self.refiner.look(images, state, shared, language), intent=reading.hidden if reading else None)

    def _refiner_loss(
        self,
        batch: Batch,
        tokens: Int[Tensor, "B L D"] | None,
        generator: torch.Generator | None,
    ) -> Float[Tensor, ""]:
        config, chunk = self.config.refiner, chunk_of(batch, self.config.action.horizon)
        sight = self._look(batch.images, batch.state, Text(ids=batch.text, mask=batch.text_mask))
        # A step past the episode's end would reach the others through attention, as a noisy action and as a token.
        data, mask = chunk.actions.masked_fill(~chunk.mask[..., None], 0), chunk.mask
        if sight.intent is not None:
            intent, hidden = sight.intent, 0
        else:
            assert tokens is not None
            hidden = self.bins.hidden
            intent = chunk.pick(tokens).masked_fill(~mask[..., None], hidden)
        if self.training and config.condition_dropout:
            dropped = torch.rand(len(batch), generator=generator).to(data.device) < config.condition_dropout
            intent = intent.masked_fill(dropped[:, None, None], hidden)
        draws = config.noise_draws
        data, intent, mask, context = (repeat(v, "b ... -> (b k) ...", k=draws) for v in (data, intent, mask, sight.context))
        noise = torch.randn(data.shape, generator=generator).to(data)
        level = torch.rand(len(data), generator=generator).to(data)
        corrupted = self.objective.corrupt(data, noise, level)
        said = self.refiner(corrupted.x, corrupted.t, intent, context).float()
        if self.says_target:
            return masked_mean((said - corrupted.target).square().mean(-1), mask)
        errors = (self._anchor(intent, said) + said - data).square().mean(-1)
        return masked_mean(self.objective.data_weight(corrupted.t)[:, None] * errors, mask)

    def _anchor(self, intent: Tensor, said: Tensor) -> Float[Tensor, "B H D"]:
        """Where the refiner's answer is counted from: the coarse action, or 0 where there is none."""
        return torch.zeros_like(said) if self.monolithic else self.bins.decode(intent).to(said)


def augmented(batch: Batch, train: TrainConfig, generator: torch.Generator | None = None) -> Batch:
    """The batch with its pictures shifted and its proprioception disturbed at random, as configured."""

    def disturbed(state: Float[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        if not train.augment_state:
            return state
        return state + train.augment_state * torch.randn(state.shape, generator=generator).to(state)

    return replace(
        batch,
        plan_images=shift_pictures(batch.plan_images, train.augment_pixels, generator),
        images=shift_pictures(batch.images, train.augment_pixels, generator),
        plan_state=disturbed(batch.plan_state),
        state=disturbed(batch.state),
    )


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The refiner's part of a batch: the H steps from its picture on.

    Attributes:
        steps: `(B, H)` their places in the plan.
        actions: `(B, H, D)` normalised; `mask` `(B, H)` is False past the episode's end.
    """

    steps: Int[Tensor, "B H"]
    actions: Float[Tensor, "B H D"]
    mask: Bool[Tensor, "B H"]

    def pick(self, tokens: Int[Tensor, "B L D"]) -> Int[Tensor, "B H D"]:
        """The slice of a plan's tokens."""
        return tokens.gather(1, self.steps[..., None].expand(-1, -1, tokens.shape[-1]))


def chunk_of(batch: Batch, horizon: int) -> Chunk:
    """The chunk of every window."""
    steps = batch.offset[:, None] + torch.arange(horizon, device=batch.offset.device)
    actions = batch.actions.gather(1, steps[..., None].expand(-1, -1, batch.actions.shape[-1]))
    return Chunk(steps=steps, actions=actions, mask=batch.action_mask.gather(1, steps))


def sample_tokens(logits: Float[Tensor, "B L D N"], generator: torch.Generator | None = None) -> Int[Tensor, "B L D"]:
    """Tokens drawn from the planner's distribution, so that the refiner learns with the mistakes it will meet."""
    uniform = torch.rand(logits.shape, generator=generator).to(logits).clamp(1e-9, 1)
    return (logits - (-uniform.log()).log()).argmax(-1)
