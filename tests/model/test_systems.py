"""The laws of every system: those of the registry, and one of a user's own."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from libra_ray import checkpoint
from libra_ray.config import override
from libra_ray.config.overrides import flatten
from libra_ray.control.lockstep import drive
from libra_ray.control.robot import RobotControl
from libra_ray.model.registry import SYSTEMS, check_system, lengthening, make_system, system_class
from libra_ray.policy import act, load_policy
from libra_ray.training.fit import Trainer
from libra_ray.types import ActionChunk, Intent, Level, check_levels
from tests.model.builders import SHAPE, make_batch, make_observation, save_checkpoint, tiny_config, tiny_model
from tests.training.builders import training_data

ROOT = Path(__file__).parents[2]
TOY = "toy_system:Toy"
CPU = torch.device("cpu")
REFINED = {"model.system": "anchor_refine"}
FORMS = {
    **{name: {"model.system": name} for name in [*SYSTEMS, TOY]},
    "anchor_two_levels": REFINED | {"anchor_refine.levels": "two"},
    "anchor_diffusion": REFINED | {"anchor_refine.backbone": "diffusion"},
    "anchor_libra": REFINED | {"anchor_refine.backbone": "libra"},
    "anchor_libra_two_levels": REFINED | {"anchor_refine.backbone": "libra", "anchor_refine.levels": "two"},
    "anchor_own_context": REFINED | {"anchor_refine.levels": "two", "anchor_refine.context": "own"},
    "hierarchy_two_levels": {"model.system": "hierarchy", "hierarchy.levels": "two"},
    "experts_soft": {"model.system": "experts", "experts.routing": "soft", "experts.names": "token,flow"},
    "anchor_not_frozen": REFINED | {"anchor_refine.stop_gradient": False, "anchor_refine.gripper": "none"},
}
"""Every system, and the forms of one that change what it is made of."""


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request) -> dict[str, object]:
    return request.param


@pytest.fixture
def policy(form, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_model(form))
    return load_policy(tmp_path / "checkpoint")


def test_it_trains_and_every_loss_is_logged(form):
    config = tiny_config({**form, "train.validate_every": 2})
    data = training_data(config)
    torch.manual_seed(0)
    model = data.make_model()
    with data.stream(model, rank=0, world=1, start_step=0) as batches:
        rows = [p.metrics for p in Trainer(model, device=CPU).run(batches, data.validator(CPU))]
    terms, parts, phases = model.loss_weights(), model.parts(), model.schedule().phases
    logged = [{term for term in terms if f"loss_{term}" in row} for row in rows]
    assert set.union(*logged) == set(terms)
    for row, learned in zip(rows, logged, strict=True):
        assert learned == set(terms) or len(phases) > 1
        assert {f"grad_norm_{part}" for part in parts} < row.keys()
        assert row["loss"] == pytest.approx(sum(row[f"weight_{term}"] * row[f"loss_{term}"] for term in learned), rel=1e-4)
        assert all(np.isfinite(value) for value in row.values())
        assert sum(row[f"phase_{phase}"] for phase in phases if phase) == (1 if phases != ("",) else 0)
    assert {f"val_loss_{term}" for term in terms} | {"val_action_error"} < rows[-1].keys()


def test_two_and_two_resumed_steps_are_four(form):
    def run(fit, until):
        list(fit.run([make_batch(fit.model, 4, seed=s) for s in range(until)][fit.step :], until=until))
        return fit

    whole = run(Trainer(tiny_model(form), device=CPU), 4)
    first = run(Trainer(tiny_model(form), device=CPU), 2)
    second = run(Trainer(tiny_model(form), device=CPU, state=first.state()), 4)
    assert all(torch.equal(second.weights()[key], value) for key, value in whole.weights().items())


def test_its_parts_hold_all_weights_and_its_losses_reach_them(form):
    model = make_system(tiny_config(form), SHAPE)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for part in model.parts().values() for p in part.parameters() if p.requires_grad} == trained
    assert {id(p) for weights in model.reached().values() for p in weights} == trained
    assert model.reached().keys() == model.loss_weights().keys()
    for part in model.parts():
        assert any(key.startswith(f"{part}.") for key in model.state_dict()), "parts go by the names of their weights"
    batch, alone = make_batch(model), {}
    for phase in model.schedule().phases:
        alone |= model(batch, phase, torch.Generator().manual_seed(0)).terms
    for term, weights in model.reached().items():
        model.zero_grad()
        alone[term].backward(retain_graph=True)
        reached = {id(p) for p in model.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert reached <= {id(p) for p in weights}, f"loss {term} reaches weights that it does not name"


def test_the_setting_that_is_said_to_lengthen_a_level_does(form):
    """Whatever the plans' length is: one that only happens to be that of a level lengthens nothing."""
    for chunks in (2, 4):
        config = tiny_config({**form, "action.chunks": chunks})
        levels = make_system(config, SHAPE).levels
        found = lengthening(config, levels)
        assert levels[-1].name in found
        assert ("action.chunks", config.action.horizon) in found.values() or form != FORMS["libra"]
        for level in (level for level in levels if level.name in found):
            setting, steps = found[level.name]
            longer = make_system(override(config, {setting: flatten(config)[setting] + 1}), SHAPE)
            assert longer.level(level.name).covers == level.covers + steps


def test_a_checkpoint_answers_as_what_was_saved(policy, tmp_path):
    seen = [make_observation(robot) for robot in range(3)]
    again = load_policy(checkpoint.export(tmp_path / "checkpoint", tmp_path / "copy") and tmp_path / "copy")
    assert checkpoint.read_manifest(tmp_path / "copy").levels == again.levels == policy.levels
    for one, other in zip(act(policy, seen), act(again, seen), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)


def test_the_order_of_a_batch_is_the_order_of_its_answers(policy):
    seen, order = [make_observation(robot) for robot in range(5)], [3, 0, 4, 1, 2]
    chunks = act(policy, seen)
    for i, chunk in zip(order, act(policy, [seen[i] for i in order]), strict=True):
        np.testing.assert_allclose(chunk.actions, chunks[i].actions, atol=1e-4)
    assert not np.allclose(chunks[0].actions, chunks[1].actions)


def test_each_level_answers_what_it_promises(policy):
    """Intents of the shapes, types and ranges that are checked when they come back; chunks within the robot's limits."""
    seen, intents = [make_observation(robot, step=7) for robot in range(2)], {}
    for level in policy.levels:
        answers = policy.infer(level.name, seen, intents.get(level.reads, [None, None]))
        last = level is policy.levels[-1]
        assert all(isinstance(answer, ActionChunk if last else Intent) for answer in answers)
        intents[level.name] = answers
        if not last:
            assert [(i.level, i.first_step, i.end_step) for i in answers] == [(level.name, 7, 7 + level.covers)] * 2
            for value, spec in policy.model.intents[level.name].items():
                assert {i.values[value].dtype for i in answers} == {np.dtype(spec.dtype)}
    assert all(chunk.actions.shape == (policy.levels[-1].covers, SHAPE.action_dim) for chunk in intents[policy.levels[-1].name])


def test_a_robot_is_driven_without_a_gap(policy):
    """Each level is asked when its intent is used up, with what the level above said last."""
    config, latencies, actions = policy.source.config.control, {}, []
    robots = {0: RobotControl(config, policy.levels)}
    while len(actions) < 3 * policy.levels[0].covers:
        actions += drive(robots, {0: replace(make_observation(), step=len(actions))}, policy, latencies)[0]
    assert not any(action.held for action in actions)
    assert {level: len(calls.ms) for level, calls in latencies.items()} == {
        level.name: len(actions) // level.covers for level in policy.levels
    }
    reads = policy.levels[-1].reads
    covers = policy.model.level(reads).covers if reads else policy.levels[-1].covers
    assert [action.intent_age_steps for action in actions] == [step % covers for step in range(len(actions))]


def test_every_system_appears_in_help():
    done = subprocess.run([sys.executable, "jobs/train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [name for name in SYSTEMS if f"`{name}`" not in done.stdout] == []
    assert "MODULE:CLASS" in done.stdout, "one of a user's own"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("libre", "none of libra, monolithic, regression, coarse_to_fine, anchor_refine, experts, hierarchy, nor the address"),
        ("nowhere:Toy", "cannot be loaded"),
        ("toy_system:Tonic", "cannot be loaded"),
        ("tests.model.builders:Path", "no subclass of libra_ray.model.system.System"),
    ],
)
def test_what_is_no_system_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        system_class(given)


OWN = "from libra_ray.model.system import System\nclass Mine(System):\n    "
"""Begins the module of a system of one's own."""
NAMED = "; ".join(f"{name} = lambda *_: None" for name in ("infer", "losses", "parts", "tokenise", "save_processor"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Mine(:", r"cannot be loaded \(SyntaxError: .*mine.py, line 1"),
        ("Mine = nn.Module", r"cannot be loaded \(NameError: name 'nn' is not defined\); systems are libra"),
        ("import nowhere", r"cannot be loaded \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("raise SystemExit('usage: mine.py FILE')", r"cannot be loaded \(SystemExit: usage: mine.py FILE\)"),
        ("def Mine(*_): pass", "no subclass of libra_ray.model.system.System"),
        (OWN + "levels = ()", r"cannot be made \(TypeError: Can't instantiate abstract class Mine"),
        (OWN + NAMED, r"cannot be made \(AttributeError: 'Mine' object has no attribute 'levels'\)"),
        (OWN + NAMED + "\n    def __init__(self, *_): raise ValueError('odd\\nwidth')", r"made \(ValueError: odd width\)"),
        (OWN + NAMED + "\n    def __init__(self, *_): {}['key']", r"made \(KeyError: 'key'\)"),
        (OWN + NAMED + "\n    def __init__(self): pass", r"made \(TypeError: .*positional argument"),
    ],
)
def test_whatever_a_system_of_ones_own_raises_is_one_line(text, message, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(ValueError, match=rf"^model.system='mine:Mine' .*{message}") as refused:
        make_system(tiny_config({"model.system": "mine:Mine"}), SHAPE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((), "at least one; got none"),
        ((Level(name="a", covers=1), Level(name="a", covers=1)), "different names"),
        ((Level(name="a", covers=0),), "at least one"),
        ((Level(name="a", covers=1, reads="a"),), r"levels above it \(none\)"),
        ((Level(name="a", covers=1, reads="b"), Level(name="b", covers=1)), "reads b"),
        ((Level(name="a", covers=1), Level(name="b", covers=1)), "no level reads a; each level above the last must be read"),
    ],
)
def test_levels_that_are_none_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        check_levels(levels)


def test_a_system_without_its_intents_is_refused():
    model = make_system(tiny_config(), SHAPE)
    model.intents = {}
    with pytest.raises(ValueError, match="levels above the last: planner"):
        check_system(model)
