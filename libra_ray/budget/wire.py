"""What lies between a robot's picture and a level: codec and transport, by the functions that serve."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from libra_ray.budget.records import GATEWAY, ROBOT, TRANSPORT, ComponentTime
from libra_ray.budget.stopwatch import timings
from libra_ray.client.protocol import Handshake, Reply, pack, request, unpack
from libra_ray.control.margin import Latency
from libra_ray.policy import SystemPolicy
from libra_ray.serving.batches import InferenceBatch, InferenceRequest
from libra_ray.serving.replica import described
from libra_ray.serving.requests import read_request
from libra_ray.types import Observation

PATIENCE_S = 30.0
"""For the other process to start and to answer."""


def wire_times(policy: SystemPolicy, batches: Sequence[int], jpeg: int) -> list[ComponentTime]:
    """What each batch size takes.

    Args:
        policy: whose observations and chunks travel.
        batches: robots in one call, ascending.
        jpeg: quality of the pictures; 0 sends them raw.

    Raises:
        ValueError: two processes of this machine cannot talk to each other.
    """
    seen, chunk = noisy(policy.blank()), np.zeros((policy.levels[-1].covers, policy.model.shape.action_dim), np.float32)
    shake = Handshake(**described(policy), execute_steps=1, rule="overlap", max_message_bytes=2**30)
    said = pack(request(seen, jpeg_quality=jpeg or None, seq=0))
    timing = dict.fromkeys(("total_ms", "queue_ms", "call_ms", "compute_ms", "batch"), 1.0)
    answer = {"actions": chunk, "first_step": 0, "robot": "robot-1", "seq": 0, "held": False, "server_timing": timing}
    reply = pack(answer)
    asked = [InferenceRequest(number=number, observation=seen) for number in range(batches[-1])]
    found = [
        _component(ROBOT, "request made", 1, lambda: pack(request(seen, jpeg_quality=jpeg or None, seq=0))),
        _component(ROBOT, "answer read", 1, lambda: Reply.read(unpack(reply))),
    ]
    message = unpack(said)
    for robots in batches:
        batch = InferenceBatch(weights="weights", requests=asked[:robots])
        gateway: dict[str, Callable[[], object]] = {
            "msgpack decoded": _repeated(robots, lambda: unpack(said)),
            "request checked, pictures decoded": _repeated(robots, lambda: read_request(message, shake)),
            "batch between processes (pickle)": partial(_copied, batch),
            "answers packed": _repeated(robots, lambda: pack(answer)),
        }
        found += [_component(GATEWAY, name, robots, call) for name, call in gateway.items()]
    with _other_process(len(reply)) as connection:
        for robots in batches:
            talk = partial(_talk, connection, said, robots)
            found.append(_component(TRANSPORT, "WebSocket, there and back", robots, talk))
    return found


def noisy(blank: Observation) -> Observation:
    """With pictures that compress as badly as real ones at their worst: a black one would flatter the codec."""
    rng = np.random.default_rng(0)
    images = {}
    for name, picture in blank.images.items():
        rows, columns = np.indices(picture.shape[:2])
        shades = np.stack([rows + columns, 2 * rows, 255 - columns], axis=-1) + rng.integers(0, 32, picture.shape)
        images[name] = (shades % 256).astype(np.uint8)
    return replace(blank, images=images)


def _component(where: str, name: str, batch: int, call: Callable[[], object]) -> ComponentTime:
    latency = Latency.of(timings(call))
    return ComponentTime(where=where, name=name, batch=batch, p50_ms=latency.p50_ms, p95_ms=latency.p95_ms)


def _repeated(times: int, call: Callable[[], object]) -> Callable[[], object]:
    return lambda: [call() for _ in range(times)]


def _copied(batch: InferenceBatch) -> object:
    """As another process gets it."""
    return pickle.loads(pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL))  # noqa: S301  (of our own making)


def _talk(connection: ClientConnection, said: bytes, robots: int) -> None:
    for _ in range(robots):
        connection.send(said)
    for _ in range(robots):
        connection.recv(timeout=PATIENCE_S)


@contextmanager
def _other_process(reply_bytes: int) -> Iterator[ClientConnection]:
    """A connection to another process of this machine, which ends with the block."""
    command = [sys.executable, "-m", "libra_ray.budget.echo", str(reply_bytes)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    # In a group of its own: Ctrl-C is for this process, which ends the other one.
    with subprocess.Popen(command, encoding="utf-8", process_group=0, **pipes) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise ValueError("no process could be started that listens on 127.0.0.1, to measure the transport")
            with _connected(f"ws://127.0.0.1:{port}") as connection:
                yield connection
        finally:
            process.kill()


def _connected(address: str) -> ClientConnection:
    try:
        return connect(address, max_size=None, compression=None, proxy=None, open_timeout=PATIENCE_S)
    except (OSError, WebSocketException) as error:
        raise ValueError(
            f"two processes of this machine cannot talk over {address} ({error}), to measure the transport"
        ) from None
