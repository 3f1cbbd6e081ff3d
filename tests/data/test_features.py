"""What a dataset declares of its numbers: written by the recorder, kept by LeRobot, said by the settings where it does not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.aggregate import validate_all_metadata

from libra_ray.config import DataConfig
from libra_ray.data.checks import DatasetError
from libra_ray.data.dataset import open_dataset, write_dataset
from libra_ray.data.features import ENTRY, robot_to_record
from libra_ray.spec import NO_GRIPPER, NOTHING, UNDECLARED, Declaration, RobotSpec, VectorSpec
from libra_ray.types import ACTION_KEY, IMAGE_KEY, STATE_KEY
from tests.data.builders import edit_info, make_episode

NAMES = ("x", "y", "z", "gripper")
ARM = Declaration(
    action=VectorSpec(names=NAMES, ranges=((-1, 1),) * 4, gripper=3, delta=True, rotation="none"),
    state=VectorSpec(names=NAMES, ranges=(None, None, None, (0, 1)), gripper=3, delta=False, rotation="none"),
)


def written(root: Path, declared: Declaration = ARM) -> Path:
    return write_dataset([make_episode(length=3)], root, fps=10, declared=declared)


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("declared") / "arm")


def say(root: Path, key: str, **entries: object) -> None:
    """Change the entries of a feature in `info.json`."""
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    edit_info(root, features=features | {key: features[key] | entries})


def test_what_the_recorder_declares_is_read_again(arm):
    recorded = open_dataset(arm)
    assert recorded.declared == ARM
    assert (recorded.robot.action, recorded.robot.state) == (ARM.action, ARM.state)


def test_lerobot_reads_such_a_dataset_and_keeps_what_is_declared(arm):
    loaded = LeRobotDataset("local/arm", root=arm)
    assert loaded[0][ACTION_KEY].shape == (4,)
    assert loaded.meta.names[ACTION_KEY] == list(NAMES)
    entry = loaded.meta.info.to_dict()["features"][ACTION_KEY][ENTRY]
    assert VectorSpec.read({"names": NAMES, **entry}, 4) == ARM.action


def test_lerobot_merges_only_datasets_that_declare_the_same(arm, tmp_path):
    other = written(tmp_path / "absolute", replace(ARM, action=replace(ARM.action, delta=False)))
    same = written(tmp_path / "same")
    metadata = [LeRobotDatasetMetadata(f"local/{root.name}", root=root) for root in (arm, same, other)]
    validate_all_metadata(metadata[:2])
    with pytest.raises(ValueError, match="Same features is expected"):
        validate_all_metadata(metadata)


def test_a_dataset_that_declares_nothing_is_accepted_as_such(dataset):
    assert open_dataset(dataset).declared == NOTHING


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["a", "b", "c", "d"], ("a", "b", "c", "d")),
        ({"motors": ["a", "b", "c", "d"]}, ("a", "b", "c", "d")),
        ({"c": 2, "a": 0, "d": 3, "b": 1}, ("a", "b", "c", "d")),
        (["actions"], ()),
        ({"motors": ["a", "b"]}, ()),
        ({"a": 0, "b": 0, "c": 1, "d": 2}, ()),
        (["a", "a", "b", "c"], ()),
        ([1, 2, 3, 4], ()),
        (None, ()),
    ],
)
def test_names_are_known_wherever_lerobots_datasets_have_them(tmp_path, names, read):
    root = written(tmp_path / "d", NOTHING)
    say(root, ACTION_KEY, names=names)
    assert open_dataset(root).declared == Declaration(action=VectorSpec(names=read))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gripper": "last"}, {"gripper": 3}),
        ({"gripper": "0"}, {"gripper": 0}),
        ({"gripper": "z"}, {"gripper": 2}),
        ({"gripper": "none"}, {"gripper": NO_GRIPPER}),
        ({"action_is": "absolute"}, {"delta": False}),
        ({"action_is": "delta"}, {"delta": True}),
        ({"rotation": "rot6d"}, {"rotation": "rot6d"}),
        ({"action_names": ("a", "b", "c", "d")}, {"names": ("a", "b", "c", "d")}),
        ({"action_names": ("a", "b", "c", "d"), "gripper": "c"}, {"names": ("a", "b", "c", "d"), "gripper": 2}),
    ],
)
def test_settings_say_it_instead(arm, tmp_path, settings, said):
    assert open_dataset(arm, DataConfig(**settings)).declared == replace(ARM, action=replace(ARM.action, **said))
    if settings != {"gripper": "z"}:
        silent = written(tmp_path / "d", NOTHING)
        assert open_dataset(silent, DataConfig(**settings)).declared == Declaration(action=replace(UNDECLARED, **said))


def test_settings_name_the_numbers_of_a_state(arm):
    named = open_dataset(arm, DataConfig(state_names=("a", "b", "c", "d"))).declared
    assert named == replace(ARM, state=replace(ARM.state, names=("a", "b", "c", "d")))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"gripper": "4"},
            r"data.gripper=4: an action of .* has 4 dimensions; give none, last, or a number from 0 to 3, or one of",
        ),
        ({"gripper": "hand"}, r"data.gripper=hand: .* or one of x, y, z, gripper"),
        ({"gripper": "-1"}, r"data.gripper=-1: .* from 0 to 3"),
        ({"action_names": ("x", "y")}, r"data.action_names=x,y: .* has 4 dimensions; give 4 different names"),
        ({"action_names": ("x", "y", "z", "x")}, r"data.action_names=x,y,z,x: .* 4 different names"),
        ({"state_names": ("x",)}, r"data.state_names=x: .* has 4 dimensions; give 4 different names"),
    ],
)
def test_settings_that_the_dimensions_do_not_allow_are_refused(arm, settings, line):
    robot = RobotSpec(action_dim=4, state_dim=4, cameras=(IMAGE_KEY,), control_hz=10, **vars(ARM))
    for refuse in (lambda: open_dataset(arm, DataConfig(**settings)), lambda: robot_to_record(robot, DataConfig(**settings))):
        with pytest.raises(DatasetError, match=line):
            refuse()


def test_a_declaration_that_is_none_is_refused_with_its_place(tmp_path):
    root = written(tmp_path / "d")
    say(root, STATE_KEY, **{ENTRY: {"gripper": 9}})
    with pytest.raises(
        DatasetError, match=r"info.json: observation.state: libra_ray: gripper 9 is no declaration of 4 numbers"
    ):
        open_dataset(root)


@pytest.mark.parametrize("entry", [{"griper": 3}, {"names": ["a", "b", "c", "d"]}])
def test_a_declaration_of_what_there_is_none_of_is_refused(entry, tmp_path):
    root = written(tmp_path / "d")
    say(root, STATE_KEY, **{ENTRY: entry})
    with pytest.raises(DatasetError, match=rf"there is no {next(iter(entry))} to declare; give ranges, gripper, delta"):
        open_dataset(root)
