"""The laws of the hierarchy: every level follows what the one above says, and knows when nothing is said."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from libra_ray.checkpoint import DatasetSpec
from libra_ray.config import override
from libra_ray.data.splits import Split
from libra_ray.data.subgoals import THEN
from libra_ray.data.transforms import compute_stats
from libra_ray.model.hierarchy import MOTOR, STRATEGIC, TACTICAL
from libra_ray.model.parts.waypoints import FARTHEST, WaypointGrid
from libra_ray.model.precision import in_bf16
from libra_ray.model.system import asked, seen_first, seen_now
from libra_ray.policy import load_policy
from libra_ray.training.data import TrainingData
from libra_ray.training.fit import Trainer
from libra_ray.types import IMAGE_KEY, Intent, RobotShape
from tests.data.builders import make_frames, make_recorded
from tests.model.builders import SHAPE, make_batch, make_observation, save_checkpoint, tiny_config, tiny_model

CPU = torch.device("cpu")
RIGHT, LEFT = "go right", "go left"
WAY = {RIGHT: 0.1, LEFT: -0.1}
NAMED = replace(SHAPE, subgoals=("lift", "push", "touch"))
CHAINS = ([RIGHT, LEFT], [LEFT, RIGHT], [RIGHT], [LEFT]) * 2
PART = 8
"""Steps of each part of a chain."""
DIALS = {
    "model.system": "hierarchy",
    "action.horizon": 4,
    "hierarchy.waypoint_steps": 4,
    "hierarchy.subgoals": 3,
    "refiner.max_staleness": -1,
    "refiner.sample_noise": 0.0,
}


def chains(config):
    """Demonstrations of one axis: for every part of the chain the hand goes one way, and says how many parts are done."""
    recorded = make_recorded([PART * len(chain) for chain in CHAINS], [THEN.join(chain) for chain in CHAINS])
    states, actions, rewards = [], [], []
    for chain in CHAINS:
        way = np.repeat([WAY[part] for part in chain], PART)
        done = np.repeat(np.arange(len(chain)), PART)
        states.append(np.stack([np.cumsum(way) - way, done], axis=1))
        actions.append(np.stack([way, np.full_like(way, 7)], axis=1))
        rewards.append(np.tile(np.eye(PART)[-1] / len(chain), len(chain)))
    recorded = replace(
        recorded,
        state=np.concatenate(states).astype(np.float32),
        action=np.concatenate(actions).astype(np.float32),
        reward=np.concatenate(rewards).astype(np.float32),
    )
    names = recorded.subgoals.names
    return TrainingData(
        config=config,
        demonstrations=recorded,
        # Pictures tell nothing.
        frames=0 * make_frames(recorded, size=16),
        split=Split(train=np.arange(len(CHAINS)), holdout=np.empty(0, np.int64)),
        stats=compute_stats(recorded, np.arange(len(recorded))),
        spec=DatasetSpec(
            shape=RobotShape(action_dim=2, state_dim=2, cameras=1, subgoals=names),
            image_keys=(IMAGE_KEY,),
            control_hz=10,
            instructions=recorded.instructions,
        ),
    )


@pytest.fixture(scope="module")
def learned():
    """Three levels that know these chains, and a batch of all their windows."""
    steps = {"train.steps": 120, "train.lr": 0.006, "train.log_every": 120, "train.batch_size": 24, "train.ema_decay": 0.9}
    config = tiny_config({**DIALS, **steps, "data.image_size": 16})
    data = chains(config)
    torch.manual_seed(0)
    model = data.make_model()
    with data.stream(model, rank=0, world=1, start_step=0) as batches:
        list(Trainer(model, device=CPU).run(batches))
    windows = data.windows(model, data.split.train)
    return model.eval(), windows.batch(np.arange(len(windows)), np.random.default_rng(0))


def aligned(model, level, values, rows, age=0):
    return model.aligned(model.level(level), values, torch.full((rows,), age))


def test_the_strategic_level_says_what_is_left_to_do_in_words(learned):
    model, batch = learned
    said = model.infer(STRATEGIC, seen_first(batch), {})["subgoals"].numpy()
    assert (said == batch.subgoals.numpy()).all(1).mean() > 0.95
    told = [model.metadata(STRATEGIC, {"subgoals": row})["subgoals"] for row in said]
    assert told[0] == [RIGHT, LEFT]
    assert told[PART + 2] == [LEFT], "the first part is done"
    assert told[2 * PART] == [LEFT, RIGHT]


def test_the_tactical_level_goes_where_the_sub_goal_lies(learned):
    """The same pictures and state; only what was said differs."""
    model, batch = learned
    start = batch.index(torch.tensor([0]))
    place, end = model.shape.subgoals.index, len(model.shape.subgoals)
    first = {}
    for goal, other in ((RIGHT, LEFT), (LEFT, RIGHT)):
        said = torch.tensor([[place(goal), place(other), end]])
        first[goal] = model.infer(TACTICAL, seen_first(start), {"subgoals": said})["waypoint"][0, 0, 0] - start.plan_state[0, 0]
    assert first[RIGHT] > 0.2
    assert first[LEFT] < -0.2


def test_the_motor_level_goes_to_its_waypoint(learned):
    model, batch = learned
    start = batch.index(torch.tensor([0]))
    found = {}
    for way in (RIGHT, LEFT):
        path = start.plan_state[:, None] + torch.arange(1, 9)[:, None] * torch.tensor([WAY[way] / 0.8, 0.0])
        above = aligned(model, MOTOR, model.grid.intent(model.grid.of(path)), 1)
        found[way] = model.infer(MOTOR, seen_first(start), above, torch.zeros(1, 4, 2))["actions"][0, :, 0]
    assert found[RIGHT].mean() > 0.5
    assert found[LEFT].mean() < -0.5


def test_all_levels_together_do_what_the_instruction_says(learned):
    """At an episode's start only the words tell which way to go."""
    model, batch = learned
    right, left = asked(model, seen_first(batch.index(torch.tensor([0, 2 * PART]))), torch.zeros(2, 4, 2))[..., 0]
    assert right.mean() > 0.5
    assert left.mean() < -0.5


@pytest.mark.parametrize(("every", "ends"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7])])
def test_every_step_leads_to_the_next_waypoint_and_the_last_one_ends_the_plan(every, ends):
    grid, path = WaypointGrid(7, every), torch.arange(1.0, 8.0)[None, :, None]
    intent = grid.intent(grid.of(path))
    assert grid.of(path).flatten().tolist() == ends
    for step in range(7):
        reached = next(end for end in ends if end > step)
        assert intent["waypoint"][0, step, 0] == reached
        assert intent["left"][0, step] == reached - step


def test_without_words_there_are_as_many_weights():
    def count(levels):
        named = override(tiny_config(DIALS), {"hierarchy.levels": levels})
        model = tiny_model({**DIALS, "hierarchy.levels": levels}, NAMED)
        words = 0 if levels == "two" else 2 * model.codes.weight.numel() + len(model.strategic.to_logits.bias)
        assert named.hierarchy.levels == levels
        return sum(weight.numel() for weight in model.parameters()), words

    (three, words), (two, _) = count("three"), count("two")
    assert abs(three - two) <= words


def test_two_levels_know_the_instruction_and_of_three_only_the_first_does():
    for levels, reads in (("two", {TACTICAL}), ("three", {STRATEGIC})):
        model = tiny_model({**DIALS, "hierarchy.levels": levels}, NAMED)
        batch = make_batch(model, 2)
        other = replace(batch, text=batch.text.flip(0), text_mask=batch.text_mask.flip(0))
        said = {"subgoals": torch.zeros(2, 3, dtype=torch.long)}
        intent = model.grid.intent(torch.zeros(2, model.grid.count, SHAPE.state_dim))
        above = {STRATEGIC: {}, TACTICAL: said, MOTOR: aligned(model, MOTOR, intent, 2)}
        found = set()
        for level in model.levels:
            noise = torch.zeros(2, 4, SHAPE.action_dim) if level.name == MOTOR else None
            if level.name == STRATEGIC:
                answers = [
                    model.strategic(*[getattr(seen_first(b), n) for n in ("images", "state", "text")]) for b in (batch, other)
                ]
            else:
                answers = [
                    next(iter(model.infer(level.name, seen_first(b), above[level.name], noise).values()))
                    for b in (batch, other)
                ]
            found |= {level.name} if not torch.equal(*answers) else set()
        assert found == reads


def test_past_a_plan_the_motor_level_knows_of_no_waypoint():
    """And what stands in its place makes no difference."""
    model = tiny_model(DIALS, NAMED)
    batch = make_batch(model, 2)
    intent = model.grid.intent(batch.path[:, model.grid.ends - 1])
    steps = model.level(TACTICAL).covers
    noise, seen = torch.zeros(2, 4, SHAPE.action_dim), seen_now(batch)
    old, older = (aligned(model, MOTOR, intent, 2, age) for age in (steps, 2 * steps))
    none = aligned(model, MOTOR, {name: value + 1 for name, value in intent.items()}, 2, -1)
    answers = [model.infer(MOTOR, seen, above, noise)["actions"] for above in (old, older, none)]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    fresh = model.infer(MOTOR, seen, aligned(model, MOTOR, intent, 2), noise)["actions"]
    assert not torch.allclose(fresh, answers[0])


def test_without_any_sub_goal_the_tactical_level_answers_all_the_same():
    model = tiny_model(DIALS, NAMED)
    seen = seen_first(make_batch(model, 2))
    intent = {"subgoals": torch.zeros(2, 3, dtype=torch.long)}
    none = aligned(model, TACTICAL, intent, 2, -1)
    assert (none["subgoals"] == model.intents[STRATEGIC]["subgoals"].unknown).all()
    answer = model.infer(TACTICAL, seen, none)["waypoint"]
    assert answer.abs().max() <= FARTHEST
    assert not torch.allclose(answer, model.infer(TACTICAL, seen, aligned(model, TACTICAL, intent, 2))["waypoint"])


@pytest.mark.parametrize(
    ("places", "words"),
    [([2, 0, 3], ["touch", "lift"]), ([1, 1, 0], ["push", "push", "lift"]), ([3, 2, 2], []), ([4, 4, 4], [])],
    ids=["to the end", "all", "nothing left", "nothing known"],
)
def test_what_is_left_to_do_is_said_in_words(places, words, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model(DIALS, NAMED))
    model = load_policy(tmp_path / "checkpoint").model
    assert model.metadata(STRATEGIC, {"subgoals": np.array(places)}) == {"subgoals": words}
    assert model.metadata(TACTICAL, {}) == {}


def test_an_intent_carries_what_it_says(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model(DIALS, NAMED))
    policy = load_policy(tmp_path / "checkpoint")
    seen = [make_observation(robot) for robot in range(3)]
    said = policy.infer(STRATEGIC, seen, [None] * 3)
    assert [dict(intent.metadata) for intent in said] == [policy.model.metadata(STRATEGIC, intent.values) for intent in said]
    assert all(set(intent.metadata["subgoals"]) <= set(NAMED.subgoals) for intent in said)
    ways = policy.infer(TACTICAL, seen, said)
    assert all(isinstance(way, Intent) and way.metadata == {} for way in ways)


@pytest.mark.parametrize("levels", ["two", "three"])
def test_in_bf16_it_answers_much_the_same(levels):
    model = tiny_model({**DIALS, "hierarchy.levels": levels}, NAMED)
    narrow = in_bf16(model, CPU)
    batch = make_batch(model, 4)
    said = {"subgoals": batch.heard_subgoals} if levels == "three" else {}
    ways = [net.infer(TACTICAL, seen_first(batch), said)["waypoint"] for net in (model, narrow)]
    torch.testing.assert_close(*ways, atol=0.05, rtol=0.05)
    above, noise = aligned(model, MOTOR, model.grid.intent(model.grid.of(batch.path)), 4), torch.zeros(4, 4, SHAPE.action_dim)
    torch.testing.assert_close(
        *[net.infer(MOTOR, seen_now(batch), above, noise)["actions"] for net in (model, narrow)], atol=0.05, rtol=0.05
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hierarchy.waypoint_steps": 9}, "hierarchy.waypoint_steps=9 lies past the 8 steps .* at most 8"),
        ({"hierarchy.waypoint_steps": 0}, "must be at least 1"),
        ({"hierarchy.plans": 0}, "must be at least 1"),
        ({"hierarchy.subgoals": 0}, "must be at least 1"),
        ({"refiner.vision": "shared"}, "refiner.vision=shared has no use with model.system=hierarchy.*; give own"),
        ({"refiner.see_language": True}, "refiner.see_language=True has no use .*; give false"),
        ({"hierarchy.levels": "four"}, "hierarchy.levels"),
    ],
)
def test_settings_that_make_no_hierarchy_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config({**DIALS, **changes})
