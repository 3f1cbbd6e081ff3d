"""What a gateway knows of its levels' replicas: which weights they hold, and what those say to robots."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from libra_ray.client.protocol import Handshake
from libra_ray.control.margin import Latency, Margin, margins
from libra_ray.control.robot import chunk_period
from libra_ray.serving.engine import Engine
from libra_ray.serving.retry import NoAnswerError, call
from libra_ray.serving.settings import ServingSettings
from libra_ray.serving.weights import weights_key
from libra_ray.types import Json

AGAIN_S = 0.2
DESCRIBE_S = 5.0
LENGTHENED_BY, LATENCY = "lengthened_by", "latency"
"""What a level's replica describes for the gateway alone: see `control.margin.margins`; and its own latency with one robot."""


class WeightSwitch:
    """The weights in use, and the switch from one checkpoint to the next.

    A new checkpoint is loaded by every replica beside the old one; only when Serve says that all are done, new intents are
    made by it. An intent is read by the weights that made it, to its end: no robot notices, and none is dropped.

    Args:
        handles: of the levels' deployments, by the level's name.
        space_changed: called where weights take or give something else than those before, the first ones too.

    Attributes:
        weights: in use; empty before the first are loaded.
        handshake: what robots are told; None before.
        lengthened_by: by level the setting that lengthens its answers; `latencies`: each level's with one robot, in warming up.
        loaded: set as soon as there is one.
    """

    def __init__(
        self, settings: ServingSettings, handles: Mapping[str, Any], engine: Engine, space_changed: Callable[[], None]
    ) -> None:
        self._settings, self._handles, self._engine, self._space_changed = settings, handles, engine, space_changed
        self.handshake: Handshake | None = None
        self.lengthened_by: Mapping[str, tuple[str, int]] = {}
        self.latencies: dict[str, Latency] = {}
        self._told_late: set[tuple[str, str]] = set()
        self.loaded = asyncio.Event()
        self.weights = self._wanted = ""
        self._task: asyncio.Task[None] | None = None

    def switch_to(self, user_config: Mapping[str, str]) -> None:
        """Switch to the weights that `user_config` names as soon as all replicas hold them."""
        self._wanted = weights_key(user_config)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._switch_when_loaded())

    def margins(self, served: Mapping[str, Latency]) -> dict[str, Margin]:
        """How well each level keeps up, by what was `served` of late; one that served too little by its latency with one robot.

        A level that is too late is said in the log, once for its weights.
        """
        if self.handshake is None:
            return {}
        latencies, shake = {**self.latencies, **served}, self.handshake
        found = margins(shake.levels, latencies, shake.control_hz, self._settings.control, self.lengthened_by, section="")
        for margin in found:
            of = (margin.level, self.weights)
            if margin.margin_steps < 0 and of not in self._told_late:
                self._told_late.add(of)
                self._engine.log.warning("%s", margin.text)
        return {margin.level: margin for margin in found}

    async def _switch_when_loaded(self) -> None:
        while self.weights != self._wanted:
            wanted = self._wanted
            try:
                described = [
                    await call(partial(handle.describe.remote, wanted), timeout_s=DESCRIBE_S, tries=1)
                    for handle in self._handles.values()
                ]
                if await self._everywhere():
                    self._switch(wanted, described)
                    continue
            except NoAnswerError:
                pass
            await asyncio.sleep(AGAIN_S)

    async def _everywhere(self) -> bool:
        """Whether no replica still loads; the first weights are used as soon as one replica of each level holds them."""
        return self.handshake is None or await asyncio.to_thread(self._engine.settled, [*self._handles.values()])

    def _switch(self, weights: str, by_level: list[Json]) -> None:
        settings, described = self._settings, {**by_level[0]}
        self.lengthened_by = described.pop(LENGTHENED_BY, {})
        self.latencies = {name: of[LATENCY] for name, of in zip(self._handles, by_level, strict=True) if LATENCY in of}
        described.pop(LATENCY, None)
        told = {
            "control_hz": settings.control_hz or described["control_hz"],
            "execute_steps": chunk_period(settings.execute_steps, settings.committed_steps, described["horizon"]),
            "rule": settings.rule,
            "max_message_bytes": settings.max_message_bytes,
            "gateway": self._engine.gateway,
        }
        handshake = Handshake(**described | told)
        before, self.handshake, self.weights = self.handshake, handshake, weights
        if before is None or _space(before) != _space(handshake):
            self._space_changed()
        self.loaded.set()


def _space(handshake: Handshake) -> tuple[Any, ...]:
    """What a robot's control and its client depend on."""
    return handshake.observation, handshake.action, handshake.levels, handshake.control_hz, handshake.history
