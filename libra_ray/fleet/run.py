"""`jobs/drive.py` without its command line: the load's specification, its fleet, and the table of what came of it."""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from libra_ray.client.client import AsyncRobotClient
from libra_ray.client.protocol import Handshake
from libra_ray.common.gc_freeze import freeze_startup_objects
from libra_ray.common.json_text import ABSENT
from libra_ray.common.provenance import Hardware, describe_hardware
from libra_ray.config import SimConfig
from libra_ray.config.presets import QUICKSTART_TASKS, TABLETOP_TASKS
from libra_ray.fleet.log import DriveLog
from libra_ray.fleet.records import Moment, Rates, SuccessRate, Summary
from libra_ray.fleet.replay import Recording, open_recording, reflects, synthetic
from libra_ray.fleet.robot import DrivenRobot, drive
from libra_ray.fleet.robots import PhysicsRobot, StubRobot
from libra_ray.fleet.simulated import SimulatedFleet
from libra_ray.sim import check_robot, check_tasks
from libra_ray.stats.intervals import Percentiles

SYNTHETIC = "synthetic"
TASKS = {"metaworld": QUICKSTART_TASKS, "tabletop": TABLETOP_TASKS}
BUSY_DRIVER = 0.9
"""Share of a core from which on the driver itself is in doubt."""
WRIST = "observation.images.wrist"


@dataclass(frozen=True, kw_only=True)
class LoadSpec:
    """The specification of a fleet's load.

    Attributes:
        endpoint: the server's address, e.g. `ws://127.0.0.1:8765`.
        hz: control rate of simulated robots, which ask for a chunk every `execute_steps` control steps; of stub robots the
            rate of chunk requests, 0 for the next one as soon as an answer is there.
        warmup_s: beginning that is driven but not counted.
        stub: `synthetic`, or the folder of a run or data set to replay; empty simulates.
        tasks: of the simulated robots; empty takes the family's preset.
        echo: the server is a test's and sends identities back: a wrong one is another robot's answer.
        patience_s: longest time without a server before a robot gives up.

    Raises:
        ValueError: a value outside its range, an unknown task, or a stub without a data set.
    """

    endpoint: str
    robots: int = 16
    hz: float = 10.0
    seconds: float = 60.0
    warmup_s: float = 0.0
    stub: str = ""
    family: Literal["metaworld", "tabletop"] = "metaworld"
    tasks: tuple[str, ...] = ()
    max_steps: int = 500
    seed: int = 100_000
    processes: int = 0
    echo: bool = False
    jpeg_quality: int | None = None
    patience_s: float = 10.0

    def __post_init__(self) -> None:
        """Refuse what cannot be driven, before any work."""
        ranges: dict[str, tuple[float, float]] = {
            "robots": (1, 4096),
            "processes": (0, 256),
            "max_steps": (1, 100_000),
            "seed": (0, 2**31),
        }
        ranges |= {"seconds": (0.1, 1e6), "warmup_s": (0, 1e5), "patience_s": (0.1, 1e5), "hz": (0 if self.stub else 0.1, 1000)}
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name):g} is out of range; it must lie in [{least:g}, {most:g}]")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 95:
            raise ValueError(f"jpeg_quality={self.jpeg_quality} is out of range; it must lie in [1, 95]")
        if self.echo and self.stub != SYNTHETIC:
            raise ValueError(f"only synthetic observations carry identities; give --stub {SYNTHETIC} with --echo")
        if self.stub and self.tasks:
            raise ValueError("stub robots have no tasks; leave out --tasks or --stub")
        if self.stub and self.stub != SYNTHETIC and not Path(self.stub).is_dir():
            raise ValueError(f"{self.stub} is no folder; give {SYNTHETIC}, the folder of a run or that of a data set")
        if not self.stub:
            check_tasks(SimConfig(family=self.family, tasks=self.task_names))
        self.client("")  # refuses the address

    @property
    def task_names(self) -> tuple[str, ...]:
        """The given tasks, or the family's preset."""
        return self.tasks or TASKS[self.family]

    def client(self, robot: str, token: str | None = None) -> AsyncRobotClient:
        """A robot's connection, not yet made."""
        return AsyncRobotClient(
            self.endpoint, robot=robot, token=token, patience_s=self.patience_s, jpeg_quality=self.jpeg_quality
        )


@dataclass(frozen=True, kw_only=True)
class DriveResult(Summary):
    """What came of a load, as the JSON of `jobs/drive.py` has it.

    Attributes:
        order: the load that was asked for.
        server: the handshake, as it was sent.
        timeline: second by second.
        level_latencies_ms: level -> from each picture to its answer; a trace for `delay.trace`.
        driver_cpu_share: of one core; `physics_cpu_share`: of the simulators, None of stub robots.
    """

    order: LoadSpec
    server: Mapping[str, Any]
    rates: Rates
    timeline: Sequence[Moment]
    level_latencies_ms: Mapping[str, Sequence[float]]
    hardware: Hardware
    driver_cpu_share: float
    physics_cpu_share: float | None = field(default=None, metadata=ABSENT)


async def run(load: LoadSpec, token: str | None = None, on_progress: Callable[[float], None] = lambda _: None) -> DriveResult:
    """Drive the fleet and return what came of it: the summary, the time line, the server's words of itself, the machine.

    Args:
        on_progress: called with the seconds so far, now and then.

    Raises:
        ConnectionError: there is no server, or it vanished for good.
        RefusedError: it refuses these robots.
        ValueError: it speaks another version, or needs what the fleet does not have.
    """
    async with load.client("drive", token) as probe:
        server = probe.handshake
    with ExitStack() as stack:
        fleet = None if load.stub else stack.enter_context(_simulated_fleet(load, server))
        if fleet is not None:
            await fleet.ready()
        recording = open_recording(server, Path(load.stub)) if load.stub not in ("", SYNTHETIC) else None
        freeze_startup_objects()
        # Its clock starts here: all that takes time before the robots move is done.
        log = DriveLog(levels=[level.name for level in server.levels])
        robots = _robots(load, server, log, token, fleet, recording)
        simulated = fleet.cpu_s if fleet is not None else 0.0
        used, began = time.process_time(), time.perf_counter()
        await drive(robots, load.warmup_s + load.seconds, on_progress)
        seconds = time.perf_counter() - began
        driver_share = (time.process_time() - used) / seconds
        physics_share = (fleet.cpu_s - simulated) / seconds if fleet is not None else None
    asking_hz = load.hz if load.stub else load.hz / server.execute_steps
    return DriveResult(
        order=load,
        server=server.message(),
        rates=Rates(control_hz=None if load.stub else load.hz, chunk_requests_hz_per_robot=asking_hz),
        **vars(log.summary(after_s=load.warmup_s, until_s=load.warmup_s + load.seconds)),
        driver_cpu_share=driver_share,
        physics_cpu_share=physics_share,
        timeline=log.timeline(),
        level_latencies_ms=log.level_latencies_ms(after_s=load.warmup_s),
        hardware=describe_hardware(),
    )


def table(result: DriveResult) -> str:
    """The result as plain text."""
    text = io.StringIO()
    shown = Table("measure", "value", title=_title(result), title_justify="left")
    rates: dict[str, SuccessRate] = {"success": result.success, **result.success.tasks}
    rows = {
        "actions/s": f"{result.actions_per_s:.1f}",
        "chunk requests/s": f"{result.chunk_requests_per_s:.1f}",
        "latency p50/p95/p99, ms": _marks(result.latency_ms),
        "deadline misses": f"{result.deadlines.missed} of {result.deadlines.due}" + _percent(result.deadlines.share),
        "intent age p50/p95/p99, steps": _marks(result.intent_age_steps),
        "intent age p50/p95/p99, ms": _marks(result.intent_age_ms),
        "held actions": f"{result.held_actions}, of them {result.awaited_actions} before an episode's first answer",
        "wrong-robot replies": f"{result.wrong_robot}",
        "errors": ", ".join(f"{n} {kind}" for kind, n in result.errors.items()) or "0",
        "reconnections": f"{result.reconnects}",
    }
    for name, rate in rates.items():
        if rate.interval is not None:
            low, high = rate.interval
            rows[name] = f"{rate.rate:.2f} ({low:.2f}–{high:.2f}), {rate.episodes} episodes"
    rows["driver"] = f"{result.driver_cpu_share:.0%} of a core, late by {_marks(result.driver_lateness_ms)} ms"
    if result.physics_cpu_share is not None:
        rows["physics"] = f"{result.physics_cpu_share:.0%} of a core"
    for name, value in rows.items():
        shown.add_row(name, value)
    Console(file=text, width=110, color_system=None).print(shown)
    examples = [f"{kind}: {example}" for kind, example in result.error_examples.items()]
    if result.driver_cpu_share > BUSY_DRIVER:
        examples.append("the driver itself was busy: these latencies are upper bounds")
    return text.getvalue() + "".join(f"{line}\n" for line in examples)


def simulation(load: LoadSpec, server: Handshake) -> SimConfig:
    """Robots that see as the demonstrations' robots saw."""
    return SimConfig(
        family=load.family,
        tasks=load.task_names,
        supersample=server.supersample,
        wrist_camera=WRIST in server.cameras,
        max_steps=load.max_steps,
    )


def picture_size(server: Handshake) -> int:
    """Height and width of the pictures that the server's policy reads, in pixels."""
    return int(server.observation[server.cameras[0]]["shape"][0])


def _simulated_fleet(load: LoadSpec, server: Handshake) -> SimulatedFleet:
    sim, size = simulation(load, server), picture_size(server)
    remedy = "give --family of the robot that its policy is for, or serve a policy of this one"
    check_robot(sim, server.robot, f"the policy at {load.endpoint}", remedy, any_rate=True)
    return SimulatedFleet(
        sim, size, load.task_names, load.robots, history=server.history, seed=load.seed, processes=load.processes
    )


def _robots(
    load: LoadSpec,
    server: Handshake,
    log: DriveLog,
    token: str | None,
    fleet: SimulatedFleet | None,
    recording: Recording | None,
) -> Sequence[DrivenRobot]:
    asking_s = (1 / load.hz if load.hz else 0.0) * (1 if load.stub else server.execute_steps)
    robots: list[DrivenRobot] = []
    for i in range(load.robots):
        name = f"robot-{i:04d}"
        client, phase_s = load.client(name, token), asking_s * i / load.robots
        if fleet is not None:
            robots.append(
                PhysicsRobot(
                    name=name,
                    client=client,
                    log=log,
                    phase_s=phase_s,
                    simulated=fleet.robots[i],
                    period_s=1 / load.hz,
                    execute_steps=server.execute_steps,
                    action_dim=int(server.action["shape"][1]),
                )
            )
            continue
        seen = recording.robot(i, load.robots) if recording else synthetic(server, i)
        robots.append(
            StubRobot(
                name=name,
                client=client,
                log=log,
                phase_s=phase_s,
                seen=seen,
                period_s=asking_s or None,
                execute_steps=server.execute_steps,
                check=reflects if load.echo else None,
            )
        )
    return robots


def _title(result: DriveResult) -> str:
    load, rates = result.order, result.rates
    asking = rates.chunk_requests_hz_per_robot
    each = f"{asking:g} chunk requests/s each" if asking else "each asking as soon as it is answered"
    control = f", control at {rates.control_hz:g} Hz" if rates.control_hz else ""
    return f"{load.robots} {'stub' if load.stub else 'simulated'} robots, {each}{control}, {result.seconds:.0f} s"


def _marks(marks: Percentiles) -> str:
    return "–" if marks.p50 is None else f"{marks.p50:.4g}/{marks.p95:.4g}/{marks.p99:.4g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f" ({share:.2%})"
