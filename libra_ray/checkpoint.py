"""A checkpoint is one folder: weights, configuration, statistics, tokeniser. Readable without Ray, written atomically.

```
checkpoint/
  weights.safetensors   what the policy runs with (the moving average of the trained weights, adapters apart)
  config.json           the resolved configuration
  stats.json            normalisation statistics of the training episodes
  manifest.json         step, dimensions, schema of observation and action, digest
  processor/, encoder/  tokeniser and architecture of a pretrained backbone and vision encoder, where there are such
  trainer/              raw weights, moving average, optimiser and step: only for resuming; not part of the digest
```

While training goes on, its checkpoints have `trainer/`, written by all workers (`libra_ray/shards.py`), and no weights beside
it: `export` makes one to run of it.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from libra_ray import config as configuration
from libra_ray.common.disk import room_for
from libra_ray.common.folders import written
from libra_ray.config import Config, override
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.data.transforms import NormStats
from libra_ray.manifest import LevelOrigin, Manifest, read_config, read_levels, read_manifest
from libra_ray.model.parts.adapters import merged
from libra_ray.model.parts.backbone import PROCESSOR_FOLDER
from libra_ray.model.parts.vision import ENCODER_FOLDER
from libra_ray.model.registry import make_system
from libra_ray.model.system import System
from libra_ray.types import RobotShape

TRAINER_FOLDER, WEIGHTS_NAME, STATS_NAME = "trainer", "weights.safetensors", "stats.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint, ready to run."""

    model: System
    config: Config
    stats: NormStats
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What a data set tells a checkpoint: robot shape, camera names, control rate, instructions, and which data set it was."""

    shape: RobotShape
    image_keys: tuple[str, ...]
    control_hz: float
    instructions: tuple[str, ...]
    data: Fingerprint | None = None


def save(
    folder: Path,
    model: System,
    weights: dict[str, torch.Tensor],
    stats: NormStats,
    spec: DatasetSpec,
    step: int,
) -> Manifest:
    """Write a checkpoint to run; `folder` appears complete or not at all.

    Args:
        folder: where to; replaced if it exists.
        model: gives configuration and processor.
        weights: the state dict the policy shall run with.
        stats: normalisation statistics.
        spec: what the data set says.
        step: optimiser steps done.

    Raises:
        NoRoomError: the disk of `folder` has no room for it.
    """
    with room_for(folder, sum(value.nbytes for value in weights.values()), "a checkpoint"), written(folder) as staging:
        staging.mkdir()
        save_file({n: value.detach().cpu().contiguous() for n, value in weights.items()}, staging / WEIGHTS_NAME)
        describe(staging, model, stats, spec, step)
        return seal(staging)


def describe(folder: Path, model: System, stats: NormStats, spec: DatasetSpec, step: int) -> None:
    """Write all of a checkpoint but its weights, for which `export` makes them of the trainer's state."""
    (folder / "config.json").write_text(configuration.to_json(model.config), encoding="utf-8")
    (folder / STATS_NAME).write_text(stats.to_json(), encoding="utf-8")
    model.save_processor(folder)
    manifest = Manifest(
        step=step,
        total_steps=model.config.train.steps,
        digest="",
        levels=model.levels,
        **{k: getattr(spec, k) for k in asdict(spec)},
    )
    _write_manifest(folder, manifest)


def seal(folder: Path, **changes: Any) -> Manifest:
    """Complete the manifest of a folder that has all else, with other fields as given."""
    manifest = replace(read_manifest(folder), **changes, digest=digest(folder))
    _write_manifest(folder, manifest)
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2), encoding="utf-8")


def load(
    folder: Path | str, device: torch.device | str = "cpu", changes: Mapping[str, Any] = MappingProxyType({})
) -> Checkpoint:
    """Read a checkpoint written by `save`.

    Args:
        changes: settings of inference that replace the checkpoint's: those of `PolicyConfig`, and see `System.denoised_by`.

    Raises:
        ValueError: the folder is missing, incomplete, of another format, or its files do not fit one another, or what is
            changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    found = digest(folder)
    if found != manifest.digest:
        raise ValueError(
            f"checkpoint {folder} was changed after it was written (digest {found[:12]}, manifest says "
            f"{manifest.digest[:12]}); restore its files or train again"
        )
    config = override(configuration.read_saved(folder / "config.json"), changes)
    check_complete(folder, config, manifest)
    stats = NormStats.from_json((folder / STATS_NAME).read_text(encoding="utf-8"))
    stats.check_fits(manifest.shape.state_dim, manifest.shape.action_dim)
    model = make_system(config, manifest.shape, folder)
    try:
        model.load_state_dict(merged(load_file(folder / WEIGHTS_NAME), config.model))
    except RuntimeError as error:
        raise ValueError(f"checkpoint {folder}: its weights do not fit its configuration ({error}); train again") from error
    if manifest.levels not in ((), model.levels):
        raise ValueError(f"checkpoint {folder}: its manifest names other levels than its policy has; train again or restore it")
    return Checkpoint(model=model.to(device).eval(), config=config, stats=stats, manifest=manifest)


def check_complete(folder: Path, config: Config, manifest: Manifest) -> None:
    """Refuse a checkpoint some of whose levels never learned.

    Raises:
        ValueError: names those that did, and what to do.
    """
    trained = config.train.levels
    if trained and set(trained) < {level.name for level in manifest.levels}:
        raise ValueError(
            f"of checkpoint {folder} only {', '.join(trained)} was trained (train.levels); join it with the other levels: "
            "jobs/join.py"
        )


def load_trainer_state(folder: Path | str) -> dict[str, Any]:
    """Raw weights, optimiser and step of a checkpoint that training wrote, its tensors not read yet; nothing is unpickled.

    Raises:
        ValueError: the checkpoint has none, or not all of it.
    """
    # Training's alone: its libraries take longer to load than all that runs a policy.
    from libra_ray import shards

    path = Path(folder) / TRAINER_FOLDER
    if not (path / shards.STATE_NAME).is_file():
        raise ValueError(f"checkpoint {folder} has no trainer state to resume from; give one that training itself wrote")
    state = shards.read(path)
    raw = state.get("model", {})
    if "frozen" not in state and (Path(folder) / WEIGHTS_NAME).is_file():
        # Earlier versions wrote whole weights beside it, and in them alone what is frozen.
        state["frozen"] = {n: v for n, v in load_file(Path(folder) / WEIGHTS_NAME).items() if n not in raw}
    if "switched_at" in state:
        # And the schedule's state beside the others.
        state["schedule"] = {name: state.pop(name) for name in ("accuracy", "switched_at")}
    return state


def export(source: Path, target: Path) -> Manifest:
    """A checkpoint to run, without the trainer's state, of one that training wrote; atomically.

    Its weights are the moving average and what is frozen, copied tensor by tensor.

    Raises:
        ValueError: `source` is none, or not all of one.
        NoRoomError: the disk of `target` has no room for it.
    """
    from libra_ray import shards  # see load_trainer_state

    with written(target) as staging:
        shutil.copytree(source, staging, ignore=shutil.ignore_patterns(TRAINER_FOLDER))
        if not (staging / WEIGHTS_NAME).exists():
            state = load_trainer_state(source)
            weights = shards.sources({**state["frozen"], **state["average"]})
            with room_for(target, sum(source.bytes for source in weights.values()), "a checkpoint"):
                shards.write_whole(staging / WEIGHTS_NAME, weights)
            seal(staging)
    return read_manifest(target)


def digest(folder: Path) -> str:
    """Sha256 over what determines the policy's answers."""
    sha = hashlib.sha256()
    parts = [path for name in (PROCESSOR_FOLDER, ENCODER_FOLDER) for path in sorted((folder / name).rglob("*"))]
    for path in (folder / WEIGHTS_NAME, folder / "config.json", folder / STATS_NAME, *parts):
        if path.is_file():
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    sha.update(chunk)
    return sha.hexdigest()


__all__ = [
    "Checkpoint",
    "DatasetSpec",
    "LevelOrigin",
    "Manifest",
    "check_complete",
    "describe",
    "digest",
    "export",
    "load",
    "load_trainer_state",
    "read_config",
    "read_levels",
    "read_manifest",
    "save",
    "seal",
]
