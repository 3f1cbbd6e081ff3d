"""Policies: raw observations in, chunks in the robot's own units out, and no answer depends on its company."""

from dataclasses import replace

import numpy as np
import pytest

from libra_ray import checkpoint
from libra_ray.data.transforms import Pipeline
from libra_ray.model.libra import RobotShape
from libra_ray.policy import CoarseOnlyPolicy, LibraPolicy, MonolithicPolicy, load_policy
from libra_ray.types import IMAGE_KEY, Observation, Plan
from tests.model.builders import KEYS, SHAPE, make_observation, make_stats, save_checkpoint, tiny_model

LOW, HIGH = -2, 4  # the range of `make_stats`


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    save_checkpoint(folder, tiny_model())
    return checkpoint.load(folder)


@pytest.fixture(scope="module")
def policy(source) -> LibraPolicy:
    return LibraPolicy(source)


@pytest.fixture(scope="module")
def coarse(source) -> CoarseOnlyPolicy:
    return CoarseOnlyPolicy(source)


@pytest.fixture(params=["policy", "coarse"])
def either(request):
    return request.getfixturevalue(request.param)


def at(observation: Observation, step: int) -> Observation:
    return replace(observation, step=step)


def test_permuting_the_robots_permutes_their_answers(either):
    seen, order = [make_observation(robot) for robot in range(5)], [3, 0, 4, 1, 2]
    plans = either.plan(seen)
    shuffled = either.plan([seen[i] for i in order])
    for i, plan in zip(order, shuffled, strict=True):
        np.testing.assert_array_equal(plan.tokens, plans[i].tokens)
    chunks = either.refine(seen, plans)
    for i, chunk in zip(order, either.refine([seen[i] for i in order], shuffled), strict=True):
        np.testing.assert_allclose(chunk.actions, chunks[i].actions, atol=1e-4)
    assert len({chunk.actions.tobytes() for chunk in chunks}) > 1


def test_a_robot_alone_gets_what_it_gets_in_company(either):
    seen = [at(make_observation(robot), robot) for robot in range(4)]
    plans = either.plan(seen)
    chunks = either.refine([at(o, o.step + 5) for o in seen], plans)
    for observation, plan, chunk in zip(seen, plans, chunks, strict=True):
        alone = either.plan([observation])[0]
        np.testing.assert_array_equal(alone.tokens, plan.tokens)
        again = either.refine([at(observation, observation.step + 5)], [alone])[0]
        np.testing.assert_allclose(again.actions, chunk.actions, atol=1e-4)


def test_the_same_question_gets_the_same_answer(policy):
    seen = [make_observation()]
    plans = policy.plan(seen)
    first = policy.refine(seen, plans)[0].actions
    policy.refine([make_observation(1)], policy.plan([make_observation(1)]))
    np.testing.assert_array_equal(policy.refine(seen, plans)[0].actions, first)


def test_nobody_asks_nothing(either):
    assert either.plan([]) == []
    assert either.refine([], []) == []


def test_steps_and_shapes(either, source):
    observation = at(make_observation(), 7)
    plan = either.plan([observation])[0]
    action = source.config.action
    assert (plan.tokens.shape, plan.tokens.dtype) == ((action.plan_steps, SHAPE.action_dim), np.int64)
    assert (plan.first_step, plan.end_step) == (7, 7 + action.plan_steps)
    chunk = either.refine([at(observation, 11)], [plan])[0]
    assert (chunk.actions.shape, chunk.actions.dtype) == ((action.horizon, SHAPE.action_dim), np.float32)
    assert (chunk.first_step, chunk.plan_first_step) == (11, 7)


def test_actions_are_in_the_robots_own_units(policy):
    seen = [make_observation(robot) for robot in range(8)]
    actions = np.stack([chunk.actions for chunk in policy.refine(seen, policy.plan(seen))])
    assert ((actions >= LOW) & (actions <= HIGH)).all()
    assert actions.max() > 1


def test_states_are_normalised_by_the_checkpoints_statistics(source):
    """A checkpoint whose states are ten times as large gives the same answer to states ten times as large."""
    stats = make_stats()
    wide = replace(stats, state=replace(stats.state, low=10 * stats.state.low, high=10 * stats.state.high))
    seen = make_observation()
    tenfold = LibraPolicy(replace(source, stats=wide)).plan([replace(seen, state=10 * seen.state)])[0]
    np.testing.assert_array_equal(tenfold.tokens, LibraPolicy(source).plan([seen])[0].tokens)


def test_coarse_only_executes_bin_centres(coarse, source):
    seen, bins = [make_observation(robot) for robot in range(3)], source.config.action.bins
    for plan, chunk in zip(plans := coarse.plan(seen), coarse.refine(seen, plans), strict=True):
        centres = (plan.tokens[: len(chunk.actions)] + 0.5) / bins * 2 - 1
        np.testing.assert_allclose(chunk.actions, LOW + (centres + 1) / 2 * (HIGH - LOW), atol=1e-5)


def test_both_rows_share_the_planner(policy, coarse):
    seen = [make_observation(robot) for robot in range(3)]
    for one, other in zip(policy.plan(seen), coarse.plan(seen), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_plans_tail_is_padded_with_the_hidden_token(policy, coarse, source):
    observation = make_observation()
    plan = policy.plan([observation])[0]
    horizon, steps = source.config.action.horizon, source.config.action.plan_steps
    hidden = source.model.bins.hidden
    late = at(observation, steps - 2)
    padded = Plan(tokens=np.concatenate([plan.tokens, np.full((horizon, SHAPE.action_dim), hidden)]), first_step=0)
    np.testing.assert_array_equal(policy.refine([late], [plan])[0].actions, policy.refine([late], [padded])[0].actions)
    # Where no intent is known, the middle of the normalised range is executed.
    np.testing.assert_allclose(coarse.refine([late], [plan])[0].actions[2:], (LOW + HIGH) / 2, atol=1e-6)


def test_only_the_plans_current_slice_is_read(policy):
    observation = make_observation()
    plan = policy.plan([observation])[0]
    changed = plan.tokens.copy()
    changed[:5] = (changed[:5] + 1) % 10
    late, other = [at(observation, 5)], replace(plan, tokens=changed)
    np.testing.assert_array_equal(policy.refine(late, [plan])[0].actions, policy.refine(late, [other])[0].actions)
    now = [observation]
    assert not np.array_equal(policy.refine(now, [plan])[0].actions, policy.refine(now, [other])[0].actions)


WRONG_OBSERVATIONS = {
    "size": (lambda o: replace(o, images={IMAGE_KEY: np.zeros((64, 64, 3), np.uint8)}), r"needs uint8 \(32, 32, 3\)"),
    "dtype": (lambda o: replace(o, images={IMAGE_KEY: np.zeros((32, 32, 3), np.float32)}), "is float32"),
    "channels first": (lambda o: replace(o, images={IMAGE_KEY: np.zeros((3, 32, 32), np.uint8)}), r"\(3, 32, 32\)"),
    "key": (lambda o: replace(o, images={"camera": o.images[IMAGE_KEY]}), f"no '{IMAGE_KEY}'"),
    "no picture": (lambda o: replace(o, images={}), f"needs {IMAGE_KEY}"),
    "nan": (lambda o: replace(o, state=np.array([0, np.nan, 0, 0, 0], np.float32)), "5 finite numbers"),
    "infinity": (lambda o: replace(o, state=np.array([0, np.inf, 0, 0, 0], np.float32)), "5 finite numbers"),
    "state": (lambda o: replace(o, state=np.zeros(4, np.float32)), r"5 finite numbers; got shape \(4,\)"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG_OBSERVATIONS.values(), ids=WRONG_OBSERVATIONS)
def test_observations_that_do_not_fit_are_refused(policy, spoil, message):
    good = make_observation()
    plan = policy.plan([good])
    with pytest.raises(ValueError, match=message):
        policy.plan([good, spoil(good)])
    with pytest.raises(ValueError, match=message):
        policy.refine([spoil(good)], plan)


WRONG_PLANS = {
    "past": (lambda p: replace(p, first_step=-10), "covers steps -10 to -1"),
    "future": (lambda p: replace(p, first_step=1), "the observation is of step 0"),
    "dimensions": (lambda p: replace(p, tokens=p.tokens[:, :1]), "4 tokens per step"),
    "no dimensions": (lambda p: replace(p, tokens=p.tokens[:, 0]), "4 tokens per step"),
    "too large": (lambda p: replace(p, tokens=p.tokens + 11), r"in \[0, 10\)"),
    "negative": (lambda p: replace(p, tokens=p.tokens - 11), r"in \[0, 10\)"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG_PLANS.values(), ids=WRONG_PLANS)
def test_plans_that_do_not_fit_are_refused(either, spoil, message):
    seen = [make_observation()]
    with pytest.raises(ValueError, match=message):
        either.refine(seen, [spoil(either.plan(seen)[0])])


def test_every_observation_needs_its_plan(either):
    seen = [make_observation(0), make_observation(1)]
    with pytest.raises(ValueError, match="2 observations and 1 plans"):
        either.refine(seen, either.plan(seen)[:1])


def test_histories_and_cameras_reach_the_model_in_order(tmp_path):
    shape = RobotShape(action_dim=4, state_dim=5, cameras=2)
    save_checkpoint(tmp_path / "checkpoint", tiny_model({"data.history": 3}, shape))
    policy = load_policy(tmp_path / "checkpoint")
    seen = make_observation(past=4, cameras=2)
    pictures = policy._images([seen])[0].permute(0, 2, 3, 1).numpy()
    expected = [images[key] for key in KEYS for images in (*seen.past[-2:], seen.images)]
    np.testing.assert_array_equal(pictures, expected)
    young = policy._images([replace(seen, past=())])[0].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(young, [seen.images[key] for key in KEYS for _ in range(3)])
    broken = replace(seen, past=[*seen.past[:-1], {key: np.zeros((8, 8, 3), np.uint8) for key in KEYS}])
    with pytest.raises(ValueError, match=r"needs uint8 \(32, 32, 3\)"):
        policy.plan([broken])


def test_a_folder_becomes_the_policy_asked_for(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model())
    assert type(load_policy(tmp_path / "checkpoint")) is LibraPolicy
    assert type(load_policy(tmp_path / "checkpoint", coarse_only=True)) is CoarseOnlyPolicy
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_policy(tmp_path)


def test_a_monolithic_checkpoint_is_refused_as_coarse_only_and_answers_as_fresh_as_it_looks(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model({"refiner.condition": "features", "refiner.vision": "shared"}))
    with pytest.raises(ValueError, match=r"refiner\.condition=features.*no coarse tokens"):
        load_policy(tmp_path / "checkpoint", coarse_only=True)
    policy = load_policy(tmp_path / "checkpoint")
    assert type(policy) is MonolithicPolicy
    seen = [make_observation(robot) for robot in range(3)]
    plans = policy.plan(seen)
    later = [at(make_observation(robot + 5), 5) for robot in range(3)]
    chunks = policy.refine(later, plans)
    assert [(chunk.first_step, chunk.plan_first_step) for chunk in chunks] == [(5, 5)] * 3
    np.testing.assert_array_equal(policy.refine(later, policy.plan(later))[0].actions, chunks[0].actions)
    spoken = [replace(o, instruction="something else") for o in later]
    assert not np.allclose(policy.refine(spoken, plans)[0].actions, chunks[0].actions)


def test_training_and_policy_share_one_pipeline(policy, source):
    state = np.random.default_rng(0).normal(size=(2, SHAPE.state_dim)).astype(np.float32)
    seen = [replace(make_observation(robot), state=row) for robot, row in enumerate(state)]
    trained = Pipeline(source.stats, source.config.data.normalisation).inputs_state(state)
    np.testing.assert_array_equal(policy._state(seen).numpy(), trained)


def test_words_that_change_for_ever_do_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("libra_ray.policy.KNOWN_TEXTS", 4)
    save_checkpoint(tmp_path / "checkpoint", tiny_model())
    policy = load_policy(tmp_path / "checkpoint")
    for number in range(20):
        policy.tokenise(f"go to place {number}")
    assert policy._texts.cache_info().currsize == 4
