"""Timing: a call again and again, and the named methods that it goes through."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from time import perf_counter
from typing import Any

CALLS, FEWEST_CALLS, LONGEST_S = 40, 3, 0.4
"""Something is measured so often, or for so long, but at least a few times."""

type Stages = Mapping[str, Callable[..., object]]


def timings(call: Callable[[], object]) -> list[float]:
    """Milliseconds of repeated calls; the first one is not counted."""
    call()
    ms: list[float] = []
    while len(ms) < CALLS and (len(ms) < FEWEST_CALLS or sum(ms) < 1000 * LONGEST_S):
        began = perf_counter()
        call()
        ms.append(1000 * (perf_counter() - began))
    return ms


@contextmanager
def watched(stages: Stages, settle: Callable[[], object]) -> Iterator[dict[str, list[float]]]:
    """Time bound methods wherever they are called within the block.

    Args:
        stages: by a reader's name.
        settle: waits until the device has done what was asked of it.

    Yields:
        Milliseconds of every call so far, by the name; methods that are not called have none.
    """
    found: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as undo:
        for name, method in stages.items():
            owner, attribute = method.__self__, method.__name__  # type: ignore[attr-defined]  # bound methods have both
            setattr(owner, attribute, _timed(method, found[name], settle))
            undo.callback(delattr, owner, attribute)
        yield found


def _timed(method: Callable[..., object], ms: list[float], settle: Callable[[], object]) -> Callable[..., object]:
    @wraps(method)
    def call(*args: Any, **options: Any) -> object:
        settle()
        began = perf_counter()
        try:
            return method(*args, **options)
        finally:
            settle()
            ms.append(1000 * (perf_counter() - began))

    return call
