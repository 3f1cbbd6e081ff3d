"""Libra: a Semantic Planner and an Action Refiner, trained together and run apart (method.md, Libra-VLA)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from libra_ray.batch import Batch
from libra_ray.config import Config, TrainConfig
from libra_ray.model.parts.action_tokens import ActionTokenizer
from libra_ray.model.parts.augment import augmented
from libra_ray.model.parts.backbone import Backbone, make_backbone
from libra_ray.model.parts.chunks import chunk_of
from libra_ray.model.parts.diffusion import Denoised
from libra_ray.model.parts.draws import uniform
from libra_ray.model.parts.planner import Planner, plan_accuracy, plan_loss
from libra_ray.model.parts.refiner import Refiner, RefinerContext, followed
from libra_ray.model.parts.token_measures import measure_tokens
from libra_ray.model.planner_and_refiner import PlannerAndRefiner
from libra_ray.model.schedule import Schedule
from libra_ray.model.system import IntentValue, Losses, SystemInput, seen_first, seen_now
from libra_ray.types import Level, RobotShape

PLANNER, REFINER = "planner", "refiner"
COARSE_ONLY = "coarse_only"
GROUND_TRUTH, SAMPLED = "ground_truth", "sampled"
"""The phases: whose tokens the refiner reads in training."""
ACCURACY_MEMORY = 0.98
"""Decay per step of the planner accuracy that the curriculum watches."""


class Libra(PlannerAndRefiner):
    """The dual system: P(a | o, l) = P(fine | coarse, o) P(coarse | o, l).

    Its planner's intent holds `tokens`, `(L, D)`. The variant `coarse_only` executes their bins' centres, without a refiner.
    """

    variants = (COARSE_ONLY,)

    def __init__(self, config: Config, shape: RobotShape, folder: Path | None = None) -> None:
        super().__init__(config, shape)
        action, dims = config.action, shape.action_dim
        pictures = shape.cameras * config.data.history
        self.levels = (
            Level(name=PLANNER, covers=action.plan_steps),
            Level(name=REFINER, covers=action.horizon, reads=PLANNER),
        )
        self.tokenizer = ActionTokenizer(count=action.bins)
        hidden = float(self.tokenizer.mask_token)
        tokens = IntentValue(shape=(action.plan_steps, dims), low=0.0, high=hidden, unknown=hidden)
        self.intents = {PLANNER: {"tokens": tokens}}
        backbone: Backbone = make_backbone(config.planner, config.data.image_size, pictures, folder)
        self.planner = Planner(
            config.planner, backbone, plan_steps=action.plan_steps, bins=action.bins, dims=dims, state=shape.state_dim
        )
        self.refiner = Refiner(
            config.refiner,
            image_size=config.data.image_size,
            pictures=pictures,
            horizon=action.horizon,
            dims=dims,
            bins=action.bins,
            state=shape.state_dim,
            feature_width=backbone.width,
            folder=folder,
        )

    def losses(self, batch: Batch, phase: str, generator: torch.Generator | None = None) -> Losses:
        """The planner's cross-entropy `plan` and the refiner's denoising loss `diff`; the metric `plan_accuracy` in [0, 1]."""
        if self.training:
            batch = augmented(batch, self.config.train, generator)
        steps = self.config.action.plan_steps
        truth, mask = self.tokenizer.encode(batch.actions[:, :steps]), batch.action_mask[:, :steps]
        terms, metrics, tokens = dict[str, Tensor](), dict[str, Tensor](), truth
        if self.teaches("plan"):
            seen = seen_first(batch)
            logits = self.planner(seen.images, seen.state, seen.text)
            terms["plan"] = plan_loss(logits, truth, mask)
            metrics["plan_accuracy"] = plan_accuracy(logits, truth, mask).detach()
            tokens = truth if phase == GROUND_TRUTH else sample_tokens(logits.detach(), generator)
        if self.teaches("diff"):
            terms["diff"] = self._refiner_loss(batch, tokens, generator)
        return Losses(terms=terms, metrics=metrics)

    @torch.no_grad()
    def infer(
        self, level: str, seen: SystemInput, above: Mapping[str, Tensor], noise: Tensor | None = None, variant: str = ""
    ) -> Mapping[str, Tensor]:
        """The planner's most likely `tokens` for the next L steps; the refiner's `actions` from what it sees and the tokens."""
        if level == PLANNER:
            return {"tokens": self.planner(seen.images, seen.state, seen.text).argmax(-1)}
        if variant == COARSE_ONLY:
            return {"actions": self.tokenizer.decode(above["tokens"])}
        assert noise is not None, "the refiner begins with noise"
        tokens, context = above["tokens"], self._context(seen)
        return {"actions": self.refiner.sample(tokens, context, self.tokenizer.decode, noise, seen.committed)}

    def loss_weights(self) -> Mapping[str, float]:
        """The lambdas."""
        return {"plan": self.config.train.lambda_plan, "diff": self.config.train.lambda_diff}

    def taught_by(self) -> Mapping[str, tuple[str, ...]]:
        """Each level by its own loss; of the refiner alone the tokens are the ground truth."""
        return {PLANNER: ("plan",), REFINER: ("diff",)}

    @classmethod
    def follows(cls, config: Config) -> tuple[str, ...]:
        """Those of both networks, and the curriculum."""
        tau = ("train.tau",) if config.train.curriculum == "threshold" else ()
        curriculum = ("train.lambda_plan", "train.lambda_diff", "train.curriculum", *tau)
        return ("action.bins", "planner.", *followed(config.refiner), *curriculum)

    def reached(self) -> Mapping[str, list[nn.Parameter]]:
        """Each loss its own network, and both the backbone where the refiner sees through it."""
        shared = self.planner.backbone.parameters() if self.sees_through_planner else ()
        reached = {"plan": [*self.planner.parameters()], "diff": [*shared, *self.refiner.parameters()]}
        return {name: [p for p in weights if p.requires_grad] for name, weights in reached.items()}

    def schedule(self) -> Schedule:
        """The curriculum of tokens; of a level alone the ground truth."""
        train = self.config.train
        return Curriculum(train if self.learned is None else replace(train, curriculum="teacher"))

    def denoised_by(self) -> Denoised:
        """The refiner's."""
        return Denoised(level=REFINER, setting="refiner.denoising_steps", most=self.config.refiner.train_timesteps)

    def measure(self, batch: Batch, everything: Batch) -> Mapping[str, float]:
        """The difficulty of both problems, and how much of each was learned (`libra_ray.model.parts.token_measures`)."""
        chunk = chunk_of(batch, self.config.action.horizon)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses = self.losses(batch, GROUND_TRUTH)
            noise = torch.randn_like(chunk.actions)
        planned = self.infer(PLANNER, seen_first(batch), {})["tokens"]

        def refine(tokens: Int[Tensor, "B H D"]) -> Float[Tensor, "B H D"]:
            return self.infer(REFINER, seen_now(batch), {"tokens": tokens}, noise)["actions"]

        return {
            "loss_diff": float(losses.terms["diff"]),
            "loss_plan": float(losses.terms["plan"]),
            "plan_accuracy": float(losses.metrics["plan_accuracy"]),
        } | measure_tokens(
            self.tokenizer, chunk, self._at(batch, planned), refine, self._planned_part(everything), float(losses.terms["plan"])
        )

    def _planned_part(self, batch: Batch) -> Batch:
        """The windows without the steps past the plan's end."""
        steps = self.config.action.plan_steps
        return replace(batch, actions=batch.actions[:, :steps], action_mask=batch.action_mask[:, :steps])

    def _at(self, batch: Batch, tokens: Int[Tensor, "B L D"]) -> Int[Tensor, "B H D"]:
        """The tokens of each window's chunk; hidden past the plan's end."""
        return self.aligned(self.levels[1], {"tokens": tokens}, batch.offset)["tokens"]

    def _context(self, seen: SystemInput) -> RefinerContext:
        """What the refiner sees; the planner's backbone is asked only by the ablations that share it."""
        if not self.sees_through_planner:
            return self.refiner.encode_context(seen.images, seen.state)
        return self.context_of(seen, self.planner.encode(seen.images, seen.text))

    def _refiner_loss(self, batch: Batch, tokens: Int[Tensor, "B L D"], generator: torch.Generator | None) -> Float[Tensor, ""]:
        chunk, masked = chunk_of(batch, self.config.action.horizon), self.tokenizer.mask_token
        context = self._context(seen_now(batch))
        # A step past the episode's end would reach the others through attention, as a token too.
        intent = self._at(batch, tokens).masked_fill(~chunk.mask[..., None], masked)
        share = self.config.refiner.condition_dropout if self.training else 0.0
        intent = dropped(intent, share, masked, generator)
        return self.refiner.loss(chunk, intent, context, self.tokenizer.decode, generator)


class Curriculum(Schedule):
    """Whose tokens the refiner reads: ground truth until the planner passes `train.tau`, then sampled ones, as published."""

    phases = (GROUND_TRUTH, SAMPLED)

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self.accuracy, self.switched_at = 0.0, -1

    @property
    def phase(self) -> str:
        """`GROUND_TRUTH` or `SAMPLED`."""
        if self._config.curriculum == "threshold":
            return SAMPLED if self.switched_at >= 0 else GROUND_TRUTH
        return GROUND_TRUTH if self._config.curriculum == "teacher" else SAMPLED

    @property
    def watches(self) -> bool:
        """Until the switch, where there is to be one."""
        return self._config.curriculum == "threshold" and self.switched_at < 0

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        """Average the accuracy, and switch once it is high enough and the warm-up is over."""
        if not self.watches:
            return
        self.accuracy = ACCURACY_MEMORY * self.accuracy + (1 - ACCURACY_MEMORY) * metrics["plan_accuracy"]
        unbiased = self.accuracy / (1 - ACCURACY_MEMORY**step)
        if step >= self._config.warmup_steps and unbiased >= self._config.tau:
            self.switched_at = step

    def state(self) -> dict[str, Any]:
        """The averaged accuracy, and the step of the switch."""
        return {"accuracy": self.accuracy, "switched_at": self.switched_at}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.accuracy, self.switched_at = state["accuracy"], state["switched_at"]


def dropped(intent: Tensor, share: float, unknown: int, generator: torch.Generator | None = None) -> Tensor:
    """The intents `(B, H, ...)` with a share of the windows' hidden."""
    if not share:
        return intent
    chosen = uniform((len(intent),), intent.float(), generator) < share
    return intent.masked_fill(chosen[:, None, None], unknown)


def sample_tokens(logits: Float[Tensor, "B L D N"], generator: torch.Generator | None = None) -> Int[Tensor, "B L D"]:
    """Tokens drawn from the planner's distribution, so that the refiner learns with the mistakes it will meet."""
    drawn = uniform(logits.shape, logits.float(), generator).clamp(1e-9, 1)
    return (logits - (-drawn.log()).log()).argmax(-1)
