"""The tensor word: one training batch."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch of windows, normalised, as `Pipeline.inputs` leaves it.

    Letters: `B` windows, `T` images per system (cameras x history), `C` = 3, `L = M * H` steps in a plan, `D` action and
    `S` state dimensions, `W` instruction tokens. The planner's window starts at `plan`, the refiner's at `now`, which lies
    `offset` control steps later (0 <= offset <= L): a chunk is refined from a *fresh* picture and an older intent.

    Attributes:
        plan_images: `(B, T, 3, height, width)` uint8, what the planner saw.
        plan_state: `(B, S)` normalised proprioception at the planner's step.
        images: `(B, T, 3, height, width)` uint8, what the refiner sees `offset` steps later.
        state: `(B, S)` normalised proprioception at the refiner's step.
        text: `(B, W)` instruction token ids, as the planner tokenises them; `text_mask` is False on padding.
        actions: `(B, L + H, D)` normalised actions from the planner's step on, in [-1, 1].
        action_mask: `(B, L + H)` False on steps past the episode's end; these never influence a loss.
        offset: `(B,)` control steps between the planner's and the refiner's picture.
        path: `(B, L, S)` normalised proprioception after each of the first L of the actions; past the episode's end its last.
        subgoals: `(B, K)` the sub-goals that the demonstrator works on from the planner's step on, in their order, as places in
            `RobotShape.subgoals`; past the last one that list's length.
        heard_subgoals: `(B, K)` the same as of some steps before, as a slower level will have said them.
    """

    plan_images: UInt8[Tensor, "B T C height width"]
    plan_state: Float[Tensor, "B S"]
    images: UInt8[Tensor, "B T C height width"]
    state: Float[Tensor, "B S"]
    text: Int[Tensor, "B W"]
    text_mask: Bool[Tensor, "B W"]
    actions: Float[Tensor, "B steps D"]
    action_mask: Bool[Tensor, "B steps"]
    offset: Int[Tensor, " B"]
    path: Float[Tensor, "B L S"]
    subgoals: Int[Tensor, "B K"]
    heard_subgoals: Int[Tensor, "B K"]

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.actions)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pinned(self) -> "Batch":
        """The same batch in memory from which a GPU fetches it by itself."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def index(self, rows: Int[Tensor, " K"]) -> "Batch":
        """The batch of the given rows, in the given order."""
        return Batch(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})
