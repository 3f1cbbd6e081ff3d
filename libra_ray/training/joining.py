"""Levels that were trained one by one, put together into one checkpoint."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from libra_ray import config as configuration
from libra_ray.checkpoint import (
    WEIGHTS_NAME,
    LevelOrigin,
    Manifest,
    digest,
    read_config,
    read_manifest,
    seal,
)
from libra_ray.common.disk import room_for
from libra_ray.common.folders import written
from libra_ray.config import Config, override
from libra_ray.config.overrides import flatten
from libra_ray.model.levels import owner_of, owners
from libra_ray.model.parts.backbone import PROCESSOR_FOLDER
from libra_ray.model.parts.vision import ENCODER_FOLDER
from libra_ray.model.registry import make_system, system_class
from libra_ray.shards import TensorSource, write_whole

OF_A_RUN = (
    "preset", "sim.", "record.", "data.root", "data.keys", "data.holdout_share", "data.action_", "data.state_names",
    "data.gripper", "data.rotation", "train.", "ray.", "policy.", "control.", "delay.", "evaluate.", "tracking.",
)  # fmt: skip
"""The settings in which checkpoints of one policy may differ. What their data sets declare is compared as manifests have it."""
OF_TRAINING = {"step", "total_steps", "digest", "data", "instructions", "joined"}
"""What may differ between their manifests."""


@dataclass(frozen=True, kw_only=True)
class LevelSource:
    """A checkpoint that a level is taken from."""

    level: str
    folder: Path
    config: Config
    manifest: Manifest


def join(folders: Mapping[str, Path], target: Path) -> Manifest:
    """Write a checkpoint with each level from another one, tensor by tensor; `target` appears complete or not at all.

    Args:
        folders: the checkpoint of each level of the policy, by the level's name.
        target: replaced if it exists.

    Raises:
        ValueError: one is no checkpoint, a level is missing or was not trained in what is given for it, or they do not fit one
            another: by system, shapes, settings, normalisation statistics, tokenisers, or weights that levels share.
        NoRoomError: the disk has no room for it.
    """
    found = joinable(folders)
    given, last = found.given, found.last
    whose = owners(make_system(last.config, last.manifest.shape, last.folder))
    weights = _weights(given, whose)
    with room_for(target, sum(source.bytes for source in weights.values()), "a checkpoint"), written(target) as staging:
        shutil.copytree(last.folder, staging, ignore=shutil.ignore_patterns("trainer", WEIGHTS_NAME))
        write_whole(staging / WEIGHTS_NAME, weights)
        (staging / "config.json").write_text(configuration.to_json(found.config), encoding="utf-8")
        told = dict.fromkeys(text for source in given for text in source.manifest.instructions)
        subgoals = tuple(sorted({name for source in given for name in source.manifest.shape.subgoals}))
        shape = replace(last.manifest.shape, subgoals=subgoals)
        seal(staging, shape=shape, instructions=tuple(told), data=None, joined=tuple(map(_origin, given)))
    return read_manifest(target)


@dataclass(frozen=True, kw_only=True)
class Joinable:
    """Checkpoints of the levels of one policy.

    Attributes:
        given: each level's.
        last: that of the level that acts.
        config: of what they become.
    """

    given: Sequence[LevelSource]
    last: LevelSource
    config: Config


def joinable(folders: Mapping[str, Path]) -> Joinable:
    """What is to be joined.

    Raises:
        ValueError: as `join`, but for weights that levels share.
    """
    given = [_source(level, folder) for level, folder in folders.items()]
    last = _check_fit(given)
    config = override(
        last.config, {"train.levels": (), "train.stats_from": "", "train.start_from": "", "train.start_parts": ()}
    )
    return Joinable(given=given, last=last, config=config)


def is_joined(target: Path, found: Joinable) -> bool:
    """Whether a checkpoint is already what these would become, so that only publishing may be left."""
    return target.exists() and read_manifest(target).joined == tuple(map(_origin, found.given))


def _source(level: str, folder: Path) -> LevelSource:
    manifest, config = read_manifest(folder), read_config(folder)
    if digest(folder) != manifest.digest:
        raise ValueError(f"checkpoint {folder} was changed after it was written; restore its files or train again")
    levels = [of.name for of in manifest.levels]
    if level not in levels:
        raise ValueError(f"checkpoint {folder} has no level {level}; its levels are {', '.join(levels)}")
    if config.train.levels and level not in config.train.levels:
        raise ValueError(
            f"checkpoint {folder} was trained without {level}; its train.levels is {','.join(config.train.levels)}"
        )
    return LevelSource(level=level, folder=folder, config=config, manifest=manifest)


def _check_fit(given: Sequence[LevelSource]) -> LevelSource:
    """Refuse what is not one policy; returns the source of the level that acts."""
    levels = [level.name for level in given[0].manifest.levels]
    if missing := [level for level in levels if level not in {source.level for source in given}]:
        raise ValueError(
            f"no checkpoint is given for the level {', '.join(missing)}; the policy's levels are {', '.join(levels)}"
        )
    first, *others = given
    for other in others:
        pair = f"{first.folder} and {other.folder} cannot be joined"
        ours, theirs = _settings(first.config), _settings(other.config)
        differing = [f"{k} ({v} and {theirs.get(k)})" for k, v in ours.items() if v != theirs.get(k)]
        one, another = _promise(first), _promise(other)
        names = [f.name for f in fields(Manifest) if f.name not in OF_TRAINING]
        differing += [f"{n} ({one[n]} and {another[n]})" for n in names if one[n] != another[n]]
        if differing:
            raise ValueError(f"{pair}: they differ in {', '.join(differing)}; train both with the same settings and robot")
        if _file(first, "stats.json") != _file(other, "stats.json"):
            raise ValueError(
                f"{pair}: their normalisation statistics differ, so that one level would not mean what the other reads; train "
                f"one of them again with --train.stats_from {first.folder} (or the other's), also while that one still trains"
            )
        if _processors(first.folder) != _processors(other.folder):
            raise ValueError(f"{pair}: their tokenisers or architectures differ; train both from the same backbone and encoder")
    return next(source for source in given if source.level == levels[-1])


def _promise(source: LevelSource) -> dict[str, Any]:
    """Its manifest, without the sub-goals of its data where no level speaks of them."""
    manifest, named = source.manifest, system_class(source.config.model.system).names_subgoals(source.config)
    return asdict(manifest if named else replace(manifest, shape=replace(manifest.shape, subgoals=())))


def _settings(config: Config) -> dict[str, Any]:
    """Those that a policy depends on."""
    return {k: v for k, v in flatten(config).items() if not k.startswith(OF_A_RUN)}


def _file(source: LevelSource, name: str) -> bytes:
    return (source.folder / name).read_bytes()


def _processors(folder: Path) -> dict[str, str]:
    """What the files are that rebuild pretrained parts, by their names."""
    paths = [
        path for name in (PROCESSOR_FOLDER, ENCODER_FOLDER) for path in sorted((folder / name).rglob("*")) if path.is_file()
    ]
    found = {}
    for path in paths:
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _weights(given: Sequence[LevelSource], whose: Mapping[str, str | None]) -> dict[str, TensorSource]:
    """Each weight from its level's checkpoint; what is no level's own has to be the same in all of them."""
    files = {source.level: safe_open(source.folder / WEIGHTS_NAME, framework="pt") for source in given}
    found = {}
    for name in files[given[0].level].keys():  # noqa: SIM118  (it is no mapping)
        level = owner_of(name, whose)
        values: dict[str, Tensor] = {} if level else {each: file.get_tensor(name) for each, file in files.items()}
        first = next(iter(values.values()), None)
        if first is not None and not all(value.equal(first) for value in values.values()):
            raise ValueError(
                f"the checkpoints cannot be joined: {name} is of no level alone, and differs between {', '.join(values)}; "
                "choose settings by which levels share nothing, or train all together"
            )
        found[name] = _read_later(files[level or given[0].level], name)
    return found


def _read_later(file: Any, name: str) -> TensorSource:
    described = file.get_slice(name)
    return TensorSource(dtype=described.get_dtype(), shape=tuple(described.get_shape()), read=lambda: file.get_tensor(name))


def _origin(source: LevelSource) -> LevelOrigin:
    manifest = source.manifest
    return LevelOrigin(
        level=source.level, folder=str(source.folder), digest=manifest.digest, step=manifest.step, data=manifest.data
    )
