"""What a system says of the settings that it follows is so: others change nothing, and each of these changes something."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from libra_ray.config import override, preset
from libra_ray.config.checks import LEAST
from libra_ray.config.overrides import flatten
from libra_ray.model import ignored
from libra_ray.model.dry_run import dry_run
from libra_ray.model.ignored import OF_SYSTEMS, OF_WINDOWS, ignored_in_evaluation, ignored_in_training, remark
from libra_ray.model.registry import make_system, system_class
from libra_ray.model.system import SystemInput
from libra_ray.types import Level
from tests.model.builders import SHAPE, make_batch, open_gates, tiny_config
from tests.model.test_systems import FORMS

NAMED = replace(SHAPE, subgoals=("one", "two"))
FROM_OUTSIDE = {"planner.backbone", "refiner.encoder"}
"""Names of models, of which there is no small other one."""
OTHER: dict[str, Any] = {
    "action.bins": 7,
    "planner.width": 64,
    "planner.depth": 2,
    "planner.heads": 2,
    "planner.max_text_tokens": 80,
    "planner.see_state": False,
    "planner.train_vision": "frozen",
    "planner.train_language": "frozen",
    "planner.train_head": "frozen",
    "refiner.width": 64,
    "refiner.depth": 2,
    "refiner.heads": 2,
    "refiner.train_encoder": "frozen",
    "refiner.train_transformer": "frozen",
    "refiner.vision": "shared",
    "refiner.vision_tokens": "patches",
    "refiner.see_language": True,
    "refiner.objective": "ddpm",
    "refiner.predicts": "target",
    "refiner.train_timesteps": 50,
    "refiner.denoising_steps": 3,
    "refiner.noise_draws": 1,
    "refiner.sample_noise": 0.5,
    "refiner.condition_dropout": 0.5,
    "refiner.max_committed_steps": 1,
    "coarse_to_fine.steps": 3,
    "coarse_to_fine.noise": 0.3,
    "anchor_refine.backbone": "diffusion",
    "anchor_refine.levels": "two",
    "anchor_refine.anchor_share": 0.25,
    "anchor_refine.context": "own",
    "anchor_refine.gripper": "0",
    "anchor_refine.gripper_refinement": "naive",
    "anchor_refine.gripper_margin": 0.3,
    "anchor_refine.lambda_residual": 0.5,
    "anchor_refine.lambda_gripper": 0.5,
    "anchor_refine.stop_gradient": False,
    "anchor_refine.predicts": "action",
    "anchor_refine.see_anchor": True,
    "hierarchy.levels": "two",
    "hierarchy.plans": 3,
    "hierarchy.waypoint_steps": 2,
    "experts.names": "flow,token",
    "experts.routing": "soft",
    "experts.temperature": 0.5,
    "experts.balance": 0.5,
    "train.lambda_plan": 0.5,
    "train.lambda_diff": 0.5,
    "train.curriculum": "planner",
    "train.tau": 0.01,
}
SHIPPED = {name: form for name, form in FORMS.items() if ":" not in name}
IN_DETAIL = ("libra", "coarse_to_fine", "anchor_refine", "experts", "hierarchy")


def behaviour(changes: dict[str, Any]) -> Iterator[object]:
    """All that a system is and does, one after the other, from what is known without computing on."""
    torch.manual_seed(0)
    model = open_gates(make_system(tiny_config(changes), NAMED))
    schedule, batch = model.schedule(), make_batch(model, 3)
    yield [(name, weight.shape, weight.requires_grad) for name, weight in model.named_parameters()]
    yield model.levels
    yield model.loss_weights()
    yield batch.text.shape
    for step in range(1, 7):
        schedule.advance(step, {"plan_accuracy": 0.5})
        yield schedule.phase
    for phase in schedule.phases:
        torch.manual_seed(1)
        found = model.train().losses(batch, phase)
        yield {name: value.item() for name, value in {**found.terms, **found.metrics}.items()}
    model.eval()
    text = model.tokenise(["open the drawer"] * 3)
    seen = SystemInput(images=batch.images, state=batch.state, text=text, committed=batch.actions[:, :2])
    values: dict[str, Any] = {}
    for level in model.levels:
        above = {} if level.reads is None else model.aligned(level, values[level.reads], torch.zeros(3, dtype=torch.long))
        shape = model.noise_shape(level.name)
        noise = None if shape is None else torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
        values[level.name] = model.infer(level.name, seen, above, noise)
        yield {name: value.tolist() for name, value in values[level.name].items()}


def changes_nothing(changes: dict[str, Any], usual: list[object]) -> bool:
    return all(found == known for found, known in zip(behaviour(changes), usual, strict=True))


def apart(form: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Of the settings with another value that such a system may have, those that it follows and those that it does not."""
    config, followed, ignored = tiny_config(form), list[str](), list[str]()
    names = system_class(config.model.system).follows(config)
    assert names is not None
    for name, value in OTHER.items():
        try:
            override(config, {name: value})
        except ValueError:
            continue
        if name not in form:
            is_followed = any(name == one or (one.endswith(".") and name.startswith(one)) for one in names)
            (followed if is_followed else ignored).append(name)
    return followed, ignored


def test_every_setting_of_systems_has_another_value():
    names = {name for name in flatten(preset("debug")) if name.startswith(OF_SYSTEMS)}
    assert names - set(OF_WINDOWS) - FROM_OUTSIDE == OTHER.keys()


@pytest.mark.parametrize("form", SHIPPED.values(), ids=SHIPPED)
def test_what_a_system_does_not_follow_changes_nothing(form):
    changed = dict(form)
    for name in apart(form)[1]:
        try:
            tiny_config({**changed, name: OTHER[name]})
        except ValueError:
            continue
        changed[name] = OTHER[name]
    assert len(changed) > 8
    assert changes_nothing(changed, list(behaviour(form)))


@pytest.mark.parametrize("system", IN_DETAIL)
def test_what_a_system_follows_changes_something(system):
    form = FORMS[system]
    usual = list(behaviour(form))
    assert [name for name in apart(form)[0] if changes_nothing({**form, name: OTHER[name]}, usual)] == []


def test_what_was_given_and_has_no_effect_is_told():
    given = {
        "model.system": "regression",
        "planner.width": 64,
        "refiner.width": 64,
        "action.bins": 7,
        "refiner.max_staleness": 3,
    }
    config = override(preset("debug"), given)
    names = ignored_in_training(config, apart=False)
    assert names == ["action.bins", "refiner.width"]
    assert remark(names, config, "with model.system=regression") == (
        "no effect with model.system=regression: action.bins=7, refiner.width=64"
    )
    assert ignored_in_training(override(preset("mt10"), {"model.system": "regression"}), apart=False) == []
    assert ignored_in_training(override(config, {"model.system": "toy_system:Toy"}), apart=False) == []


NEEDED = [
    (
        {"data.root": "/d", "record.settle_steps": 3, "record.seed": 7},
        {"data.root": ""},
        ["no effect beside data.root: record.settle_steps=3, record.seed=7"],
    ),
    (
        {"record.noise_std": 0.3, "record.noise_share": 0.0},
        {"record.noise_share": 0.1},
        ["no effect without record.noise_share above 0: record.noise_std=0.3"],
    ),
    (
        {"record.noise_std": 0.0, "record.noise_share": 0.3},
        {"record.noise_std": 0.1},
        ["no effect without record.noise_std above 0: record.noise_share=0.3"],
    ),
    (
        {"record.episodes_per_task": 9, "record.episodes_of": "reach-v3=2,push-v3=3"},
        {"sim.tasks": "reach-v3,door-open-v3"},
        ["no effect where record.episodes_of counts every task: record.episodes_per_task=9"],
    ),
    (
        {"train.start_parts": "planner,refiner"},
        {"train.start_from": "/c"},
        ["no effect without train.start_from: train.start_parts=planner,refiner"],
    ),
    (
        {"train.balance_memory": 0.5},
        {"train.balance": "gradient"},
        ["no effect without train.balance=gradient: train.balance_memory=0.5"],
    ),
    (
        {"train.validate_every": 3, "data.holdout_share": 0.0},
        {"data.holdout_share": 0.2},
        ["no effect without data.holdout_share above 0: train.validate_every=3"],
    ),
    (
        {"train.checkpointing": "full"},
        {"planner.backbone": "some/model"},
        ["no effect without a pretrained planner.backbone or refiner.encoder: train.checkpointing=full"],
    ),
    (
        {"model.lora_rank": 4, "model.lora_alpha": 8},
        {"planner.train_language": "lora"},
        ["no effect without a part that trains by lora: model.lora_rank=4, model.lora_alpha=8.0"],
    ),
    (
        {"delay.seed": 3},
        {"delay.lost_share": 0.1},
        ["no effect without delay.trace, delay.lost_share or delay.reordered_share: delay.seed=3"],
    ),
    (
        {"evaluate.gpus_per_replica": 0.25},
        {"ray.use_gpu": True},
        ["no effect without ray.use_gpu=true: evaluate.gpus_per_replica=0.25"],
    ),
    ({"record.noise_std": 0.0, "record.noise_share": 0.0, "train.validate_every": 0, "data.holdout_share": 0.0}, {}, []),
]
"""Settings that mean nothing without another one, that one, and what is said without it."""
OF_STAGES = ignored.remarks_in_recording, ignored.remarks_in_training, ignored.remarks_in_evaluation


@pytest.mark.parametrize(("given", "met", "said"), NEEDED)
def test_a_setting_without_the_other_that_it_needs_is_told(given, met, said):
    config = override(preset("debug"), given)
    assert [line for remarks in OF_STAGES for line in remarks(config)] == said
    assert [line for remarks in OF_STAGES for line in remarks(override(config, met))] == []


def test_of_networks_that_a_user_has_made_nothing_is_told():
    given = {"model.system": "toy_system:Toy", "model.lora_rank": 4, "train.checkpointing": "full"}
    assert ignored.remarks_in_training(override(preset("debug"), given)) == []


@pytest.mark.parametrize("system", IN_DETAIL)
def test_of_every_setting_the_least_value_is_enough_or_another_is_named(system):
    """No network may be the first to say that something is too small, in its own words."""
    names = [n for n in LEAST if n.startswith(("data.image", "data.history", "action.", *OF_SYSTEMS)) and LEAST[n] > 0]
    assert len(names) > 15
    for name in names:
        try:
            config = tiny_config({**FORMS[system], name: LEAST[name]})
            dry_run(lambda: make_system(config, NAMED))  # noqa: B023  (called at once)
        except ValueError as refusal:
            assert re.search(r"\.\w+=.* must be at (least|most) \d+", str(refusal)), refusal  # noqa: PT017


@pytest.mark.parametrize("tokens", range(-1, 4))
def test_instructions_too_short_for_the_tiny_backbone_are_refused_with_the_least(tokens):
    with pytest.raises(ValueError, match=rf"planner\.max_text_tokens={tokens} is too small.* must be at least [14]$"):
        make_system(tiny_config({"planner.max_text_tokens": tokens}), NAMED)
    dry_run(lambda: make_system(tiny_config({"planner.max_text_tokens": 4}), NAMED))


def test_levels_apart_follow_no_curriculum():
    config = override(preset("debug"), {"train.curriculum": "teacher", "train.lambda_diff": 2.0})
    assert ignored_in_training(config, apart=False) == []
    assert ignored_in_training(config, apart=True) == ["train.curriculum"]


@pytest.mark.parametrize(
    ("changes", "one", "two"),
    [
        ({"delay.intent_steps": 3, "delay.chunk_steps": 1}, ["delay.intent_steps"], []),
        (
            {"delay.lost_share": 0.5, "control.max_intent_age_steps": 5},
            ["control.max_intent_age_steps", "delay.lost_share"],
            [],
        ),
        ({"delay.control_hz": 20.0}, ["delay.control_hz"], ["delay.control_hz"]),
        ({"delay.trace": "/a", "delay.control_hz": 20.0, "delay.chunk_steps": 1}, ["delay.chunk_steps"], ["delay.chunk_steps"]),
    ],
)
def test_settings_of_intents_that_nobody_reads_are_told(changes, one, two):
    last = Level(name="policy", covers=5)
    levels = (Level(name="above", covers=10), replace(last, reads="above"))
    config = override(preset("debug"), changes)
    assert [ignored_in_evaluation(config, of) for of in ((last,), levels)] == [one, two]
