"""Threads that compute one batch at a time, some of them behind whatever else wants their processor.

Only for levels that share processors: on machines of their own, with `nice` 0, both threads are alike. On two shared cores the
p99 of the last level's calls beside a busy level above is 1.44 times that without one, and 1.62 times with `nice` 0. Linux's
idle policy would make it 1.25, but a killed process ends with its last thread, and an idle one may wait half a minute for that.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from libra_ray.serving.weights import UnknownWeightsError


class ComputeThreads:
    """One batch is computed at a time, by one of two threads.

    Priority belongs to a thread, and only the privileged may raise one that was lowered: so a batch that can wait goes to
    the thread that has been lowered for good.

    Args:
        threads: that torch computes a batch with.
        nice: of the thread of low priority.

    Attributes:
        busy_since: when the batch under way was begun, on the clock `time.monotonic`; None where none is.
        busy_s: computed so far.
    """

    def __init__(self, threads: int, nice: int) -> None:
        self._first, self._behind = _thread(threads, 0), _thread(threads, nice)
        self._one_at_a_time = threading.Lock()
        self.busy_since: float | None = None
        self.busy_s = 0.0

    async def run[T](self, work: Callable[[], T], *, low_priority: bool) -> T:
        """Compute off the event loop.

        Raises:
            UnknownWeightsError: `work` says so.
            RuntimeError: it failed otherwise; the text says how.
        """

        def timed() -> T:
            with self._one_at_a_time:
                self.busy_since = time.monotonic()
                try:
                    return work()
                except UnknownWeightsError:
                    raise
                except Exception as error:
                    # An error of torch's the gateway could only unpickle by importing torch, which takes seconds.
                    raise RuntimeError(f"{type(error).__name__}: {error}") from error
                finally:
                    self.busy_s += time.monotonic() - self.busy_since
                    self.busy_since = None

        return await asyncio.get_running_loop().run_in_executor(self._behind if low_priority else self._first, timed)


def _thread(threads: int, nice: int) -> ThreadPoolExecutor:
    """A thread to compute in. Its priority and OpenMP's number of threads belong to the thread that sets them."""

    def begin() -> None:
        # The driver, which names this class to Serve, need not wait for the import.
        import torch

        os.nice(nice)
        torch.set_num_threads(threads)

    return ThreadPoolExecutor(1, initializer=begin)
