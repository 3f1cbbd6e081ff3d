"""Policies: raw observations in, chunks in the robot's own units out, and no answer depends on the rest of the batch."""

from dataclasses import replace

import numpy as np
import pytest

from libra_ray import checkpoint
from libra_ray.data.transforms import Pipeline
from libra_ray.policy import SystemPolicy, act, load_policy
from libra_ray.types import IMAGE_KEY, Observation, RobotShape
from tests.model.builders import KEYS, SHAPE, make_observation, make_stats, save_checkpoint, tiny_model
from tests.policies import plan, refine

LOW, HIGH = -2, 4  # the range of `make_stats`


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    save_checkpoint(folder, tiny_model())
    return checkpoint.load(folder)


@pytest.fixture(scope="module")
def policy(source) -> SystemPolicy:
    return SystemPolicy(source)


@pytest.fixture(scope="module")
def coarse(source) -> SystemPolicy:
    return SystemPolicy(source, variant="coarse_only")


@pytest.fixture(params=["policy", "coarse"])
def either(request):
    return request.getfixturevalue(request.param)


def at(observation: Observation, step: int) -> Observation:
    return replace(observation, step=step)


def test_permuting_the_robots_permutes_their_answers(either):
    seen, order = [make_observation(robot) for robot in range(5)], [3, 0, 4, 1, 2]
    plans = plan(either, seen)
    shuffled = plan(either, [seen[i] for i in order])
    for i, intent in zip(order, shuffled, strict=True):
        np.testing.assert_array_equal(intent.values["tokens"], plans[i].values["tokens"])
    chunks = refine(either, seen, plans)
    for i, chunk in zip(order, refine(either, [seen[i] for i in order], shuffled), strict=True):
        np.testing.assert_allclose(chunk.actions, chunks[i].actions, atol=1e-4)
    assert len({chunk.actions.tobytes() for chunk in chunks}) > 1


def test_a_robot_alone_gets_what_it_gets_in_a_batch(either):
    seen = [at(make_observation(robot), robot) for robot in range(4)]
    plans = plan(either, seen)
    chunks = refine(either, [at(o, o.step + 5) for o in seen], plans)
    for observation, intent, chunk in zip(seen, plans, chunks, strict=True):
        alone = plan(either, [observation])[0]
        np.testing.assert_array_equal(alone.values["tokens"], intent.values["tokens"])
        again = refine(either, [at(observation, observation.step + 5)], [alone])[0]
        np.testing.assert_allclose(again.actions, chunk.actions, atol=1e-4)


def test_the_same_question_gets_the_same_answer(policy):
    seen = [make_observation()]
    plans = plan(policy, seen)
    first = refine(policy, seen, plans)[0].actions
    act(policy, [make_observation(1)])
    np.testing.assert_array_equal(refine(policy, seen, plans)[0].actions, first)


def test_nobody_asks_nothing(either):
    assert plan(either, []) == []
    assert refine(either, [], []) == []


def test_steps_and_shapes(either, source):
    observation = at(make_observation(), 7)
    intent = plan(either, [observation])[0]
    action = source.config.action
    assert (intent.values["tokens"].shape, intent.values["tokens"].dtype) == ((action.plan_steps, SHAPE.action_dim), np.int64)
    assert (intent.first_step, intent.end_step) == (7, 7 + action.plan_steps)
    chunk = refine(either, [at(observation, 11)], [intent])[0]
    assert (chunk.actions.shape, chunk.actions.dtype) == ((action.horizon, SHAPE.action_dim), np.float32)
    assert (chunk.first_step, chunk.intent_first_step) == (11, 7)


def test_actions_are_in_the_robots_own_units(policy):
    seen = [make_observation(robot) for robot in range(8)]
    actions = np.stack([chunk.actions for chunk in act(policy, seen)])
    assert ((actions >= LOW) & (actions <= HIGH)).all()
    assert actions.max() > 1


def test_states_are_normalised_by_the_checkpoints_statistics(source):
    """A checkpoint whose states are ten times as large gives the same answer to states ten times as large."""
    stats = make_stats()
    wide = replace(stats, state=replace(stats.state, low=10 * stats.state.low, high=10 * stats.state.high))
    seen = make_observation()
    tenfold = plan(SystemPolicy(replace(source, stats=wide)), [replace(seen, state=10 * seen.state)])[0]
    np.testing.assert_array_equal(tenfold.values["tokens"], plan(SystemPolicy(source), [seen])[0].values["tokens"])


def test_coarse_only_executes_bin_centres(coarse, source):
    seen, bins = [make_observation(robot) for robot in range(3)], source.config.action.bins
    for intent, chunk in zip(plans := plan(coarse, seen), refine(coarse, seen, plans), strict=True):
        centres = (intent.values["tokens"][: len(chunk.actions)] + 0.5) / bins * 2 - 1
        np.testing.assert_allclose(chunk.actions, LOW + (centres + 1) / 2 * (HIGH - LOW), atol=1e-5)


def test_both_rows_share_the_planner(policy, coarse):
    seen = [make_observation(robot) for robot in range(3)]
    for one, other in zip(plan(policy, seen), plan(coarse, seen), strict=True):
        np.testing.assert_array_equal(one.values["tokens"], other.values["tokens"])


def test_a_plans_tail_is_padded_with_the_hidden_token(policy, coarse, source):
    observation = make_observation()
    intent = plan(policy, [observation])[0]
    steps = source.config.action.plan_steps
    hidden = source.model.tokenizer.mask_token
    late = at(observation, steps - 2)
    tail = np.full((steps, SHAPE.action_dim), hidden)
    tail[:2] = intent.values["tokens"][-2:]
    padded = replace(intent, values={"tokens": tail}, first_step=steps - 2)
    np.testing.assert_array_equal(refine(policy, [late], [intent])[0].actions, refine(policy, [late], [padded])[0].actions)
    # Where no intent is known, the middle of the normalised range is executed.
    np.testing.assert_allclose(refine(coarse, [late], [intent])[0].actions[2:], (LOW + HIGH) / 2, atol=1e-6)


def test_only_the_plans_current_slice_is_read(policy):
    observation = make_observation()
    intent = plan(policy, [observation])[0]
    changed = intent.values["tokens"].copy()
    changed[:5] = (changed[:5] + 1) % 10
    late, other = [at(observation, 5)], replace(intent, values={"tokens": changed})
    np.testing.assert_array_equal(refine(policy, late, [intent])[0].actions, refine(policy, late, [other])[0].actions)
    now = [observation]
    assert not np.array_equal(refine(policy, now, [intent])[0].actions, refine(policy, now, [other])[0].actions)


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
    intent = plan(policy, [good])
    with pytest.raises(ValueError, match=message):
        plan(policy, [good, spoil(good)])
    with pytest.raises(ValueError, match=message):
        refine(policy, [spoil(good)], intent)


def holding(intent, change):
    return replace(intent, values={"tokens": change(intent.values["tokens"])})


WRONG_PLANS = {
    "future": (lambda p: replace(p, first_step=1), "the observation is of step 0"),
    "dimensions": (lambda p: holding(p, lambda tokens: tokens[:, :1]), r"tokens of shape \(10, 4\)"),
    "no dimensions": (lambda p: holding(p, lambda tokens: tokens[:, 0]), r"tokens of shape \(10, 4\)"),
    "too large": (lambda p: holding(p, lambda tokens: tokens + 11), r"in \[0, 10\]; got .* in \[1[1-9], "),
    "negative": (lambda p: holding(p, lambda tokens: tokens - 11), r"in \[0, 10\]"),
    "nothing": (lambda p: replace(p, values={}), r"tokens of shape \(10, 4\).*got shape \(0,\)"),
    "another level": (lambda p: replace(p, level="dreamer"), "level dreamer was given where one of level planner is read"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG_PLANS.values(), ids=WRONG_PLANS)
def test_plans_that_do_not_fit_are_refused(either, spoil, message):
    seen = [make_observation()]
    with pytest.raises(ValueError, match=message):
        refine(either, seen, [spoil(plan(either, seen)[0])])


def test_every_observation_needs_its_plan(either):
    seen = [make_observation(0), make_observation(1)]
    with pytest.raises(ValueError, match="2 observations and 1 intents"):
        refine(either, seen, plan(either, seen)[:1])


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
        plan(policy, [broken])


def test_without_an_intent_everything_is_hidden(policy, coarse, source):
    """As in training with dropped conditions; the chunk is as old as its own picture."""
    observation, steps = make_observation(step=3), source.config.action.plan_steps
    (chunk,) = refine(policy, [observation], [None])
    hidden = replace(plan(policy, [observation])[0], values={"tokens": np.full((steps, 4), source.model.tokenizer.mask_token)})
    np.testing.assert_array_equal(chunk.actions, refine(policy, [observation], [hidden])[0].actions)
    assert (chunk.first_step, chunk.intent_first_step) == (3, 3)
    np.testing.assert_allclose(refine(coarse, [observation], [None])[0].actions, (LOW + HIGH) / 2, atol=1e-6)


def test_a_folder_becomes_the_policy_asked_for(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model())
    assert load_policy(tmp_path / "checkpoint").variant == ""
    assert load_policy(tmp_path / "checkpoint", variant="coarse_only").variant == "coarse_only"
    with pytest.raises(ValueError, match=r"model.system=libra, which has no variant 'fine_only'; it has coarse_only"):
        load_policy(tmp_path / "checkpoint", variant="fine_only")
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_policy(tmp_path)


def test_a_level_that_there_is_not_is_refused(policy):
    with pytest.raises(ValueError, match=r"no level 'dreamer'; its levels are planner, refiner"):
        policy.infer("dreamer", [make_observation()], [None])


def test_a_policy_of_one_level_is_as_fresh_as_its_picture(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model({"model.system": "monolithic", "refiner.vision": "shared"}))
    with pytest.raises(ValueError, match=r"model.system=monolithic, which has no variant 'coarse_only'; it has none"):
        load_policy(tmp_path / "checkpoint", variant="coarse_only")
    policy = load_policy(tmp_path / "checkpoint")
    assert [level.name for level in policy.levels] == ["policy"]
    later = [at(make_observation(robot + 5), 5) for robot in range(3)]
    chunks = act(policy, later)
    assert [(chunk.first_step, chunk.intent_first_step) for chunk in chunks] == [(5, 5)] * 3
    spoken = [replace(o, instruction="something else") for o in later]
    assert not np.allclose(act(policy, spoken)[0].actions, chunks[0].actions)


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
