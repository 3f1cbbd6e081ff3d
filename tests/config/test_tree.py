"""The configuration: one tree, one way to change it, and messages that help."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libra_ray.config import PRESETS, Config, from_json, from_tree, override, preset, to_json
from libra_ray.config.overrides import flatten, flatten_mapping, leaf_types
from libra_ray.config.paths import NAMES_OR_FOLDERS, PLACES

LEAVES = leaf_types(Config)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    assert from_json(to_json(preset(name))) == preset(name)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_its_own_name(name):
    assert preset(name).preset == name


def test_an_unknown_preset_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"nope.*debug.*mt10.*quickstart"):
        preset("nope")


def test_leaves_and_flat_values_have_the_same_names():
    assert set(LEAVES) == set(flatten(Config()))
    assert flatten_mapping(dataclasses.asdict(Config())) == flatten(Config())


def test_everything_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3


def test_overriding_nothing_changes_nothing():
    assert override(Config(), {}) == Config()
    assert override(Config(), flatten(Config())) == Config()


@given(
    steps=st.integers(1, 10**9),
    lr=st.floats(1e-9, 1, allow_nan=False),
    see=st.booleans(),
    tasks=st.lists(st.from_regex(r"[a-z-]{1,9}", fullmatch=True), min_size=1, unique=True),
)
def test_text_and_value_mean_the_same(steps, lr, see, tasks):
    """What a command line writes is what Python would have said."""
    values = {"train.steps": steps, "train.lr": lr, "planner.see_state": see, "sim.tasks": tuple(tasks)}
    texts = {"train.steps": str(steps), "train.lr": repr(lr), "planner.see_state": str(see), "sim.tasks": ",".join(tasks)}
    assert override(Config(), texts) == override(Config(), values)


@given(steps=st.integers(1, 10**6), width=st.sampled_from([16, 32, 64]))
def test_overrides_of_different_names_commute_and_touch_nothing_else(steps, width):
    a, b = {"train.steps": steps}, {"refiner.width": width}
    changed = override(override(Config(), a), b)
    assert changed == override(override(Config(), b), a) == override(Config(), a | b)
    assert flatten(changed) == flatten(Config()) | a | b


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.stepz": 1}, "train.stepz.*train.steps"),
        ({"steps": 1}, "train.steps"),
        ({"train": 1}, "unknown"),
        ({"train.steps.more": 1}, "unknown"),
        ({"train.steps": "many"}, "train.steps.*int"),
        ({"train.steps": 1.5}, "train.steps.*int"),
        ({"train.steps": True}, "train.steps.*int"),
        ({"train.steps": 0}, "train.steps.*at least 1"),
        ({"train.steps": float("inf")}, "train.steps.*int"),
        *[({"train.lr": value}, "train.lr.*finite") for value in ("nan", "inf", float("nan"))],
        *[({name: value}, f"{name}.*above 0") for name in ("train.lr", "train.grad_clip") for value in (0, -1)],
        *[({name: -1}, f"{name}.*at least 0") for name in ("train.weight_decay", "train.lambda_plan", "refiner.sample_noise")],
        *[({name: 2**64}, f"{name}.*at most") for name in ("record.seed", "evaluate.seed", "train.seed", "delay.seed")],
        *[({name: 10**11}, f"{name}.*at most 2147483647") for name in ("train.steps", "train.batch_size", "evaluate.robots")],
        ({"action.horizon": 100_000}, "action.horizon=100000 times action.chunks=.*at most 2000"),
        ({"sim.tasks": 5}, "sim.tasks=5.*list"),
        ({"sim.tasks": None}, "sim.tasks=None.*list"),
        *[({name: "~nobody-of-this-name/x"}, f"{name}.*home") for name in (*PLACES, *NAMES_OR_FOLDERS)],
        *[({name: "x" * 300}, f"{name}.*too long") for name in NAMES_OR_FOLDERS],
        ({"planner.see_state": "perhaps"}, "true or false"),
        ({"refiner.vision": "eyes"}, "own, shared"),
        ({"data.holdout_share": 1.5}, r"data.holdout_share.*\[0, 1\]"),
        ({"control.execute_steps": 6}, "exceeds action.horizon"),
        ({"planner.width": 130}, "planner.heads"),
        ({"sim.tasks": ""}, "at least one task"),
        ({"train.balance": "magic"}, "fixed, gradient, uncertainty"),
        ({"refiner.condition": "features"}, "now model.system; give model.system=monolithic"),
        ({"planner.freeze_backbone": True}, r"now planner\.train_vision and planner\.train_language; give both"),
        ({"refiner.vision": "shared", "refiner.train_encoder": "lora"}, r"no encoder .*; give planner\.train_vision"),
        ({"planner.train_head": "half"}, r"planner\.train_head.*full, frozen, lora"),
        ({"control.planner_delay_steps": 3}, "give delay.intent_steps=3"),
        ({"sim.image_size": 48}, "sim.image_size has another name now; give data.image_size=48"),
        ({"tracking.experiment": " "}, "tracking.experiment=' '.*1 to 500"),
        ({"tracking.experiment": "x" * 501}, "1 to 500"),
        ({"tracking.uri": None}, "tracking.uri=None.*str"),
        ({"tracking.experiment": ["a"]}, "tracking.experiment.*str"),
        *[
            ({"tracking.registered_model": name}, r"tracking.registered_model=.*without / : \. % \" '")
            for name in (
                "",
                " ",
                "team/libra",
                "libra.v2",
                "libra:new",
                "50%",
                '"',
                "it's",
                "a@b",
                "a?b",
                "a#b",
                "a\nb",
                "x" * 257,
            )
        ],
    ],
)
def test_a_mistake_is_refused_in_words(changes, message):
    with pytest.raises(ValueError, match=message):
        override(Config(), changes)


def test_what_earlier_versions_saved_is_read_in_todays_words():
    tree = json.loads(to_json(Config()))
    tree["control"]["planner_delay_steps"] = tree.pop("delay")["intent_steps"] + 2
    tree["refiner"]["condition"] = "features"
    del tree["model"]
    tree["sim"]["image_size"] = tree["data"].pop("image_size") + 16
    saved = {"model.system": "monolithic", "delay.intent_steps": 2, "data.image_size": 80}
    assert from_json(json.dumps(tree)) == override(Config(), saved)
    tree["refiner"]["condition"] = "tokens"
    assert from_json(json.dumps(tree)).model.system == "libra"


def test_the_defaults_of_earlier_versions_are_todays():
    """They named all there was; today naming none means all."""
    saved = Path(__file__).parents[1] / "fixtures" / "first_edition" / "run" / "config.json"
    tree = json.loads(saved.read_text())
    assert (tree["evaluate"]["controllers"], tree["train"]["start_parts"]) != ([], [])
    assert from_tree(tree) == preset("debug")
    tree["evaluate"]["controllers"].remove("expert")
    assert from_tree(tree).evaluate.controllers == ("policy", "coarse_only", "zero_action")


@pytest.mark.parametrize(
    ("name", "default", "other"), [("control.hold", "still", "repeat"), ("anchor_refine.gripper", "last", "none")]
)
def test_a_choice_that_is_declared_today_was_a_default_once(name, default, other):
    """Or a run that was begun then would not be continued by the same command; what is chosen today stays."""
    section, _, key = name.partition(".")
    tree = json.loads(to_json(Config()))
    assert tree[section][key] == "declared"
    for chosen in (default, other):
        tree[section][key] = chosen
        assert flatten(from_tree(tree))[name] == chosen
    tree["sim"]["image_size"] = tree["data"].pop("image_size")
    assert flatten(from_tree(tree))[name] == other
    tree[section][key] = default
    assert from_tree(tree) == Config()


def test_a_list_that_names_all_there_is_stays_what_it_is():
    """Or the run that was begun with it would not be continued by the same command."""
    named = {"evaluate.controllers": "expert,policy,coarse_only,zero_action", "train.start_parts": "planner,refiner"}
    config = override(preset("debug"), named)
    assert config.evaluate.controllers
    assert from_json(to_json(config)) == config


def test_a_key_of_another_version_is_refused():
    with pytest.raises(ValueError, match=r"train\.oracle"):
        from_json('{"train": {"oracle": 1}}')


@pytest.mark.parametrize("name", [name for name, kind in LEAVES.items() if get_origin(kind) is Literal])
def test_every_choice_is_accepted(name):
    for choice in get_args(LEAVES[name]):
        assert flatten(override(Config(), {name: choice}))[name] == choice


def test_every_leaf_is_of_a_kind_that_text_can_say():
    def plain(kind: Any) -> bool:
        if get_origin(kind) is tuple:
            return plain(get_args(kind)[0])
        return kind in (int, float, bool, str) or get_origin(kind) is Literal

    assert [name for name, kind in LEAVES.items() if not plain(kind)] == []


def test_recording_and_evaluation_seeds_never_meet():
    for name in PRESETS:
        config = preset(name)
        attempts = sum(map(config.record.episodes, config.sim.tasks)) * config.record.max_attempts
        assert config.record.seed + attempts <= config.evaluate.seed


@pytest.mark.parametrize("seed", [0, 50, 199])
def test_evaluation_on_recorded_placements_is_refused(seed):
    with pytest.raises(ValueError, match=r"evaluate\.seed.*at least 200"):
        override(Config(), {"evaluate.seed": seed, "record.episodes_per_task": 50, "record.max_attempts": 3})


def test_evaluation_on_placements_of_the_task_with_most_demonstrations_is_refused():
    with pytest.raises(ValueError, match=r"evaluate\.seed.*at least 400"):
        override(Config(), {"evaluate.seed": 200, "record.episodes_of": "door-open-v3=100", "record.max_attempts": 3})


def test_a_task_may_have_a_number_of_demonstrations_of_its_own():
    record = override(Config(), {"record.episodes_of": "door-open-v3=7,plate-slide-v3=90"}).record
    wanted = {task: record.episodes(task) for task in ("door-open-v3", "plate-slide-v3", "drawer-open-v3")}
    assert wanted == {"door-open-v3": 7, "plate-slide-v3": 90, "drawer-open-v3": record.episodes_per_task}


@pytest.mark.parametrize("pair", ["=5", "door-open-v3", "door-open-v3=0", "door-open-v3=-1", "door-open-v3=many", "5"])
def test_a_wrong_number_of_demonstrations_is_refused(pair):
    with pytest.raises(ValueError, match=r"record\.episodes_of=.* TASK=COUNT"):
        override(Config(), {"record.episodes_of": pair})


def test_a_second_number_of_demonstrations_of_a_task_is_refused():
    with pytest.raises(ValueError, match="only once"):
        override(Config(), {"record.episodes_of": "door-open-v3=5,door-open-v3=6"})


def test_a_task_named_twice_is_refused():
    with pytest.raises(ValueError, match="only once"):
        override(Config(), {"sim.tasks": "reach-v3,reach-v3"})


@pytest.mark.parametrize("name", PLACES)
def test_a_place_is_the_same_wherever_it_is_read(name, tmp_path, monkeypatch):
    """Workers, and a run that is continued, may be in another working folder than the one where it was typed."""
    monkeypatch.chdir(tmp_path)
    config = override(Config(), {name: "mine/of-today"})
    assert flatten(config)[name] == str(tmp_path / "mine" / "of-today")
    monkeypatch.chdir("/")
    assert from_json(to_json(config)) == config
    assert flatten(override(config, {name: ""}))[name] == ""


@pytest.mark.parametrize("name", NAMES_OR_FOLDERS)
def test_a_model_is_a_folder_where_there_is_one_and_a_name_elsewhere(name, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed in ("models/mine", "./models/mine", "~/models/mine", str(tmp_path / "models" / "mine")):
        assert flatten(override(Config(), {name: typed}))[name] == str(tmp_path / "models" / "mine")
    for typed in ("models/another", "google/siglip-base-patch16-224", "tiny"):
        assert flatten(override(Config(), {name: typed}))[name] == typed


@pytest.mark.parametrize("name", ["tiny", "conv"])
def test_what_is_built_in_is_never_a_folder(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    key = "planner.backbone" if name == "tiny" else "refiner.encoder"
    assert flatten(override(Config(), {key: name}))[key] == name
