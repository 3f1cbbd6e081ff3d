"""The folder of one run: where things lie, which stages are done, how long they took. All writes are atomic.

```
runs/<name>/
  config.json       the resolved configuration; a run is never continued under another one
  stages.json       per stage: done, wall seconds so far (interruptions included)
  spool/            demonstrations, one file each, until the data set is finished
  dataset/          LeRobotDataset v3
  frames/           decoded pictures, memory-mapped
  stats.json        normalisation statistics of the training
  ray/              Ray Train's own folder: checkpoints to resume from
  train_log.jsonl   one row per logged step
  margins.json      how well each level will keep up with a robot, measured before the first step
  train_errors.log  whole tracebacks, where training failed
  checkpoint/       the policy
  evaluation.jsonl  one row per episode and per batch of latencies
  report.json, report.html
```
"""

import errno
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from libra_ray import config as configuration
from libra_ray.common.disk import lacks_room
from libra_ray.common.files import write_text
from libra_ray.common.json_text import dump, parse, read
from libra_ray.config import Config
from libra_ray.config.overrides import flatten

Stage = Literal["record", "train", "evaluate", "total"]
"""The three stages, and the whole pipeline around them with all its starts."""

STAGE_KEYS: dict[Stage, tuple[str, ...]] = {
    "record": ("sim.", "record.", "data.root", "data.image_size"),
    "train": (
        "data.", "action.", "model.", "planner.", "refiner.", "coarse_to_fine.", "anchor_refine.", "experts.", "hierarchy.",
        "train.",
    ),
    "evaluate": (
        "sim.", "data.image_size", "policy.", "control.", "delay.", "evaluate.checkpoint", "evaluate.episodes_per_task",
        "evaluate.seed", "evaluate.controllers", "evaluate.videos_per_task",
    ),
}  # fmt: skip
"""The settings that a stage's result depends on; the others may change between a stop and a resumption."""

PRODUCTS: dict[Stage, tuple[str, ...]] = {
    "record": ("spool", "dataset", "frames"),
    "train": ("ray", "stats.json", "train_log.jsonl", "margins.json", "train_errors.log", "checkpoint"),
    "evaluate": ("evaluation.jsonl", "rollouts"),
}
"""What a stage leaves in the folder: what starting it over has to put aside."""


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """How far a stage has come: whether it has finished, and the wall seconds spent in it, over all its starts."""

    done: bool
    wall_s: float


def products(*stages: Stage) -> list[str]:
    """The products of several stages."""
    return [name for stage in stages for name in PRODUCTS[stage]]


@dataclass
class RunFolder:
    """One run's folder.

    Raises:
        ValueError: (from `open`) the folder holds a run of other settings that a finished or begun stage depends on.
    """

    root: Path
    config: Config

    @classmethod
    def open(cls, root: Path, config: Config, forget: Sequence[Stage] = ()) -> "RunFolder":
        """Create the folder, or continue in it if its settings are the same; stages to `forget` count as never begun."""
        root.mkdir(parents=True, exist_ok=True)
        folder = cls(root.resolve(), config)
        if any(folder.begun(stage) for stage in forget):
            gone = (*forget, "total")
            kept = {name: value for name, value in folder._kept().items() if name.partition(".")[0] not in gone}
            write_text(folder.path("stages.json"), dump(kept))
        if folder.path("config.json").exists():
            folder._refuse_other_settings(configuration.read_saved(folder.path("config.json")))
        write_text(folder.path("config.json"), configuration.to_json(config))
        return folder

    def path(self, name: str) -> Path:
        """A path inside the run's folder."""
        return self.root / name

    @property
    def dataset(self) -> Path:
        """The data set to train on: the configured one, or the run's own recording."""
        return Path(self.config.data.root) if self.config.data.root else self.path("dataset")

    @property
    def checkpoint(self) -> Path:
        """The checkpoint to evaluate: the configured one, or the run's own."""
        return Path(self.config.evaluate.checkpoint) if self.config.evaluate.checkpoint else self.path("checkpoint")

    def share_frames(self, frames: Path) -> None:
        """Use the pictures that another run has decoded from the same data set."""
        if not self.path("frames").exists():
            self.path("frames").symlink_to(frames.resolve(), target_is_directory=True)

    def done(self, stage: Stage) -> bool:
        """Whether a stage has finished."""
        time = self.fact(stage, StageTime)
        return time is not None and time.done

    def begun(self, stage: Stage) -> bool:
        """Whether a stage has been started at some time."""
        return self.fact(stage, StageTime) is not None

    def wall_s(self, stage: Stage) -> float:
        """Seconds spent in a stage, over all its starts."""
        time = self.fact(stage, StageTime)
        return 0.0 if time is None else time.wall_s

    def note(self, name: str, value: object) -> None:
        """Keep a small fact, such as the tracker's run id, beside the stages; `<stage>.<name>` is forgotten with its stage."""
        write_text(self.path("stages.json"), dump({**self._kept(), name: value}))

    def fact[T](self, name: str, kind: type[T]) -> T | None:
        """A fact kept by `note`; None where there is none.

        Raises:
            ValueError: it is something else; names the file and the field.
        """
        value = self._kept().get(name)
        return None if value is None else parse(kind, json.dumps(value), f"{self.path('stages.json')}: {name}")

    def _kept(self) -> dict[str, Any]:
        path = self.path("stages.json")
        return read(dict[str, Any], path) if path.exists() else {}

    @contextmanager
    def stage(self, stage: Stage, since: float | None = None) -> Iterator["Clock"]:
        """Time a stage, from `time.monotonic()` `since` or from now; it is done when the block ends without an exception."""
        clock = Clock(self, stage, self.wall_s(stage), time.monotonic() if since is None else since)
        clock.write(done=False)
        try:
            yield clock
        except BaseException:
            # What ended the stage is to be told, not that its time could not be written either.
            with suppress(OSError):
                clock.write(done=False)
            raise
        clock.write(done=True)

    def _refuse_other_settings(self, before: Config) -> None:
        old, new = flatten(before), flatten(self.config)
        for stage, keys in STAGE_KEYS.items():
            changed = [k for k in new if k.startswith(keys) and old[k] != new[k]]
            if changed and self.begun(stage):
                words = ", ".join(f"{k} ({old[k]} -> {new[k]})" for k in changed)
                raise ValueError(
                    f"{self.root.name} was started with other settings for its stage {stage!r}: {words}. "
                    "Give another --name, or --fresh to start over (the old folder is kept aside)."
                )


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keep a second process away from the run in `root`; the lock ends with the process, however that ends.

    Raises:
        ValueError: another process is working on it, or there can be no such folder.
    """
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        if root.exists() and not root.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if root.exists():
            # Asking for permissions forgets disks that are mounted to be read.
            with tempfile.TemporaryFile(dir=root):
                pass
        file = root.with_name(f".{root.name}.lock").open("w", encoding="utf-8")
    except OSError as error:
        if lacks_room(error):
            raise
        raise ValueError(
            f"the run's folder {root} cannot be made or written ({error.strerror}); give another --runs or --name"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is working on {root}; wait for its end, or give another --name") from None
        yield


@dataclass
class Clock:
    """Wall time of a running stage, written to disk now and then so that a killed process loses seconds, not minutes."""

    folder: RunFolder
    stage: Stage
    before_s: float
    began: float

    def __post_init__(self) -> None:
        """Start."""
        self._written = time.monotonic()

    def tick(self) -> None:
        """Call often: writes at most every two seconds."""
        if time.monotonic() - self._written > 2:
            self.write(done=False)

    def write(self, *, done: bool) -> None:
        """Write the time so far."""
        self._written = time.monotonic()
        self.folder.note(self.stage, StageTime(done=done, wall_s=round(self.before_s + self._written - self.began, 2)))
