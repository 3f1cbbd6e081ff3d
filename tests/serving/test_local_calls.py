"""Calls between processes of one machine: who is asked, what becomes of them when a replica dies, hangs or errs."""

import asyncio
import stat
import sys
from contextlib import asynccontextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import uvloop

from libra_ray.serving import local_calls
from libra_ray.serving.local_calls import LocalCalls, LocalCallServer, socket_name


class Machine:
    """Replicas that answer who they are, and the engine's handle, which counts what it is asked."""

    def __init__(self, folder):
        self.folder, self.servers, self.by_engine, self.cancelled = folder, {}, 0, []
        engine = SimpleNamespace(app_name="app", deployment_name="Refiner", infer=self, describe="the engine's")
        self.handle = LocalCalls(engine, folder)

    def remote(self, what):
        self.by_engine += 1
        return asyncio.ensure_future(asyncio.sleep(0, ("engine", what)))

    async def replica(self, name, deployment="Refiner"):
        async def answer(what):
            if isinstance(what, str) and what == "hang":
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.append(name)
            if isinstance(what, str) and what == "fail":
                raise ValueError(f"{name} cannot")
            return name, what

        self.servers[name] = LocalCallServer(answer)
        await self.servers[name].open(self.folder / socket_name("app", deployment, name))
        self.handle._looked_at = float("-inf")


@asynccontextmanager
async def machine(folder, *names):
    made = Machine(folder)
    for name in names:
        await made.replica(name)
    yield made
    for server in made.servers.values():
        await server.close(0.1)


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request):
    """Replicas of Serve run on uvloop where it is installed."""
    return request.param


def test_a_replica_of_this_machine_is_asked_without_the_engine(tmp_path, run):
    async def case():
        async with machine(tmp_path, "one") as here:
            big = np.arange(300_000)
            name, came = await here.handle.infer.remote(big)
            assert name == "one"
            assert (came == big).all()
            assert here.by_engine == 0
            assert here.handle.describe == "the engine's", "all else is"
            with pytest.raises(ValueError, match="one cannot"):
                await here.handle.infer.remote("fail")
            assert await here.handle.infer.remote("again") == ("one", "again"), "its error was the call's alone"

    run(case())


def test_calls_at_once_go_to_different_replicas_and_beyond_to_the_engine(tmp_path, run):
    async def case():
        async with machine(tmp_path, "one", "two") as here:
            await here.replica("other", deployment="Planner")
            for _ in range(2):
                told = await asyncio.gather(*(here.handle.infer.remote(n) for n in range(3)))
                assert told[:2] in ([("one", 0), ("two", 1)], [("two", 0), ("one", 1)])
                assert told[2] == ("engine", 2)

    run(case())


ALONE = """
import asyncio, sys
from pathlib import Path
from libra_ray.serving.local_calls import LocalCallServer

async def answer(what):
    if what == "hang":
        print("asked", flush=True)
        await asyncio.Event().wait()
    return "alone", what

async def main():
    await LocalCallServer(answer).open(Path(sys.argv[1]))
    print("open", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_replica_that_is_killed_fails_its_call_and_is_asked_no_more(tmp_path):
    async def case():
        here = Machine(tmp_path)
        path = tmp_path / socket_name("app", "Refiner", "alone")
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", ALONE, path, stdout=asyncio.subprocess.PIPE)
        try:
            await process.stdout.readline()
            assert await here.handle.infer.remote(1) == ("alone", 1)
            call = here.handle.infer.remote("hang")
            await process.stdout.readline()
        finally:
            process.kill()
        with pytest.raises(ConnectionError):
            await call
        await process.wait()
        assert await here.handle.infer.remote(2) == ("engine", 2)
        # A gateway that comes later finds its file.
        assert path.exists()
        late = Machine(tmp_path)
        assert await late.handle.infer.remote(3) == ("engine", 3)
        assert not path.exists()

    asyncio.run(case())


def test_a_replica_that_hangs_is_given_up_and_left_to_itself(tmp_path, run):
    async def case():
        async with machine(tmp_path, "one") as here:
            call = here.handle.infer.remote("hang")
            await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await here.handle.infer.remote(1) == ("engine", 1)
            async with asyncio.timeout(10):
                while here.cancelled != ["one"]:
                    await asyncio.sleep(0.01)
            await here.replica("two")
            assert await here.handle.infer.remote(2) == ("two", 2), "others are asked"

    run(case())


def test_one_that_ends_answers_what_it_was_asked_and_no_more(tmp_path, run):
    async def case():
        async with machine(tmp_path, "one") as here:
            call = here.handle.infer.remote("hang")
            await asyncio.sleep(0.05)
            ending = asyncio.create_task(here.servers["one"].close(10))
            await asyncio.sleep(0.05)
            assert not ending.done(), "a call is under way"
            assert not [*tmp_path.iterdir()], "nobody new finds it"
            call.cancel()
            await ending
            here.handle._looked_at = float("-inf")
            assert await here.handle.infer.remote(1) == ("engine", 1)

    run(case())


def test_a_socket_is_its_users_alone(tmp_path, monkeypatch):
    """What comes out of it is unpickled."""

    async def case():
        async with machine(tmp_path, "one") as here:
            (path,) = tmp_path.iterdir()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            monkeypatch.setattr(local_calls.os, "getuid", lambda: path.stat().st_uid + 1)
            assert await here.handle.infer.remote(1) == ("engine", 1), "that of another user is passed over"

    asyncio.run(case())
