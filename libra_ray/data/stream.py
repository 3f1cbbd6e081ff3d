"""Training batches without end, the same for the same (seed, step, rank), gathered ahead of the training loop."""

import queue
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from libra_ray.batch import Batch

if TYPE_CHECKING:
    from libra_ray.data.windows import Windows


class BatchStream:
    """An endless iterator over batches; use it as a context manager, or call `close()`.

    Epochs are permutations of all windows, laid end to end and cut into steps of `batch_size * world_size`; the ranks share
    each step's windows among them. So the step number alone says what is drawn: a stream begun at `start_step` goes on
    exactly as an uninterrupted one, and the ranks of one step hold different draws.

    Args:
        windows: what to draw from.
        batch_size: windows per step and rank.
        seed: determines everything.
        rank: this worker, from 0.
        world_size: the number of workers.
        start_step: the first step to deliver.
        prefetch: batches that a thread gathers ahead.
        pin: put them where a GPU fetches them by itself.

    Attributes:
        samples: windows delivered to this rank.

    Raises:
        ValueError: `batch_size` is below 1, or the rank does not exist.
    """

    def __init__(
        self,
        windows: "Windows",
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        prefetch: int = 2,
        pin: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist; it must lie in [0, {world_size})")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is too small; it must be at least 1")
        self.samples = 0
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._pin = pin
        self._permutations: dict[int, NDArray[np.int64]] = {}
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=max(prefetch, 1))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(start_step,), name="batch-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        """The stream itself."""
        return self

    def __next__(self) -> Batch:
        """The next step's batch of this rank, `batch_size` windows."""
        if self._stopped.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.samples += len(item)
        return item

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Stop the gathering thread and wait for its end. Idempotent."""
        self._stopped.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join()

    def rows(self, step: int) -> NDArray[np.int64]:
        """The window numbers `(batch_size,)` that this rank draws at `step`."""
        positions = (step * self._batch_size + np.arange(self._batch_size)) * self._world_size + self._rank
        epochs, places = np.divmod(positions, len(self._windows))
        drawn = np.empty_like(positions)
        for epoch in np.unique(epochs):
            drawn[epochs == epoch] = self._permutation(int(epoch))[places[epochs == epoch]]
        return drawn

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._permutations:
            while len(self._permutations) > 1:
                self._permutations.pop(min(self._permutations))
            self._permutations[epoch] = np.random.default_rng([self._seed, epoch]).permutation(len(self._windows))
        return self._permutations[epoch]

    def _produce(self, step: int) -> None:
        while not self._stopped.is_set():
            try:
                rng = np.random.default_rng([self._seed, step, self._rank])
                batch = self._windows.batch(self.rows(step), rng)
                item: Batch | BaseException = batch.pinned() if self._pin else batch
            except Exception as error:  # noqa: BLE001 - the consumer raises it
                item = error
            self._offer(item)
            step += 1

    def _offer(self, item: Batch | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return
