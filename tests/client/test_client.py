"""What the light client makes of its server's answers, also of those that come too late."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import serve

from libra_ray.client.client import AsyncRobotClient, RefusedError, WrongRobotError
from libra_ray.client.protocol import Handshake, pack, unpack
from libra_ray.types import Level

SHAKE = Handshake(
    observation={}, action={}, control_hz=10, horizon=5, levels=(Level(name="policy", covers=5),), execute_steps=5, history=1,
    rule="overlap", checkpoint_digest="", normalisation_digest="", max_message_bytes=1000,
)  # fmt: skip


@asynccontextmanager
async def told(answers, **options):
    """A client of a server that gives these answers, one per request: functions of the request."""
    left = iter(answers)

    async def handle(socket):
        await socket.send(pack(SHAKE.message()))
        async for data in socket:
            await socket.send(await next(left)(unpack(data)))

    async with serve(handle, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with AsyncRobotClient(f"127.0.0.1:{port}", robot="a", **options) as client:
            yield client


async def well(message):
    return pack({"robot": message["robot"], "seq": message["seq"], "is": message["asks"]})


async def refuses(message):
    return f"no {message['asks']}"


def late(answer):
    async def answered(message):
        await asyncio.sleep(0.5)
        return await answer(message)

    return answered


@pytest.mark.parametrize("first", [well, refuses])
@pytest.mark.parametrize("way", ["timeout", "cancelled"])
def test_the_answer_to_a_request_that_was_given_up_is_nobodys(first, way):
    async def play():
        async with told([late(first), well, refuses], timeout_s=0.2 if way == "timeout" else 60) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(None if way == "timeout" else 0.2):
                    await client.ask({"asks": 1})
            client._timeout_s = 60
            assert (await client.ask({"asks": 2}))["is"] == 2
            with pytest.raises(RefusedError, match="no 3"):
                await client.ask({"asks": 3})
            assert client.reconnects == 0

    asyncio.run(play())


@pytest.mark.parametrize("wrong", [{"robot": "b"}, {"seq": 7}])
def test_an_answer_to_somebody_else_is_never_taken(wrong):
    async def mixed_up(message):
        return pack({"robot": message["robot"], "seq": message["seq"], **wrong})

    async def play():
        async with told([mixed_up]) as client:
            with pytest.raises(WrongRobotError):
                await client.ask({"asks": 1})

    asyncio.run(play())
