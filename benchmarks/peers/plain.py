"""The plain blocking loop: a restatement of openpi's `WebsocketPolicyServer` (on PyPI is only its client).

As there: metadata on connecting, then one request and one answer at a time, and `infer` runs inside the event loop, so that all
robots wait for one another. Codec and framing are those of `openpi-client`. Beyond it, a plan is kept per connection.

Run: `python -m benchmarks.peers.plain CHECKPOINT PORT THREADS`
"""

import asyncio
import sys
import time
import traceback
from typing import Any

from openpi_client import msgpack_numpy
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from benchmarks.peers.work import TIMEOUT_S, Work
from libra_ray.client.client import RefusedError
from libra_ray.client.protocol import Reply, request
from libra_ray.types import Observation


async def run(work: Work, port: int) -> None:
    """Serve until cancelled."""
    packer = msgpack_numpy.Packer()

    async def handle(socket: ServerConnection) -> None:
        await socket.send(packer.pack({"checkpoint": work.policy.source.manifest.digest}))
        robot = str(socket.id)
        while True:
            try:
                message = msgpack_numpy.unpackb(await socket.recv())
                began = time.monotonic()
                actions = work.answer({robot: work.observed(message)})[robot].actions
                timing = {"infer_ms": 1e3 * (time.monotonic() - began)}
                await socket.send(packer.pack({"actions": actions, "server_timing": timing}))
            except ConnectionClosed:
                work.robots.pop(robot, None)
                break
            except Exception:
                await socket.send(traceback.format_exc())
                await socket.close(CloseCode.INTERNAL_ERROR, "Internal server error. Traceback included in previous frame.")
                raise

    async with serve(handle, "127.0.0.1", port, compression=None, max_size=None):
        await asyncio.get_running_loop().create_future()


class PlainClient:
    """What `openpi_client.websocket_client_policy` says to the server, for many robots in one event loop."""

    def __init__(self, port: int, robot: str) -> None:
        self.robot, self.reconnects = robot, 0
        self._url = f"ws://127.0.0.1:{port}"
        self._socket: ClientConnection | None = None

    async def connect(self) -> Any:
        """Connect and read the server's metadata."""
        self._socket = await connect(self._url, compression=None, max_size=None, proxy=None, open_timeout=TIMEOUT_S)
        return msgpack_numpy.unpackb(await self._socket.recv())

    async def act(self, observation: Observation, **extra: Any) -> Reply:
        """One request."""
        assert self._socket is not None
        async with asyncio.timeout(TIMEOUT_S):
            await self._socket.send(msgpack_numpy.packb(request(observation, **extra)))
            answer = await self._socket.recv()
        if isinstance(answer, str):
            raise RefusedError(answer)
        message = msgpack_numpy.unpackb(answer)
        return Reply(actions=message["actions"], first_step=observation.step, robot=self.robot)

    async def close(self) -> None:
        """Disconnect."""
        if self._socket is not None:
            await self._socket.close()


if __name__ == "__main__":
    asyncio.run(run(Work.open(sys.argv[1], int(sys.argv[3])), int(sys.argv[2])))
