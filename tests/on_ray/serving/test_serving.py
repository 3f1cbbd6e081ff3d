"""The served application on a real Ray cluster: the same answers as the policy itself, and what happens when processes die."""

import asyncio
import os
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from libra_ray.client.client import AsyncRobotClient, RefusedError, RobotClient
from libra_ray.client.protocol import Reply, request
from libra_ray.types import Observation
from tests.processes import command, family, loaded
from tests.serving import stubs
from tests.serving.bench import check
from tests.serving.stubs import HORIZON, observe
from tests.serving.test_web import free_port

PATIENCE_S = 240
LIGHT = {"levels.planner.num_cpus": 0.1, "levels.refiner.num_cpus": 0.1, "gateway.num_cpus": 0.1}
OF_THREE = LIGHT | {"levels.director.num_cpus": 0.1}


def ready(port, patience_s=PATIENCE_S):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        try:
            with opener.open(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def proxy_port(ray_cluster):
    """Serve on the shared cluster, gone afterwards."""
    from ray import cloudpickle, serve

    # Replicas need not find the tests.
    cloudpickle.register_pickle_by_value(stubs)

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()


@pytest.fixture(scope="module")
def deployed(proxy_port, tmp_path_factory):
    """Applications, side by side: of a real checkpoint, and of two and three levels that only say whose answer it is."""
    from ray import serve

    from libra_ray.on_ray.serving.app import build
    from libra_ray.on_ray.serving.level import AnsweringLocally
    from libra_ray.serving.settings import ServingSettings
    from libra_ray.serving.weights import pinned
    from tests.model.builders import save_checkpoint, tiny_model

    class Stub(AnsweringLocally, stubs.StubLevel):
        """As `ServedLevel`."""

    folders = [tmp_path_factory.mktemp("serving") / name for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        save_checkpoint(folder, tiny_model({"train.seed": seed}))
    real = pinned(ServingSettings.read({"checkpoint": str(folders[0]), "port": free_port(), "rule": "fifo", **LIGHT}))
    stub = {"checkpoint": "first", "port": free_port(), "levels.refiner.replicas": 2, "gateway.replicas": 2, **LIGHT}
    three = {"checkpoint": "first", "port": free_port(), **OF_THREE}
    stub = ServingSettings.read(stub).with_levels([level.name for level in stubs.LEVELS])
    three = ServingSettings.read(three).with_levels([level.name for level in stubs.THREE])
    targets = {
        "stub": build(stub, Stub),
        "three": build(three, stubs.StubOfThree),
        "real": build(real),
    }
    routes = {"stub": "/stub", "three": "/three", "real": "/"}
    serve.run_many([serve.RunTarget(target=app, name=name, route_prefix=routes[name]) for name, app in targets.items()])
    assert ready(three.port)
    assert ready(real.port)
    assert ready(stub.port)
    return real, stub, folders, three


@pytest.fixture(scope="module")
def real(deployed):
    return deployed[0]


@pytest.fixture(scope="module")
def stub(deployed):
    return deployed[1]


def test_a_handle_knows_how_many_replicas_run(stub):
    from ray import serve

    from libra_ray.on_ray import ray_private
    from libra_ray.on_ray.serving.engine import RayEngine

    wanted = {"Planner": 1, "Refiner": 2}
    handles = {name: serve.get_deployment_handle(name, "stub") for name in wanted}
    end = time.monotonic() + PATIENCE_S
    while (found := {name: ray_private.running_replicas(of) for name, of in handles.items()}) != wanted:
        assert time.monotonic() < end, found
        time.sleep(0.05)
    assert RayEngine.settled(handles.values())


@pytest.fixture(scope="module")
def policy(deployed):
    from libra_ray.policy import load_policy

    return load_policy(deployed[2][0])


def test_what_cannot_start_says_why_in_one_line_and_leaves_nothing(proxy_port):
    from ray import serve

    from libra_ray.on_ray.serving.app import build
    from libra_ray.on_ray.serving.start import run
    from libra_ray.serving.settings import ServingSettings

    settings = ServingSettings.model_validate({"checkpoint": "broken", "port": 0, **LIGHT}).with_levels(["planner", "refiner"])
    broken = build(settings, stubs.StubLevel)
    with pytest.raises(RuntimeError, match=r"^there is no such checkpoint$"):
        run(broken, name="broken", route_prefix="/broken")
    assert "broken" not in serve.status().applications


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"levels.planner.num_cpus": 100}, r"reserve 100\.2 CPUs, this machine gives Ray 4; lower the num_cpus or replicas"),
        ({"levels.refiner.replicas": 50}, r"reserve 5\.2 CPUs"),
        ({"gateway.num_gpus": 0.5}, r"reserve 0\.5 GPUs, this machine gives Ray 0; lower the num_gpus"),
    ],
)
def test_more_than_this_machine_will_ever_hold_is_refused(ray_cluster, monkeypatch, arguments, words):
    from libra_ray.on_ray.serving.start import check_size
    from libra_ray.serving.settings import ServingSettings

    settings = ServingSettings.read({"checkpoint": "c", **LIGHT, **arguments}).with_levels(["planner", "refiner"])
    with pytest.raises(ValueError, match=words):
        check_size(settings)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    check_size(settings)
    monkeypatch.delenv("RAY_ADDRESS")
    check_size(ServingSettings.read({"checkpoint": "c", **LIGHT}).with_levels(["planner", "refiner"]))


def seen(robot, step=0) -> Observation:
    from dataclasses import replace

    from tests.model.builders import make_observation

    return replace(make_observation(robot), step=step)


def expected(policy, robot, step, first):
    plan = policy.infer("planner", [seen(robot, first)], [None])
    return policy.infer("refiner", [seen(robot, step)], plan)[0].actions


def test_the_fleet_gets_what_the_policy_itself_says(real, policy):
    """Fetched by many robots at once through batches, actions are those of the checkpoint alone."""

    async def robot(number):
        async with AsyncRobotClient(f"127.0.0.1:{real.port}", robot=f"robot {number}") as client:
            return [await client.act(seen(number, step)) for step in range(0, 20, 5)]

    async def fleet():
        return await asyncio.gather(*[robot(number) for number in range(6)])

    for number, replies in enumerate(asyncio.run(fleet())):
        for reply in replies:
            assert not reply.held
            want = expected(policy, number, reply.first_step, reply.intent_first_step)
            np.testing.assert_allclose(reply.actions, want, atol=1e-3)
            assert reply.robot == f"robot {number}"


@pytest.mark.parametrize("way", ["own port", "proxy"])
def test_openpis_client_gets_the_same(real, proxy_port, policy, way):
    client = WebsocketClientPolicy("127.0.0.1", real.port if way == "own port" else proxy_port)
    message = {key: value for key, value in request(seen(2)).items() if key not in ("step", "version")}
    answers = [client.infer(message) for _ in range(3)]
    assert [answer["first_step"] for answer in answers] == [0, 5, 10]
    np.testing.assert_allclose(answers[0]["actions"], expected(policy, 2, 0, 0), atol=1e-3)
    with pytest.raises(RuntimeError, match="a request needs"):
        client.infer({"hello": 1})


def test_simulators_inside_the_cluster_ask_by_handle(real, policy):
    from ray import serve

    answer = Reply.read(serve.get_app_handle("real").act.remote(request(seen(4), robot="inside")).result(timeout_s=PATIENCE_S))
    np.testing.assert_allclose(answer.actions, expected(policy, 4, 0, 0), atol=1e-3)


def test_new_weights_replace_the_old_ones_in_place(real, deployed):
    """No process is started for it, no connection is lost, and afterwards the answers are the new checkpoint's."""
    from libra_ray.on_ray.serving.app import update_weights
    from libra_ray.policy import load_policy

    other = load_policy(deployed[2][1])
    before = replicas("real")
    with RobotClient(f"127.0.0.1:{real.port}", robot="robot 1", timeout_s=PATIENCE_S) as client:
        first = client.act(seen(1))
        assert not np.allclose(first.actions, expected(other, 1, 0, 0), atol=1e-2), "the checkpoints can be told apart"
        update_weights(str(deployed[2][1]), app_name="real")
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            reply = client.act(seen(1), reset=True)
            if not np.allclose(reply.actions, first.actions):
                break
            time.sleep(0.1)
        np.testing.assert_allclose(reply.actions, expected(other, 1, 0, 0), atol=1e-3)
        assert client.reconnects == 0
    with RobotClient(f"127.0.0.1:{real.port}", robot="robot 1") as client:
        assert client.handshake.checkpoint_digest == other.source.manifest.digest
    assert replicas("real") == before
    assert all(loaded(pid, "libtorch") for pid in replicas("real", "Planner")), "this looks in the right place"
    assert not any(loaded(pid, "libtorch") for pid in replicas("real", "Gateway")), "its robots would wait for the import"


def test_so_they_do_where_the_application_came_by_serve_deploy(deployed):
    """To Serve it is its file's: built anew by a program, it would be another one, and every process would end."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from libra_ray.checkpoint import read_manifest
    from libra_ray.on_ray.serving.app import update_weights

    _, _, (first, second), _ = deployed
    port = free_port()
    arguments = {"checkpoint": str(first), "port": port, **LIGHT}
    file = {"name": "file", "route_prefix": "/file", "import_path": "serve_apps.libra:app", "args": arguments}
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [file]}))
    assert ready(port)
    before = replicas("file")
    update_weights(str(second), app_name="file")
    end, wanted, told = time.monotonic() + PATIENCE_S, read_manifest(second).digest, ""
    while told != wanted and time.monotonic() < end:
        with RobotClient(f"127.0.0.1:{port}", robot="robot 1") as client:
            told = client.handshake.checkpoint_digest
    assert told == wanted
    assert replicas("file") == before
    assert {"real", "stub"} <= set(serve.status().applications), "the others go on"
    serve.delete("file")


def test_three_levels_are_three_deployments(deployed):
    """Beside the gateway; every answer follows the intents of its own robot, each of which followed the one above it."""
    from ray import serve

    three = deployed[3]
    assert set(serve.status().applications["three"].deployments) == {"Director", "Planner", "Refiner", "Gateway"}

    async def robot(number):
        async with AsyncRobotClient(f"127.0.0.1:{three.port}", robot=f"robot {number}", timeout_s=PATIENCE_S) as client:
            assert client.handshake.levels == stubs.THREE
            for step in range(0, 20 * HORIZON, HORIZON):
                check(await client.act(observe(number, step)), number, step)

    async def fleet():
        await asyncio.gather(*[robot(number) for number in range(6)])

    asyncio.run(fleet())


def test_new_weights_of_other_levels_are_refused(deployed, tmp_path):
    from libra_ray.on_ray.serving.app import update_weights
    from tests.model.builders import SHAPE, save_checkpoint, tiny_config

    changes = {"model.system": "monolithic", "evaluate.controllers": "policy"}
    from libra_ray.model.registry import make_system

    save_checkpoint(tmp_path / "other", make_system(tiny_config(changes), SHAPE))
    with pytest.raises(ValueError, match=r"levels.planner: no such level; checkpoint .*other has policy"):
        update_weights(str(tmp_path / "other"), app_name="real")


def test_new_weights_are_refused_for_an_application_that_does_not_run(deployed):
    from libra_ray.on_ray.serving.app import update_weights

    with pytest.raises(ValueError, match=r"no application 'nobody' runs; running: .*real"):
        update_weights(str(deployed[2][0]), app_name="nobody")


def test_the_page_and_its_numbers_are_served(stub):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{stub.port}/", timeout=PATIENCE_S) as page:
        assert "Content-Security-Policy" in page.read().decode()
    with opener.open(f"http://127.0.0.1:{stub.port}/fleet.json", timeout=PATIENCE_S) as numbers:
        assert b"robots" in numbers.read()


def replicas(app, deployment="") -> list[int]:
    """Process numbers of the replicas."""
    return sorted(pid for pid in family(os.getpid()) if f"ServeReplica:{app}:{deployment}" in command(pid))


@dataclass
class Fleet:
    """Robots that act on their own until told to stop; whatever goes wrong is raised."""

    port: int
    robots: int = 16
    replies: list[tuple[float, int, Reply]] = field(default_factory=list)
    reconnects: int = 0
    going: bool = True

    async def robot(self, number):
        async with AsyncRobotClient(f"127.0.0.1:{self.port}", robot=f"robot {number}", timeout_s=PATIENCE_S) as client:
            step = 0
            while self.going:
                reply = await client.act(observe(number, step))
                check(reply, number, step)
                self.replies.append((time.monotonic(), number, reply))
                step += HORIZON
                await asyncio.sleep(0.05)
            self.reconnects += client.reconnects

    def since(self, moment, *, fresh=False) -> list[int]:
        """How many replies each robot has had since then, only those that were not held if `fresh`."""
        told = Counter(number for at, number, reply in self.replies if at > moment and not (fresh and reply.held))
        return [told[number] for number in range(self.robots)]

    async def through(self, happening, recovered):
        """Act, let it happen, and go on until `recovered(since when)`; how long that takes is measured in benchmarks/."""
        tasks = [asyncio.create_task(self.robot(number)) for number in range(self.robots)]
        await self._until(tasks, lambda: min(self.since(0.0)) >= 3)
        await asyncio.to_thread(happening)
        moment = time.monotonic()
        await self._until(tasks, lambda: recovered(moment))
        self.going = False
        await asyncio.gather(*tasks)
        return moment

    async def _until(self, tasks, seen):
        async with asyncio.timeout(PATIENCE_S):
            while not seen() and not any(task.done() for task in tasks):
                await asyncio.sleep(0.02)


def kill(app, deployment):
    os.kill(replicas(app, deployment)[0], signal.SIGKILL)


def test_a_planner_that_is_killed_stops_no_refiner(stub):
    """Robots go on with the plans they have, then hold; when Serve has a new planner, intents are fresh again."""
    fleet = Fleet(stub.port)

    def all_answered_without_it(killed):
        return min(fleet.since(killed)) >= 3 and fleet.since(killed) != fleet.since(killed, fresh=True)

    asyncio.run(fleet.through(lambda: kill("stub", "Planner"), all_answered_without_it))
    assert fleet.reconnects == 0
    deadline = time.monotonic() + PATIENCE_S
    with RobotClient(f"127.0.0.1:{stub.port}", robot="robot 1", timeout_s=PATIENCE_S) as client:
        while (reply := _fresh(client)) is None:
            assert time.monotonic() < deadline, "no planner was started again"
            time.sleep(0.1)
        check(reply, 1, 0)


def _fresh(client) -> Reply | None:
    """An episode's first chunk; None while no planner answers: held, or refused where there is nothing to hold."""
    try:
        reply = client.act(observe(1), reset=True)
    except RefusedError as refusal:
        assert "level planner does not answer" in str(refusal)  # noqa: PT017  # another refusal is a fault
        return None
    return None if reply.held else reply


def test_a_refiner_that_is_killed_costs_no_episode(stub):
    """What it had under way is asked of the other one; nobody gets another robot's answer, nobody loses its connection."""
    fleet = Fleet(stub.port)
    asyncio.run(fleet.through(lambda: kill("stub", "Refiner"), lambda killed: min(fleet.since(killed, fresh=True)) >= 5))
    assert fleet.reconnects == 0


def test_a_gateway_that_is_killed_loses_no_robot(stub):
    """Its robots come back to the other one and go on at the step at which they were."""
    fleet = Fleet(stub.port)
    asyncio.run(fleet.through(lambda: kill("stub", "Gateway"), lambda killed: min(fleet.since(killed, fresh=True)) >= 5))
    assert fleet.reconnects > 0
