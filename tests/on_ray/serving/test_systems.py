"""Systems of one, two and three levels, served side by side on one cluster: each gives what its own checkpoint says."""

import os
import signal
import time
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from prometheus_client.parser import text_string_to_metric_families

from libra_ray.client.client import RobotClient
from libra_ray.client.protocol import request
from tests.model.builders import SHAPE, make_observation, save_checkpoint, tiny_model
from tests.on_ray.serving.test_serving import PATIENCE_S, ready, replicas
from tests.serving.test_web import free_port

SYSTEMS = {
    "experts": {"model.system": "experts"},
    "anchors": {"model.system": "anchor_refine", "anchor_refine.levels": "two"},
    "hierarchy": {"model.system": "hierarchy"},
}
LEVELS = {"experts": 1, "anchors": 2, "hierarchy": 3}
SUBGOALS = ("lift", "push", "touch")


@pytest.fixture(scope="module")
def served(ray_cluster, tmp_path_factory):
    """By application: its port, and the policy of its checkpoint."""
    from ray import serve

    from libra_ray.on_ray.serving.app import build
    from libra_ray.policy import load_policy
    from libra_ray.serving.settings import ServingSettings
    from libra_ray.serving.weights import pinned

    folder, targets, found = tmp_path_factory.mktemp("systems"), [], {}
    for name, changes in SYSTEMS.items():
        save_checkpoint(folder / name, tiny_model(changes, replace(SHAPE, subgoals=SUBGOALS)))
        policy = load_policy(folder / name)
        light = {f"{place}.num_cpus": 0.1 for place in ("gateway", *(f"levels.{level.name}" for level in policy.levels))}
        given = {"checkpoint": str(folder / name), "port": free_port(), "rule": "fifo", **light}
        settings = pinned(ServingSettings.read(given))
        targets.append(serve.RunTarget(target=build(settings), name=name, route_prefix=f"/{name}"))
        found[name] = settings.port, policy
    serve.start(proxy_location="Disabled")
    serve.run_many(targets)
    assert all(ready(port) for port, _ in found.values())
    yield found
    serve.shutdown()


def alone(policy, seen):
    """What a policy answers by itself to an episode's first observation: actions, and what its intents tell."""
    above, told = [None], {}
    for level in policy.levels:
        above = policy.infer(level.name, [seen], above)
        told |= above[0].metadata if level != policy.levels[-1] else {}
    return above[0].actions, told


@pytest.mark.parametrize("name", SYSTEMS)
def test_openpis_client_gets_what_the_checkpoint_says(served, name):
    port, policy = served[name]
    client = WebsocketClientPolicy("127.0.0.1", port)
    told = client.get_server_metadata()
    assert [level["name"] for level in told["levels"]] == [level.name for level in policy.levels]
    assert len(policy.levels) == LEVELS[name]
    assert told["checkpoint_digest"] == policy.source.manifest.digest
    for seed in range(3):
        seen = make_observation(seed)
        actions, metadata = alone(policy, seen)
        message = {key: value for key, value in request(seen).items() if key not in ("step", "version")}
        answer = client.infer(message | {"reset": True})
        np.testing.assert_allclose(answer["actions"], actions, atol=1e-3)
        assert answer["metadata"] == metadata
        assert not answer["held"]
        for other in set(SYSTEMS) - {name}:
            assert not np.allclose(alone(served[other][1], seen)[0], actions, atol=1e-2), "they can be told apart"


def test_prometheus_tells_applications_apart(served):
    import ray

    for port, _ in served.values():
        robot = RobotClient(f"127.0.0.1:{port}", robot="one", timeout_s=PATIENCE_S)
        robot.act(make_observation(0), reset=True)
        robot.close()
    [node] = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end, found = time.monotonic() + PATIENCE_S, set()
    while not set(SYSTEMS) <= found and time.monotonic() < end:
        with urllib.request.urlopen(address, timeout=10) as answer:
            samples = [s for of in text_string_to_metric_families(answer.read().decode()) for s in of.samples]
        found = {s.labels["application"] for s in samples if s.name == "ray_libra_answered_requests_total" and s.value >= 1}
        time.sleep(0.2)
    assert set(SYSTEMS) <= found


def test_a_replica_that_is_killed_comes_back_and_the_other_applications_notice_nothing(served):
    _, policy = served["hierarchy"]
    robots = {name: RobotClient(f"127.0.0.1:{port}", robot="one", timeout_s=PATIENCE_S) for name, (port, _) in served.items()}
    wanted = {name: alone(policy, make_observation(0))[0] for name, (_, policy) in served.items()}
    for level in policy.levels:
        os.kill(replicas("hierarchy", level.name.capitalize())[0], signal.SIGKILL)
        for name in ("experts", "anchors"):
            np.testing.assert_allclose(robots[name].act(make_observation(0), reset=True).actions, wanted[name], atol=1e-3)
        assert comes_back(robots["hierarchy"], wanted["hierarchy"]), level.name
    for robot in robots.values():
        robot.close()


def comes_back(robot, wanted):
    """Whether an episode's first answer is soon again what it should be; until then it is refused or held."""
    from libra_ray.client.client import RefusedError

    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            reply = robot.act(make_observation(0), reset=True)
        except RefusedError:
            continue
        if not reply.held:
            return np.allclose(reply.actions, wanted, atol=1e-3)
        time.sleep(0.1)
    return False
