"""What a checkpoint says about itself, readable without torch: its manifest, configuration and levels."""

import json
from dataclasses import dataclass
from pathlib import Path

from libra_ray import config as configuration
from libra_ray.config import Config
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.spec import RobotSpec, VectorSpec
from libra_ray.types import Json, Level, RobotShape

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class LevelOrigin:
    """Where a level of a joined checkpoint comes from.

    Attributes:
        folder: the checkpoint, as it was called.
        digest: of that checkpoint; `step`: the optimiser steps behind it; `data`: what it was trained on.
    """

    level: str
    folder: str
    digest: str
    step: int
    data: Fingerprint | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
        step: optimiser steps behind the weights.
        total_steps: optimiser steps the run was configured for.
        image_keys: camera feature names, in the order the model reads them.
        control_hz: control rate of the demonstrations.
        instructions: the instructions it was trained on.
        digest: sha256 over weights, configuration, statistics and processors.
        data: the data set it was trained on; None where the version that wrote it did not say.
        levels: of the policy, slow to fast; empty where the version that wrote it did not say.
        joined: where each level comes from, where they were trained one by one.
    """

    step: int
    total_steps: int
    shape: RobotShape
    image_keys: tuple[str, ...]
    control_hz: float
    instructions: tuple[str, ...]
    digest: str
    format: int = FORMAT
    data: Fingerprint | None = None
    levels: tuple[Level, ...] = ()
    joined: tuple[LevelOrigin, ...] = ()

    @property
    def robot(self) -> RobotSpec:
        """Whose policy this is."""
        return RobotSpec(
            action_dim=self.shape.action_dim,
            state_dim=self.shape.state_dim,
            cameras=self.image_keys,
            control_hz=self.control_hz,
            action=self.shape.action,
            state=self.shape.state,
        )

    @property
    def finished(self) -> bool:
        """Whether training reached its last step."""
        return self.step >= self.total_steps


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest alone, without loading weights.

    Raises:
        ValueError: the folder is not a checkpoint of this format.
    """
    folder = Path(folder)
    missing = [n for n in ("weights.safetensors", "config.json", "stats.json", "manifest.json") if not (folder / n).is_file()]
    if missing:
        raise ValueError(f"{folder} is not a checkpoint: {', '.join(missing)} missing; give the folder that training wrote")
    try:
        tree: Json = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise ValueError(f"checkpoint {folder} has format {tree['format']}, this version reads format {FORMAT}")
        tree |= {name: tuple(tree[name]) for name in ("image_keys", "instructions")}
        data = Fingerprint(**tree["data"]) if tree.get("data") else None
        levels = tuple(Level(**level) for level in tree.get("levels", ()))
        joined = tuple(_origin(origin) for origin in tree.get("joined", ()))
        read = {"shape": _shape(tree["shape"]), "data": data, "levels": levels, "joined": joined}
        return Manifest(**{**tree, **read})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {folder} has a damaged manifest.json ({error}); train again or restore it") from error


def _shape(tree: Json) -> RobotShape:
    """The shape in a manifest; earlier versions wrote neither sub-goals nor what the numbers mean."""
    means = {name: VectorSpec.read(tree.get(name), tree[f"{name}_dim"]) for name in ("action", "state")}
    return RobotShape(**{**tree, **means, "subgoals": tuple(tree.get("subgoals", ()))})


def _origin(tree: Json) -> LevelOrigin:
    return LevelOrigin(**{**tree, "data": Fingerprint(**tree["data"]) if tree.get("data") else None})


def read_config(folder: Path | str) -> Config:
    """The configuration that a checkpoint was trained with, without loading weights.

    Raises:
        ValueError: the folder is not a checkpoint of this format, or its configuration is damaged.
    """
    read_manifest(folder)
    return configuration.read_saved(Path(folder) / "config.json")


def read_levels(folder: Path | str) -> tuple[Level, ...]:
    """The levels of a checkpoint's policy, slow to fast.

    Raises:
        ValueError: the folder is not a checkpoint of this format.
    """
    levels = read_manifest(folder).levels
    if levels:
        return levels
    # Earlier versions did not write them down, and knew two systems.
    config = read_config(folder)
    action = config.action
    if config.model.system == "monolithic":
        return (Level(name="policy", covers=action.horizon),)
    return Level(name="planner", covers=action.plan_steps), Level(name="refiner", covers=action.horizon, reads="planner")
