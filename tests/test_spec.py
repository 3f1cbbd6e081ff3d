"""What the numbers of actions and states mean: a record that travels as JSON, and a comparison that names both sides."""

import json
from dataclasses import replace

import pytest

from libra_ray.sim import robot_spec
from libra_ray.spec import NO_GRIPPER, NOTHING, UNDECLARED, Declaration, VectorSpec, differences
from tests.on_ray.doubles import debug_config

ARM = VectorSpec(
    names=("x", "y", "yaw", "grip"), ranges=((-1, 1), (-1, 1), None, (0, 1)), gripper=3, delta=True, rotation="euler"
)
OTHERWISE = {
    "names": ({"names": ("y", "x", "yaw", "grip")}, "x, y, yaw, grip", "y, x, yaw, grip"),
    "ranges": (
        {"ranges": ((-1, 1), (-2, 1), None, (0, 1))},
        "[-1, 1], [-1, 1], unlimited, [0, 1]",
        "[-1, 1], [-2, 1], unlimited, [0, 1]",
    ),
    "gripper": ({"gripper": 0}, "grip", "x"),
    "values": ({"delta": False}, "delta", "absolute"),
    "rotation": ({"rotation": "rot6d"}, "euler", "rot6d"),
}
"""Fact -> a change of it, and the words of both."""


@pytest.mark.parametrize("spec", [UNDECLARED, ARM, VectorSpec(gripper=NO_GRIPPER, delta=False)])
def test_it_survives_json(spec):
    assert VectorSpec.read(json.loads(json.dumps(spec.tree())), 4) == spec


def test_what_is_not_said_is_not_declared():
    assert VectorSpec.read(None, 4) == VectorSpec.read({}, 4) == UNDECLARED
    assert UNDECLARED.tree() == {}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (7, "7 is no declaration of 4 numbers"),
        ({"names": 7}, "is no declaration of 4 numbers"),
        ({"names": ["x", "y"]}, r"names \['x', 'y'\] is no declaration of 4 numbers"),
        ({"names": ["x", "x", "y", "z"]}, "names"),
        ({"names": [["x"], "y", "z", "g"]}, "names"),
        ({"ranges": [[0, 1]]}, "ranges"),
        ({"ranges": [[1, 0], None, None, None]}, "ranges"),
        ({"ranges": [["a", "b"], None, None, None]}, "is no declaration"),
        ({"ranges": [[float("nan"), 1], None, None, None]}, "ranges"),
        ({"gripper": 4}, "gripper 4"),
        ({"gripper": -2}, "gripper -2"),
        ({"gripper": True}, "gripper True"),
        ({"delta": "yes"}, "delta yes"),
        ({"rotation": "radians"}, "rotation radians"),
    ],
)
def test_what_is_none_is_refused_in_one_line_that_says_what_is(tree, said):
    with pytest.raises(ValueError, match=rf"{said}.*valid are names.*rotation, one of none, euler.*rot6d") as refused:
        VectorSpec.read(tree, 4)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["action", "state"])
@pytest.mark.parametrize("fact", OTHERWISE)
def test_every_fact_is_compared_and_both_sides_are_named(kind, fact):
    change, ours, theirs = OTHERWISE[fact]
    one, other = Declaration(**{kind: ARM}), Declaration(**{kind: replace(ARM, **change)})
    assert differences(one, other) == {f"{kind} {fact}": (ours, theirs)}
    assert differences(one, one) == {}


@pytest.mark.parametrize("fact", OTHERWISE)
def test_what_is_not_declared_fits_everything_unless_that_counts(fact):
    empty = {"values": {"delta": None}, "gripper": {"gripper": None}, "rotation": {"rotation": None}}
    one = Declaration(action=ARM)
    other = Declaration(action=replace(ARM, **empty.get(fact, {fact: ()})))
    assert differences(one, other) == differences(other, one) == differences(one, NOTHING) == {}
    ours = OTHERWISE[fact][1]
    assert differences(one, other, undeclared=True) == {f"action {fact}": (ours, "not declared")}
    assert differences(other, one, undeclared=True) == {f"action {fact}": ("not declared", ours)}


def test_a_gripper_is_the_same_by_name_and_by_number():
    nameless = VectorSpec(gripper=3)
    assert differences(Declaration(action=ARM), Declaration(action=nameless)) == {}
    found = differences(Declaration(action=ARM), Declaration(action=replace(nameless, gripper=2)))
    assert found == {"action gripper": ("grip", "2")}
    none = Declaration(action=VectorSpec(gripper=NO_GRIPPER))
    assert differences(Declaration(action=ARM), none) == {"action gripper": ("grip", "none")}


@pytest.mark.parametrize("family", ["metaworld", "tabletop"])
def test_simulators_declare_everything(family):
    robot = robot_spec(debug_config(sim__family=family).sim)
    for spec, dims in ((robot.action, robot.action_dim), (robot.state, robot.state_dim)):
        assert None not in [fact for fact, _ in spec.facts().values()]
        assert VectorSpec.read(spec.tree(), dims) == spec
