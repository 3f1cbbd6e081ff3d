"""What a checkpoint says about itself, readable without torch: its manifest, configuration and levels."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libra_ray import config as configuration
from libra_ray.config import Config
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.spec import RobotSpec, VectorSpec
from libra_ray.types import Json, Level, RobotShape, check_levels

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
        _refuse_values(tree)
        tree |= {name: tuple(tree[name]) for name in ("image_keys", "instructions")}
        data = Fingerprint(**tree["data"]) if tree.get("data") else None
        levels = tuple(Level(**level) for level in tree.get("levels", ()))
        _refuse_levels(levels)
        joined = tuple(_origin(origin) for origin in tree.get("joined", ()))
        read = {"shape": _shape(tree["shape"]), "data": data, "levels": levels, "joined": joined}
        return Manifest(**{**tree, **read})
    except (KeyError, TypeError, AttributeError, RecursionError, _DamagedError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {folder} has a damaged manifest.json ({error}); train again or restore it") from error


class _DamagedError(Exception):
    """A value that no training wrote."""


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _refuse_levels(levels: tuple[Level, ...]) -> None:
    try:
        if levels:
            check_levels(levels)
    except ValueError as error:
        raise _DamagedError(error) from error


VALID: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_whole(0), "a whole number from 0 on"),
    "total_steps": (_whole(1), "a whole number from 1 on"),
    "shape.action_dim": (_whole(1), "a whole number from 1 on"),
    "shape.state_dim": (_whole(1), "a whole number from 1 on"),
    "shape.cameras": (_whole(1), "a whole number from 1 on"),
    "shape.subgoals": (_texts, "a list of texts"),
    "image_keys": (lambda value: _texts(value) and len(set(value)) == len(value) > 0, "different names of cameras"),
    "control_hz": (lambda value: type(value) in (int, float) and 0 < value < math.inf, "a number above 0"),
    "instructions": (_texts, "a list of texts"),
    "digest": (lambda value: isinstance(value, str), "a text"),
    "levels": (lambda value: isinstance(value, list) and all(map(_is_level, value)), "a list of name, covers, reads"),
    "joined": (lambda value: isinstance(value, list), "a list"),
}
"""What a manifest's values may be; earlier versions wrote neither sub-goals nor the last two."""


def _is_level(value: Any) -> bool:
    kinds = {"name": str, "covers": int, "reads": str | None}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _refuse_values(tree: Json) -> None:
    """Refuse what would fail where it is used, far from here.

    Raises:
        _DamagedError: names the value and what is valid.
    """
    shape = tree["shape"]
    for name, (is_valid, words) in VALID.items():
        part, dot, field = name.partition(".")
        holder, field = (shape, field) if dot else (tree, part)
        if name in ("shape.subgoals", "levels", "joined") and field not in holder:
            continue
        if not is_valid(holder[field]):
            raise _DamagedError(f"{name} is {str(holder[field])[:80]}; it must be {words}")
    if len(tree["image_keys"]) != shape["cameras"]:
        raise _DamagedError(f"it names {len(tree['image_keys'])} cameras in image_keys, and {shape['cameras']} in shape")


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
