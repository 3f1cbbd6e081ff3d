"""Answers from recordings are those of the networks as written, whoever asks with whom; in bf16 within a stated tolerance."""

import functools
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from libra_ray import checkpoint
from libra_ray.config import PolicyConfig
from libra_ray.inference import engine as engines
from libra_ray.inference.engine import InferenceEngine, buckets
from libra_ray.inference.recording import CallAgain
from libra_ray.model.registry import SYSTEMS
from libra_ray.policy import SystemPolicy, act, load_policy
from tests.inference.tolerance import differences, within_tolerance
from tests.model.builders import make_observation, save_checkpoint, tiny_model
from tests.model.test_systems import FORMS, TOY

CPU = torch.device("cpu")
CLOSE = {"atol": 1e-4, "rtol": 0}
"""Batches of other sizes are added up in another order."""
GOES_ON = {"refiner__max_committed_steps": 2}


ROOT = Path(__file__).parents[2]
COMPILED = """
import functools, sys
import numpy as np
import torch
from libra_ray.policy import act, load_policy

torch.compile = functools.partial(torch.compile, backend="eager")
written = load_policy(sys.argv[1])
compiled = load_policy(sys.argv[1], changes={"policy.compile": "inductor"})
apart = 0.0
for robots in (1, 3):
    chunks = (act(policy, [policy.blank()] * robots) for policy in (written, compiled))
    apart = max(apart, *(np.abs(a.actions - b.actions).max() for a, b in zip(*chunks)))
print(apart, len(compiled.engine._recordings))
"""


class Counting(CallAgain):
    """Counts what it records."""

    def __init__(self):
        super().__init__(CPU)
        self.recorded = 0

    def record(self, call):
        self.recorded += 1
        return super().record(call)


class Unable(CallAgain):
    """Records nothing: the errors are those of a capture that breaks off."""

    def record(self, call):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand much more")
        except RuntimeError:
            raise RuntimeError("capture was invalidated") from None


def recorded(policy, recorder=None):
    """The policy, its answers from recordings."""
    made = SystemPolicy(policy.source, variant=policy.variant)
    made.engine = InferenceEngine(policy.model, CPU, PolicyConfig(), policy.variant, recorder or Counting())
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of checkpoints by their changes; each is made once."""

    @functools.cache
    def made(**changes):
        folder = tmp_path_factory.mktemp("saved") / "checkpoint"
        save_checkpoint(folder, tiny_model({name.replace("__", "."): value for name, value in changes.items()}))
        return folder

    return made


def answers(policy, seen):
    """Of every level: its values, or its chunk and measures."""
    intents, found = {None: [None] * len(seen)}, []
    for level in policy.levels:
        intents[level.name] = policy.infer(level.name, seen, intents[level.reads])
        for answer in intents[level.name]:
            found += [answer.actions, *answer.measures.values()] if level is policy.levels[-1] else [*answer.values.values()]
    return found


@pytest.mark.parametrize("name", [*SYSTEMS, "anchor_two_levels", TOY])
def test_recorded_answers_are_those_of_the_networks_as_written(name, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model(FORMS[name]))
    policy = load_policy(tmp_path / "checkpoint")
    played = recorded(policy)
    for robots in (3, 1, 4, 2):
        seen = [make_observation(robot, step=2) for robot in range(robots)]
        for one, other in zip(answers(played, seen), answers(policy, seen), strict=True):
            np.testing.assert_allclose(one, other, **CLOSE)


def test_a_robot_gets_the_same_answer_in_any_company(saved):
    policy = recorded(load_policy(saved()))
    seen = [make_observation(robot) for robot in range(5)]
    alone = [act(policy, [one])[0].actions for one in seen]
    for robots in ([0, 1, 2], [2, 1, 0], [4, 4, 3, 2, 2], [1, 0, 3, 4]):
        for robot, chunk in zip(robots, act(policy, [seen[robot] for robot in robots]), strict=True):
            np.testing.assert_allclose(chunk.actions, alone[robot], **CLOSE)


def test_rows_left_over_repeat_one_that_was_asked(saved):
    policy, states = recorded(load_policy(saved())), []
    infer = policy.model.infer

    def noting(level, seen, *rest):
        states.append(seen.state.clone())
        return infer(level, seen, *rest)

    policy.model.infer = noting
    act(policy, [make_observation(robot) for robot in range(5)])
    act(policy, [make_observation(robot) for robot in range(6, 8)])
    act(policy, [make_observation(robot) for robot in range(3)])
    assert {len(state) for state in states} == {8, 2, 4}
    for state in states:
        distinct = {tuple(row) for row in state.tolist()}
        assert len(distinct) == {8: 5, 2: 2, 4: 3}[len(state)]
        assert torch.equal(state[-1], state[len(distinct) - 1])


def test_more_robots_than_the_largest_batch_are_answered_in_parts(saved, monkeypatch):
    monkeypatch.setattr(engines, "LARGEST", 4)
    policy, counting = load_policy(saved()), Counting()
    played, seen = recorded(policy, counting), [make_observation(robot) for robot in range(9)]
    for one, other in zip(answers(played, seen), answers(policy, seen), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)
    assert counting.recorded == 4, "of both levels one for 4 robots and one for the ninth"
    assert played.batches(100) == (1, 2, 4)


def test_of_recordings_those_used_last_are_kept(saved, monkeypatch):
    monkeypatch.setattr(engines, "KINDS", 3)
    policy, counting = load_policy(saved()), Counting()
    played = recorded(policy, counting)
    for robots, recordings in ((1, 2), (2, 4), (2, 4), (1, 6), (4, 8)):
        seen = [make_observation(robot) for robot in range(robots)]
        for one, other in zip(answers(played, seen), answers(policy, seen), strict=True):
            np.testing.assert_allclose(one, other, **CLOSE)
        assert counting.recorded == recordings
    assert len(played.engine._recordings) == 3


def test_buckets_are_the_powers_of_two_up_to_the_one_that_holds_all():
    assert [buckets(most) for most in (1, 2, 3, 8, 9)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8, 16)]


def test_nothing_is_new_after_warming_up(saved):
    """Whoever waits and however far the others are committed, with intents and without."""
    counting = Counting()
    policy = recorded(load_policy(saved(**GOES_ON)), counting)
    policy.warm_up(policy.batches(5))
    warm = counting.recorded
    assert warm == 2 * len(buckets(5))
    going_on = [replace(make_observation(robot), committed=np.zeros((robot, 4), np.float32)) for robot in range(1, 3)]
    for seen in ([make_observation(0)] * 3, [make_observation(0), *going_on], going_on * 2):
        plans = policy.infer("planner", seen, [None] * len(seen))
        policy.infer("refiner", seen, plans)
        policy.infer("refiner", seen, [None] * len(seen))
    assert counting.recorded == warm


def test_waiting_for_nothing_is_being_committed_to_nothing(saved):
    """Of a recording's fixed width: the steps that nobody is committed to are those of a robot that waits."""
    policy = load_policy(saved(**GOES_ON))
    committed = np.full((1, 4), 0.5, np.float32)
    seen = [make_observation(0), replace(make_observation(1), committed=committed), make_observation(2)]
    played = recorded(policy)
    for one, other in zip(act(played, seen), act(policy, seen), strict=True):
        np.testing.assert_allclose(one.actions, other.actions, **CLOSE)
    np.testing.assert_allclose(act(played, seen)[1].actions[0], committed[0], atol=1e-5)


def test_no_answer_lies_in_memory_that_the_next_one_uses(saved):
    policy = recorded(load_policy(saved()))
    first = answers(policy, [make_observation(0), make_observation(1)])
    kept = [np.copy(value) for value in first]
    answers(policy, [make_observation(2), make_observation(3)])
    for value, before in zip(first, kept, strict=True):
        np.testing.assert_array_equal(value, before)


def test_threads_that_ask_at_the_same_time_get_their_own_answers(saved):
    policy = recorded(load_policy(saved()))
    expected = [act(policy, [make_observation(robot)])[0].actions for robot in range(4)]
    together = threading.Barrier(4)

    def ask(robot):
        together.wait()
        return [act(policy, [make_observation(robot)])[0].actions for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for robot, found in enumerate(pool.map(ask, range(4))):
            for actions in found:
                np.testing.assert_array_equal(actions, expected[robot])


def test_other_weights_are_taken_in_place_and_recordings_go_on(saved, tmp_path):
    save_checkpoint(tmp_path / "other", tiny_model({"train.seed": 1, "train.steps": 7}))
    counting, seen = Counting(), [make_observation(robot) for robot in range(3)]
    policy = recorded(load_policy(saved()), counting)
    before, memory = answers(policy, seen), [value.data_ptr() for value in policy.model.state_dict().values()]
    other = checkpoint.load(tmp_path / "other")
    wider = replace(other.stats, action=replace(other.stats.action, low=3 * other.stats.action.low))
    assert policy.take(replace(other, stats=wider))
    after, expected = answers(policy, seen), answers(SystemPolicy(replace(other, stats=wider)), seen)
    assert [value.data_ptr() for value in policy.model.state_dict().values()] == memory
    assert counting.recorded == 2
    assert policy.source.manifest == other.manifest
    for one, same in zip(after, expected, strict=True):
        np.testing.assert_allclose(one, same, **CLOSE)
    assert not all(np.array_equal(one, old) for one, old in zip(after, before, strict=True))


@pytest.mark.parametrize(
    "changes", [{"planner.depth": 2}, {"refiner.denoising_steps": 3}, {"model.system": "monolithic"}, {"action.chunks": 3}]
)
def test_weights_of_another_model_are_not_taken(changes, saved, tmp_path):
    save_checkpoint(tmp_path / "other", tiny_model(changes))
    policy = load_policy(saved())
    before, source = act(policy, [make_observation()])[0].actions, policy.source
    assert not policy.take(checkpoint.load(tmp_path / "other"))
    assert policy.source is source
    np.testing.assert_array_equal(act(policy, [make_observation()])[0].actions, before)


def test_a_level_that_cannot_be_recorded_is_run_as_written_and_that_is_said_once(saved, capsys):
    policy, seen = load_policy(saved()), [make_observation(robot) for robot in range(3)]
    played = recorded(policy, Unable(CPU))
    for _ in range(2):
        for one, other in zip(answers(played, seen), answers(policy, seen), strict=True):
            np.testing.assert_allclose(one, other, **CLOSE)
    said = capsys.readouterr().err.splitlines()
    why = "is run as it is written, for it cannot be recorded: operation not permitted when stream is capturing"
    assert said == [f"policy: level {level.name} {why}" for level in policy.levels]


def test_graphs_are_refused_where_there_is_no_gpu(saved):
    with pytest.raises(ValueError, match="compile=graphs needs a GPU, and there is none; give auto, none or inductor"):
        load_policy(saved(), changes={"policy.compile": "graphs"})


def test_compiled_answers_are_those_of_the_networks_as_written(saved):
    """Traced, and cut to the sizes of batch, as for inductor, whose own arithmetic is left out: it compiles for a minute.

    In a process of its own: here shapes are checked by what cannot be traced.
    """
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED, str(saved())], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    apart, recordings = run.stdout.split()
    assert float(apart) < 1e-4
    assert recordings == "4"


@pytest.mark.parametrize("name", [*SYSTEMS, "anchor_two_levels", TOY])
def test_in_bf16_a_policy_answers_nearly_the_same(name, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model(FORMS[name]))
    policy = load_policy(tmp_path / "checkpoint")
    narrow = load_policy(tmp_path / "checkpoint", changes={"policy.precision": "bf16"})
    seen = [make_observation(robot) for robot in range(16)]
    assert within_tolerance(differences(policy, narrow, seen)), differences(policy, narrow, seen)
    wide, rounded = (np.stack([chunk.actions for chunk in act(of, seen)]) for of in (policy, narrow))
    assert rounded.dtype == np.float32
    assert not np.array_equal(rounded, wide)
    assert {value.dtype for value in policy.model.parameters()} == {torch.float32}


def test_what_must_not_be_rounded_stays_in_fp32(saved):
    model = load_policy(saved(**GOES_ON), changes={"policy.precision": "bf16"}).model
    types = {name: value.dtype for name, value in model.named_parameters()}
    wide = {name for name, kind in types.items() if kind == torch.float32}
    assert {"refiner.position", "refiner.from_action.weight", "refiner.to_action.weight", "planner.from_state.weight"} < wide
    assert all(types[f"{part}.blocks.0.attention.to_qkv.weight"] == torch.bfloat16 for part in ("planner", "refiner"))


def test_what_a_policy_is_made_of_is_left_as_it_is(saved):
    """Training measures its own model in passing."""
    source = checkpoint.load(saved(), changes={"policy.precision": "bf16"})
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    act(SystemPolicy(source), [make_observation()])
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())
    assert {value.dtype for value in source.model.parameters()} == {torch.float32}
