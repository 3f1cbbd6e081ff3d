"""On a GPU: answers from CUDA graphs are those of the networks as written, in bf16 nearly, and go on with other weights."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from libra_ray import checkpoint
from libra_ray.inference.engine import InferenceEngine, buckets
from libra_ray.inference.recording import CallRecording, CudaGraphs
from libra_ray.inference.tensors import LevelInput
from libra_ray.model.registry import SYSTEMS
from libra_ray.policy import SystemPolicy, act, load_policy
from libra_ray.types import Intent
from tests.inference.tolerance import differences, within_tolerance
from tests.model.builders import make_observation, save_checkpoint, tiny_model
from tests.model.test_systems import FORMS, TOY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
WRITTEN = {"policy.precision": "fp32", "policy.compile": "none"}
GRAPHS = {"policy.precision": "fp32", "policy.compile": "graphs"}
CLOSE = {"atol": 5e-3, "rtol": 0}
"""Other sizes of batch take other kernels, of convolutions in TF32."""
EVERY = [*SYSTEMS, "anchor_two_levels", "anchor_libra", TOY]


@pytest.fixture(scope="module", params=EVERY)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(place, tiny_model(FORMS[request.param]))
    return place


@pytest.fixture(scope="module")
def libra(tmp_path_factory):
    place = tmp_path_factory.mktemp("libra") / "checkpoint"
    save_checkpoint(place, tiny_model())
    return place


def captured(policy: SystemPolicy) -> int:
    """How many calls it has captured, and every one that it was asked for."""
    assert isinstance(policy.engine, InferenceEngine)
    assert isinstance(policy.engine._recorder, CudaGraphs)
    assert not policy.engine._as_written
    assert all(isinstance(recording, CallRecording) for recording in policy.engine._recordings.values())
    return len(policy.engine._recordings)


def actions(policy, robots):
    """Of a batch, `(B, H, D)`."""
    return np.stack([chunk.actions for chunk in act(policy, [make_observation(robot) for robot in robots])])


def both(one, other, seen):
    """The answers of every level of two policies, which read the intents of the first."""
    intents = {None: [None] * len(seen)}
    for level in one.levels:
        mine, theirs = (of.infer(level.name, seen, intents[level.reads]) for of in (one, other))
        intents[level.name] = mine
        for a, b in zip(mine, theirs, strict=True):
            if level is one.levels[-1]:
                yield a.actions, b.actions
            else:
                yield from ((a.values[name], b.values[name]) for name in a.values)


def test_graphs_answer_as_the_networks_do_at_every_size_of_batch(folder, capsys):
    written, graphs = (load_policy(folder, "cuda", changes=changes) for changes in (WRITTEN, GRAPHS))
    for robots in (1, 2, 3, 8, 5):
        seen = [make_observation(robot, step=1) for robot in range(robots)]
        pairs = list(both(written, graphs, seen))
        assert np.mean([np.allclose(a, b, **CLOSE) for a, b in pairs]) >= 0.9, "near a tie another class may win"
    assert captured(graphs) == len(graphs.levels) * len(buckets(8))
    assert "policy:" not in capsys.readouterr().err


def test_by_itself_a_policy_runs_in_bf16_and_as_graphs(folder):
    policy, wide = load_policy(folder, "cuda"), load_policy(folder, "cuda", changes=WRITTEN)
    seen = [make_observation(robot) for robot in range(16)]
    found = differences(wide, policy, seen)
    assert within_tolerance(found), found
    assert captured(policy) == len(policy.levels)
    assert actions(policy, range(2)).dtype == np.float32
    types = {weight.dtype for weight in policy.model.parameters()}
    assert (torch.bfloat16 in types) == hasattr(policy.model, "STAYS_FP32")


def test_a_robot_gets_the_same_answer_in_any_company(libra):
    policy = load_policy(libra, "cuda", changes=GRAPHS)
    alone = [actions(policy, [robot])[0] for robot in range(5)]
    for robots in ([0, 1, 2], [2, 1, 0], [4, 3, 4, 0, 1]):
        apart = np.abs(actions(policy, robots) - np.stack([alone[robot] for robot in robots]))
        assert (apart.reshape(len(robots), -1).max(axis=1) <= CLOSE["atol"]).mean() >= 0.6, "near a tie another class may win"
    first = actions(policy, range(4))
    kept = first.copy()
    actions(policy, range(4, 8))
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(actions(policy, range(4)), kept)


def test_nothing_is_captured_after_warming_up(libra):
    policy = load_policy(libra, "cuda")
    policy.warm_up(policy.batches(6))
    warm = captured(policy)
    assert warm == len(policy.levels) * len(buckets(6))
    for robots in range(1, 9):
        actions(policy, range(robots))
    assert captured(policy) == warm


@pytest.mark.parametrize("changes", [GRAPHS, {}], ids=["fp32", "auto"])
def test_other_weights_are_taken_in_place_and_graphs_go_on(changes, libra, tmp_path):
    save_checkpoint(tmp_path / "other", tiny_model({"train.seed": 1}))
    policy = load_policy(libra, "cuda", changes=changes)
    before, warm = actions(policy, range(3)), captured(policy)
    assert policy.take(checkpoint.load(tmp_path / "other", changes=changes))
    after = actions(policy, range(3))
    assert captured(policy) == warm
    fresh = SystemPolicy(checkpoint.load(tmp_path / "other", changes=changes), "cuda")
    np.testing.assert_allclose(after, actions(fresh, range(3)), **CLOSE)
    assert not np.array_equal(after, before)


def test_the_level_alone_answers_what_infer_does(libra):
    policy, seen = load_policy(libra, "cuda"), [make_observation(robot) for robot in range(3)]
    first = policy.levels[0].name
    asked = policy.asked(first, seen, [None] * 3)
    assert isinstance(asked, LevelInput)
    values = policy.engine.answer(first, asked)
    for row, intent in enumerate(policy.infer(first, seen, [None] * 3)):
        assert isinstance(intent, Intent)
        for name, value in intent.values.items():
            np.testing.assert_array_equal(values[name][row], value)


def test_threads_get_their_own_answers(libra):
    policy = load_policy(libra, "cuda")
    expected, together = [actions(policy, [robot]) for robot in range(4)], threading.Barrier(4)

    def ask(robot):
        together.wait()
        return [actions(policy, [robot]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for robot, found in enumerate(pool.map(ask, range(4))):
            for answer in found:
                np.testing.assert_array_equal(answer, expected[robot])


def test_a_level_that_looks_at_values_is_run_as_written_and_the_device_goes_on(libra, capsys):
    policy, written = (load_policy(libra, "cuda", changes=changes) for changes in (GRAPHS, WRITTEN))
    infer = policy.model.infer

    def looking(level, seen, *rest):
        assert float(seen.state.sum()) < 1e9
        return infer(level, seen, *rest)

    policy.model.infer = looking
    np.testing.assert_allclose(actions(policy, range(3)), actions(written, range(3)), **CLOSE)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" is run as it is written")[0] for line in said] == [
        "policy: level planner",
        "policy: level refiner",
    ]
    again = load_policy(libra, "cuda", changes=GRAPHS)
    np.testing.assert_allclose(actions(again, range(3)), actions(written, range(3)), **CLOSE)
    assert captured(again) == len(again.levels)


COMPILED = """
import sys
import numpy as np
from libra_ray.inference.recording import CudaGraphs
from libra_ray.policy import act, load_policy

def answered(how):
    policy = load_policy(sys.argv[1], "cuda", changes={"policy.precision": "fp32", "policy.compile": how})
    actions = act(policy, [policy.blank()] * 2)[1].actions
    assert how == "none" or isinstance(policy.engine._recorder, CudaGraphs) and len(policy.engine._recordings) == 1
    return actions

print(max(np.abs(answered("none") - answered(how)).max() for how in ("inductor", "layers")))
"""


def test_what_is_compiled_within_graphs_answers_as_the_networks_do(tmp_path):
    """In a process of its own: here shapes are checked by what cannot be traced."""
    save_checkpoint(tmp_path / "checkpoint", tiny_model({"model.system": "regression"}))
    asked = [sys.executable, "-W", "ignore", "-c", COMPILED, str(tmp_path / "checkpoint")]
    run = subprocess.run(asked, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= CLOSE["atol"]
