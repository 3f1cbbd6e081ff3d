"""Calls from a gateway to its levels: with a time limit, and tried again on another replica."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

TRIES = 3
"""A batch that a replica took with it when it died goes to the next one; one that killed three is given up."""
PAUSE_S = 0.02


class NoAnswerError(RuntimeError):
    """A level did not answer in time, on whatever replica."""


async def call(remote: Callable[[], Any], *, timeout_s: float, tries: int = TRIES) -> Any:
    """The answer of a handle's call, tried again where a replica dies, errs or takes too long.

    Args:
        remote: makes the call, e.g. `lambda: handle.infer.remote(batch)`; Serve prefers a replica with less to do.
        timeout_s: longest wait for one try.
        tries: the first one included.

    Raises:
        NoAnswerError: all tries failed.
    """
    last: BaseException | None = None
    for _ in range(tries):
        response = remote()
        try:
            async with asyncio.timeout(timeout_s):
                return await response
        except TimeoutError as error:
            response.cancel()
            last = error
        except Exception as error:  # noqa: BLE001  # whatever a dying replica raises; the batch is tried elsewhere
            last = error
            await asyncio.sleep(PAUSE_S)
    text = f"no answer within {timeout_s:g} s" if isinstance(last, TimeoutError) else f"{type(last).__name__}: {last}"
    raise NoAnswerError(text.splitlines()[0]) from last


class RecentMean:
    """A share over the last seconds, by exponential forgetting.

    Args:
        half_life_s: after which an observation counts half.
    """

    def __init__(self, half_life_s: float = 2.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._half_life_s, self._clock = half_life_s, clock
        self._sum, self._weight, self._at = 0.0, 0.0, clock()

    def add(self, value: float) -> None:
        """One more observation."""
        now = self._clock()
        keep = 0.5 ** ((now - self._at) / self._half_life_s)
        self._sum, self._weight, self._at = keep * self._sum + value, keep * self._weight + 1, now

    @property
    def mean(self) -> float:
        """Of the recent observations; 0 where there are none."""
        return self._sum / self._weight if self._weight > 1e-3 else 0.0
