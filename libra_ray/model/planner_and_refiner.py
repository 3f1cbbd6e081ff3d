"""What systems of a planner and a refiner share, whatever stands between the two."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from libra_ray.model.parts.backbone import BackboneOutput, Text
from libra_ray.model.parts.planner import Planner
from libra_ray.model.parts.refiner import Refiner, RefinerContext
from libra_ray.model.system import System, SystemInput


class PlannerAndRefiner(System):
    """A subclass makes both in its constructor."""

    STAYS_FP32 = ()
    planner: Planner
    refiner: Refiner

    def parts(self) -> Mapping[str, nn.Module]:
        """Both networks."""
        return {"planner": self.planner, "refiner": self.refiner}

    def stages(self) -> Mapping[str, Callable[..., object]]:
        """Those of both networks."""
        return {**self.planner.stages(), **self.refiner.stages()}

    def tokenise(self, instructions: list[str]) -> Text:
        """By the planner's backbone; the refiner reads no words of its own."""
        return self.planner.tokenise(instructions)

    def save_processor(self, folder: Path) -> None:
        """Of both networks."""
        self.planner.save_processor(folder)
        self.refiner.save_processor(folder)

    @property
    def sees_through_planner(self) -> bool:
        """Whether the refiner needs the planner's backbone, as its ablations do."""
        return self.config.refiner.vision == "shared" or self.config.refiner.see_language

    def context_of(self, seen: SystemInput, features: BackboneOutput) -> RefinerContext:
        """What the refiner sees, where the backbone was asked about the same moment."""
        shared = features.pictures if self.config.refiner.vision == "shared" else None
        language = features.sentence if self.config.refiner.see_language else None
        return self.refiner.encode_context(seen.images, seen.state, shared, language)
