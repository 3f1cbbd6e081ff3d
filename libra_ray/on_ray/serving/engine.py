"""Ray as a gateway sees it: metrics in Prometheus, the state of replicas, and one small actor that adds up the fleet."""

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.util.metrics import Counter, Gauge, Histogram

from libra_ray.on_ray import ray_private
from libra_ray.serving.fleet_snapshot import FleetAggregator, FleetSnapshot
from libra_ray.serving.metrics import Metric
from libra_ray.types import Json

AGGREGATOR_NAME = "libra_ray_fleet_aggregator"
"""Begins the aggregators' names."""
ANSWER_TIMEOUT_S = 2.0
"""An aggregator that does not answer for so long, because it still starts or its node is lost, is done without for now."""


class RayEngine:
    """Ray for the gateway of that name; see `libra_ray.serving.engine.Engine`.

    All gateways of an application share one aggregator. One that died is started anew; no gateway depends on it.

    Args:
        application: whose gateway it is, in few letters.
        alone: there will be no other gateway, so that this one adds up by itself, without a process for it.
    """

    def __init__(self, gateway: str, application: str, *, alone: bool = False) -> None:
        self.gateway, self.log = gateway, logging.getLogger("ray.serve")
        self._latest = FleetSnapshot(time=time.time(), gateways=0)
        self._own = FleetAggregator() if alone else None
        self._name = f"{AGGREGATOR_NAME}_{application}"
        self._aggregator: Any = None

    @staticmethod
    def register(metric: Metric, deployment: str) -> Counter | Gauge | Histogram:
        """Announce the metric in this process; what is recorded carries the names of application and deployment.

        Ray exports it under its name with the prefix `ray_`, and adds the label `WorkerId`, one per replica. It sends a
        histogram's buckets on as if every value lay in the middle of its bucket, so counts and quantiles are right and `_sum`
        is approximate; nothing here reads it.
        """
        labels = ("application", "deployment", *([metric.label] if metric.label else []))
        if metric.kind == "histogram":
            made: Counter | Gauge | Histogram = Histogram(metric.name, metric.description, list(metric.boundaries), labels)
        else:
            made = (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.description, labels)
        made.set_default_tags({"application": _application(), "deployment": deployment})
        return made

    @staticmethod
    def running(handle: Any) -> int:
        """Replicas of a handle's deployment."""
        return ray_private.running_replicas(handle)

    @staticmethod
    def settled(handles: Iterable[Any]) -> bool:
        """Whether all replicas of those deployments are as they were last asked to be."""
        applications = ray_private.serve_details()["applications"]
        found = [applications.get(of.app_name, {}).get("deployments", {}).get(of.deployment_name, {}) for of in handles]
        return all(deployment.get("status") == "HEALTHY" for deployment in found)

    async def report(self, snapshot: FleetSnapshot) -> None:
        """Send this gateway's snapshot to the aggregator."""
        self._latest = snapshot
        await self._ask("report", self.gateway, snapshot)

    async def fleet(self) -> Json:
        """The content of `fleet.json`; without an aggregator, of this gateway alone and without curves."""
        fleet = await self._ask("fleet")
        return fleet if fleet is not None else {**self._latest.to_json(), "history": []}

    async def _ask(self, method: str, *arguments: Any) -> Any:
        if self._own is not None:
            return getattr(self._own, method)(*arguments)
        try:
            if self._aggregator is None:
                # It costs no CPU, dies with the gateway that started it, and is then started by another.
                options = {"name": self._name, "get_if_exists": True, "num_cpus": 0}
                self._aggregator = ray.remote(FleetAggregator).options(**options).remote()
            return await asyncio.wait_for(getattr(self._aggregator, method).remote(*arguments), ANSWER_TIMEOUT_S)
        except TimeoutError:
            # The handle stays: with its starter's last handle the actor would end.
            return None
        except (RayError, ValueError):
            self._aggregator = None
            return None


def _application() -> str:
    """Whose replica this process is; empty where it is none."""
    try:
        return str(serve.get_replica_context().app_name)
    except RayServeException:
        return ""
