"""From sub-goals to waypoints, and from waypoints to actions."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from libra_ray.config import Config
from libra_ray.model.parts.backbone import BackboneOutput, GuidedEyes
from libra_ray.model.parts.chunks import Chunk
from libra_ray.model.parts.planner import FeatureWidths, Planner
from libra_ray.model.parts.refiner import Refiner, RefinerContext
from libra_ray.model.precision import matched
from libra_ray.types import RobotShape

FARTHEST = 2.0
"""How far out a waypoint may lie, in normalised units: what was recorded spans [-1, 1]."""


class WaypointGrid(nn.Module):
    """The control steps of a plan and the waypoints that they lead to.

    Args:
        steps: L, of the plan.
        every: control steps between two waypoints; the last one lies at the plan's end.

    Attributes:
        count: W.
        ends: `(W,)` the steps after which a waypoint is reached, the last one L.
        left: `(L,)` for each step, control steps until the waypoint that it leads to is reached, its own among them.
    """

    def __init__(self, steps: int, every: int) -> None:
        super().__init__()
        ends = torch.tensor([*range(every, steps, every), steps])
        leads_to = torch.arange(steps) // every
        self.count = len(ends)
        self.ends: Tensor
        self.left: Tensor
        self._leads_to: Tensor
        self.register_buffer("ends", ends, persistent=False)
        self.register_buffer("left", ends[leads_to] - torch.arange(steps), persistent=False)
        self.register_buffer("_leads_to", leads_to, persistent=False)

    def of(self, path: Float[Tensor, "B L S"]) -> Float[Tensor, "B W S"]:
        """The waypoints on a path, which says the state after each step."""
        return path.index_select(1, self.ends - 1)

    def intent(self, waypoints: Float[Tensor, "B W S"]) -> dict[str, Tensor]:
        """Waypoints as a level below reads them: `waypoint` `(B, L, S)`, where each step leads to, and `left` `(B, L)`."""
        rows = waypoints.index_select(1, self._leads_to)
        return {"waypoint": rows, "left": self.left.expand(len(rows), -1)}


class Pathfinder(nn.Module):
    """The waypoints that lead to sub-goals, from what is seen now: a small transformer with eyes of its own.

    What is to be done enters as one vector for each sub-goal; together they are the sentence by which it finds things in the
    pictures. Waypoints are future proprioception, each said as the way there from the present state.
    """

    STAYS_FP32 = ("to_way",)

    def __init__(self, config: Config, shape: RobotShape, pictures: int, waypoints: int) -> None:
        super().__init__()
        width = config.planner.width
        self.read = nn.Sequential(
            nn.Linear(config.hierarchy.subgoals * width, width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width)
        )
        self.guided = GuidedEyes(config.data.image_size, pictures, width)
        features = FeatureWidths(width=width, summary_width=self.guided.summary_width)
        self.head = Planner(config.planner, features, plan_steps=waypoints, dims=shape.state_dim, bins=0, state=shape.state_dim)
        self.to_way = nn.Linear(width, shape.state_dim)

    def forward(
        self, images: UInt8[Tensor, "B T C height width"], state: Float[Tensor, "B S"], meant: Float[Tensor, "B K d"]
    ) -> Float[Tensor, "B W S"]:
        """The waypoints, normalised and unbounded; `meant` is a vector for each sub-goal, in their order."""
        hidden = self.head.attend(self.see(images, meant), state).hidden
        way: Tensor = self.to_way(matched(hidden, self.to_way.weight))
        return state[:, None] + way

    def see(self, images: UInt8[Tensor, "B T C height width"], meant: Float[Tensor, "B K d"]) -> BackboneOutput:
        """What is seen in the light of what is meant."""
        first: nn.Linear = self.read[0]  # type: ignore[assignment]
        return self.guided.look(images, self.read(matched(meant.flatten(1), first.weight)))

    def stages(self) -> Mapping[str, Callable[..., object]]:
        """What its time goes into, see `System.stages`."""
        return {"tactical encoder": self.see, "tactical head": self.head.attend}


class PathFollower(nn.Module):
    """The chunk of actions towards waypoints, denoised under a fresh picture."""

    STAYS_FP32 = ("from_path",)

    def __init__(self, config: Config, shape: RobotShape, pictures: int, folder: Path | None = None) -> None:
        super().__init__()
        self.every, self.dims, width = config.hierarchy.waypoint_steps, shape.action_dim, config.refiner.width
        self.from_path = nn.Linear(2 * shape.state_dim + 2, width)
        self.refiner = Refiner(
            config.refiner,
            image_size=config.data.image_size,
            pictures=pictures,
            horizon=config.action.horizon,
            dims=shape.action_dim,
            state=shape.state_dim,
            # Neither pictures nor words of another level are read.
            feature_width=width,
            hidden_width=width,
            folder=folder,
        )

    def features(
        self, waypoint: Float[Tensor, "B H S"], left: Int[Tensor, "B H"], state: Float[Tensor, "B S"]
    ) -> Float[Tensor, "B H F"]:
        """What each step of a chunk knows of its waypoint: where it is, how far off, how soon; zeros where `left` is 0."""
        known = (left > 0)[..., None]
        soon = (left / self.every)[..., None]
        said = torch.cat([waypoint, waypoint - state[:, None], soon.to(waypoint), known.to(waypoint)], dim=-1)
        return said * known

    def loss(
        self,
        chunk: Chunk,
        features: Float[Tensor, "B H F"],
        context: RefinerContext,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """The denoising loss."""
        return self.refiner.loss(chunk, self._read(features), context, self._origin, generator)

    def actions(
        self,
        features: Float[Tensor, "B H F"],
        context: RefinerContext,
        noise: Float[Tensor, "B H D"],
        committed: Float[Tensor, "B K D"] | None,
    ) -> Float[Tensor, "B H D"]:
        """Normalised actions in [-1, 1]; `committed` as in `SystemInput`."""
        return self.refiner.sample(self._read(features), context, self._origin, noise, committed)

    def _read(self, features: Float[Tensor, "B H F"]) -> Float[Tensor, "B H d"]:
        read: Tensor = nn.functional.gelu(self.from_path(features))
        assert self.refiner.from_features is not None
        return matched(read, self.refiner.from_features.weight)

    def _origin(self, intent: Float[Tensor, "B H d"]) -> Float[Tensor, "B H D"]:
        """Answers are counted from 0: there is no coarse action."""
        return intent.new_zeros(*intent.shape[:2], self.dims)
