"""The application inside this process's own Ray, with its levels' handles: for measuring one of them beside another."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray import serve

from libra_ray.on_ray.serving.app import APP_NAME, build, deployment_of
from libra_ray.on_ray.session import connected
from libra_ray.serving.batches import InferenceBatch, InferenceRequest, InferenceResult
from libra_ray.serving.replica import LevelReplica
from libra_ray.serving.settings import ServingSettings
from libra_ray.serving.weights import weights_key
from libra_ray.types import Intent, Observation

SLOWER = 10


class SlowFirstLevel(LevelReplica):
    """A replica whose level, where it is the first one, computes every intent `SLOWER` times."""

    async def infer(self, batch: InferenceBatch) -> InferenceResult:
        """The answers, late."""
        for _ in range(SLOWER - 1 if self._level == next(iter(self._settings.levels)) else 0):
            await super().infer(batch)
        return await super().infer(batch)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One batched call: how long the caller waited, and how long the replica computed, in seconds."""

    waited_s: float
    computed_s: float


@dataclass(frozen=True, kw_only=True)
class DirectCalls:
    """Calls to the levels past the gateway."""

    settings: ServingSettings
    handles: Mapping[str, Any]

    def infer(self, level: str, seen: Sequence[Observation], above: Sequence[Intent | None]) -> Call:
        """One batch for a level."""
        rows = enumerate(zip(seen, above, strict=True))
        requests = [InferenceRequest(number=i, observation=o, above=intent) for i, (o, intent) in rows]
        batch = InferenceBatch(weights=weights_key(self.settings.user_config()), requests=requests)
        began = time.perf_counter()
        result: InferenceResult = self.handles[level].infer.remote(batch).result(timeout_s=60)
        return Call(waited_s=time.perf_counter() - began, computed_s=result.seconds)

    @contextmanager
    def busy(self, level: str, seen: Sequence[Observation]) -> Iterator[None]:
        """Keep a level that reads none busy, one batch after the other, to the end of the block."""
        with _repeating(lambda: self.infer(level, seen, [None] * len(seen))):
            yield


@contextmanager
def served(settings: ServingSettings, *, proxy_port: int, slow: bool = False) -> Iterator[DirectCalls]:
    """Start the application, ready to be asked; it ends with the block.

    Args:
        settings: as `pinned` gives them.
        proxy_port: of Serve's own proxy, which nobody uses here.
        slow: the first level computes everything `SLOWER` times.
    """
    with connected():
        serve.start(http_options={"host": "127.0.0.1", "port": proxy_port})
        try:
            replica = SlowFirstLevel if slow else LevelReplica
            serve.run(build(settings, replica), name=APP_NAME, route_prefix="/")
            handles = {name: serve.get_deployment_handle(deployment_of(name), APP_NAME) for name in settings.levels}
            yield DirectCalls(settings=settings, handles=handles)
        finally:
            serve.shutdown()


@contextmanager
def _repeating(work: Callable[[], Any]) -> Iterator[None]:
    ended = threading.Event()

    def loop() -> None:
        while not ended.is_set():
            work()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
