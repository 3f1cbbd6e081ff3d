"""A gateway's client of the fleet aggregator, which is one small actor."""

import asyncio
import time
from typing import Any

import ray
from ray.exceptions import RayError

from libra_ray.serving.fleet_aggregator import FleetAggregator
from libra_ray.serving.fleet_snapshot import FleetSnapshot
from libra_ray.types import Json

AGGREGATOR_NAME = "libra_ray_fleet_aggregator"
ANSWER_TIMEOUT_S = 2.0
"""An aggregator that does not answer for so long, because it still starts or its node is lost, is done without for now."""


class AggregatorClient:
    """A gateway's client of the aggregator that all share. One that died is started anew; no gateway depends on it.

    Args:
        gateway: this replica's own name.
    """

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        self._latest = FleetSnapshot(time=time.time(), gateways=0)
        self._aggregator: Any = None

    async def report(self, snapshot: FleetSnapshot) -> None:
        """Send this gateway's snapshot; to be called once a second."""
        self._latest = snapshot
        await self._ask("report", self._gateway, snapshot)

    async def fleet(self) -> Json:
        """The content of `fleet.json`; without an aggregator, of this gateway alone and without curves."""
        fleet = await self._ask("fleet")
        return fleet if fleet is not None else {**self._latest.to_json(), "history": []}

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            if self._aggregator is None:
                # It costs no CPU, dies with the gateway that started it, and is then started by another.
                options = {"name": AGGREGATOR_NAME, "get_if_exists": True, "num_cpus": 0}
                self._aggregator = ray.remote(FleetAggregator).options(**options).remote()
            return await asyncio.wait_for(getattr(self._aggregator, method).remote(*arguments), ANSWER_TIMEOUT_S)
        except TimeoutError:
            # The handle stays: with its starter's last handle the actor would end.
            return None
        except (RayError, ValueError):
            self._aggregator = None
            return None
