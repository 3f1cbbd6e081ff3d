"""The application inside this process's own Ray, with its systems' handles: for measuring one of them beside the other."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray import serve

from libra_ray.on_ray.serving.app import APP_NAME, build
from libra_ray.on_ray.session import connected
from libra_ray.serving.batches import Answers, Question, stacked
from libra_ray.serving.replica import Planner
from libra_ray.serving.settings import Settings
from libra_ray.serving.weights import weights_key
from libra_ray.types import Observation, Plan

SLOWER = 10


class SlowPlanner(Planner):
    """A planner that computes every plan `SLOWER` times."""

    async def plan(self, *arguments: Any, **options: Any) -> Answers:
        """The plans, late."""
        for _ in range(SLOWER - 1):
            await super().plan(*arguments, **options)
        return await super().plan(*arguments, **options)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One batched call: how long the caller waited, and how long the replica computed, in seconds."""

    waited_s: float
    computed_s: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Direct calls to planner and refiner, past the gateway."""

    settings: Settings
    planner: Any
    refiner: Any

    def refine(self, seen: Sequence[Observation], plans: Sequence[Plan]) -> Call:
        """One batch for the refiner."""
        questions = [Question(number=i, observation=o, plan=p) for i, (o, p) in enumerate(zip(seen, plans, strict=True))]
        return self._call(self.refiner.refine, questions)

    def plan(self, seen: Sequence[Observation]) -> Call:
        """One batch for the planner."""
        return self._call(self.planner.plan, [Question(number=i, observation=o) for i, o in enumerate(seen)])

    @contextmanager
    def planning(self, seen: Sequence[Observation]) -> Iterator[list[Call]]:
        """Keep the planner busy, one batch after the other, to the end of the block; gives its calls."""
        calls: list[Call] = []
        with _repeating(lambda: calls.append(self.plan(seen))):
            yield calls

    def _call(self, method: Any, questions: Sequence[Question]) -> Call:
        rows = stacked(questions, weights_key(self.settings.user_config()), history=1)
        began = time.perf_counter()
        answers: Answers = method.remote(rows).result(timeout_s=60)
        return Call(waited_s=time.perf_counter() - began, computed_s=answers.seconds)


@contextmanager
def served(settings: Settings, *, proxy_port: int, slow_planner: bool = False) -> Iterator[Probe]:
    """Start the application, ready to be asked; it ends with the block.

    Args:
        proxy_port: of Serve's own proxy, which nobody uses here.
    """
    with connected():
        serve.start(http_options={"host": "127.0.0.1", "port": proxy_port})
        try:
            serve.run(build(settings, planner=SlowPlanner if slow_planner else None), name=APP_NAME, route_prefix="/")
            planner, refiner = (serve.get_deployment_handle(name, APP_NAME) for name in ("Planner", "Refiner"))
            yield Probe(settings=settings, planner=planner, refiner=refiner)
        finally:
            serve.shutdown()


@contextmanager
def _repeating(work: Callable[[], None]) -> Iterator[None]:
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
