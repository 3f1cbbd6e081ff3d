"""A gateway's own port: robots come to it without a proxy between, and several gateways of one machine share it.

Ray Serve can listen in the replica too (direct ingress), with or without HAProxy before it. What that would lose: every replica
has another port, which the controller picks; a replica that ends keeps its robots for half a minute and then cuts them off,
without telling them to come back; and a message's size is bounded by what uvicorn has as default.
In requests per second of 1, 16 and 96 robots HAProxy came to 0.93, 0.86 and 0.88 times this port, Serve's proxy to 0.81, 0.70
and 0.47 times (`benchmarks/results/serve_means.md`, two cores).
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

PING_S = 10.0
"""A robot that vanished without a word is noticed after two of these."""


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
    """

    def __init__(self, app: Callable[..., Any], *, host: str, port: int, max_message_bytes: int) -> None:
        self._socket = _bound(host, port)
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

    async def close(self) -> None:
        """End, with whatever connections are left."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket that others of this user may bind too.

    Raises:
        ValueError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ValueError(f"port {port} of {host} cannot be used ({error.strerror}); give another port=...") from error
    found.setblocking(False)
    return found
