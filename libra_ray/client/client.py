"""The light client of the protocol in `libra_ray.client.protocol`, with reconnect; needs neither torch nor Ray."""

import asyncio
import random
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus

from libra_ray.client.protocol import TOO_BIG, UNAUTHORISED, Handshake, Reply, pack, request, unpack
from libra_ray.types import Json, Observation

_FINAL_CODES = (UNAUTHORISED, TOO_BIG)
_FINAL_STATUS = (400, 401, 403, 404)
_LOST = (ConnectionClosed, InvalidHandshake, InvalidMessage, OSError, EOFError)


class RefusedError(RuntimeError):
    """The server refused a request, or this client altogether; the text says why and what would have been valid."""


class WrongRobotError(RuntimeError):
    """The answer is another robot's, or to another request. It must never happen, and no action of it may be executed."""


class AsyncRobotClient:
    """One robot's connection.

    A connection that breaks, or that the server ends to move its robots, is made anew with exponential backoff, and the
    request under way is sent again; requests carry their step, so that any gateway can go on where another one stopped.

    Args:
        address: e.g. `ws://127.0.0.1:8765`; `host:port` will do.
        robot: the robot's name, unique in the fleet.
        token: the server's, where it asks for one.
        timeout_s: longest wait for one answer.
        patience_s: longest time without a connection before the client gives up.
        jpeg_quality: sends pictures as JPEG; None sends them raw.

    Attributes:
        handshake: what the server said of itself on the present connection.
        reconnects: connections made after the first one.
    """

    handshake: Handshake

    def __init__(
        self,
        address: str,
        *,
        robot: str,
        token: str | None = None,
        timeout_s: float = 10.0,
        patience_s: float = 60.0,
        jpeg_quality: int | None = None,
    ) -> None:
        self.address = address if "://" in address else f"ws://{address}"
        if not self.address.startswith(("ws://", "wss://")):
            raise ValueError(f"{address!r} is no address of a server; write ws://host:port")
        self.robot = robot
        self.reconnects = 0
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout_s, self._patience_s, self._jpeg_quality = timeout_s, patience_s, jpeg_quality
        self._socket: ClientConnection | None = None
        self._seq = 0
        # Answers to come on this connection: every request has one, in order, also a request that was given up.
        self._owed = 0

    async def __aenter__(self) -> Self:
        """Connected."""
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Disconnected."""
        await self.close()

    async def connect(self) -> Handshake:
        """Make the connection; does nothing where it stands.

        Raises:
            ConnectionError: no server within `patience_s`.
            RefusedError: the server refuses this client, e.g. its token.
            ValueError: the server speaks another version.
        """
        if self._socket is None:
            self.handshake = await self._patiently()
        return self.handshake

    async def act(self, observation: Observation, **extra: Any) -> Reply:
        """The next chunk of actions.

        Args:
            extra: `reset=True` at an episode's first request; `success=...` tells how the one before ended.

        Raises:
            RefusedError, ConnectionError: as `connect`; RefusedError also where the server refuses the observation.
            TimeoutError: no answer within `timeout_s`; the next request is independent of it.
            WrongRobotError: the answer is another robot's.
        """
        return Reply.read(await self.ask(request(observation, jpeg_quality=self._jpeg_quality, **extra)))

    async def reset(self) -> None:
        """A new episode begins; earlier intents are forgotten."""
        await self.ask({"reset": True})

    async def report(self, success: bool | None) -> None:
        """How the episode ended; None where nobody knows."""
        await self.ask({"success": success})

    async def ask(self, message: Json) -> Json:
        """The answer to any map of the protocol; `robot` and `seq` are added, and checked in the answer."""
        self._seq += 1
        data = pack({**message, "robot": self.robot, "seq": self._seq})
        while True:
            await self.connect()
            assert self._socket is not None
            try:
                async with asyncio.timeout(self._timeout_s):
                    self._owed += 1
                    await self._socket.send(data)
                    return await self._answer(self._socket)
            except TimeoutError:
                raise TimeoutError(f"{self.address} did not answer within {self._timeout_s:g} s") from None
            except _LOST as error:
                self._socket = None
                self._refuse_final(error)

    async def close(self) -> None:
        """End the connection."""
        socket, self._socket = self._socket, None
        if socket is not None:
            await socket.close()

    async def _answer(self, socket: ClientConnection) -> Json:
        while True:
            data = await socket.recv()
            self._owed -= 1
            if self._owed:
                continue
            if isinstance(data, str):
                raise RefusedError(data)
            answer = unpack(data)
            if answer.get("robot") != self.robot:
                raise WrongRobotError(f"robot {self.robot!r} was sent an answer to {answer.get('robot')!r}")
            if answer.get("seq") != self._seq:
                raise WrongRobotError(f"request {self._seq} of {self.robot!r} was sent the answer to {answer.get('seq')}")
            return answer

    async def _patiently(self) -> Handshake:
        clock = asyncio.get_running_loop().time
        began, wait_s = clock(), 0.05
        while True:
            try:
                return await self._connected()
            except (*_LOST, TimeoutError) as error:
                self._refuse_final(error)
                if clock() - began + wait_s > self._patience_s:
                    raise ConnectionError(f"no server at {self.address} ({error or type(error).__name__})") from error
            # Robots that lost the same server must not come back at the same moment.
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, 2.0)

    async def _connected(self) -> Handshake:
        again = hasattr(self, "handshake")
        socket = await connect(
            self.address,
            additional_headers=self._headers,
            compression=None,
            max_size=None,
            proxy=None,
            open_timeout=self._timeout_s,
            close_timeout=1.0,
        )
        async with asyncio.timeout(self._timeout_s):
            first = await socket.recv()
        if isinstance(first, str):
            raise RefusedError(first)
        handshake = Handshake.read(unpack(first))
        self._socket, self._owed, self.reconnects = socket, 0, self.reconnects + again
        return handshake

    def _refuse_final(self, error: Exception) -> None:
        """Give up at once where coming back would not help."""
        if isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code in _FINAL_CODES:
            raise RefusedError(error.rcvd.reason or f"the server closed with {error.rcvd.code}") from error
        if isinstance(error, InvalidStatus) and error.response.status_code in _FINAL_STATUS:
            body = (error.response.body or b"").decode(errors="replace").strip()
            raise RefusedError(body or f"the server answered HTTP {error.response.status_code}") from error


class RobotClient:
    """`AsyncRobotClient` for programs without an event loop: the same arguments and calls, blocking.

    ```python
    with RobotClient("ws://127.0.0.1:8765", robot="left arm") as client:
        reply = client.act(observation, reset=True)
    ```
    """

    def __init__(self, address: str, **options: Any) -> None:
        self._client = AsyncRobotClient(address, **options)
        # A thread of its own answers the server's pings between two requests.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="robot-client", daemon=True)
        self._thread.start()
        try:
            self._run(self._client.connect())
        except BaseException:
            self._stop()
            raise

    @property
    def handshake(self) -> Handshake:
        """What the server said of itself."""
        return self._client.handshake

    @property
    def reconnects(self) -> int:
        """Connections made after the first one."""
        return self._client.reconnects

    def __enter__(self) -> Self:
        """The client, connected."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Disconnected."""
        self.close()

    def act(self, observation: Observation, **extra: Any) -> Reply:
        """See `AsyncRobotClient.act`."""
        return self._run(self._client.act(observation, **extra))

    def reset(self) -> None:
        """See `AsyncRobotClient.reset`."""
        self._run(self._client.reset())

    def report(self, success: bool | None) -> None:
        """See `AsyncRobotClient.report`."""
        self._run(self._client.report(success))

    def ask(self, message: Json) -> Json:
        """See `AsyncRobotClient.ask`."""
        return self._run(self._client.ask(message))

    def close(self) -> None:
        """End the connection; a second call does nothing."""
        if self._thread.is_alive():
            self._run(self._client.close())
            self._stop()

    def _run[T](self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
