"""On a GPU: train, validate, resume, evaluate, serve, each once (`make test-gpu`). What they compute, other tests say."""

import asyncio

import numpy as np
import pytest
import torch

from libra_ray.checkpoint import load_trainer_state
from libra_ray.common.files import read_jsonl
from libra_ray.runs.folder import RunFolder
from tests.model.builders import make_observation, save_checkpoint, tiny_model
from tests.on_ray.doubles import debug_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
STOP, LAST = 10, 20


@pytest.fixture(scope="module")
def gpu_cluster():
    """A cluster with this machine's GPUs, gone afterwards: the other tests' has none."""
    import ray

    from libra_ray.on_ray.session import end, start_local

    if ray.is_initialized():
        pytest.skip("this process has a cluster without GPUs already; run `make test-gpu`")
    start_local(num_cpus=4, num_gpus=1, object_store_memory=512 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    end()


@pytest.fixture(scope="module")
def run(gpu_cluster, tmp_path_factory) -> RunFolder:
    """A run that was stopped half-way, after a validation."""
    from libra_ray.on_ray import record as recording
    from libra_ray.on_ray import train as training

    config = debug_config(
        ray__use_gpu=True,
        ray__simulator_actors=2,
        ray__train_cpus_per_worker=1,
        train__steps=LAST,
        train__log_every=1,
        train__validate_every=5,
        train__balance="gradient",
        refiner__vision="shared",
    )
    folder = RunFolder.open(tmp_path_factory.mktemp("gpu") / "run", config)
    with folder.stage("record") as clock:
        recording.record(folder, clock)
    with folder.stage("train") as clock:
        training.train(folder, clock, until=STOP)
    return folder


def test_it_trains_and_validates(run):
    rows = read_jsonl(run.path("train_log.jsonl"), dict)
    assert [row["step"] for row in rows] == list(range(1, STOP + 1))
    assert [row["step"] for row in rows if "val_token_entropy" in row] == [5, 10]
    assert all(row["memory_gib"] > 0 for row in rows), "only where a GPU computes is its memory known"
    [saved] = run.path("ray").rglob("state.pt")
    state = load_trainer_state(saved.parents[1])
    assert state["step"] == STOP
    assert all(value.whole().isfinite().all() for value in state["model"].values())


def test_it_resumes(run):
    from libra_ray.on_ray import train as training

    with run.stage("train") as clock:
        manifest = training.train(run, clock)
    assert manifest.finished
    assert [row["step"] for row in read_jsonl(run.path("train_log.jsonl"), dict)] == list(range(1, LAST + 1))


def test_it_evaluates(run):
    from libra_ray.evaluation.log import read_evaluation
    from libra_ray.on_ray import evaluate as evaluation

    assert evaluation.device_of(run.config) == "cuda"
    with run.stage("evaluate") as clock:
        evaluation.evaluate(run, clock)
    results = read_evaluation(run).results
    assert len(results) == len(evaluation.all_jobs(run.config, evaluation.controllers_of(run.config, run.config)))
    assert {result.error for result in results} == {None}


def test_it_serves(gpu_cluster, tmp_path):
    from ray import serve

    from libra_ray.client.client import AsyncRobotClient
    from libra_ray.on_ray.serving.app import build
    from libra_ray.policy import act, load_policy
    from libra_ray.serving.settings import ServingSettings
    from libra_ray.serving.weights import pinned
    from tests.on_ray.serving.test_serving import ready
    from tests.serving.test_web import free_port

    save_checkpoint(tmp_path / "saved", tiny_model())
    light = {f"{deployment}.num_cpus": 0.1 for deployment in ("levels.planner", "levels.refiner", "gateway")}
    shares = {f"levels.{level}.num_gpus": 0.4 for level in ("planner", "refiner")}
    settings = pinned(ServingSettings.read({"checkpoint": str(tmp_path / "saved"), "port": free_port(), **light, **shares}))
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    try:
        serve.run(build(settings), name="gpu", route_prefix="/")
        assert ready(settings.port)

        async def ask():
            async with AsyncRobotClient(f"127.0.0.1:{settings.port}", robot="robot") as client:
                return await client.act(make_observation(1))

        reply = asyncio.run(ask())
    finally:
        serve.shutdown()
    policy, seen = load_policy(tmp_path / "saved", "cuda"), [make_observation(1)]
    assert not reply.held
    np.testing.assert_allclose(reply.actions, act(policy, seen)[0].actions, atol=1e-2)
