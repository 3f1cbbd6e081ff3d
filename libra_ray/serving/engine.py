"""What a gateway needs of the engine that runs it, handed in: the gateway itself knows none."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from libra_ray.serving.fleet_snapshot import FleetSnapshot
from libra_ray.serving.metrics import Metric
from libra_ray.types import Json

Register = Callable[[Metric, str], Any]
"""Announces a metric for a deployment; returns what records it: `observe`, `inc` or `set`, by its kind."""


class Aggregator(Protocol):
    """Adds up the snapshots of all gateways for the live page."""

    async def report(self, snapshot: FleetSnapshot) -> None:
        """Take this gateway's snapshot; called once a second."""

    async def fleet(self) -> Json:
        """The content of `fleet.json`."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The engine as a gateway sees it.

    Attributes:
        aggregator: the fleet's.
        register: of metrics.
        applications: the present state of every application, by name, in the form of Serve's REST API; may block.
        log: where whoever runs the engine looks.
    """

    aggregator: Aggregator
    register: Register
    applications: Callable[[], Mapping[str, Any]]
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("libra_ray.serving"))
