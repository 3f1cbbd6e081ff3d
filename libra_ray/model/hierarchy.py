"""Three levels, from sub-goals to waypoints to actions: hierarchical plan and act (method.md, pattern 2)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from libra_ray.batch import Batch
from libra_ray.config import Config
from libra_ray.model.libra import dropped
from libra_ray.model.parts.augment import augmented
from libra_ray.model.parts.backbone import Backbone, Text, make_backbone
from libra_ray.model.parts.chunks import chunk_of
from libra_ray.model.parts.diffusion import Denoised
from libra_ray.model.parts.planner import Planner, plan_accuracy, plan_loss
from libra_ray.model.parts.refiner import RefinerContext, followed
from libra_ray.model.parts.waypoints import FARTHEST, Pathfinder, PathFollower, WaypointGrid
from libra_ray.model.system import IntentValue, Losses, System, SystemInput, seen_first, seen_now
from libra_ray.types import Level, RobotShape

STRATEGIC, TACTICAL, MOTOR = "strategic", "tactical", "motor"


class Hierarchy(System):
    """What is to be done, where the hand shall go, and how: each level reads the one above, and only the first one reads words.

    - `strategic` says the next K sub-goals, in their order, as places in the data set's list of them (`RobotShape.subgoals`),
      and the list's length where nothing is left to do: the configured vision-language backbone and K learned queries, one
      cross-entropy. Its intent holds `subgoals` `(K,)`.
    - `tactical` says waypoints: proprioception at every `hierarchy.waypoint_steps` of its M * H steps. It reads all of the
      sub-goals, not only the first, which may have been done since they were said. Its intent holds for each step the
      `waypoint` that it leads to, and how many steps are `left` until there, 0 where nothing is known.
    - `motor` denoises a chunk of H actions under the waypoints of its own steps and a fresh picture (`refiner`).

    With `hierarchy.levels=two` the hidden states of the strategic network stand where its sub-goals would, in the same pass as
    the waypoints: as many weights, but for the words.

    The source draws boxes and rates, and nothing of how sub-goals and waypoints are represented or learned. Here all levels
    learn together from demonstrations, each from what the one above should have said: sub-goals as the demonstrator worked on
    them (`libra_ray.data.subgoals`), as they were up to the strategic level's own length ago, and the path that was really
    taken from there on. What is unknown to a level is hidden in a share `refiner.condition_dropout` of the windows.
    """

    STAYS_FP32 = ("codes",)

    def __init__(self, config: Config, shape: RobotShape, folder: Path | None = None) -> None:
        super().__init__(config, shape)
        pictures, steps, dials = shape.cameras * config.data.history, config.action.plan_steps, config.hierarchy
        self.has_words = dials.levels == "three"
        self.end, self.nothing = len(shape.subgoals), len(shape.subgoals) + 1
        motor = Level(name=MOTOR, covers=config.action.horizon, reads=TACTICAL)
        tactical = Level(name=TACTICAL, covers=steps, reads=STRATEGIC if self.has_words else None)
        self.levels: tuple[Level, ...] = (tactical, motor)
        self.intents: dict[str, dict[str, IntentValue]] = {
            TACTICAL: {
                "waypoint": IntentValue(
                    shape=(steps, shape.state_dim), low=-FARTHEST, high=FARTHEST, unknown=0.0, dtype="float32"
                ),
                "left": IntentValue(shape=(steps,), low=0.0, high=float(dials.waypoint_steps), unknown=0.0),
            }
        }
        if self.has_words:
            self.levels = (Level(name=STRATEGIC, covers=dials.plans * steps), *self.levels)
            said = IntentValue(
                shape=(dials.subgoals,), low=0.0, high=float(self.nothing), unknown=float(self.nothing), per_step=False
            )
            self.intents = {STRATEGIC: {"subgoals": said}, **self.intents}
        backbone: Backbone = make_backbone(config.planner, config.data.image_size, pictures, folder)
        self.strategic = Planner(
            config.planner,
            backbone,
            plan_steps=dials.subgoals,
            dims=1,
            bins=self.end + 1 if self.has_words else 0,
            state=shape.state_dim,
        )
        self.grid = WaypointGrid(steps, dials.waypoint_steps)
        self.codes = nn.Embedding(self.nothing + 1, config.planner.width) if self.has_words else None
        self.tactical = Pathfinder(config, shape, pictures, self.grid.count)
        self.motor = PathFollower(config, shape, pictures, folder)

    def losses(self, batch: Batch, phase: str, generator: torch.Generator | None = None) -> Losses:
        """The cross-entropy `subgoals`, the waypoints' squared error `waypoints`, and the motor's denoising loss `diff`.

        Metrics: `subgoal_accuracy` in [0, 1], over all K, and `waypoint_error`, the mean absolute error in normalised units.
        """
        if self.training:
            batch = augmented(batch, self.config.train, generator)
        share = self.config.refiner.condition_dropout if self.training else 0.0
        terms, metrics, seen = dict[str, Tensor](), dict[str, Tensor](), seen_first(batch)
        if self.has_words and self.teaches("subgoals"):
            logits = self.strategic(seen.images, seen.state, seen.text)
            mask = torch.ones_like(batch.subgoals, dtype=torch.bool)
            terms["subgoals"] = plan_loss(logits, batch.subgoals[..., None], mask)
            metrics["subgoal_accuracy"] = plan_accuracy(logits, batch.subgoals[..., None], mask).detach()
        heard = dropped(batch.heard_subgoals[..., None], share, self.nothing, generator)[..., 0]
        waypoints = self.grid.of(batch.path)
        if self.teaches("waypoints"):
            errors = self.tactical(seen.images, seen.state, self._meant(seen, heard)).float() - waypoints
            terms["waypoints"], metrics["waypoint_error"] = errors.square().mean(), errors.detach().abs().mean()
        if self.teaches("diff"):
            terms["diff"] = self._motor_loss(batch, waypoints, share, generator)
        return Losses(terms=terms, metrics=metrics)

    def _motor_loss(
        self, batch: Batch, waypoints: Float[Tensor, "B W S"], share: float, generator: torch.Generator | None
    ) -> Float[Tensor, ""]:
        chunk, now = chunk_of(batch, self.config.action.horizon), seen_now(batch)
        ahead = self.aligned(self.levels[-1], self.grid.intent(waypoints), batch.offset)
        # A step past the episode's end would reach the others through attention.
        features = self.motor.features(ahead["waypoint"], ahead["left"], now.state) * chunk.mask[..., None]
        return self.motor.loss(chunk, dropped(features, share, 0, generator), self._context(now), generator)

    @torch.no_grad()
    def infer(
        self, level: str, seen: SystemInput, above: Mapping[str, Tensor], noise: Tensor | None = None, variant: str = ""
    ) -> Mapping[str, Tensor]:
        """The most likely `subgoals`; the `waypoint` of each step and what is `left` to it; the next H `actions`."""
        if level == STRATEGIC:
            return {"subgoals": self.strategic(seen.images, seen.state, seen.text).argmax(-1)[..., 0]}
        if level == TACTICAL:
            meant = self._meant(seen, above.get("subgoals"))
            found = self.tactical(seen.images, seen.state, meant).clamp(-FARTHEST, FARTHEST)
            return self.grid.intent(found.to(seen.state.dtype))
        assert noise is not None, "denoising begins with noise"
        features = self.motor.features(above["waypoint"].to(seen.state), above["left"], seen.state)
        return {"actions": self.motor.actions(features, self._context(seen), noise, seen.committed)}

    @classmethod
    def names_subgoals(cls, config: Config) -> bool:
        """Of three levels the first says them, and the second reads them."""
        return config.hierarchy.levels == "three"

    def metadata(self, level: str, values: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        """The sub-goals in words, up to the end."""
        if level != STRATEGIC:
            return {}
        said = values["subgoals"]
        left = said[: int(np.argmax(said >= self.end))] if (said >= self.end).any() else said
        return {"subgoals": [self.shape.subgoals[place] for place in left]}

    @classmethod
    def lengthened_by(cls, config: Config, level: Level, *, acts: bool) -> tuple[str, int]:
        """Each level by a setting of its own."""
        settings = {
            STRATEGIC: ("hierarchy.plans", config.action.plan_steps),
            TACTICAL: ("action.chunks", config.action.horizon),
            MOTOR: ("action.horizon", 1),
        }
        return settings[level.name]

    def loss_weights(self) -> Mapping[str, float]:
        """The lambdas: of what is planned, and of the denoising loss."""
        plan, diff = self.config.train.lambda_plan, self.config.train.lambda_diff
        return {**({"subgoals": plan} if self.has_words else {}), "waypoints": plan, "diff": diff}

    @classmethod
    def follows(cls, config: Config) -> tuple[str, ...]:
        """Those of the three networks; how long a strategic level's answer lasts only where there is one."""
        own = ["hierarchy.levels", "hierarchy.subgoals", "hierarchy.waypoint_steps"]
        own += ["hierarchy.plans"] if config.hierarchy.levels == "three" else []
        return ("planner.", *followed(config.refiner), *own, "train.lambda_plan", "train.lambda_diff")

    def taught_by(self) -> Mapping[str, tuple[str, ...]]:
        """Each level by its own loss."""
        words = {STRATEGIC: ("subgoals",)} if self.has_words else {}
        return {**words, TACTICAL: ("waypoints",), MOTOR: ("diff",)}

    def reached(self) -> Mapping[str, list[nn.Parameter]]:
        """Each loss its own level; of two levels the waypoints' also what reads the instruction."""
        above = [*self.strategic.parameters()]
        meant = above if self.codes is None else [*self.codes.parameters()]
        reached = {"waypoints": [*meant, *self.tactical.parameters()], "diff": [*self.motor.parameters()]}
        if self.has_words:
            reached = {"subgoals": above, **reached}
        return {name: [p for p in weights if p.requires_grad] for name, weights in reached.items()}

    def parts(self) -> Mapping[str, nn.Module]:
        """The three networks, and the vectors of the sub-goals."""
        codes: dict[str, nn.Module] = {} if self.codes is None else {"codes": self.codes}
        return {"strategic": self.strategic, **codes, "tactical": self.tactical, "motor": self.motor}

    def stages(self) -> Mapping[str, Callable[..., object]]:
        """Those of the three networks."""
        return {**self.strategic.stages(), **self.tactical.stages(), **self.motor.refiner.stages()}

    def denoised_by(self) -> Denoised:
        """The motor level."""
        return Denoised(level=MOTOR, setting="refiner.denoising_steps", most=self.config.refiner.train_timesteps)

    def tokenise(self, instructions: list[str]) -> Text:
        """By the strategic level's backbone; no other one reads words."""
        return self.strategic.tokenise(instructions)

    def save_processor(self, folder: Path) -> None:
        """Of the strategic level's backbone and the motor's encoder."""
        self.strategic.save_processor(folder)
        self.motor.refiner.save_processor(folder)

    def _meant(self, seen: SystemInput, subgoals: Int[Tensor, "B K"] | None) -> Float[Tensor, "B K d"]:
        """A vector for each sub-goal: its own, or of two levels what the instruction's reader makes of it."""
        if self.codes is None:
            return self.strategic.hidden_states(seen.images, seen.state, seen.text).hidden
        meant: Tensor = self.codes(subgoals)
        return meant

    def _context(self, seen: SystemInput) -> RefinerContext:
        return self.motor.refiner.encode_context(seen.images, seen.state)
