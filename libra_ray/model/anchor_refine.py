"""AnchorRefine: an anchor by any policy, then frozen, and a head that learns how far it is off (method.md, AnchorRefine)."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from libra_ray.batch import Batch
from libra_ray.config import Config
from libra_ray.model.libra import Libra, dropped
from libra_ray.model.monolithic import Monolithic
from libra_ray.model.parts.augment import augmented
from libra_ray.model.parts.backbone import Backbone, BackboneOutput, Text
from libra_ray.model.parts.chunks import Chunk, chunk_of, masked_mean
from libra_ray.model.parts.diffusion import Denoised
from libra_ray.model.parts.draws import normal
from libra_ray.model.parts.gripper import decided, decision_target, gripper_dim, probability
from libra_ray.model.parts.planner import FeatureWidths, Planner
from libra_ray.model.parts.residual import OwnContext, ResidualHead
from libra_ray.model.parts.vision import PretrainedEncoder, make_encoder
from libra_ray.model.regression import Regression
from libra_ray.model.schedule import OneAfterAnother, Schedule
from libra_ray.model.system import IntentValue, Losses, System, SystemInput, asked, seen_first, seen_now
from libra_ray.types import Level, RobotShape

ANCHOR, RESIDUAL = "anchor", "residual"
"""Parts and phases, and the levels where there are two."""
ANCHOR_ONLY = "anchor_only"
UNKNOWN = 2
"""Stands where there is no anchor; anchors lie in [-1, 1]."""
BACKBONES: dict[str, type[System]] = {"regression": Regression, "diffusion": Monolithic, "libra": Libra}


class AnchorRefine(System):
    """Action = anchor + residual.

    The anchor is the chunk of a whole policy, learned first by that policy's own losses. In the second phase it is frozen, and
    a residual head learns, from the same context and with learned tokens of its own, what the anchor lacks. The gripper is a
    decision: the head moves the anchor's probability across the threshold where it would decide wrongly.

    With two levels the intent `anchor` `(M * H, D)` is made slowly, and the residual of H steps from what is seen then; where
    no anchor is left, the head says the whole action. The variant `anchor_only` executes the anchor.
    """

    variants = (ANCHOR_ONLY,)
    STAYS_FP32 = ()

    def __init__(self, config: Config, shape: RobotShape, folder: Path | None = None) -> None:
        super().__init__(config, shape)
        self.settings, action, dims = config.anchor_refine, config.action, shape.action_dim
        self.gripper = gripper_dim(self.settings.gripper, dims, shape.action.gripper)
        self.arm: Tensor
        arm = [dim for dim in range(dims) if dim != self.gripper]
        self.register_buffer("arm", torch.tensor(arm), persistent=False)
        slow = Level(name=ANCHOR, covers=action.plan_steps)
        fast = Level(name=RESIDUAL, covers=action.horizon, reads=ANCHOR)
        self.two = self.settings.levels == "two"
        self.levels = (slow, fast) if self.two else (Level(name="policy", covers=action.horizon),)
        value = IntentValue(shape=(slow.covers, dims), low=-1.0, high=float(UNKNOWN), unknown=float(UNKNOWN), dtype="float32")
        self.intents = {ANCHOR: {"anchor": value}} if self.two else {}

        within = replace(action, horizon=self.levels[0].covers, chunks=1)
        self.anchor = BACKBONES[self.settings.backbone](replace(config, action=within), shape, folder)
        backbone = cast("Backbone", self._planner.backbone)
        widths = FeatureWidths(width=backbone.width, summary_width=backbone.summary_width)
        residual: dict[str, nn.Module] = {}
        if self.settings.context == "own":
            pictures, width = shape.cameras * config.data.history, config.planner.width
            encoder = make_encoder(config.refiner.encoder, config.data.image_size, width, folder)
            residual["context"] = own = OwnContext(encoder, pictures, width, config.refiner.train_encoder)
            widths = own.widths
        residual["head"] = ResidualHead(
            config.planner, widths, steps=action.horizon, dims=dims, state=shape.state_dim, see_anchor=self.settings.see_anchor
        )
        self.residual = nn.ModuleDict(residual)

    def losses(self, batch: Batch, phase: str, generator: torch.Generator | None = None) -> Losses:
        """The anchor's own losses first; then `residual` and, where it is refined, `gripper`.

        Metrics of the second phase: the size of the residual over that of the action, `residual_share`, and the shares of
        steps on which the gripper is commanded wrongly, `gripper_error` and, by the anchor, `gripper_error_anchor`.
        """
        frozen = phase == RESIDUAL and self.settings.stop_gradient
        if self.training and self.anchor.training == frozen:
            # Also without dropout and with fixed statistics.
            self.anchor.train(not frozen)
        if phase != RESIDUAL:
            return self.anchor.losses(self._anchor_batch(batch), phase.removeprefix(ANCHOR).removeprefix("_"), generator)
        if self.training:
            batch = augmented(batch, self.config.train, generator)
        chunk = chunk_of(batch, self.config.action.horizon)
        anchor, known, features = self._read_batch(batch, generator)
        said = self._said(features, batch.state, anchor, known).float()
        wanted = chunk.actions if self.settings.predicts == "action" else chunk.actions - anchor
        terms = {"residual": masked_mean(self._arm_error(said, wanted), chunk.mask)}
        left, whole = (masked_mean(self._arm_error(of, chunk.actions), chunk.mask) for of in (anchor, torch.zeros_like(anchor)))
        metrics = {"residual_share": (left / whole.clamp(min=1e-12)).sqrt().detach()}
        if self.gripper is not None:
            terms |= self._gripper_loss(chunk, anchor, said)
            metrics |= {"gripper_error": self._gripper_error(chunk, anchor, known, said)}
            metrics |= {"gripper_error_anchor": self._gripper_error(chunk, anchor, known, None)}
        return Losses(terms=terms, metrics=metrics)

    @torch.no_grad()
    def infer(
        self, level: str, seen: SystemInput, above: Mapping[str, Tensor], noise: Tensor | None = None, variant: str = ""
    ) -> Mapping[str, Tensor]:
        """The anchor for the next M * H steps, where that is a level; the next H `actions`."""
        if self.two and level == ANCHOR:
            return {"anchor": asked(self.anchor, seen, noise)}
        if self.two:
            anchor, known = _filled(above["anchor"])
            features = None if variant == ANCHOR_ONLY else self._features(seen)
        else:
            anchor, features = self._anchored(seen, noise)
            known = torch.ones_like(anchor[..., 0], dtype=torch.bool)
        if variant == ANCHOR_ONLY or features is None:
            return {"actions": self._combined(anchor, known, None)}
        return {"actions": self._combined(anchor, known, self._said(features, seen.state, anchor, known))}

    def parts(self) -> Mapping[str, nn.Module]:
        """The anchor's policy, and what refines it."""
        return {ANCHOR: self.anchor, RESIDUAL: self.residual}

    def loss_weights(self) -> Mapping[str, float]:
        """The anchor's, and the lambdas of the second phase."""
        own = {"residual": self.settings.lambda_residual}
        if self.gripper is not None and self.settings.gripper_refinement != "none":
            own["gripper"] = self.settings.lambda_gripper
        return {**self.anchor.loss_weights(), **own}

    def taught_by(self) -> Mapping[str, tuple[str, ...]]:
        """The anchor's own losses; a residual is of what an anchor really answers."""
        return {ANCHOR: tuple(self.anchor.loss_weights())} if self.two else super().taught_by()

    @classmethod
    def follows(cls, config: Config) -> tuple[str, ...]:
        """The anchor's, and its own."""
        dials = config.anchor_refine
        unused = {"decision": (), "naive": ("gripper_margin",), "none": ("gripper_margin", "lambda_gripper")}
        without = ("gripper_refinement", *unused["none"]) if dials.gripper == "none" else unused[dials.gripper_refinement]
        own = [f"anchor_refine.{f.name}" for f in fields(dials) if f.name not in without]
        if dials.levels == "two":
            own.append("refiner.condition_dropout")
        if dials.context == "own":
            own += ["refiner.encoder", "refiner.train_encoder"]
        return (*(BACKBONES[dials.backbone].follows(config) or ()), *own)

    def reached(self) -> Mapping[str, list[nn.Parameter]]:
        """The anchor's, and the head by both losses; without a stop-gradient the residual's loss also the anchor."""
        within = {name: list(weights) for name, weights in self.anchor.reached().items()}
        head = [p for p in self.residual.parameters() if p.requires_grad]
        anchor = [] if self.settings.stop_gradient else [p for p in self.anchor.parameters() if p.requires_grad]
        return within | {name: [*anchor, *head] for name in self.loss_weights() if name not in within}

    def schedule(self) -> Schedule:
        """The anchor's own, then the residual; the anchor's alone where nothing else is learned."""
        steps = self.config.train.steps
        first = steps if self.learned is not None else min(round(self.settings.anchor_share * steps), steps - 1)
        return OneAfterAnother((ANCHOR, RESIDUAL), self.anchor.schedule(), first, frozen=self.settings.stop_gradient)

    def stages(self) -> Mapping[str, Callable[..., object]]:
        """The anchor's, and what refines it."""
        named = {"context": "residual context", "head": "residual head"}
        return {**self.anchor.stages(), **{named[name]: module.forward for name, module in self.residual.items()}}

    def denoised_by(self) -> Denoised | None:
        """The anchor, where it is denoised."""
        within = self.anchor.denoised_by()
        return None if within is None else replace(within, level=self.levels[0].name)

    def noise_shape(self, level: str) -> tuple[int, ...] | None:
        """The anchor's; the residual begins with none."""
        return self.anchor.noise_shape(self.anchor.levels[-1].name) if level == self.levels[0].name else None

    def tokenise(self, instructions: list[str]) -> Text:
        """By the anchor's backbone."""
        return self.anchor.tokenise(instructions)

    def save_processor(self, folder: Path) -> None:
        """Of the anchor, and of an encoder of the residual's own."""
        self.anchor.save_processor(folder)
        encoder = cast("OwnContext", self.residual["context"]).encoder if self.settings.context == "own" else None
        if isinstance(encoder, PretrainedEncoder):
            encoder.save_processor(folder)

    @property
    def _planner(self) -> Planner:
        """Whose backbone the anchor sees through."""
        return cast("Planner", self.anchor.planner)

    def _anchor_batch(self, batch: Batch) -> Batch:
        """The windows as the anchor learns them: all from one moment, the plan's or, of one level, the present."""
        images, state, offset = batch.images, batch.state, batch.offset
        if self.two:
            images, state, offset = batch.plan_images, batch.plan_state, torch.zeros_like(offset)
        chunk = chunk_of(replace(batch, offset=offset), self.levels[0].covers)
        return replace(
            batch,
            plan_images=images,
            plan_state=state,
            images=images,
            state=state,
            actions=chunk.actions,
            action_mask=chunk.mask,
            offset=torch.zeros_like(offset),
        )

    def _read_batch(
        self, batch: Batch, generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "B H D"], Bool[Tensor, "B H"], BackboneOutput]:
        """The anchor of every window's chunk, where there is one, and the context of its residual."""
        shape = self.noise_shape(self.levels[0].name)
        noise = None if shape is None else normal((len(batch), *shape), batch.state, generator)
        if not self.two:
            anchor, features = self._anchored(seen_now(batch), noise)
            return anchor, torch.ones_like(anchor[..., 0], dtype=torch.bool), features
        anchor = self._answer(seen_first(batch), noise)
        present = self.aligned(self.levels[1], {"anchor": anchor}, batch.offset)["anchor"]
        share = self.config.refiner.condition_dropout if self.training else 0.0
        return *_filled(dropped(present, share, UNKNOWN, generator)), self._features(seen_now(batch))

    def _answer(self, seen: SystemInput, noise: Tensor | None) -> Float[Tensor, "B steps D"]:
        """The anchor; with its gradient where nothing stops that."""
        if self.settings.stop_gradient:
            return asked(self.anchor, seen, noise)
        return cast("Regression", self.anchor).predict(seen).clamp(-1, 1)

    def _anchored(self, seen: SystemInput, noise: Tensor | None) -> tuple[Float[Tensor, "B H D"], BackboneOutput]:
        """The anchor, and the context of its residual: where both read one backbone, it is asked once."""
        if self.settings.context == "own":
            return self._answer(seen, noise), self._features(seen)
        kept: list[BackboneOutput] = []
        handle = self._planner.backbone.register_forward_hook(lambda module, given, output: kept.append(output))
        try:
            return self._answer(seen, noise), kept[0]
        finally:
            handle.remove()

    def _features(self, seen: SystemInput) -> BackboneOutput:
        """The context of a residual."""
        if self.settings.context == "own":
            return cast("BackboneOutput", self.residual["context"](seen.images))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.settings.stop_gradient):
            return self._planner.encode(seen.images, seen.text)

    def _said(self, features: BackboneOutput, state: Tensor, anchor: Tensor, known: Tensor) -> Float[Tensor, "B H D"]:
        """What the head says of the arm's dimensions, and of the gripper's probability."""
        return cast("Tensor", self.residual["head"](features, state, anchor, known))

    def _combined(
        self, anchor: Float[Tensor, "B H D"], known: Bool[Tensor, "B H"], said: Float[Tensor, "B H D"] | None
    ) -> Float[Tensor, "B H D"]:
        """The actions of an anchor and what the head says; of the anchor alone without it, and 0 where there is none."""
        actions = anchor.clone()
        if said is not None:
            actions = said.clone() if self.settings.predicts == "action" else anchor + said
        if self.gripper is not None:
            q = probability(anchor[..., self.gripper])
            if said is not None and self.settings.gripper_refinement != "none":
                actions[..., self.gripper] = decided(q + said[..., self.gripper])
            else:
                # Without an anchor nobody has decided: neither end of the range is meant.
                actions[..., self.gripper] = decided(q) * known
        return actions.clamp(-1, 1)

    def _arm_error(self, said: Float[Tensor, "B H D"], wanted: Float[Tensor, "B H D"]) -> Float[Tensor, "B H"]:
        return (said - wanted).index_select(-1, self.arm).square().mean(-1)

    def _gripper_loss(self, chunk: Chunk, anchor: Tensor, said: Tensor) -> dict[str, Float[Tensor, ""]]:
        if self.settings.gripper_refinement == "none":
            return {}
        q, wanted = probability(anchor[..., self.gripper]).detach(), chunk.actions[..., self.gripper]
        naive = self.settings.gripper_refinement == "naive"
        target = probability(wanted) - q if naive else decision_target(q, wanted, self.settings.gripper_margin)
        return {"gripper": masked_mean((said[..., self.gripper] - target).square(), chunk.mask)}

    def _gripper_error(self, chunk: Chunk, anchor: Tensor, known: Tensor, said: Tensor | None) -> Float[Tensor, ""]:
        """The share of steps on which the gripper is commanded wrongly, or not at all."""
        wrong = self._combined(anchor, known, said)[..., self.gripper] != decided(probability(chunk.actions[..., self.gripper]))
        return masked_mean(wrong.float(), chunk.mask).detach()


def _filled(present: Float[Tensor, "B H D"]) -> tuple[Float[Tensor, "B H D"], Bool[Tensor, "B H"]]:
    """Anchors with zeros where there are none, and where there are some."""
    known = present[..., 0] < UNKNOWN
    return present.masked_fill(~known[..., None], 0), known
