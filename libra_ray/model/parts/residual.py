"""The residual head of AnchorRefine: learned tokens of its own read a context, and say how far the anchor is off."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from libra_ray.config import PlannerConfig
from libra_ray.model.parts.adapters import Adaptable, Way
from libra_ray.model.parts.backbone import BackboneOutput
from libra_ray.model.parts.planner import FeatureWidths, Planner
from libra_ray.model.parts.vision import VISION_TOKENS, PictureEncoder
from libra_ray.model.precision import matched


class ResidualHead(nn.Module):
    """One learned token a step, with a head like the anchor's, over features that it is handed.

    Before any training it says 0. It does not read the anchor, unless `see_anchor` joins it for ablation; but it knows where
    there is none, and it has to say the whole action.
    """

    STAYS_FP32 = ("without_anchor", "from_anchor", "to_residual")

    def __init__(
        self, config: PlannerConfig, features: FeatureWidths, *, steps: int, dims: int, state: int, see_anchor: bool
    ) -> None:
        super().__init__()
        width = config.width
        self.head = Planner(config, features, plan_steps=steps, dims=dims, bins=0, state=state)
        self.without_anchor = nn.Parameter(torch.zeros(width))
        self.from_anchor = nn.Linear(dims, width) if see_anchor else None
        self.to_residual = nn.Linear(width, dims)
        nn.init.zeros_(self.to_residual.weight)
        nn.init.zeros_(self.to_residual.bias)

    def forward(
        self,
        features: BackboneOutput,
        state: Float[Tensor, "B S"],
        anchor: Float[Tensor, "B H D"],
        known: Bool[Tensor, "B H"],
    ) -> Float[Tensor, "B H D"]:
        """What is to be added to the anchor.

        Args:
            anchor: read by the ablation alone.
            known: False on steps that have no anchor.
        """
        beside = ~known[..., None] * self.without_anchor
        if self.from_anchor is not None:
            beside = beside + self.from_anchor(anchor)
        hidden = self.head.attend(features, state, beside).hidden
        residual: Tensor = self.to_residual(matched(hidden, self.to_residual.weight))
        return residual


class OwnContext(Adaptable):
    """Features of the pictures alone, by an encoder, for a residual that needs no backbone."""

    def __init__(self, encoder: PictureEncoder, pictures: int, width: int, train_encoder: Way) -> None:
        super().__init__()
        self.encoder, self._train_encoder = encoder, train_encoder
        self.widths = FeatureWidths(width=width, summary_width=VISION_TOKENS * pictures * width)

    def ways(self) -> Mapping[str, Way]:
        """The encoder's."""
        return {"": "full", f"encoder.{self.encoder.tower}": self._train_encoder}

    def forward(self, images: UInt8[Tensor, "B T C height width"]) -> BackboneOutput:
        """The encoder's tokens; nothing was said."""
        tokens = self.encoder(images)
        return BackboneOutput(
            tokens=tokens, mask=None, summary=tokens.flatten(1), pictures=tokens, sentence=torch.zeros_like(tokens[:, 0])
        )
