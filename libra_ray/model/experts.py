"""A mixture of action experts: one backbone, three ways to say its actions, and a learned router (method.md, pattern 3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from libra_ray.batch import Batch
from libra_ray.config import Config
from libra_ray.config.systems import EXPERTS
from libra_ray.model.parts.action_experts import ActionExpert, Router, choice_loss, errors_of, load_loss, make_expert, shares_of
from libra_ray.model.parts.augment import augmented
from libra_ray.model.parts.backbone import Backbone, BackboneOutput, Text, WithBackbone, make_backbone
from libra_ray.model.parts.chunks import Chunk, chunk_of, masked_mean
from libra_ray.model.parts.draws import normal
from libra_ray.model.parts.planner import FeatureWidths
from libra_ray.model.precision import reads_are_free
from libra_ray.model.system import Losses, System, SystemInput, seen_now
from libra_ray.types import Level, RobotShape

ALONE = "expert_"
"""Begins the variants, an expert each."""
OF_DENOISERS = (
    "width", "depth", "heads", "train_transformer", "see_language", "predicts", "denoising_steps", "noise_draws",
    "sample_noise", "max_committed_steps",
)  # fmt: skip
"""Of the settings `refiner.*` those that its denoising experts follow."""
SHARE = "share_"
"""Begins the names of the experts' shares: measures of an answer, and metrics of training."""


class Experts(System):
    """One level: a router weighs experts that read the same backbone; one of them answers, or the mean of all.

    Every expert learns from every window by its own loss, with a head of its own, so that one that is never chosen does not
    fall behind, and each can be run alone, as the variant `expert_<name>`. They differ in how actions are said, and in nothing
    else: all see by the backbone, so that `refiner.vision`, `refiner.vision_tokens`, `refiner.encoder` and `refiner.objective`
    have no use here, nor has `refiner.condition_dropout`, for nothing is ever old or missing.

    The router learns which expert's chunk, as it would be executed, has the least error, and from a load-balancing term. An
    answer carries the measures `share_<expert>`, which sum to 1. One expert alone has no router.
    """

    variants = tuple(f"{ALONE}{name}" for name in EXPERTS)
    STAYS_FP32 = ()

    def __init__(self, config: Config, shape: RobotShape, folder: Path | None = None) -> None:
        super().__init__(config, shape)
        pictures, names = shape.cameras * config.data.history, config.experts.names
        self.levels, self.intents = (Level(name="policy", covers=config.action.horizon),), {}
        backbone: Backbone = make_backbone(config.planner, config.data.image_size, pictures, folder)
        widths = FeatureWidths(width=backbone.width, summary_width=backbone.summary_width)
        self.shared = WithBackbone(backbone, config.planner)
        self.experts = nn.ModuleDict({name: make_expert(name, config, shape, widths, pictures) for name in names})
        self.router = Router(config, shape, widths, len(names)) if len(names) > 1 else None

    def losses(self, batch: Batch, phase: str, generator: torch.Generator | None = None) -> Losses:
        """Each expert's own loss by its name, and `router`.

        Metrics: the experts' shares of the windows, `share_<expert>`; the executed chunks' squared error relative to the
        experts' mean, `routed_error`; and the load-balancing term, `load`, 1 where all are used alike.
        """
        if self.training:
            batch = augmented(batch, self.config.train, generator)
        chunk, seen = chunk_of(batch, self.config.action.horizon), seen_now(batch)
        features = self.shared.encode(seen.images, seen.text)
        readings = {name: expert.read(features, seen.state) for name, expert in self._experts.items()}
        terms = {name: expert.loss(readings[name], chunk, generator) for name, expert in self._experts.items()}
        if self.router is None:
            return Losses(terms=terms)
        # After the losses: autocast keeps what it casts, and weights that were first cast without gradient would have none.
        noise = normal(chunk.actions.shape, chunk.actions, generator)
        with torch.no_grad():
            answers = torch.stack([expert.actions(readings[name], noise).float() for name, expert in self._experts.items()])
        router = self.router_loss(self.router(features, seen.state), answers, chunk)
        return Losses(terms={**terms, **router.terms}, metrics=router.metrics)

    def router_loss(self, logits: Float[Tensor, "B K"], answers: Float[Tensor, "K B H D"], chunk: Chunk) -> Losses:
        """What the router learns from the experts' answers."""
        settings = self.config.experts
        shares, errors = shares_of(logits, settings.routing).detach(), errors_of(answers, chunk)
        choice, load = choice_loss(logits, errors, chunk, settings.temperature), load_loss(logits, shares, chunk)
        executed = errors_of(torch.einsum("bk,kbhd->bhd", shares, answers)[None], chunk)
        routed, mean = (masked_mean(of.mean(-1), chunk.mask.any(-1)) for of in (executed, errors))
        return Losses(
            terms={"router": choice + settings.balance * load},
            metrics={
                **{f"{SHARE}{name}": share for name, share in zip(self._experts, shares.mean(0), strict=True)},
                "routed_error": routed / mean.clamp(min=1e-12),
                "load": load.detach(),
            },
        )

    @torch.no_grad()
    def infer(
        self, level: str, seen: SystemInput, above: Mapping[str, Tensor], noise: Tensor | None = None, variant: str = ""
    ) -> Mapping[str, Tensor]:
        """The next H `actions`; of the policy itself also the shares.

        On a CPU only experts with a share in an answer are computed; elsewhere waiting for the shares would take longer.
        """
        assert noise is not None, "denoising begins with noise"
        features = self.shared.encode(seen.images, seen.text)
        if variant:
            expert = self._experts[variant.removeprefix(ALONE)]
            return {"actions": expert.actions(expert.read(features, seen.state), noise, seen.committed)}
        shares, actions = self._shares(features, seen), torch.zeros_like(noise)
        for share, expert in zip(shares.T, self._experts.values(), strict=True):
            if not reads_are_free(share):
                reading = expert.read(features, seen.state)
                actions = actions + share[:, None, None] * expert.actions(reading, noise, seen.committed)
                continue
            rows = share.nonzero().squeeze(-1)
            if len(rows):
                reading = expert.read(features.index(rows), seen.state[rows])
                committed = None if seen.committed is None else seen.committed[rows]
                actions[rows] += share[rows, None, None] * expert.actions(reading, noise[rows], committed)
        named = {f"{SHARE}{name}": share for name, share in zip(self._experts, shares.T, strict=True)}
        return {"actions": actions.clamp(-1, 1), **named}

    @classmethod
    def variants_of(cls, config: Config) -> tuple[str, ...]:
        """One for each expert that takes part."""
        return tuple(f"{ALONE}{name}" for name in config.experts.names)

    def parts(self) -> Mapping[str, nn.Module]:
        """The backbone, the experts and the router."""
        return {
            "shared": self.shared,
            **{f"experts.{name}": expert for name, expert in self._experts.items()},
            **({} if self.router is None else {"router": self.router}),
        }

    def loss_weights(self) -> Mapping[str, float]:
        """The lambdas, of the cross-entropy and of both denoising losses; 1 of the router's, which shares no weights."""
        plan, diff = self.config.train.lambda_plan, self.config.train.lambda_diff
        own = {name: plan if name == "token" else diff for name in self._experts}
        return own if self.router is None else {**own, "router": 1.0}

    @classmethod
    def follows(cls, config: Config) -> tuple[str, ...]:
        """Those of the backbone, of the experts that take part, and the router's where there are several."""
        names, found = config.experts.names, ["planner.", "experts.names"]
        if "token" in names:
            found += ["action.bins", "train.lambda_plan"]
        if "diffusion" in names:
            found += ["refiner.train_timesteps"]
        if set(names) - {"token"}:
            found += [f"refiner.{name}" for name in OF_DENOISERS] + ["train.lambda_diff"]
        if len(names) > 1:
            found += ["experts.routing", "experts.temperature", "experts.balance"]
        return tuple(found)

    def reached(self) -> Mapping[str, list[nn.Parameter]]:
        """Each expert's loss that expert and the backbone, the router's loss the router."""
        shared = [*self.shared.parameters()]
        reached = {name: [*shared, *expert.parameters()] for name, expert in self._experts.items()}
        if self.router is not None:
            reached["router"] = [*self.router.parameters()]
        return {name: [p for p in weights if p.requires_grad] for name, weights in reached.items()}

    def tokenise(self, instructions: list[str]) -> Text:
        """By the backbone."""
        return self.shared.tokenise(instructions)

    def save_processor(self, folder: Path) -> None:
        """Of the backbone."""
        self.shared.save_processor(folder)

    def _shares(self, features: BackboneOutput, seen: SystemInput) -> Float[Tensor, "B K"]:
        """How much of each answer is which expert's."""
        if self.router is None:
            return torch.ones_like(seen.state[:, :1])
        return shares_of(self.router(features, seen.state), self.config.experts.routing)

    @property
    def _experts(self) -> Mapping[str, ActionExpert]:
        """By name, in the configured order."""
        return {name: cast("ActionExpert", expert) for name, expert in self.experts.items()}
