"""What the study of systems compares: policies that share tasks, demonstrations and time, and the tables of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.component_tables import PRECISION, TRUTH
from libra_ray.config import Config, override, preset
from libra_ray.config.systems import EXPERTS

POLICY, ANCHOR_ONLY = "policy", "anchor_only"
SEED = 600_000
"""The first of the evaluated episodes; no demonstration and no other study has it."""
VARIED = ("model.system", "train.steps", "train.seed", "sim.tasks", "evaluate.controllers")
"""What the study gives each policy itself."""
ONE_LEVEL: dict[str, Any] = {"action.chunks": 1, "refiner.max_staleness": 0, "refiner.condition_dropout": 0.0}
"""Of one level nothing is ever old or missing."""
REFINED: dict[str, Any] = {"model.system": "anchor_refine", **ONE_LEVEL}
MIXED: dict[str, Any] = {"model.system": "experts", **ONE_LEVEL}
ALONE = {name: f"expert_{name}" for name in EXPERTS}
"""The variants of a mixture, and here also the policies that were trained with one expert."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A policy as it is trained.

    Attributes:
        changes: of the domain's settings.
        controllers: it, and its variants that are evaluated too.
        cloning: plain behaviour cloning (`baseline.py`) in place of a system.
    """

    changes: Mapping[str, Any]
    controllers: tuple[str, ...] = (POLICY,)
    cloning: bool = False


VARIANTS = {
    "cloning": Variant(changes=ONE_LEVEL, cloning=True),
    "regression": Variant(changes={"model.system": "regression", **ONE_LEVEL}),
    "monolithic": Variant(changes={"model.system": "monolithic", **ONE_LEVEL}),
    "libra": Variant(changes={}),
    "coarse_to_fine": Variant(changes={"model.system": "coarse_to_fine", **ONE_LEVEL}),
    "anchor_regression": Variant(changes=REFINED, controllers=(POLICY, ANCHOR_ONLY)),
    "anchor_diffusion": Variant(changes=REFINED | {"anchor_refine.backbone": "diffusion"}, controllers=(POLICY, ANCHOR_ONLY)),
    "experts_hard": Variant(changes=MIXED, controllers=(POLICY, *ALONE.values())),
    "experts_soft": Variant(changes=MIXED | {"experts.routing": "soft"}),
    "hierarchy_two": Variant(changes={"model.system": "hierarchy", "hierarchy.levels": "two"}),
    "hierarchy_three": Variant(changes={"model.system": "hierarchy"}),
    "anchor_no_stop": Variant(changes=REFINED | {"anchor_refine.stop_gradient": False}),
    "anchor_naive_gripper": Variant(changes=REFINED | {"anchor_refine.gripper_refinement": "naive"}),
    "anchor_direct": Variant(changes=REFINED | {"anchor_refine.predicts": "action"}),
    "anchor_seen": Variant(changes=REFINED | {"anchor_refine.see_anchor": True}),
    "anchor_no_gripper": Variant(changes=REFINED | {"anchor_refine.gripper_refinement": "none"}),
    **{alone: Variant(changes=MIXED | {"experts.names": name}) for name, alone in ALONE.items()},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table: a policy, driven by itself or as one of its variants.

    Attributes:
        against: labels of rows of the table that it is compared with, episode by episode.
    """

    label: str
    variant: str
    controller: str = POLICY
    against: tuple[str, ...] = ()


REGRESSION, MONOLITHIC, CLONED = BASES = ("monolithic regression", "monolithic diffusion", "behaviour cloning")
BY_REGRESSION, BY_DIFFUSION = "AnchorRefine over regression", "AnchorRefine over diffusion"
ROUTER = "router, hard"
ANCHOR_OF = {name: f"{name}: its anchor alone" for name in (BY_REGRESSION, BY_DIFFUSION)}
ABLATIONS = {
    "no stop-gradient": "anchor_no_stop",
    "naive gripper loss": "anchor_naive_gripper",
    "predicts the action": "anchor_direct",
    "sees the anchor": "anchor_seen",
    "no gripper refinement": "anchor_no_gripper",
}
TABLES: Mapping[str, Sequence[Row]] = {
    "ranking": (
        Row(label=CLONED, variant="cloning"),
        Row(label=REGRESSION, variant="regression"),
        Row(label=MONOLITHIC, variant="monolithic"),
        Row(label="libra", variant="libra", against=BASES),
        Row(label="coarse-to-fine", variant="coarse_to_fine", against=BASES),
        Row(label=BY_REGRESSION, variant="anchor_regression", against=BASES),
        Row(label=BY_DIFFUSION, variant="anchor_diffusion", against=BASES),
        Row(label="experts, hard", variant="experts_hard", against=BASES),
        Row(label="experts, soft", variant="experts_soft", against=BASES),
        Row(label="hierarchy of two levels", variant="hierarchy_two", against=BASES),
    ),
    "anchor": (
        Row(label=REGRESSION, variant="regression"),
        Row(label=ANCHOR_OF[BY_REGRESSION], variant="anchor_regression", controller=ANCHOR_ONLY),
        Row(label=BY_REGRESSION, variant="anchor_regression", against=(REGRESSION, ANCHOR_OF[BY_REGRESSION])),
        *(Row(label=label, variant=variant, against=(BY_REGRESSION,)) for label, variant in ABLATIONS.items()),
        Row(label=MONOLITHIC, variant="monolithic"),
        Row(label=ANCHOR_OF[BY_DIFFUSION], variant="anchor_diffusion", controller=ANCHOR_ONLY),
        Row(label=BY_DIFFUSION, variant="anchor_diffusion", against=(MONOLITHIC, ANCHOR_OF[BY_DIFFUSION])),
    ),
    "experts": (
        *(Row(label=f"{name} of the mixture", variant="experts_hard", controller=ALONE[name]) for name in EXPERTS),
        *(Row(label=f"{name} trained alone", variant=ALONE[name]) for name in EXPERTS),
        Row(
            label=ROUTER,
            variant="experts_hard",
            against=tuple(f"{name} {how}" for how in ("of the mixture", "trained alone") for name in EXPERTS),
        ),
        Row(label="router, soft", variant="experts_soft", against=(ROUTER,)),
    ),
    "hierarchy": (
        Row(label="two levels", variant="hierarchy_two"),
        Row(label="three levels", variant="hierarchy_three", against=("two levels",)),
    ),
}
"""Tables of episodes; `LATENCY` is the one of milliseconds."""
LATENCY = "latency"
TIMED = ("regression", "monolithic", "libra", "coarse_to_fine", "anchor_regression", "anchor_diffusion", "experts_hard",
         "experts_soft", "hierarchy_two", "hierarchy_three")  # fmt: skip
"""The policies of the table of latencies; plain behaviour cloning is no system, and is served by nobody."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Tasks, data and time.

    Attributes:
        preset, changes: of all its policies.
        tasks: that they are evaluated on.
        episodes: of each task, where the command line says nothing.
        seconds: of training, where the command line says nothing.
        tables: that it has.
        few: demonstrations of each task that show every instruction once: as many as the smallest study needs.
        pretraining: all its systems begin with one backbone (`pretraining.py`), whose training is not in their time; it learns
            from the domain's demonstrations, or where something is changed here, from those. None: all weights begin random.
    """

    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...]
    episodes: int
    seconds: float
    tables: tuple[str, ...]
    few: int = 2
    pretraining: Mapping[str, Any] | None = field(default_factory=dict)


ALL = ("ranking", "anchor", "experts", LATENCY)
PLACED = ("5mm", "2mm", "1mm")
DOMAINS = {
    "metaworld": Domain(
        preset="quickstart", tasks=preset("quickstart").sim.tasks, episodes=20, seconds=60.0, tables=ALL, pretraining=None
    ),
    # Demonstrations within 1 mm teach the coarser tolerances too, and the pictures do not tell which is meant. With the grasp
    # (`place-1mm`) two cores rank nobody: 8 % for all in docs/components.md.
    "tabletop": Domain(
        preset="tabletop",
        changes=PRECISION | TRUTH | {"sim.tasks": "putdown-1mm", "sim.max_steps": 60},
        tasks=tuple(f"putdown-{tolerance}" for tolerance in PLACED),
        episodes=100,
        seconds=150.0,
        tables=ALL,
        few=24,
    ),
    "grasp": Domain(
        preset="tabletop",
        changes=PRECISION
        | TRUTH
        | {
            "sim.tasks": "place-1mm",
            "sim.max_steps": 150,
            "record.episodes_per_task": 12000,
            "record.recovery_share": 0.5,
            "train.batch_size": 128,
        },
        tasks=tuple(f"place-{tolerance}" for tolerance in PLACED),
        episodes=100,
        seconds=600.0,
        tables=ALL,
        few=24,
    ),
    "chains": Domain(
        preset="tabletop",
        changes={
            "sim.tasks": "chain1,chain2,chain3,chain4",
            "record.episodes_per_task": 600,
            "planner.max_text_tokens": 256,
            "refiner.max_staleness": -1,
            "refiner.condition_dropout": 0.1,
            "control.rule": "overlap",
        },
        tasks=("chain1", "chain2", "chain3", "chain4"),
        episodes=100,
        seconds=900.0,
        tables=("hierarchy", LATENCY),
    ),
    # Without a grasp, which wants a GPU's time, two cores can tell systems apart by the length of a chain.
    "contact": Domain(
        preset="tabletop",
        changes={"sim.tasks": "contact1,contact2,contact3", "sim.max_steps": 80, "record.episodes_per_task": 1000}
        | {"record.noise_std": 0.5},
        tasks=("contact1", "contact2", "contact3"),
        episodes=100,
        seconds=600.0,
        tables=("hierarchy",),
        few=24,
        # What a word means is learned from single parts; from chains it was not, in as many steps.
        pretraining={"sim.tasks": "touch,push", "record.episodes_per_task": 1500},
    ),
}
QUICK: Mapping[str, Any] = {
    "data.image_size": 32,
    "sim.supersample": 1,
    "planner.width": 32,
    "planner.depth": 1,
    "refiner.width": 32,
    "refiner.depth": 1,
    "train.batch_size": 8,
}
"""Policies that learn nothing."""


def variants_of(table: str, domain: Domain) -> tuple[str, ...]:
    """The policies of a table, each once."""
    if table == LATENCY:
        trained = {row.variant for name in domain.tables if name != LATENCY for row in TABLES[name]}
        return tuple(name for name in TIMED if name in trained)
    return tuple(dict.fromkeys(row.variant for row in TABLES[table]))


def config_of(domain: Domain, variant: str, seed: int, changes: Mapping[str, Any]) -> Config:
    """The configuration that a policy is trained with, but for its steps.

    Raises:
        ValueError: there is none such.
    """
    own = {"evaluate.controllers": VARIANTS[variant].controllers, "evaluate.videos_per_task": 0, "train.seed": seed}
    return override(preset(domain.preset), {**domain.changes, **changes, **VARIANTS[variant].changes, **own})


def evaluated_config(trained: Config, domain: Domain, episodes: int) -> Config:
    """The configuration that it is evaluated with."""
    return override(trained, {"sim.tasks": domain.tasks, "evaluate.seed": SEED, "evaluate.episodes_per_task": episodes})
