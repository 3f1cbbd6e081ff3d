"""The features of a dataset as `meta/info.json` lists them, and what is declared there of the numbers in action and state.

Their names stand where LeRobot has them; what it has no place for, in an entry of the same feature, which LeRobot keeps,
compares when datasets are merged, and does not read.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from libra_ray.config import DataConfig
from libra_ray.data.checks import DatasetError
from libra_ray.spec import NO_GRIPPER, UNDECLARED, Declaration, Declares, RobotSpec, VectorSpec
from libra_ray.types import ACTION_KEY, STATE_KEY

SEED_KEY = "seed"
EXECUTED_KEY = "executed"
REWARD_KEY = "next.reward"
SUCCESS_KEY = "next.success"
ENTRY = "libra_ray"
"""The entry of a feature that holds all but the names."""
DECLARED = ("ranges", "gripper", "delta", "rotation")
"""What may stand in it."""


def features_of(
    image_shapes: Mapping[str, tuple[int, int, int]], state_dim: int, action_dim: int, declared: Declares
) -> dict[str, Any]:
    """LeRobot's table of what our recorder writes."""
    cameras = {
        key: {"dtype": "video", "shape": tuple(shape), "names": ["height", "width", "channels"]}
        for key, shape in image_shapes.items()
    }
    return cameras | {
        STATE_KEY: _vector("float32", state_dim, declared.state),
        ACTION_KEY: _vector("float32", action_dim, declared.action),
        EXECUTED_KEY: _vector("float32", action_dim, declared.action),
        REWARD_KEY: _vector("float32", 1),
        SUCCESS_KEY: _vector("bool", 1),
        SEED_KEY: _vector("int64", 1),
    }


def _vector(kind: str, dims: int, spec: VectorSpec = UNDECLARED) -> dict[str, Any]:
    """LeRobot's description of `(dims,)` numbers, with what is declared of them, as JSON has it."""
    feature: dict[str, Any] = {"dtype": kind, "shape": (dims,), "names": list(spec.names) or None}
    said = {name: value for name, value in spec.tree().items() if name != "names"}
    return feature | ({ENTRY: said} if said else {})


def declaration_of(root: Path, features: Mapping[str, Any], data: DataConfig) -> Declaration:
    """What the numbers of action and state mean: by the dataset or, where they say something, by the settings.

    Args:
        root: the dataset's folder.
        features: its feature table, by the names that are used here.

    Raises:
        DatasetError: a declaration that the dimensions do not allow, or as `settled`.
    """
    action, state = (_declared(root, features, key) for key in (ACTION_KEY, STATE_KEY))
    dims = _dims(features[ACTION_KEY]), _dims(features[STATE_KEY])
    return settled(Declaration(action=action, state=state), *dims, data, f"dataset {root}")


def settled(declared: Declares, action_dim: int, state_dim: int, data: DataConfig, whose: str) -> Declaration:
    """A declaration, with what the settings say in its place.

    Args:
        whose: the dataset, as messages name it.

    Raises:
        DatasetError: a setting that the dimensions do not allow; names what would be valid.
    """
    action = _named(declared.action, action_dim, "data.action_names", data.action_names, whose)
    if data.gripper:
        action = replace(action, gripper=_gripper(action, action_dim, data.gripper, whose))
    if data.action_is != "declared":
        action = replace(action, delta=data.action_is == "delta")
    if data.rotation != "declared":
        action = replace(action, rotation=data.rotation)
    return Declaration(action=action, state=_named(declared.state, state_dim, "data.state_names", data.state_names, whose))


def robot_to_record(robot: RobotSpec, data: DataConfig) -> RobotSpec:
    """What the recording of a simulated robot will say of it.

    Raises:
        DatasetError: as `settled`.
    """
    declared = settled(robot, robot.action_dim, robot.state_dim, data, "the data set to be recorded")
    return replace(robot, action=declared.action, state=declared.state)


def _dims(feature: Mapping[str, Any]) -> int:
    return int(np.prod(feature["shape"]))


def _declared(root: Path, features: Mapping[str, Any], key: str) -> VectorSpec:
    feature = features[key]
    dims, entry = _dims(feature), feature.get(ENTRY)
    names = _names(feature.get("names"), dims)
    if isinstance(entry, Mapping) and (unknown := [name for name in entry if name not in DECLARED]):
        raise DatasetError(
            f"{root / 'meta' / 'info.json'}: {key}: {ENTRY}: there is no {unknown[0]} to declare; give {', '.join(DECLARED)}"
        )
    try:
        return replace(VectorSpec.read(entry, dims), names=names)
    except ValueError as error:
        raise DatasetError(f"{root / 'meta' / 'info.json'}: {key}: {ENTRY}: {error}") from None


def _names(said: Any, dims: int) -> tuple[str, ...]:
    """The dimensions' names, of the ways in which LeRobot's datasets write them; none where they name something else."""
    if isinstance(said, Mapping):
        if len(said) == 1 and isinstance(only := next(iter(said.values())), list):
            # As of datasets of arms: `{"motors": [...]}`.
            said = only
        elif all(type(place) is int for place in said.values()) and sorted(said.values()) == [*range(dims)]:
            said = sorted(said, key=lambda name: said[name])
    if not isinstance(said, list | tuple) or not all(isinstance(name, str) for name in said):
        return ()
    return tuple(said) if len(said) == dims == len(set(said)) else ()


def _named(spec: VectorSpec, dims: int, setting: str, names: tuple[str, ...], whose: str) -> VectorSpec:
    if names and (len(names) != dims or len(set(names)) < dims):
        raise DatasetError(f"{setting}={','.join(names)}: {whose} has {dims} dimensions; give {dims} different names")
    return replace(spec, names=names) if names else spec


def _gripper(spec: VectorSpec, dims: int, setting: str, whose: str) -> int:
    if setting == "none":
        return NO_GRIPPER
    if setting in spec.names:
        return spec.names.index(setting)
    place = dims - 1 if setting == "last" else int(setting) if setting.isdecimal() else dims
    if place >= dims:
        named = f", or one of {', '.join(spec.names)}" if spec.names else ""
        raise DatasetError(
            f"data.gripper={setting}: an action of {whose} has {dims} dimensions; give none, last, or a number from 0 to "
            f"{dims - 1}{named}"
        )
    return place
