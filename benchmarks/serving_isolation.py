"""Whether levels disturb each other: the last one beside a busy first one, and beside one ten times slower.

Cores share memory and clock, so that whatever computes on one slows the others. How much of it that is, a stranger shows: a
process that has nothing to do with the policy and multiplies matrices at the lowest priority.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from benchmarks.serving_load import Load
from benchmarks.serving_servers import free_port
from libra_ray.client.client import AsyncRobotClient
from libra_ray.fleet.robot import drive
from libra_ray.manifest import read_levels
from libra_ray.stats.intervals import percentiles
from libra_ray.types import Json

BLOCK_S = 5.0
OFF, BUSY, BESIDE_STRANGER = "planner off", "planner busy", "planner off, a stranger busy"
STRANGER = "import os, numpy; os.nice(19); a = numpy.ones((512, 512), 'f4')\nwhile True: a @ a"


def isolation(given: argparse.Namespace, bench: Any) -> Json:
    """The refiner beside a busy planner, and beside one that computes everything ten times."""
    robots = given.robots[-1]
    seen, above = bench.judge.shown[:robots], bench.judge.above[:robots]
    rates, blocks = {}, {}
    for slow in (False, True):
        name = "planner ten times slower" if slow else "planner as it is"
        with _in_process(given, bench, slow=slow) as (direct, port):
            if not slow:
                blocks = _blocks(direct, seen, above, given)
            load = Load(
                client=_clients(port),
                shown=bench.judge.shown, execute_steps=bench.execute_steps, hz=given.hz,
            )  # fmt: skip
            asyncio.run(drive(load.fleet(robots), given.warmup + given.seconds))
            rates[name] = load.log.summary(after_s=given.warmup, until_s=given.warmup + given.seconds)
    facts: Json = {"robots": robots}
    for name, calls in blocks.items():
        facts |= {f"refiner call {p}, {name}, ms": calls[p] for p in ("p50", "p95", "p99")}
    for name in (BUSY, BESIDE_STRANGER):
        facts |= {f"refiner {p}: {name} / {OFF}": blocks[name][p] / blocks[OFF][p] for p in ("p50", "p99")}
    fresh = {name: s.chunk_requests_per_s - s.held_replies / s.seconds for name, s in rates.items()}
    for name, summary in rates.items():
        facts[f"fresh chunks/s, {name}"] = fresh[name]
        facts[f"intent age p50, {name}, steps"] = summary.intent_age_steps.p50
    usual, slower = fresh.values()
    facts["refiner's rate lost to the slow planner, %"] = 100 * (1 - slower / usual)
    return {"facts": facts}


def _clients(port: int) -> Callable[[str], AsyncRobotClient]:
    return lambda robot: AsyncRobotClient(f"ws://127.0.0.1:{port}", robot=robot)


def _blocks(direct: Any, seen: Any, above: Any, given: argparse.Namespace) -> dict[str, Json]:
    """Refiner calls at the fleet's rate, in turn beside nobody, planner and stranger: a drift of the machine is in all."""
    waited: dict[str, list[float]] = {OFF: [], BUSY: [], BESIDE_STRANGER: []}
    first, *_, last = direct.settings.levels

    def act() -> Any:
        return direct.infer(last, seen, above)

    for _ in range(5):
        act()
    for _ in range(max(1, round(given.seconds / BLOCK_S))):
        waited[OFF] += _paced(act, given)
        with direct.busy(first, seen):
            waited[BUSY] += _paced(act, given)
        with _stranger():
            waited[BESIDE_STRANGER] += _paced(act, given)
    return {name: vars(percentiles([1e3 * s for s in times])) for name, times in waited.items()}


@contextmanager
def _stranger() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", STRANGER], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def _paced(call: Callable[[], Any], given: argparse.Namespace) -> list[float]:
    times: list[float] = []
    began = time.perf_counter()
    for i in count():
        at_s = began + i / given.hz
        if at_s - began > min(BLOCK_S, given.seconds):
            return times
        time.sleep(max(0.0, at_s - time.perf_counter()))
        times.append(call().waited_s)
    raise AssertionError


@contextmanager
def _in_process(given: argparse.Namespace, bench: Any, *, slow: bool) -> Iterator[tuple[Any, int]]:
    # Starting Ray takes seconds that the other sections need not spend here.
    from benchmarks.direct_calls import served
    from libra_ray.serving.settings import ServingSettings
    from libra_ray.serving.weights import pinned

    port, proxy_port = free_port(), free_port()
    arguments = {**settings_of(given, bench), "checkpoint": str(given.checkpoint.resolve()), "port": port}
    with served(pinned(ServingSettings.read(arguments)), proxy_port=proxy_port, slow=slow) as direct:
        yield direct, port


def settings_of(given: argparse.Namespace, bench: Any) -> Json:
    """The arguments of the served application that all sections share."""
    threads = {f"levels.{level.name}.threads": given.threads for level in read_levels(given.checkpoint)}
    return {**threads, "control_hz": given.hz * bench.execute_steps, **dict(given.set)}
