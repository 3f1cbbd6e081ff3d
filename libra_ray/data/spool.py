"""One episode as one small file, written atomically: what recorders leave for the dataset writer. No torch here."""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from libra_ray.common.disk import explained
from libra_ray.data.video import EncodedClip
from libra_ray.types import Action, Episode, Observation, Step

_NO_AGE = -1
_IMAGES = "images/"
_CLIPS = "clips/"
_SAMPLES = "samples/"
_NO_CLIPS: Mapping[str, EncodedClip] = MappingProxyType({})


def save_episode(path: Path, episode: Episode, clips: Mapping[str, EncodedClip] = _NO_CLIPS) -> None:
    """Write `episode` to `path` (npz, uncompressed); a reader sees the whole file or none, and nothing is left of a half one.

    Args:
        path: the file to write; its folder is made where missing.
        episode: every camera must appear in all steps or in none; at least one step.
        clips: by camera; kept in place of its pictures.

    Raises:
        ValueError: the episode has no steps, or its steps differ in cameras or shapes.
        NoRoomError: the disk is full.
    """
    if not episode.steps:
        raise ValueError(f"episode {episode.task} seed {episode.seed} has no steps; only recorded episodes are kept")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with explained(path.parent), partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **_arrays(episode, clips))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_episode(path: Path) -> Episode:
    """The episode that `save_episode` wrote, without the pictures that it has as clips. Nothing is unpickled.

    Raises:
        ValueError: the file is not a spooled episode.
    """
    return load_recording(path)[0]


def load_recording(path: Path) -> tuple[Episode, dict[str, EncodedClip]]:
    """The episode that `save_episode` wrote, and its clips by camera. Nothing is unpickled.

    Raises:
        ValueError: the file is not a spooled episode.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays["meta"].item())
    except (ValueError, LookupError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a spooled episode ({error}); remove it, and it is recorded again") from error
    images = {name.removeprefix(_IMAGES): stack for name, stack in arrays.items() if name.startswith(_IMAGES)}
    instructions = meta["instructions"] or [meta["instruction"]] * len(arrays["reward"])
    steps = tuple(_step(arrays, images, text, i) for i, text in enumerate(instructions))
    length = len(arrays["reward"])
    clips = {
        name.removeprefix(_CLIPS): EncodedClip(
            encoded=stored.tobytes(), frames=length, samples=arrays[_SAMPLES + name.removeprefix(_CLIPS)]
        )
        for name, stored in arrays.items()
        if name.startswith(_CLIPS)
    }
    episode = Episode(
        task=meta["task"],
        instruction=meta["instruction"],
        seed=meta["seed"],
        steps=steps,
        success=meta["success"],
        error=meta["error"],
        frames=tuple(arrays["frames"]) if "frames" in arrays else (),
    )
    return episode, clips


def _arrays(episode: Episode, clips: Mapping[str, EncodedClip]) -> dict[str, NDArray]:
    steps = episode.steps
    cameras = list(steps[0].observation.images)
    if any(list(step.observation.images) != cameras for step in steps):
        raise ValueError(f"episode {episode.task} seed {episode.seed}: every step must carry the cameras {cameras}")
    meta = {
        "task": episode.task,
        "instruction": episode.instruction,
        "instructions": _instructions(steps, episode.instruction),
        "seed": episode.seed,
        "success": episode.success,
        "error": episode.error,
    }
    ages = [_NO_AGE if s.action.intent_age_steps is None else s.action.intent_age_steps for s in steps]
    arrays = {
        "meta": np.array(json.dumps(meta)),
        "state": np.stack([s.observation.state for s in steps]),
        "step": np.array([s.observation.step for s in steps], np.int64),
        "value": np.stack([s.action.value for s in steps]),
        "label": np.stack([s.action.label for s in steps]),
        "intent_age_steps": np.array(ages, np.int64),
        "held": np.array([s.action.held for s in steps], np.bool_),
        "reward": np.array([s.reward for s in steps], np.float64),
        "success": np.array([s.success for s in steps], np.bool_),
    }
    plain = [camera for camera in cameras if camera not in clips]
    arrays |= {_IMAGES + camera: np.stack([s.observation.images[camera] for s in steps]) for camera in plain}
    arrays |= {_CLIPS + camera: np.frombuffer(clip.encoded, np.uint8) for camera, clip in clips.items()}
    arrays |= {_SAMPLES + camera: clip.samples for camera, clip in clips.items()}
    return arrays | ({"frames": np.stack(episode.frames)} if len(episode.frames) else {})


def _instructions(steps: Sequence[Step], instruction: str) -> list[str] | None:
    """The steps' own instructions, kept only where one differs from the episode's."""
    texts = [step.observation.instruction for step in steps]
    return texts if any(text != instruction for text in texts) else None


def _step(arrays: dict[str, NDArray], images: dict[str, NDArray], instruction: str, i: int) -> Step:
    age = int(arrays["intent_age_steps"][i])
    return Step(
        observation=Observation(
            images={camera: stack[i] for camera, stack in images.items()},
            state=arrays["state"][i],
            instruction=instruction,
            step=int(arrays["step"][i]),
        ),
        action=Action(
            value=arrays["value"][i],
            label=arrays["label"][i],
            intent_age_steps=None if age == _NO_AGE else age,
            held=bool(arrays["held"][i]),
        ),
        reward=float(arrays["reward"][i]),
        success=bool(arrays["success"][i]),
    )
