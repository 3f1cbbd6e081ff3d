"""An event loop whose clock is the test's: where nothing is left to do, it goes on to the next timer at once.

What a test says of durations is then exact, and depends on no machine.
"""

import asyncio


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Time passes only in sleeps."""

    def __init__(self):
        super().__init__()
        self._now = 1000.0

    def time(self):
        return self._now

    def _run_once(self):
        # One that was cancelled stays among them for a while, and nothing comes of it.
        timers = [timer.when() for timer in self._scheduled if not timer.cancelled()]
        if not self._ready and timers:
            self._now = max(self._now, min(timers))
        super()._run_once()


def run(work, patience_s=300):
    """The result of a coroutine, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(asyncio.wait_for(work, patience_s))
