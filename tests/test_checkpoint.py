"""A checkpoint is one folder: whole or absent, refused when changed, and enough to run a policy without Ray."""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from libra_ray import checkpoint
from libra_ray import config as configuration
from libra_ray.common import folders
from libra_ray.common.disk import NoRoomError
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.policy import SystemPolicy
from libra_ray.runs.folder import RunFolder
from libra_ray.spec import NO_GRIPPER, UNDECLARED, RobotSpec, VectorSpec
from libra_ray.training.fine_tuning import start_from
from libra_ray.types import RobotShape
from tests.model.builders import (
    INSTRUCTIONS,
    KEYS,
    SHAPE,
    make_observation,
    make_stats,
    save_checkpoint,
    tiny_config,
    tiny_model,
)
from tests.policies import plan, refine

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path) -> Path:
    save_checkpoint(tmp_path / "checkpoint", tiny_model(), step=3, trainer={"step": 3, "weights": torch.ones(2)})
    return tmp_path / "checkpoint"


def spoken(folder: Path) -> list[np.ndarray]:
    """What the policy in `folder` plans and does for three robots."""
    policy, seen = SystemPolicy(checkpoint.load(folder)), [make_observation(robot) for robot in range(3)]
    plans = plan(policy, seen)
    return [intent.values["tokens"] for intent in plans] + [chunk.actions for chunk in refine(policy, seen, plans)]


def seal(folder: Path) -> None:
    """Make the manifest's digest fit changed files."""
    change_manifest(folder, digest=checkpoint.digest(folder))


def change_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_loaded_is_what_was_saved(folder):
    loaded, model = checkpoint.load(folder), tiny_model()
    assert loaded.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.config == tiny_config()
    assert loaded.stats.to_json() == make_stats().to_json()
    assert (loaded.manifest.step, loaded.manifest.shape, loaded.manifest.instructions) == (3, SHAPE, INSTRUCTIONS)
    assert not loaded.model.training


def test_saving_again_changes_no_answer(folder, tmp_path):
    loaded = checkpoint.load(folder)
    again = save_checkpoint(tmp_path / "again", loaded.model, step=3)
    assert again.digest == loaded.manifest.digest
    for before, after in zip(spoken(folder), spoken(tmp_path / "again"), strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_weights_given_are_those_that_run(folder, tmp_path):
    """Training gives the moving average, which is not what the model holds."""
    model = tiny_model()
    average = {name: value + 1 for name, value in model.state_dict().items()}
    loaded = checkpoint.load(folder)
    facts = checkpoint.DatasetSpec(shape=SHAPE, image_keys=loaded.manifest.image_keys, control_hz=10, instructions=INSTRUCTIONS)
    checkpoint.save(tmp_path / "average", model, average, loaded.stats, facts, 1)
    found = checkpoint.load(tmp_path / "average").model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in average.items())


def test_finished_means_the_last_step(tmp_path):
    model = tiny_model({"train.steps": 4})
    assert [save_checkpoint(tmp_path / str(step), model, step).finished for step in (3, 4)] == [False, True]


@pytest.mark.parametrize("breaks", ["save_file", "describe", "digest"])
def test_a_save_that_fails_leaves_the_old_one_whole(folder, breaks, monkeypatch):
    before = spoken(folder)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, breaks, fail)
    model = tiny_model({"action.bins": 7})
    with pytest.raises(NoRoomError, match="no space"):
        save_checkpoint(folder, model, 4)
    with pytest.raises(NoRoomError, match="no space"):
        save_checkpoint(folder.with_name("new"), model, 4)
    monkeypatch.undo()
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    for old, new in zip(before, spoken(folder), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_new_save_replaces_the_old_one_entirely(folder):
    (folder / "left-over").touch()
    save_checkpoint(folder, tiny_model({"action.bins": 7}), step=4)
    assert checkpoint.load(folder).config.action.bins == 7
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    assert not (folder / "left-over").exists()
    assert not (folder / "trainer").exists()


class TestFineTuning:
    """A new model begins with another checkpoint's weights, where they fit."""

    @pytest.mark.parametrize("parts", [("planner", "refiner"), ("planner.backbone",), ("refiner.blocks", "planner.blocks")])
    def test_weights_of_the_parts_are_taken_where_they_fit_and_no_others(self, folder, parts, capsys):
        given = checkpoint.load(folder).model.state_dict()
        model = tiny_model({"action.bins": 7, "train.seed": 5})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        taken = start_from(model, folder, parts)
        after = model.state_dict()
        assert taken == sorted(n for n in after if n.startswith(parts) and given[n].shape == after[n].shape)
        assert all(torch.equal(after[name], (given if name in taken else before)[name]) for name in after)
        assert "planner.to_logits.weight" not in taken, "another granularity has other classes"
        wanted = [name for name in after if name.startswith(parts)]
        told = capsys.readouterr().err
        assert told.count("\n") == (len(taken) < len(wanted)), "what stays random is said, in one line"
        assert not told or re.search(rf"{len(taken)} of {len(wanted)} weights of .*random, in .*planner\.to_logits", told)

    @pytest.mark.parametrize(
        ("system", "part"),
        [("hierarchy", "strategic.backbone"), ("experts", "shared.backbone"), ("anchor_refine", "anchor.planner.backbone")],
    )
    def test_a_part_of_another_name_is_taken_by_both(self, folder, system, part, capsys):
        given = checkpoint.load(folder).model.state_dict()
        other = tiny_model({"model.system": system, "train.seed": 5, "action.chunks": 1, "refiner.max_staleness": 0})
        taken = start_from(other, folder, [f"{part}=planner.backbone"])
        after = other.state_dict()
        assert taken == sorted(name for name in after if name.startswith(part))
        assert all(torch.equal(after[n], given[n.replace(part, "planner.backbone", 1)]) for n in taken)
        with pytest.raises(ValueError, match=r"the checkpoint's are .*planner\.backbone.*OURS=THEIRS"):
            start_from(other, folder, [part])

    def test_of_two_parts_the_longer_name_holds(self, folder):
        given, model = checkpoint.load(folder).model.state_dict(), tiny_model({"train.seed": 5})
        start_from(model, folder, ["planner", "planner.from_state=refiner.from_state"])
        after = model.state_dict()
        assert torch.equal(after["planner.from_state.weight"], given["refiner.from_state.weight"])
        assert torch.equal(after["planner.from_summary.weight"], given["planner.from_summary.weight"])

    def test_a_part_that_fits_nowhere_is_refused(self, folder):
        with pytest.raises(ValueError, match=r"train.start_parts=planner.eyes.*parts are.*planner.backbone"):
            start_from(tiny_model(), folder, ["planner.backbone", "planner.eyes"])

    def test_of_another_robot_only_parts_that_fit_as_a_whole_are_taken(self, folder):
        other = tiny_model(shape=RobotShape(action_dim=14, state_dim=SHAPE.state_dim, cameras=1))
        with pytest.raises(ValueError, match=r"another robot: action_dim 4 \(here 14\);.*start_parts planner") as refused:
            start_from(other, folder, ["planner", "refiner"])
        offered = re.search(r"start_parts (\S+),", str(refused.value))[1].split(",")
        taken = start_from(other, folder, offered)
        assert set(taken) == {name for name in other.state_dict() if name.startswith(tuple(offered))}

    def test_what_fits_of_another_system_and_robot_is_offered_by_both_names(self, folder):
        changes = {"model.system": "hierarchy", "action.chunks": 1, "refiner.max_staleness": 0}
        other = tiny_model(changes, RobotShape(action_dim=14, state_dim=9, cameras=1))
        with pytest.raises(ValueError, match="another robot") as refused:
            start_from(other, folder, ["strategic=planner", "tactical.guided.eyes=planner.backbone.eyes"])
        offered = re.search(r"start_parts (\S+),", str(refused.value))[1].split(",")
        assert {"strategic.backbone=planner.backbone", "tactical.guided.eyes=planner.backbone.eyes"} <= set(offered)
        assert start_from(other, folder, offered)
        with pytest.raises(ValueError, match="no part fits"):
            start_from(other, folder, ["strategic.from_state=planner.from_state"])

    def test_data_of_other_instructions_are_of_no_other_robot(self, folder, capsys):
        model = tiny_model({"action.bins": 7}, replace(SHAPE, subgoals=("close the door", "open the drawer")))
        assert "planner.to_logits.weight" not in start_from(model, folder, tuple(model.parts()))
        assert "stay random" in capsys.readouterr().err

    def test_without_a_checkpoint_it_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="not a checkpoint"):
            start_from(tiny_model(), tmp_path, ["planner"])


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "stats.json"])
def test_changed_files_are_refused(folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="changed after it was written"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "stats.json", "manifest.json"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"not a checkpoint: {name} missing"):
        checkpoint.load(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "nowhere")


def test_another_format_is_refused(folder):
    change_manifest(folder, format=99)
    with pytest.raises(ValueError, match="format 99, this version reads format 1"):
        checkpoint.load(folder)


def test_a_checkpoint_says_which_data_it_was_trained_on(folder, tmp_path):
    model, data = tiny_model(), Fingerprint(episodes=3, frames=30, content="0123456789abcdef")
    facts = checkpoint.DatasetSpec(shape=SHAPE, image_keys=KEYS[:1], control_hz=29.97, instructions=INSTRUCTIONS, data=data)
    checkpoint.save(tmp_path / "new", model, model.state_dict(), make_stats(), facts, 1)
    manifest = checkpoint.load(tmp_path / "new").manifest
    assert manifest.data == data
    assert manifest.robot == RobotSpec(action_dim=4, state_dim=5, cameras=KEYS[:1], control_hz=29.97)


def test_a_checkpoint_says_what_its_numbers_mean(tmp_path):
    names = {"names": ("x", "y", "z", "grip"), "ranges": ((-1, 1), None, None, (0, 1)), "rotation": "none"}
    shape = replace(SHAPE, action=VectorSpec(**names, gripper=3, delta=True), state=VectorSpec(gripper=NO_GRIPPER))
    model = tiny_model(shape=shape)
    facts = checkpoint.DatasetSpec(shape=shape, image_keys=KEYS[:1], control_hz=10, instructions=INSTRUCTIONS)
    checkpoint.save(tmp_path / "new", model, model.state_dict(), make_stats(), facts, 1)
    loaded = checkpoint.load(tmp_path / "new")
    assert loaded.manifest.shape == loaded.model.shape == shape
    assert (loaded.manifest.robot.action, loaded.manifest.robot.state) == (shape.action, shape.state)
    change_manifest(tmp_path / "new", shape={**asdict(shape), "action": {"gripper": 9}})
    with pytest.raises(ValueError, match="gripper 9 is no declaration of 4 numbers"):
        checkpoint.load(tmp_path / "new")


def test_checkpoints_of_versions_that_did_not_say_it_still_load(folder):
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["data"], tree["shape"]["action"], tree["shape"]["state"]
    path.write_text(json.dumps(tree))
    manifest = checkpoint.load(folder).manifest
    assert manifest.data is None
    assert manifest.robot.action == manifest.robot.state == UNDECLARED


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_damaged_manifest_is_refused(folder, data):
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged manifest\.json"):
        checkpoint.load(folder)


DAMAGED = [
    ("step", -1), ("total_steps", "4"), ("shape", None), ("shape.action_dim", 0), ("shape.cameras", "1"), ("shape.cameras", 2),
    ("shape.subgoals", [None]), ("image_keys", []), ("image_keys", "front"), ("image_keys", [["front"]]), ("control_hz", None),
    ("control_hz", 0), ("control_hz", math.nan), ("instructions", [None]), ("instructions", "open"), ("digest", None),
    ("levels", ["planner"]), ("levels.0.covers", "10"), ("levels.0.covers", 0), ("levels.1.reads", "nobody"), ("joined", 7),
    ("levels.0.name", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), DAMAGED)
def test_a_value_that_no_training_wrote_is_refused_where_the_manifest_is_read(folder, name, value):
    """Not far from there, by whatever fails over it first."""
    path = folder / "manifest.json"
    tree = holder = json.loads(path.read_text())
    *above, last = (int(part) if part.isdecimal() else part for part in name.split("."))
    for part in above:
        holder = holder[part]
    holder[last] = value
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"has a damaged manifest\.json") as refused:
        checkpoint.read_manifest(folder)
    assert "\n" not in str(refused.value)


def test_levels_that_are_not_the_systems_are_refused(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"covers": 5', '"covers": 7'))
    with pytest.raises(ValueError, match="its manifest names other levels than its policy has"):
        checkpoint.load(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b'{"train": 3}', b'{"action": {"bins": "many"}}'])
def test_a_damaged_configuration_is_refused_by_whoever_reads_it_first(folder, content):
    (folder / "config.json").write_bytes(content)
    for read in (checkpoint.read_config, lambda path: RunFolder.open(path, tiny_config())):
        with pytest.raises(
            ValueError, match=r"/config\.json holds no configuration that can be used \(.*; restore it"
        ) as refused:
            read(folder)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\x00" * 64])
def test_damaged_weights_are_no_start(folder, content):
    (folder / "weights.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"train.start_from=\S+: its weights cannot be read \(.*; give another") as refused:
        start_from(tiny_model(), folder, ["planner"])
    assert "\n" not in str(refused.value)


def test_unknown_settings_are_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"bins"', '"bans"'))
    seal(folder)
    with pytest.raises(ValueError, match=r"unknown configuration key 'action\.bans'"):
        checkpoint.load(folder)


def test_statistics_of_another_robot_are_refused(folder):
    (folder / "stats.json").write_text(make_stats(RobotShape(action_dim=7, state_dim=5, cameras=1)).to_json())
    seal(folder)
    with pytest.raises(ValueError, match="7 action dimensions"):
        checkpoint.load(folder)


def test_weights_of_another_model_are_refused(folder):
    config = configuration.override(tiny_config(), {"planner.width": 64})
    (folder / "config.json").write_text(configuration.to_json(config))
    seal(folder)
    with pytest.raises(ValueError, match="weights do not fit"):
        checkpoint.load(folder)


def test_the_trainers_state_comes_back_and_is_no_part_of_the_digest(folder):
    state = checkpoint.load_trainer_state(folder)
    assert (state["step"], state["weights"].whole().tolist()) == (3, [1, 1])
    before = checkpoint.digest(folder)
    shutil.rmtree(folder / "trainer")
    assert checkpoint.digest(folder) == before


def test_nothing_is_unpickled(folder):
    torch.save({"step": hashlib.sha256}, folder / "trainer" / "state.pt")
    with pytest.raises(ValueError, match="was cut off or changed") as refused:
        checkpoint.load_trainer_state(folder)
    assert "Weights only load failed" in str(refused.value.__cause__)


def test_export_leaves_the_trainers_state_out(folder, tmp_path):
    exported = checkpoint.export(folder, tmp_path / "exported")
    assert exported == checkpoint.read_manifest(folder)
    assert not (tmp_path / "exported" / "trainer").exists()
    for before, after in zip(spoken(folder), spoken(tmp_path / "exported"), strict=True):
        np.testing.assert_array_equal(before, after)
    with pytest.raises(ValueError, match="no trainer state"):
        checkpoint.load_trainer_state(tmp_path / "exported")


def test_an_export_that_fails_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(folders, "replace_folder", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.export(folder, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


PROGRAM = """
import sys
from dataclasses import asdict, replace
import numpy as np
from libra_ray.policy import act, load_policy
from libra_ray.types import Observation
policy = load_policy(sys.argv[1])
images = {"observation.image": np.zeros((32, 32, 3), np.uint8)}
seen = [Observation(images=images, state=np.zeros(5, np.float32), instruction="go")]
chunk = act(policy, seen)[0]
print(np.isfinite(chunk.actions).all(), "ray" in sys.modules, "torch" in sys.modules)
"""


def test_a_policy_runs_without_ray(folder):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False", "True"], done.stderr
