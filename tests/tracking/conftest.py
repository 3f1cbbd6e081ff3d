"""A real MLflow store in a SQLite file, made by three jobs that begin in the same moment."""

import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient

from libra_ray.config import TrackingConfig
from libra_ray.tracking import observation_action_schema, tracking_uri

SCHEMA = observation_action_schema(
    image_keys=["observation.image"], image_size=64, history=1, state_dim=4, horizon=5, action_dim=4
)
JOBS = 3

FIRST_RUNS = f"""
import multiprocessing, sys
from pathlib import Path
from libra_ray.config import TrackingConfig
from libra_ray.tracking import Tracker
from libra_ray.tracking.registry import ArrayShape, ModelShape

def job(number):
    together.wait()
    with Tracker.start(TrackingConfig(), Path("runs"), "first") as tracker:
        for step in range(20):
            tracker.log_metrics(step, {{"loss": 1.0, "accuracy": 0.5}})
        tracker.register_model(Path("checkpoint"), {SCHEMA!r}, digest=str(number))

Path("checkpoint").mkdir()
Path("checkpoint", "w.bin").write_bytes(b"x")
fork = multiprocessing.get_context("fork")
together = fork.Barrier({JOBS})
jobs = [fork.Process(target=job, args=(number,)) for number in range({JOBS})]
[started.start() for started in jobs]
[started.join() for started in jobs]
assert not {{"torch", "ray"}} & set(sys.modules), "engine loaded"
sys.exit(sum(started.exitcode != 0 for started in jobs))
"""


@pytest.fixture(scope="session")
def first_process(tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """A process of its own that makes the store, which takes seconds: all tests go on with it."""
    folder = tmp_path_factory.mktemp("fresh")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", FIRST_RUNS, str(folder)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def runs(first_process) -> Path:
    """The folder of all runs."""
    return Path(first_process.args[-1], "runs")


@pytest.fixture
def tracking() -> TrackingConfig:
    return TrackingConfig()


@pytest.fixture
def client(runs, tracking) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri(tracking, runs))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def disk_full() -> Callable[[], object]:
    """A block in which no file can be written, whoever the user is."""

    @contextmanager
    def block() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return block


class Away:
    """A server's address at which somebody hears, and never gives a sensible answer.

    Attributes:
        uri: the address.
        asked: how often it was called.
    """

    def __init__(self, answer: bytes = b"") -> None:
        self._answer, self.asked = answer, 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._socket.accept()
                self.asked += 1
                with caller:
                    caller.recv(65536)
                    caller.sendall(self._answer)

    def close(self) -> None:
        with suppress(OSError):
            # Closing alone does not wake the thread that waits for a caller.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def away() -> Iterator[Away]:
    server = Away()
    yield server
    server.close()
