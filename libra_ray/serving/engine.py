"""What a gateway needs of the engine that runs it, handed in: the gateway itself knows none."""

import logging
from collections.abc import Iterable
from typing import Any, Protocol

from libra_ray.serving.fleet_snapshot import FleetSnapshot
from libra_ray.serving.metrics import Metric
from libra_ray.types import Json


class Engine(Protocol):
    """The engine as one gateway sees it.

    Attributes:
        gateway: the name of this gateway's replica.
        log: where whoever runs the engine looks.
    """

    gateway: str
    log: logging.Logger

    def register(self, metric: Metric, deployment: str) -> Any:
        """Announce a metric for a deployment; returns what records it: `observe`, `inc` or `set`, by its kind."""

    def running(self, handle: Any) -> int:
        """Replicas of a deployment that run now; asked before every call."""

    def settled(self, handles: Iterable[Any]) -> bool:
        """Whether all replicas of those deployments are as they were last asked to be; may block."""

    async def report(self, snapshot: FleetSnapshot) -> None:
        """Take this gateway's snapshot, for the live page of the whole fleet; called once a second."""

    async def fleet(self) -> Json:
        """The content of `fleet.json`."""
