"""A gateway's own port: robots come to it without a proxy between, and several gateways of one machine share it.

Ray Serve can listen in the replica too (direct ingress), with or without HAProxy before it. What that would lose: every replica
has another port, which the controller picks; a replica that ends keeps its robots for half a minute and then cuts them off,
without telling them to come back; and a message's size is bounded by what uvicorn has as default.
In requests per second of 1, 16 and 96 robots HAProxy came to 0.93, 0.86 and 0.88 times this port, Serve's proxy to 0.81, 0.70
and 0.47 times (`benchmarks/results/serve_means.md`, two cores).
"""

import asyncio
import contextlib
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

PATIENCE_S = 5.0
PING_S = 10.0
"""A robot that vanished without a word is noticed after two of these."""
_SIGN = "libra_ray"
_EVERYWHERE = {"0.0.0.0", "::"}  # noqa: S104  (compared with, not listened on)


class _Server(uvicorn.Server):
    """Signals are Ray's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


class Listener:
    """Listens from `open` to `close`.

    Args:
        app: the ASGI application.
        host, port: where; gateways on one machine share the port, and the system spreads connections over them.
        max_message_bytes: a longer WebSocket message closes its connection with code 1009 as soon as its length is known.
        owner: the application in few ASCII letters; only its own gateways share its port.

    Raises:
        ValueError: the address cannot be had.
    """

    def __init__(self, app: Callable[..., Any], *, host: str, port: int, max_message_bytes: int, owner: str) -> None:
        self._claim = _claimed(host, port, owner)
        try:
            self._socket = _bound(host, port)
        except ValueError:
            self._claim.close()
            raise
        config = uvicorn.Config(
            app,
            ws="websockets-sansio",
            ws_max_size=max_message_bytes,
            ws_per_message_deflate=False,
            ws_ping_interval=PING_S,
            ws_ping_timeout=PING_S,
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="warning",
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to listen."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))

    def refuse_new(self) -> None:
        """Take no more connections; those that stand go on."""
        for server in getattr(self._server, "servers", []):
            server.close()
        self._socket.close()
        self._claim.close()

    async def close(self) -> None:
        """End, with whatever connections are left."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()
        self._claim.close()


def check_free(host: str, port: int, patience_s: float = PATIENCE_S) -> None:
    """Refuse a port that somebody listens on, for who is about to start the first that should.

    Raises:
        ValueError: names the port, which was not free for so long: a server that was just ended may take as long to let go.
    """
    until = time.monotonic() + patience_s
    while (problem := _in_use(host, port)) is not None:
        if time.monotonic() >= until:
            raise _unusable(host, port, problem)
        time.sleep(0.1)


def _in_use(host: str, port: int) -> str | None:
    """Why nobody could listen there; None where one could."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as tried:
        # As a server does: connections that have ended are no obstacle.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None


def _claimed(host: str, port: int, owner: str) -> socket.socket:
    """A sign, for as long as it is open, that `owner` listens there.

    Whoever may share a port may share it with any program of this user, and the system would send robots to one policy or the
    other. The sign is a socket without a file: it ends with its process, whatever ends that, and is seen where the port is.

    Raises:
        ValueError: another application listens there.
    """
    sign = socket.socket(socket.AF_UNIX)
    if sys.platform != "linux":
        return sign
    mine = f"@{_SIGN}/{port}/{host}/{owner}/"
    sign.bind(f"{mine}{secrets.token_hex(4)}".replace("@", "\0", 1))
    for line in Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines():
        name = line.rpartition(" ")[2]
        kind, place, other, *_ = [*name.split("/"), "", "", ""]
        meets = other == host or {other, host} & _EVERYWHERE
        if kind == f"@{_SIGN}" and place == str(port) and meets and not name.startswith(mine):
            sign.close()
            raise _unusable(host, port, "another application's robots come there")
    return sign


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket that others of this user may bind too.

    Raises:
        ValueError: the address cannot be had.
    """
    found = socket.socket(_family(host), socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise _unusable(host, port, error.strerror) from error
    found.setblocking(False)
    return found


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _unusable(host: str, port: int, why: str | None) -> ValueError:
    return ValueError(f"port {port} of {host} cannot be used ({why}); give another port=...")
