"""Calls between a gateway and the replicas of its machine, over a socket of each replica, without the engine between them.

Ray Serve's way costs both ends together about four milliseconds of CPU a call, however few robots are in it: its router, gRPC
and its interceptors, and a second event loop in the replica. Here a call is one pickle there and one back. A socket's file
belongs to one user, who alone may connect to it: what is unpickled was written by a process of the same user.
"""

import asyncio
import hashlib
import os
import pickle
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LOOK_S = 1.0
"""Between two looks at which replicas are there."""
AVOIDED_S = 5.0
"""A replica that did not answer in time is left to itself for so long."""
_HEAD = 8
"""Bytes before a message, which hold its length."""


def socket_name(app: str, deployment: str, replica: str = "") -> str:
    """The file's name of a replica's socket, at most 12 characters; without `replica` what those of a deployment begin with."""
    return hashlib.sha256(f"{app}/{deployment}".encode()).hexdigest()[:8] + replica[:4]


class _Messages(asyncio.Protocol):
    """Whole messages in and out; `_received` and `connection_lost` are the subclasses'."""

    def __init__(self) -> None:
        self._coming = bytearray()
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._coming = transport, bytearray()

    def data_received(self, data: bytes) -> None:
        self._coming += data
        while len(self._coming) >= _HEAD:
            end = _HEAD + int.from_bytes(self._coming[:_HEAD], "little")
            if len(self._coming) < end:
                return
            whole, self._coming = self._coming, self._coming[end:]
            self._received(pickle.loads(memoryview(whole)[_HEAD:end]))  # noqa: S301  # of a process of this user

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.close()

    def _send(self, message: Any) -> None:
        data = pickle.dumps(message, protocol=5)
        self._transport.writelines([len(data).to_bytes(_HEAD, "little"), data])

    def _received(self, message: Any) -> None:
        raise NotImplementedError


class LocalCallServer:
    """Answers the gateways of this machine.

    Args:
        answer: to a call's one argument.
    """

    def __init__(self, answer: Callable[[Any], Awaitable[Any]]) -> None:
        self._answer = answer
        self._path = Path()
        self._server: asyncio.Server | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def open(self, path: Path) -> None:
        """Begin to answer."""
        path.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        # Before anybody can connect, for nobody listens yet.
        path.chmod(0o600)
        self._path, loop = path, asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Answering(self._answer, self._running), sock=listening)

    async def close(self, timeout_s: float) -> None:
        """Take no more calls, and wait for those under way."""
        if self._server is not None:
            self._path.unlink(missing_ok=True)
            self._server.close()
            if self._running:
                await asyncio.wait(self._running, timeout=timeout_s)


class _Answering(_Messages):
    """A gateway's connection, as the replica has it: one call at a time, kept among those `running`."""

    def __init__(self, answer: Callable[[Any], Awaitable[Any]], running: set[asyncio.Task[None]]) -> None:
        super().__init__()
        self._answer, self._running = answer, running
        self._task: asyncio.Task[None] | None = None

    def _received(self, message: Any) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(message))
        self._running.add(self._task)
        self._task.add_done_callback(self._running.discard)

    async def _run(self, question: Any) -> None:
        try:
            self._send((True, await self._answer(question)))
        except Exception as error:  # noqa: BLE001  # the caller's to judge
            self._send((False, error))

    def connection_lost(self, exc: Exception | None) -> None:
        # Nobody waits any more.
        if self._task is not None:
            self._task.cancel()


class _Replica(_Messages):
    """A replica of this machine, as the gateway has it: for one call at a time.

    Attributes:
        busy: whether it computes for this gateway.
        rested_since: when its last call came back; in the future where it is left to itself until then.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.busy, self.rested_since = path, False, 0.0
        self._answer: asyncio.Future[Any] | None = None

    async def connect(self) -> None:
        """Have a connection.

        Raises:
            OSError: the replica is gone.
        """
        if self._transport is None or self._transport.is_closing():
            await asyncio.get_running_loop().create_unix_connection(lambda: self, self.path)

    async def ask(self, question: Any) -> Any:
        """The answer to one call.

        Raises:
            ConnectionError: the replica went away; and its error where it had one.
        """
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self._send(question)
            fine, answer = await self._answer
        except BaseException:
            self.close()
            self.rested_since = time.monotonic() + AVOIDED_S
            raise
        self.rested_since = time.monotonic()
        if not fine:
            raise answer
        return answer

    def _received(self, message: Any) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the replica went away with the call"))


class LocalCalls:
    """A handle of a deployment whose `infer` asks replicas of this machine directly, each for one call at a time.

    Where none of them is free, and for all else, the engine's handle is asked: it knows the replicas of other machines, and
    waits for those that start.

    Args:
        handle: the engine's.
        folder: of the sockets.
    """

    def __init__(self, handle: Any, folder: Path) -> None:
        self._handle, self._folder = handle, folder
        self._name = socket_name(handle.app_name, handle.deployment_name)
        self._replicas: dict[str, _Replica] = {}
        self._looked_at = float("-inf")

    def __getattr__(self, name: str) -> Any:
        """All but `infer` is the engine's."""
        return getattr(self._handle, name)

    @property
    def infer(self) -> "LocalCalls":
        """What is called by `infer.remote(...)`."""
        return self

    def remote(self, question: Any) -> asyncio.Task[Any]:
        """One call; it can be awaited and cancelled."""
        return asyncio.get_running_loop().create_task(self._call(question))

    async def _call(self, question: Any) -> Any:
        while (replica := self._free()) is not None:
            replica.busy = True
            try:
                await replica.connect()
            except OSError:
                # It died without a word.
                self._replicas.pop(replica.path, None)
                with suppress(OSError):
                    Path(replica.path).unlink()
            else:
                return await replica.ask(question)
            finally:
                replica.busy = False
                if replica.path not in self._replicas:
                    replica.close()
        return await self._handle.infer.remote(question)

    def _free(self) -> _Replica | None:
        """The replica here that has rested for longest, of those that do nothing for this gateway."""
        now = time.monotonic()
        if now - self._looked_at > LOOK_S:
            self._look()
            self._looked_at = now
        free = (replica for replica in self._replicas.values() if not replica.busy and replica.rested_since <= now)
        return min(free, key=lambda replica: replica.rested_since, default=None)

    def _look(self) -> None:
        """Which replicas are here; one that ends answers what it was asked."""
        mine = os.getuid()
        with os.scandir(self._folder) as files:
            here = {file.path for file in files if file.name.startswith(self._name) and file.stat().st_uid == mine}
        for path in self._replicas.keys() - here:
            gone = self._replicas.pop(path)
            if not gone.busy:
                gone.close()
        self._replicas |= {path: _Replica(path) for path in here - self._replicas.keys()}
