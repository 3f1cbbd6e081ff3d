"""The fleet aggregator: adds up the gateways' snapshots for the live page."""

import time
from collections import deque
from collections.abc import Callable

from libra_ray.serving.fleet_snapshot import FleetSnapshot
from libra_ray.types import Json

SILENT_S = 5.0
"""A gateway that says nothing for so long is gone."""
HISTORY_S = 180


class FleetAggregator:
    """The latest snapshot of every gateway replica, and the curves of the last minutes. An actor's class, plain Python.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._latest: dict[str, tuple[float, FleetSnapshot]] = {}
        self._history: deque[tuple[float, Json]] = deque(maxlen=HISTORY_S)
        self._next_point = clock()

    def report(self, gateway: str, snapshot: FleetSnapshot) -> None:
        """A gateway's snapshot replaces its last one; about one call a second and gateway."""
        now = self._clock()
        self._latest[gateway] = (now, snapshot)
        if now >= self._next_point:
            self._next_point = now + 0.9
            self._history.append((now, self._merged().point()))

    def fleet(self) -> Json:
        """The content of `fleet.json`: `FleetSnapshot.to_json` of the whole fleet, and `history`, a point per second."""
        now = self._clock()
        history = [{"seconds_ago": round(now - at, 2), **point} for at, point in self._history]
        return {**self._merged().to_json(), "history": history}

    def _merged(self) -> FleetSnapshot:
        now = self._clock()
        self._latest = {name: known for name, known in self._latest.items() if now - known[0] < SILENT_S}
        return FleetSnapshot.merged((snapshot for _, snapshot in self._latest.values()), time=time.time())
