"""How a gateway follows the systems: which weights they hold, what those say to robots, how many replicas run."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from libra_ray.client.protocol import Handshake
from libra_ray.common.gc_freeze import settle
from libra_ray.serving.retry import NoAnswerError, call
from libra_ray.serving.settings import Settings
from libra_ray.serving.weights import weights_key
from libra_ray.types import Json

AGAIN_S = 0.2
DESCRIBE_S = 5.0


class Running:
    """How many replicas of a deployment run.

    Attributes:
        running: at least 1, so that somebody is asked even while Serve starts a new one.
        settled: whether all of them are as they were last asked to be.
    """

    def __init__(self, handle: Any, at_least: int) -> None:
        self.running, self.settled = at_least, False
        self._app, self._name = handle.app_name, handle.deployment_name

    def update(self, applications: Mapping[str, Any]) -> None:
        """Take the numbers from Serve's details, as its REST API gives them."""
        deployment = applications.get(self._app, {}).get("deployments", {}).get(self._name)
        if deployment is not None:
            self.running = max(1, sum(replica["state"] == "RUNNING" for replica in deployment["replicas"]))
            self.settled = deployment["status"] == "HEALTHY"


class Following:
    """The weights in use, and the way from one checkpoint to the next.

    A new checkpoint is loaded by every planner and refiner beside the old one; only when Serve says that all are done, new
    plans are made by it. A plan is refined by the weights that made it, to its end: no robot notices, and none is dropped.

    Args:
        settings: the application's.
        planner: handle of the planner's deployment.
        refiner: handle of the refiner's deployment.
        gateway: this replica's name.
        applications: see `Engine`.
        space_changed: called where the new weights take or give something else than the old ones.

    Attributes:
        weights: in use; empty before the first are loaded.
        handshake: what robots are told; None before.
        loaded: set as soon as there is one.
    """

    def __init__(
        self,
        settings: Settings,
        planner: Any,
        refiner: Any,
        *,
        gateway: str,
        applications: Callable[[], Mapping[str, Any]],
        space_changed: Callable[[], None],
    ) -> None:
        self._settings, self._systems = settings, (planner, refiner)
        self._gateway, self._applications, self._space_changed = gateway, applications, space_changed
        self.planners = Running(planner, settings.planner.replicas)
        self.refiners = Running(refiner, settings.refiner.replicas)
        self.handshake: Handshake | None = None
        self.loaded = asyncio.Event()
        self.weights = self._wanted = ""
        self._task: asyncio.Task[None] | None = None

    def follow(self, user_config: Mapping[str, str]) -> None:
        """Switch to the weights that `user_config` names as soon as planner and refiner hold them."""
        self._wanted = weights_key(user_config)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._follow())

    async def look(self) -> None:
        """Ask Serve how many replicas run."""
        applications = await asyncio.to_thread(self._applications)
        for running in (self.planners, self.refiners):
            running.update(applications)

    async def _follow(self) -> None:
        while self.weights != self._wanted:
            wanted = self._wanted
            try:
                facts = [
                    await call(partial(system.describe.remote, wanted), timeout_s=DESCRIBE_S, tries=1)
                    for system in self._systems
                ]
                if await self._everywhere():
                    self._switch(wanted, facts[0])
                    continue
            except NoAnswerError:
                pass
            await asyncio.sleep(AGAIN_S)

    async def _everywhere(self) -> bool:
        """Whether no replica still loads; the first weights are used as soon as one of each system holds them."""
        if self.handshake is None:
            return True
        await self.look()
        return self.planners.settled and self.refiners.settled

    def _switch(self, weights: str, facts: Json) -> None:
        settings, horizon = self._settings, facts["horizon"]
        handshake = Handshake(
            **facts
            | {
                "control_hz": settings.control_hz or facts["control_hz"],
                "execute_steps": min(settings.execute_steps or horizon, horizon),
                "instructions": tuple(facts["instructions"]),
                "rule": settings.rule,
                "max_message_bytes": settings.max_message_bytes,
                "gateway": self._gateway,
            }
        )
        before, self.handshake, self.weights = self.handshake, handshake, weights
        if before is None:
            settle()
        self.loaded.set()
        if before is not None and _space(before) != _space(handshake):
            self._space_changed()


def _space(handshake: Handshake) -> tuple[Any, ...]:
    """What a robot's control and its client depend on."""
    return handshake.observation, handshake.action, handshake.bins, handshake.chunks, handshake.control_hz, handshake.history
