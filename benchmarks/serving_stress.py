"""What libra_ray does under stress: killed processes, robots that come and go, rising load."""

import argparse
import asyncio
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import psutil

from benchmarks.serving_cost import cost
from benchmarks.serving_isolation import isolation, settings_of
from benchmarks.serving_load import Load
from benchmarks.serving_servers import DEPLOYMENTS, Server, ours
from libra_ray.fleet.log import DriveLog
from libra_ray.fleet.records import Moment
from libra_ray.fleet.robot import drive
from libra_ray.manifest import read_levels
from libra_ray.types import Json

Lines = dict[str, list[list[float]]]
LIVES_S = (5.0, 25.0)
"""How long a robot of the soak stays."""
WATCH_S = 1.0
SCALED = {"replicas": 1, "max_replicas": 3, "num_cpus": 0.1}
"""Room for three replicas of each system, also on two cores."""
RECOVERED = 0.95
"""Share of the rate before a fault at which it counts as back."""


@dataclass
class Watch:
    """Looks at the server's replicas now and then.

    Attributes:
        rows: time, and per deployment the number of replicas, their resident memory in MiB and their open descriptors.
    """

    server: Server
    log: DriveLog
    rows: list[Json] = field(default_factory=list)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.rows.append({"at_s": self.log.now(), **await asyncio.to_thread(self._look)})
            await asyncio.sleep(WATCH_S)

    def lines(self, measure: str) -> Lines:
        """One line per deployment, e.g. of `replicas`."""
        return {name: [[row["at_s"], row[name][measure]] for row in self.rows] for name in DEPLOYMENTS}

    def _look(self) -> Json:
        found = {}
        for name, processes in self.server.replicas().items():
            living = [both for process in processes if (both := _memory_and_descriptors(process))]
            found[name] = {
                "replicas": len(living),
                "rss_mib": sum(rss for rss, _ in living) / 2**20,
                "descriptors": sum(descriptors for _, descriptors in living),
            }
        return found


def faults(given: argparse.Namespace, bench: Any) -> Json:
    """Kill a planner, a refiner and a gateway replica under load, a third of the time apart."""
    robots, marks = given.robots[-1], []
    with _ours(given, bench) as running:
        load = bench.load(running, given.hz)

        async def kill() -> None:
            for name in DEPLOYMENTS:
                await asyncio.sleep(given.seconds / (len(DEPLOYMENTS) + 1))
                for process in (await asyncio.to_thread(running.replicas))[name][:1]:
                    os.kill(process.pid, signal.SIGKILL)
                    marks.append([load.log.now(), f"kill -9 {name}"])

        _together(drive(load.fleet(robots), given.warmup + given.seconds), kill())
    timeline = load.log.timeline()
    facts: Json = {"robots": robots, "errors": load.log.summary().errors, "reconnections": load.log.reconnects}
    ends = [at_s for at_s, _ in marks[1:]] + [given.warmup + given.seconds]
    for (at_s, what), end_s in zip(marks, ends, strict=True):
        facts |= {f"{what}: {name}": value for name, value in aftermath(load.log, at_s, end_s).items()}
    facts["wrong-robot replies"] = bench.judge.wrong(load.told[:: max(1, len(load.told) // 256)])
    return {"facts": facts, "marks": marks, "timeline": _panels(timeline)}


def aftermath(log: DriveLog, at_s: float, end_s: float) -> Json:
    """What a fault at `at_s` did to the robots until `end_s`."""
    before = log.summary(after_s=max(0.0, at_s - 5), until_s=at_s)
    after = log.summary(after_s=at_s, until_s=end_s)
    rows = [row for row in log.timeline() if at_s <= row.at_s <= end_s - 1]
    rate, age = before.chunk_requests_per_s, before.intent_age_steps.p50
    silences = [max(_silences(log, robot, at_s, end_s), default=0.0) for robot in {a.robot for a in log.answers}]
    return {
        "requests/s before": rate,
        "lowest requests/s": min((row.chunk_requests_per_s for row in rows), default=None),
        "seconds until the rate is back": _back(rows, at_s, lambda r: 0 < rate * RECOVERED <= r.chunk_requests_per_s),
        "longest silence of a robot, s": max(silences, default=None),
        "misses before, %": _percent(before.deadlines.share),
        "misses after, %": _percent(after.deadlines.share),
        "held replies": after.held_replies,
        "intent age p50 before, steps": age,
        "seconds until the intent age is back": _back(
            rows, at_s, lambda r: age is not None and (r.intent_age_steps.p50 or np.inf) <= max(1.5 * age, age + 1)
        ),
    }


def soak(given: argparse.Namespace, bench: Any) -> Json:
    """Robots join and leave; memory and descriptors of the replicas over time."""
    with _ours(given, bench) as running:
        load = bench.load(running, given.hz)
        watch, rng = Watch(running, load.log), np.random.default_rng(0)
        slots = [_Slot(load, i, given.robots[-1], rng) for i in range(given.robots[-1])]
        _together(drive(slots, given.seconds), watch.run())  # type: ignore[arg-type]  # a slot runs like a robot
        summary = load.log.summary(after_s=given.warmup)
    facts: Json = {"robots at a time": given.robots[-1], "robots in all": sum(slot.robots for slot in slots)}
    facts |= {"misses, %": _percent(summary.deadlines.share), "errors": summary.errors}
    facts["wrong-robot replies"] = bench.judge.wrong(load.told[:: max(1, len(load.told) // 256)])
    for name in DEPLOYMENTS:
        for measure in ("rss_mib", "descriptors"):
            facts[f"{name}: growth of {measure}, %"] = growth([row[name][measure] for row in watch.rows])
    panels = _panels(load.log.timeline(max(1.0, given.seconds / 300)))
    return {
        "facts": facts,
        "timeline": {"RSS, MiB": watch.lines("rss_mib"), "descriptors": watch.lines("descriptors"), **panels},
    }


def growth(values: list[float]) -> float | None:
    """Growth in percent from the second tenth of the time (warmed up) to the last one."""
    tenth = len(values) // 10
    if tenth == 0:
        return None
    early, late = np.median(values[tenth : 2 * tenth]), np.median(values[-tenth:])
    return float(100 * (late / early - 1)) if early else None


def autoscaling(given: argparse.Namespace, bench: Any) -> Json:
    """Few robots, half, all, few: how many replicas of each deployment there are meanwhile; to end them takes longest."""
    most, fifth = given.robots[-1], given.seconds / 5
    phases = [(2, fifth), (max(2, most // 2), fifth), (most, fifth), (2, 2 * fifth)]
    scaling = {f"levels.{level.name}.{key}": value for level in read_levels(given.checkpoint) for key, value in SCALED.items()}
    with _ours(given, bench, {**scaling, "scale_down_delay_s": max(2.0, fifth / 8)}) as running:
        load = bench.load(running, given.hz)
        watch, marks = Watch(running, load.log), []

        async def rise_and_fall() -> None:
            for number, (robots, seconds) in enumerate(phases):
                marks.append([load.log.now(), f"{robots} robots"])
                # New names in every phase: a robot that left does not come back.
                names = [1000 * number + i for i in range(robots)]
                await drive([load.robot(n, of=robots, phase_s=n % 1000 / robots / given.hz) for n in names], seconds)

        _together(rise_and_fall(), watch.run())
    replicas = watch.lines("replicas")
    facts: Json = {}
    for name in DEPLOYMENTS:
        facts[f"{name}: replicas at most"] = max((n for _, n in replicas[name]), default=None)
        facts[f"{name}: replicas at the end"] = replicas[name][-1][1] if replicas[name] else None
    return {"facts": facts, "marks": marks, "timeline": {"replicas": replicas, **_panels(load.log.timeline())}}


def _ours(given: argparse.Namespace, bench: Any, settings: Json | None = None) -> Server:
    return ours(given.checkpoint, given.threads, {**settings_of(given, bench), **(settings or {})})


@dataclass
class _Slot:
    """A place in the fleet: one robot after the other, each with a short life."""

    load: Load
    number: int
    slots: int
    rng: np.random.Generator
    robots: int = 0

    @property
    def log(self) -> DriveLog:
        return self.load.log

    async def run(self) -> None:
        while True:
            number, self.robots = self.number + self.slots * self.robots, self.robots + 1
            robot = self.load.robot(number, of=self.slots, phase_s=float(self.rng.uniform(0, 0.5)))
            robot.lifetime_s = float(self.rng.uniform(*LIVES_S))
            await robot.run()


def _together(main: Any, beside: Any) -> None:
    """Run `main` to its end, with `beside` going on as long."""

    async def both() -> None:
        other = asyncio.ensure_future(beside)
        try:
            await main
        finally:
            other.cancel()
            done = await asyncio.gather(other, return_exceptions=True)
        if isinstance(done[0], Exception):
            raise done[0]

    asyncio.run(both())


def _panels(timeline: list[Moment]) -> dict[str, Lines]:
    def line(value: Callable[[Moment], float | None]) -> list[list[float]]:
        return [[row.at_s, v] for row in timeline if (v := value(row)) is not None]

    return {
        "chunk requests/s": {"answered": line(lambda r: r.chunk_requests_per_s), "missed": line(lambda r: r.missed)},
        "latency, ms": {p: line(attrgetter(f"latency_ms.{p}")) for p in ("p50", "p99")},
        "intent age, steps": {p: line(attrgetter(f"intent_age_steps.{p}")) for p in ("p50", "max")},
    }


def _back(rows: list[Moment], at_s: float, good: Callable[[Moment], bool]) -> float | None:
    """Seconds until a row from which on two in a row are good; 0 where all are, None where none is."""
    flags = [good(row) for row in rows]
    if flags and all(flags):
        return 0.0
    for (first, second), row in zip(pairwise(flags), rows, strict=False):
        if first and second and row.at_s > at_s:
            return float(row.at_s - at_s)
    return None


def _silences(log: DriveLog, robot: str, at_s: float, end_s: float) -> Iterable[float]:
    """Gaps between the answers that a robot got around and after a moment; one that gets none to the end is silent so long."""
    times = sorted(a.at_s + a.latency_s for a in log.answers if a.robot == robot and a.at_s + a.latency_s < end_s)
    return [later - earlier for earlier, later in pairwise([*times, end_s]) if later > at_s]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _memory_and_descriptors(process: psutil.Process) -> tuple[int, int] | None:
    try:
        return process.memory_info().rss, process.num_fds()
    except psutil.Error:
        return None


SECTIONS: dict[str, tuple[Callable[[argparse.Namespace, Any], Json], float]] = {
    "cost": (cost, 15.0),
    "isolation": (isolation, 60.0),
    "faults": (faults, 160.0),
    "soak": (soak, 600.0),
    "autoscaling": (autoscaling, 240.0),
}
"""Name -> what measures it, and for how many seconds."""
