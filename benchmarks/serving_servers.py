"""Servers as processes of their own: started with the same threads, watched through /proc, and ended with all they began."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import psutil

from benchmarks.files import ROOT
from libra_ray.client.client import AsyncRobotClient
from libra_ray.fleet.robot import Endpoint
from libra_ray.manifest import read_levels
from libra_ray.types import Json

START_S = 300.0
"""LeRobot's imports alone can take a minute on a slow machine."""
END_S = 20.0
DEPLOYMENTS = ("Planner", "Refiner", "Gateway")


APP = "serve_apps.libra:app"
Entry = Literal["own port", "proxy", "replica"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How robots reach a gateway, and a gateway its levels.

    Attributes:
        entry: the gateways' own port, that of Serve's proxy (or HAProxy), or the one that Serve gives a gateway's replica.
        serve: Serve's environment, its controller and proxies included.
        replicas: added to the environment of the replicas.
    """

    entry: Entry = "own port"
    serve: Mapping[str, str] = field(default_factory=dict)
    replicas: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Server:
    """A server's process and its children.

    Attributes:
        name: of the system.
        command: that starts it.
        port: it listens on, on 127.0.0.1.
        client: makes a robot's connection from its name.
        ready_url: answers 200 when the server is ready; empty where an open port says so.
        scratch: files that are no longer needed when it has ended.
    """

    name: str
    command: list[str]
    port: int
    client: Callable[[str], Endpoint]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_url: str = ""
    scratch: Sequence[Path] = ()
    _process: subprocess.Popen[bytes] | None = None
    _known: dict[int, psutil.Process] = field(default_factory=dict)

    def __enter__(self) -> Self:
        """Started and ready.

        Raises:
            RuntimeError: it ended, or was not ready in time; the message holds its last lines.
        """
        with tempfile.NamedTemporaryFile(prefix=f"{self.name}-", suffix=".log", delete=False) as log:
            self._log = Path(log.name)
            environment = {**os.environ, **self.environment}
            self._process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ended, with its children."""
        self.end()

    def processes(self) -> list[psutil.Process]:
        """The server's process and all below it."""
        assert self._process is not None
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._process.pid)
            self._known |= {p.pid: p for p in (top, *top.children(recursive=True))}
        return [p for p in self._known.values() if p.is_running()]

    def cpu_s(self) -> float:
        """CPU seconds of all its processes that still live."""
        return sum(_cpu_s(process) for process in self.processes())

    def replicas(self) -> dict[str, list[psutil.Process]]:
        """The replicas of libra_ray's deployments, by name: Ray writes it into a replica's command line."""
        found: dict[str, list[psutil.Process]] = {name: [] for name in DEPLOYMENTS}
        for process in self.processes():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                for name in DEPLOYMENTS:
                    if "ServeReplica" in line and f":{name}" in line:
                        found[name].append(process)
        return found

    def end(self) -> None:
        """Ask, wait, and kill what is left; only what this object started."""
        if self._process is None:
            return
        mine = self.processes()
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        _, left = psutil.wait_procs(mine, timeout=2)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        self._process.wait()
        for path in (self._log, *self.scratch):
            path.unlink(missing_ok=True)
        self._process = None

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_S
        while not self._is_ready():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > end:
                last = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
                raise RuntimeError(f"{self.name} {'ended' if ended else 'was not ready in time'}:\n{last}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            if self.ready_url:
                with urllib.request.urlopen(self.ready_url, timeout=2) as answer:  # noqa: S310  (http on this machine)
                    return bool(answer.status == 200)
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except (OSError, urllib.error.URLError):
            return False


def peer(module: str, checkpoint: Path, threads: int, client: Callable[[int, str], Endpoint]) -> Server:
    """A peer of `benchmarks.peers`, on a free port."""
    port = free_port()
    return Server(
        name=module,
        command=[sys.executable, "-m", f"benchmarks.peers.{module}", str(checkpoint), str(port), str(threads)],
        port=port,
        client=lambda robot: client(port, robot),
        environment={"OMP_NUM_THREADS": str(threads)},
    )


def ours(
    checkpoint: Path,
    threads: int,
    settings: Mapping[str, Any] | None = None,
    way: Way | None = None,
    import_path: str = APP,
    *,
    typed: bool = False,
) -> Server:
    """libra_ray as `serve run` starts it, with its own Ray, on free ports.

    Args:
        typed: by the command that users type, so that Serve's proxy has its usual port: one server at a time. Otherwise by a
            file that names the proxy's port, for which Ray starts with all that it has.
        way: by which robots and calls reach the replicas; as libra_ray does by default.
        import_path: of the application, e.g. one whose gateway calls in another way.
    """
    way = way or Way()
    proxy, direct = free_port(), free_port()
    own = free_port() if way.entry == "own port" else 0
    port = {"own port": own, "proxy": proxy, "replica": direct}[way.entry]
    arguments = {
        "checkpoint": str(checkpoint.resolve()),
        "port": own,
        **{f"levels.{level.name}.threads": threads for level in read_levels(checkpoint)},
        **(settings or {}),
    }
    if typed:
        named = [f"{name}={value}" for name, value in arguments.items()]
        return _ours([import_path, *named], port, threads, way, direct)
    application: Json = {"name": "libra", "import_path": import_path, "route_prefix": "/", "args": arguments}
    if way.replicas:
        needs = {"num_cpus": 0.1, "runtime_env": {"env_vars": dict(way.replicas)}}
        application["deployments"] = [{"name": name, "ray_actor_options": needs} for name in DEPLOYMENTS]
    config: Json = {"http_options": {"host": "127.0.0.1", "port": proxy}, "applications": [application]}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="serving-", suffix=".yaml", delete=False) as file:
        json.dump(config, file)  # JSON is YAML
    return _ours([file.name], port, threads, way, direct, scratch=(Path(file.name),))


def _ours(what: list[str], port: int, threads: int, way: Way, direct: int, scratch: Sequence[Path] = ()) -> Server:
    return Server(
        name="libra_ray",
        command=[str(Path(sys.executable).parent / "serve"), "run", *what],
        port=port,
        client=lambda robot: AsyncRobotClient(f"ws://127.0.0.1:{port}", robot=robot),
        environment={
            "OMP_NUM_THREADS": str(threads),
            # A Ray of its own, also where another one runs on this machine.
            "RAY_ADDRESS": "local",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            # The one port that a gateway's replica may listen on where Serve has it listen itself.
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(direct),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(direct + 1),
            **way.serve,
        },
        ready_url=f"http://127.0.0.1:{port}/readyz",
        scratch=scratch,
    )


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
