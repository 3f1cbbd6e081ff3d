"""A trainer's states written while it trains on, by all workers together, each what it holds."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from torch import distributed

from libra_ray import checkpoint, shards
from libra_ray.common import disk
from libra_ray.common.folders import replace_folder
from libra_ray.training.data import TrainingData
from libra_ray.training.fit import Trainer

PARTIAL = ".partial"
"""Ends the names of folders that are being written: one that was left behind is no checkpoint."""


class BackgroundSaver:
    """Writes checkpoints to resume from; every worker makes one, and asks the same of it in the same order.

    One state is written at a time: the next one waits for it. Leave it as a context, or `wait`: until then nothing is sure.
    """

    def __init__(self, trainer: Trainer, data: TrainingData) -> None:
        self._trainer, self._data = trainer, data
        # Of its own, over CPUs: the trainer's exchanges go on meanwhile.
        self._group = distributed.new_group(backend="gloo") if distributed.is_initialized() else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        """Ready."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """`wait`; of what ended the context and of what failed here, the former is told."""
        with suppress(*(() if kind is None else (Exception,))):
            self.wait()
        self._thread.shutdown(wait=False)

    def begin(self, folder: Path, then: Callable[[Path], None] = lambda _: None) -> None:
        """Wait for the save before, copy the trainer's state, and write it while training goes on.

        Args:
            folder: appears when all of it is written, in the place of one that is there; the first worker's counts.
            then: called with that folder afterwards, in the background, at every worker.

        Raises:
            NoRoomError: the disk has no room for it.
            Exception: what the save before failed by, at any worker.
        """
        self.wait()
        folder = Path(self._told(str(folder)))
        partial = folder.with_name(f".{folder.name}{PARTIAL}")
        if self._trainer.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            disk.check_room(folder, self._trainer.checkpoint_bytes(), "a checkpoint")
        self._meet()
        saving = shards.begin(partial / checkpoint.TRAINER_FOLDER, self._trainer.state(), self._group)
        self._last = self._thread.submit(self._finish, saving, partial, folder, self._trainer.step, then)

    def check(self) -> None:
        """Tell what failed, if the present save has; it waits for nothing.

        Raises:
            Exception: as `begin`.
        """
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Until the present save is over at all workers.

        Raises:
            Exception: as `begin`.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _finish(self, saving: shards.Saving, partial: Path, folder: Path, step: int, then: Callable[[Path], None]) -> None:
        first = self._trainer.rank == 0
        with disk.explained(folder.parent):
            saving.finish(first=first)
            if first:
                checkpoint.describe(partial, self._trainer.model, self._data.stats, self._data.spec, step)
                replace_folder(partial, folder)
        self._meet()
        then(folder)

    def _meet(self) -> None:
        if self._group is not None:
            distributed.barrier(self._group)

    def _told(self, text: str) -> str:
        """What the first worker says."""
        if self._group is None:
            return text
        found: list[Any] = [text]
        distributed.broadcast_object_list(found, group=self._group)
        return str(found[0])
