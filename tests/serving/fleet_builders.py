"""A fleet that never was: real telemetry and a real aggregator under a clock that the test moves, and a page server."""

import json
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from libra_ray.config import ControlConfig
from libra_ray.control.disagreement import Replan
from libra_ray.control.margin import Margin, margins
from libra_ray.control.robot import RobotControl
from libra_ray.on_ray.serving.engine import RayEngine
from libra_ray.serving.fleet_snapshot import FleetAggregator, FleetSnapshot
from libra_ray.serving.page.live_page import fleet_page
from libra_ray.serving.robot_sessions import RobotSessions
from libra_ray.serving.telemetry import Telemetry
from libra_ray.types import Level


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


LEVELS = ("planner", "refiner")
MAX_ROBOTS = 4096
ONE = (Level(name="policy", covers=5),)


class Gateway(Telemetry):
    """What a gateway measures, of robots by their names; each has one connection, or none."""

    def __init__(self, levels: Sequence[str] = LEVELS, clock: Clock | None = None) -> None:
        clock = clock or Clock()
        super().__init__("g", RayEngine.register, levels, clock=clock)
        self.robots = RobotSessions(lambda: RobotControl(ControlConfig(), ONE), MAX_ROBOTS, clock)
        self.connections: dict[str, object] = {}

    def connected(self, robot: str) -> None:
        self.robots.named(robot, owner=self.connections.setdefault(robot, object()))

    def disconnected(self, robot: str) -> None:
        self.robots.left(self.connections.pop(robot))

    def tick(self, robot: str, **measured: object) -> None:
        super().tick(self.robots.named(robot).row, **measured)

    def episode_ended(self, robot: str, success: bool | None) -> None:
        super().episode_ended(self.robots.named(robot).row, success)

    def snapshot(self, margins: Mapping[str, Margin] | None = None) -> FleetSnapshot:
        return super().snapshot(self.robots.rows(), margins or {})


def judged(gateway: Gateway, levels: Sequence[str] = LEVELS) -> dict[str, Margin]:
    """The margins of such levels, two chunks to each answer, by what the gateway measured; the topmost one comes too late."""
    known = [Level(name=name, covers=10, reads=above) for above, name in zip([None, *levels], levels, strict=False)]
    found = margins(known, gateway.latencies(), 80, ControlConfig(rule="overlap"))
    return {margin.level: margin for margin in found}


def busy_fleet(
    robots: int, *, seconds: int = 40, names: str = "robot-{}", seed: int = 0, levels: Sequence[str] = LEVELS
) -> FleetAggregator:
    """An aggregator that two gateways reported to for a while; every fifth robot succeeds less often, the last one has left."""
    noise, clock = random.Random(seed), Clock()
    aggregator, gateways = FleetAggregator(clock), [Gateway(levels, clock) for _ in range(2)]
    for i in range(robots):
        gateways[i % 2].connected(names.format(i))
    for second in range(seconds):
        if robots > 1 and second == seconds - 3:
            gateways[(robots - 1) % 2].disconnected(names.format(robots - 1))
        for i in range(robots - (second >= seconds - 3 and robots > 1)):
            for _ in range(3):
                clock.now += 1 / (3 * max(1, robots))
                one_request(gateways[i % 2], names.format(i), noise, late=second > 25, levels=levels)
            if second % 8 == i % 8:
                gateways[i % 2].episode_ended(names.format(i), noise.random() < (0.5 if i % 5 == 0 else 0.95))
        clock.now += 0 if robots else 1
        for i, gateway in enumerate(gateways):
            aggregator.report(f"gateway-{i}", gateway.snapshot(judged(gateway, levels)))
    if robots:
        gateways[0].refused("wrong shape")
        gateways[0].refused("not a number")
        gateways[0].refused("wrong shape")
        aggregator.report("gateway-0", gateways[0].snapshot(judged(gateways[0], levels)))
    return aggregator


def one_request(gateway: Gateway, robot: str, noise: random.Random, *, late: bool, levels: Sequence[str] = LEVELS) -> None:
    """A request as a busy gateway answers it, with the calls behind it now and then."""
    latency = noise.lognormvariate(-4.0, 0.4) * (1.5 if late else 1)
    age = noise.randrange(3, 12)
    *upper, last = levels
    gateway.tick(
        robot,
        latency_s=latency,
        batch_size=noise.randrange(4, 9),
        ages={level: (age * (i + 1), age * (i + 1) * 0.05) for i, level in enumerate(reversed(upper))},
        intent_age_steps=age if upper else None,
        held=noise.random() < 0.01,
        missed=latency > 0.05,
    )
    if noise.random() < 0.2:
        gateway.call(last, seconds=0.7 * latency, batch_size=noise.randrange(4, 9), queued=noise.randrange(3))
    for level in upper:
        if noise.random() < 0.3:
            share = noise.choice((0.0, 0.05, 0.2))
            gateway.replanned([Replan(level=level, value="tokens", share=share, difference=1.5 * share)])
        if noise.random() < 0.1:
            seconds = noise.lognormvariate(-2.8, 0.3)
            gateway.call(level, seconds=seconds, batch_size=noise.randrange(2, 6), queued=noise.randrange(2))
            gateway.intent(level, 1.2 * seconds)


UNPROTECTED = "unprotected"
"""The page of this name comes without its Content-Security-Policy."""


@contextmanager
def page_server(fleets: Mapping[str, Sequence[dict | None]], probe: str = "") -> Iterator[str]:
    """The live page on localhost under `/<name>/`, and `probe` at the root; yields the address.

    Args:
        fleets: what each page's server says, one after the other and then the last for ever; None: it hangs up.
    """
    said = dict.fromkeys(fleets, 0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, _, file = unquote(self.path).strip("/").partition("/")
            if file == "fleet.json":
                fleet = fleets[name][min(said[name], len(fleets[name]) - 1)]
                said[name] += 1
                if fleet is not None:
                    self._say(json.dumps(fleet, allow_nan=False), "application/json")
            else:
                page = fleet_page() if name in fleets else probe
                if name == UNPROTECTED:
                    page = page.replace("Content-Security-Policy", "")
                self._say(page, "text/html; charset=utf-8")

        def _say(self, text: str, kind: str) -> None:
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
