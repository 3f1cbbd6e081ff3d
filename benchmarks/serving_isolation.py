"""Whether planner and refiner disturb each other: the refiner beside a busy planner, and beside one ten times slower."""

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from benchmarks.serving_load import Load
from benchmarks.serving_servers import free_port
from libra_ray.driving import drive
from libra_ray.intervals import percentiles
from libra_ray.robot_client import AsyncRobotClient
from libra_ray.types import Json

BLOCK_S = 5.0


def isolation(given: argparse.Namespace, bench: Any) -> Json:
    """The refiner beside a busy planner, and beside one that computes everything ten times."""
    robots = given.robots[-1]
    seen, plans = bench.judge.shown[:robots], bench.judge.plans[:robots]
    rates, blocks = {}, {}
    for slow in (False, True):
        name = "planner ten times slower" if slow else "planner as it is"
        with _in_process(given, bench, slow=slow) as (probe, port):
            if not slow:
                blocks = _blocks(probe, seen, plans, given)
            load = Load(
                client=lambda robot, port=port: AsyncRobotClient(f"ws://127.0.0.1:{port}", robot=robot),
                shown=bench.judge.shown, execute_steps=bench.execute_steps, hz=given.hz,
            )  # fmt: skip
            asyncio.run(drive(load.fleet(robots), given.warmup + given.seconds))
            rates[name] = load.log.summary(after_s=given.warmup, until_s=given.warmup + given.seconds)
    facts: Json = {"robots": robots}
    for name, calls in blocks.items():
        facts |= {f"refiner call {p}, planner {name}, ms": calls[p] for p in ("p50", "p95", "p99")}
    facts["refiner p99: planner busy / off"] = blocks["busy"]["p99"] / blocks["off"]["p99"]
    fresh = {name: s["chunk_requests_per_s"] - s["held_replies"] / s["seconds"] for name, s in rates.items()}
    for name, summary in rates.items():
        facts[f"fresh chunks/s, {name}"] = fresh[name]
        facts[f"intent age p50, {name}, steps"] = summary["intent_age_steps"]["p50"]
    usual, slower = fresh.values()
    facts["refiner's rate lost to the slow planner, %"] = 100 * (1 - slower / usual)
    return {"facts": facts}


def _blocks(probe: Any, seen: Any, plans: Any, given: argparse.Namespace) -> dict[str, Json]:
    """Refiner calls at the fleet's rate, in turn with the planner off and busy, so that a drift of the machine is in both."""
    waited: dict[str, list[float]] = {"off": [], "busy": []}
    for _ in range(5):
        probe.refine(seen, plans)
    for _ in range(max(1, round(given.seconds / BLOCK_S))):
        waited["off"] += _paced(lambda: probe.refine(seen, plans), given)
        with probe.planning(seen):
            waited["busy"] += _paced(lambda: probe.refine(seen, plans), given)
    return {name: percentiles([1e3 * s for s in times]) for name, times in waited.items()}


def _paced(call: Callable[[], Any], given: argparse.Namespace) -> list[float]:
    times, began = [], time.perf_counter()
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
    from libra_ray.on_ray.serving.probe import served
    from libra_ray.on_ray.serving.settings import Settings

    port, proxy_port = free_port(), free_port()
    arguments = {**settings_of(given, bench), "checkpoint": str(given.checkpoint.resolve()), "port": port}
    with served(Settings.model_validate(arguments), proxy_port=proxy_port, slow_planner=slow) as probe:
        yield probe, port


def settings_of(given: argparse.Namespace, bench: Any) -> Json:
    """The arguments of the served application that all sections share."""
    threads = {"planner.threads": given.threads, "refiner.threads": given.threads}
    return {**threads, "control_hz": given.hz * bench.execute_steps, **dict(given.set)}
