"""What the study of components compares: benches of policies that share tasks and demonstrations, and the tables of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.pretraining import PART, WORDED_TASKS
from libra_ray.config import Config, override, preset
from libra_ray.config.presets import AS_PUBLISHED

COARSE_ONLY = "coarse_only"
WORDS = {"refiner.see_language": True}
BOTH = {"evaluate.controllers": f"policy,{COARSE_ONLY}"}
FEATURES, SHARED = {"model.system": "monolithic"}, {"refiner.vision": "shared"}
TRUTH = {"train.curriculum": "teacher"}
PRECISION: dict[str, Any] = {
    "sim.wrist_camera": True,
    # A plan that began ten steps ago is centimetres old: the planner runs freely. And the last millimetres want to be seen.
    "control.rule": "overlap",
    "control.execute_steps": 2,
    "record.episodes_per_task": 4000,
    # A pixel of the wrist camera is a millimetre: pictures shifted at random would teach errors of that size.
    "train.augment_pixels": 0,
    "evaluate.episodes_per_task": 100,
    # How many steps are executed, and what the refiner reads in training, was chosen on the seeds from 100,000 on.
    "evaluate.seed": 200_000,
}
PUT_DOWN: dict[str, Any] = {"sim.tasks": "putdown-1mm", "sim.max_steps": 60, "train.steps": 1500}
GRASP: dict[str, Any] = {
    "sim.tasks": "place-1mm",
    "sim.max_steps": 100,
    # Of 4,000 it learns the episodes by heart and grasps the wrong block.
    "record.episodes_per_task": 12000,
    "train.batch_size": 128,
    "train.steps": 1500,
    "train.start_parts": f"{PART},refiner.eyes",
}
EYES: Mapping[str, Any] = {
    "train.steps": 6000,
    "train.checkpoint_every": 1000,
    "train.validate_every": 1000,
    "train.lambda_diff": 1.0,
    "refiner.vision": "own",
    "refiner.depth": 2,
}
"""A longer training of both systems' encoders, as both begin pretrained in the paper."""
PLACED: dict[str, dict[str, Any]] = {"full": BOTH | TRUTH, "monolithic": FEATURES}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Policies that share tasks, demonstrations and backbone.

    Attributes:
        changes: of the preset `tabletop`.
        variants: name -> changes of that.
        pretraining: what their backbone is trained with beside `pretraining.PRETRAINING`.
    """

    changes: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    pretraining: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table: a variant of a bench, driven by itself or by its planner alone."""

    label: str
    bench: str
    variant: str
    controller: str = "policy"


BENCHES = {
    "place": Bench(
        changes=PRECISION | PUT_DOWN,
        variants=PLACED | {"fine": {"action.bins": 64} | BOTH | TRUTH, "sampled": BOTH},
    ),
    "grasp": Bench(changes=PRECISION | GRASP, variants=PLACED, pretraining=EYES),
    "tasks": Bench(
        changes=WORDED_TASKS,
        variants={
            "monolithic": FEATURES | SHARED,
            "own_encoder": FEATURES,
            "refinement": SHARED,
            "full": {},
            "teacher": {"train.curriculum": "teacher"},
            "planner": {"train.curriculum": "planner"},
            "words": WORDS,
            "two": {"action.bins": 2},
            "two_words": {"action.bins": 2} | WORDS,
        },
    ),
}
TABLES = {
    "precision": (
        Row(label="coarse + refine, N = 10", bench="place", variant="full"),
        Row(label="coarse only, N = 10", bench="place", variant="full", controller=COARSE_ONLY),
        Row(label="coarse + refine, N = 64", bench="place", variant="fine"),
        Row(label="coarse only, N = 64", bench="place", variant="fine", controller=COARSE_ONLY),
        Row(label="monolithic, equal budget", bench="place", variant="monolithic"),
        Row(label="coarse + refine, N = 10, trained on sampled tokens", bench="place", variant="sampled"),
    ),
    "precision with the grasp": (
        Row(label="coarse + refine, N = 10", bench="grasp", variant="full"),
        Row(label="coarse only, N = 10", bench="grasp", variant="full", controller=COARSE_ONLY),
        Row(label="monolithic, equal budget", bench="grasp", variant="monolithic"),
    ),
    "components": (
        Row(label="full", bench="tasks", variant="full"),
        Row(label="+ refinement (tokens, shared features)", bench="tasks", variant="refinement"),
        Row(label="+ own encoder (no tokens)", bench="tasks", variant="own_encoder"),
        Row(label="monolithic diffusion", bench="tasks", variant="monolithic"),
    ),
    "curriculum": (
        Row(label="ground truth, then sampled tokens", bench="tasks", variant="full"),
        Row(label="ground truth only", bench="tasks", variant="teacher"),
        Row(label="sampled tokens only", bench="tasks", variant="planner"),
    ),
    "information": (
        Row(label="N = 2, as published", bench="tasks", variant="two"),
        Row(label="N = 2, the refiner reads the words", bench="tasks", variant="two_words"),
        Row(label="N = 10, as published", bench="tasks", variant="full"),
        Row(label="N = 10, the refiner reads the words", bench="tasks", variant="words"),
    ),
}
"""The first row of each is what the others are compared with."""
STUDY = {
    # As published, where the preset is made for late planners.
    **AS_PUBLISHED,
    "train.start_parts": PART,
    "train.curriculum": "threshold",
    "evaluate.controllers": "policy",
    "evaluate.videos_per_task": 0,
    "train.checkpoint_every": 500,
    "train.log_every": 40,
}
QUICK = {
    "data.image_size": 32,
    "sim.max_steps": 60,
    "record.episodes_per_task": 10,
    "train.steps": 40,
    "train.batch_size": 16,
    "train.warmup_steps": 5,
    "evaluate.episodes_per_task": 4,
}


def config_of(bench: Bench, variant: str, seed: int, changes: Mapping[str, Any]) -> Config:
    """A cell's configuration: preset, study, bench, the command line's changes, and last what the variant is named after."""
    ordered = {**STUDY, **bench.changes, **changes, **bench.variants[variant], "train.seed": seed}
    base = override(preset("tabletop"), ordered)
    return override(base, {"train.validate_every": base.train.steps})
