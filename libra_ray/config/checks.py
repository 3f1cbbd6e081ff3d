"""Ranges and combinations of settings that no type expresses, by their dotted names. Standard library only."""

from collections.abc import Mapping, Sequence
from typing import Any

from libra_ray.config.systems import EXPERTS

Settings = Mapping[str, Any]
"""Dotted name -> value, of every setting."""

LEAST = {
    "delay.control_hz": 0,
    "data.image_size": 16, "sim.max_steps": 1, "record.episodes_per_task": 1, "record.max_attempts": 1, "data.history": 1,
    "action.bins": 2, "action.horizon": 1, "action.chunks": 1, "planner.width": 8, "planner.depth": 1, "planner.heads": 1,
    "planner.max_text_tokens": 1,
    "refiner.width": 8, "refiner.depth": 1, "refiner.heads": 1, "refiner.train_timesteps": 2, "refiner.denoising_steps": 1,
    "refiner.noise_draws": 1, "refiner.max_staleness": -1, "train.steps": 1, "train.batch_size": 1, "train.log_every": 1,
    "train.checkpoint_every": 1,
    "train.accumulate": 1, "train.validate_every": 0, "train.warmup_steps": 0, "delay.intent_steps": 0,
    "delay.chunk_steps": 0, "delay.seed": 0, "refiner.max_committed_steps": 0, "control.committed_steps": 0,
    "control.execute_steps": 0, "control.max_intent_age_steps": 0, "evaluate.episodes_per_task": 1, "evaluate.robots": 0,
    "evaluate.policy_replicas": 0, "evaluate.videos_per_task": 0, "sim.goal_moves_at": 0,
    "ray.simulator_actors": 0, "ray.train_workers": 1, "ray.max_failures": -1, "record.settle_steps": 0, "record.seed": 0,
    "evaluate.seed": 0, "train.seed": 0, "train.balance_every": 1, "ray.train_cpus_per_worker": 0, "record.noise_std": 0,
    "train.augment_pixels": 0, "train.augment_state": 0, "sim.supersample": 1, "train.weight_decay": 0,
    "train.lambda_plan": 0, "train.lambda_diff": 0, "refiner.sample_noise": 0, "coarse_to_fine.steps": 1,
    "coarse_to_fine.noise": 0, "anchor_refine.lambda_gripper": 0, "experts.balance": 0,
    "model.lora_rank": 1, "hierarchy.plans": 1, "hierarchy.subgoals": 1, "hierarchy.waypoint_steps": 1,
}  # fmt: skip
"""The smallest value of each."""
ABOVE_ZERO = (
    "train.lr",
    "train.grad_clip",
    "anchor_refine.lambda_residual",
    "anchor_refine.gripper_margin",
    "experts.temperature",
    "model.lora_alpha",
)
"""Settings that would stop all learning at 0."""
SEEDS = ("record.seed", "evaluate.seed", "train.seed", "delay.seed")
LARGEST_SEED = 2**62
"""Data sets and networks keep and take seeds of 64 bits, and some are counted on from the first."""
LARGEST = 2**31 - 1
"""Of every other whole number: nobody means more, and what counts or allocates by it would end somewhere else, later."""
LONGEST_PLAN = 2000
"""Steps of a plan; at 80 Hz 25 s."""
SHARES = (
    "data.holdout_share", "record.noise_share", "refiner.condition_dropout", "train.tau", "train.ema_decay",
    "train.balance_memory", "train.lr_final_share", "delay.lost_share", "delay.reordered_share", "anchor_refine.anchor_share",
    "record.recovery_share",
)  # fmt: skip
"""Settings in [0, 1]."""

NOT_IN_MODEL_NAMES = "/:.%\"'"
"""Characters that MLflow takes in no name of its model registry."""
NOT_IN_ADDRESSES = "@?#"
"""Characters with a meaning of their own in `models:/<name>@<alias>`."""
LONGEST_MODEL_NAME = 256
LONGEST_EXPERIMENT = 500


def counts_of(pairs: Sequence[str]) -> dict[str, int]:
    """The counts of `TASK=COUNT` pairs.

    Raises:
        ValueError: a pair of another form, or a task named twice.
    """
    counts: dict[str, int] = {}
    for task, _, count in (pair.partition("=") for pair in pairs):
        if not task or not count.isdecimal() or int(count) < 1:
            raise ValueError(f"record.episodes_of={task}={count} must be TASK=COUNT with a count from 1 on, e.g. reach-v3=800")
        if task in counts:
            raise ValueError(f"record.episodes_of={','.join(pairs)} must name each task only once")
        counts[task] = int(count)
    return counts


def renames_of(pairs: Sequence[str]) -> dict[str, str]:
    """New name -> old name of `NEW=OLD` pairs.

    Raises:
        ValueError: a pair of another form, or a name given twice.
    """
    names: dict[str, str] = {}
    for new, _, old in (pair.partition("=") for pair in pairs):
        if not new or not old or "=" in old:
            raise ValueError(f"data.keys={','.join(pairs)} must be pairs NEW=OLD, e.g. action=actions,observation.state=state")
        if new in names or old in names.values():
            raise ValueError(f"data.keys={','.join(pairs)} must name each feature only once")
        names[new] = old
    return names


def check(settings: Settings) -> None:
    """Refuse what cannot be run.

    Raises:
        ValueError: a value outside its range, or two that contradict each other; the message names what would be valid.
    """
    _refuse_ranges(settings)
    _refuse_misfits(settings)
    _refuse_other_families(settings)
    _refuse_one_sided(settings)
    _refuse_odd_systems(settings)
    _refuse_seen_seeds(settings)
    _refuse_names(settings)


def _refuse_ranges(settings: Settings) -> None:
    for name, least in LEAST.items():
        if settings[name] < least:
            raise ValueError(f"{name}={settings[name]} is too small; it must be at least {least}")
    for name in LEAST:
        largest = LARGEST_SEED if name in SEEDS else LARGEST
        if settings[name] > largest:
            raise ValueError(f"{name}={settings[name]} is too large; it must be at most {largest}")
    for name in ABOVE_ZERO:
        if settings[name] <= 0:
            raise ValueError(f"{name}={settings[name]} would teach nothing; it must be above 0")
    for name in SHARES:
        if not 0 <= settings[name] <= 1:
            raise ValueError(f"{name}={settings[name]} is not a share; it must lie in [0, 1]")
    gpus = settings["evaluate.gpus_per_replica"]
    if not 0 < gpus <= 1:
        raise ValueError(f"evaluate.gpus_per_replica={gpus} is no share of a GPU; it must be above 0 and at most 1")


def _refuse_misfits(settings: Settings) -> None:
    """Sizes, names and shares that do not go together."""
    executed, horizon, tasks = settings["control.execute_steps"], settings["action.horizon"], settings["sim.tasks"]
    if executed > horizon:
        raise ValueError(f"control.execute_steps={executed} exceeds action.horizon={horizon}")
    if (steps := horizon * settings["action.chunks"]) > LONGEST_PLAN:
        raise ValueError(
            f"action.horizon={horizon} times action.chunks={settings['action.chunks']} are plans of {steps} steps; "
            f"give at most {LONGEST_PLAN}"
        )
    for name in ("control.committed_steps", "refiner.max_committed_steps"):
        if 2 * settings[name] > horizon:
            raise ValueError(
                f"{name}={settings[name]} is more than half of action.horizon={horizon}: the chunk that is executed meanwhile "
                "would end before the next one is there"
            )
    lost, reordered = settings["delay.lost_share"], settings["delay.reordered_share"]
    if lost + reordered > 1:
        raise ValueError(
            f"delay.lost_share={lost} and delay.reordered_share={reordered} are more than all; their sum is at most 1"
        )
    for system in ("planner", "refiner"):
        width, heads = settings[f"{system}.width"], settings[f"{system}.heads"]
        if width % heads:
            raise ValueError(f"{system}.width={width} is not a multiple of {system}.heads={heads}")
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"sim.tasks={','.join(tasks)!r} must name at least one task, and each only once")
    renames_of(settings["data.keys"])
    cameras = settings["data.cameras"]
    if len(set(cameras)) < len(cameras):
        raise ValueError(f"data.cameras={','.join(cameras)} must name each camera only once")


def _refuse_other_families(settings: Settings) -> None:
    """What only the table has, of another family; and a move of the goal that never comes."""
    moves, steps, share = (settings[name] for name in ("sim.goal_moves_at", "sim.max_steps", "record.recovery_share"))
    if settings["sim.wrist_camera"] and settings["sim.family"] != "tabletop":
        raise ValueError("sim.wrist_camera=true needs sim.family=tabletop: the robots of other families have no such camera")
    if share and settings["sim.family"] != "tabletop":
        raise ValueError(
            f"record.recovery_share={share} needs sim.family=tabletop: the experts of other families make no mistakes; give 0, "
            "and record.noise_share to push them off their path"
        )
    if moves and settings["sim.family"] != "tabletop":
        raise ValueError(f"sim.goal_moves_at={moves} needs sim.family=tabletop: other families' goals stay where they are")
    if moves >= steps:
        raise ValueError(f"sim.goal_moves_at={moves} must be below sim.max_steps={steps}, or no goal would ever be moved")


def _refuse_one_sided(settings: Settings) -> None:
    """A balance that leaves one loss out, or never learns."""
    balance, plan, diff = (settings[f"train.{name}"] for name in ("balance", "lambda_plan", "lambda_diff"))
    if settings["train.balance_memory"] == 1:
        raise ValueError("train.balance_memory=1 would never take in a measure; it must be below 1")
    if balance != "fixed" and min(plan, diff) <= 0:
        raise ValueError(
            f"train.balance={balance} needs both train.lambda_plan={plan} and train.lambda_diff={diff} above 0; "
            "give train.balance=fixed to train one system alone"
        )


def _refuse_odd_systems(settings: Settings) -> None:
    """Dials of single systems that do not go together."""
    system, gripper = settings["model.system"], settings["anchor_refine.gripper"]
    if gripper not in ("declared", "last", "none") and not gripper.isdecimal():
        raise ValueError(
            f"anchor_refine.gripper={gripper!r} is no action dimension; give last, none, or its number from 0; declared means "
            "as the data set says"
        )
    if system == "coarse_to_fine" and settings["refiner.objective"] != "flow":
        raise ValueError("model.system=coarse_to_fine starts from a coarse action, not from noise; give refiner.objective=flow")
    if settings["refiner.train_encoder"] != "full" and settings["refiner.vision"] == "shared":
        raise ValueError(
            f"refiner.train_encoder={settings['refiner.train_encoder']} has no encoder with refiner.vision=shared; "
            "give planner.train_vision"
        )
    named = settings["experts.names"]
    if not named or len(set(named)) < len(named) or not set(named) <= set(EXPERTS):
        raise ValueError(f"experts.names={','.join(named)} must name at least one of {', '.join(EXPERTS)}, each only once")
    if system == "hierarchy":
        _refuse_odd_hierarchies(settings)
    if system != "anchor_refine":
        return
    share, backbone = settings["anchor_refine.anchor_share"], settings["anchor_refine.backbone"]
    if share == 1:
        raise ValueError("anchor_refine.anchor_share=1 leaves no step to the residual; it must be below 1")
    if share == 0 and not settings["train.start_from"]:
        raise ValueError("anchor_refine.anchor_share=0 leaves no step to the anchor; give train.start_from, or a share above 0")
    if backbone != "regression" and not settings["anchor_refine.stop_gradient"]:
        raise ValueError(
            f"anchor_refine.stop_gradient=false has no gradient through the denoising of anchor_refine.backbone={backbone}; "
            "give anchor_refine.backbone=regression"
        )


def _refuse_odd_hierarchies(settings: Settings) -> None:
    """Waypoints that no plan has, and ways to see that the level below has not."""
    every, steps = settings["hierarchy.waypoint_steps"], settings["action.horizon"] * settings["action.chunks"]
    if every > steps:
        raise ValueError(
            f"hierarchy.waypoint_steps={every} lies past the {steps} steps of action.horizon times action.chunks; "
            f"it must be at most {steps}"
        )
    for name, only in (("refiner.vision", "own"), ("refiner.see_language", False)):
        if settings[name] != only:
            raise ValueError(
                f"{name}={settings[name]} has no use with model.system=hierarchy: its motor level has its own encoder, and "
                f"knows the task by its waypoints alone; give {str(only).lower()}"
            )


def _refuse_seen_seeds(settings: Settings) -> None:
    """Evaluation on placements that recording may use."""
    own = counts_of(settings["record.episodes_of"])
    usual: int = settings["record.episodes_per_task"]
    most = max(own.get(task, usual) for task in settings["sim.tasks"])
    first, evaluated = settings["record.seed"], settings["evaluate.seed"]
    end = first + most * (1 + settings["record.max_attempts"])
    if evaluated < end and first < evaluated + settings["evaluate.episodes_per_task"]:
        raise ValueError(
            f"evaluate.seed={evaluated} would evaluate on placements that recording may use (seeds {first} to {end - 1}); "
            f"give a seed of at least {end}"
        )


def _refuse_names(settings: Settings) -> None:
    """Names that MLflow would refuse when there is something to publish: after training."""
    name, experiment = settings["tracking.registered_model"], settings["tracking.experiment"]
    forbidden = NOT_IN_MODEL_NAMES + NOT_IN_ADDRESSES
    is_plain = name.isprintable() and name == name.strip() and not set(name) & set(forbidden)
    if not 1 <= len(name) <= LONGEST_MODEL_NAME or not is_plain:
        raise ValueError(
            f"tracking.registered_model={name!r} is no name for a registered model; give 1 to {LONGEST_MODEL_NAME} characters "
            f"without {' '.join(forbidden)}, e.g. libra"
        )
    if not experiment.strip() or len(experiment) > LONGEST_EXPERIMENT:
        raise ValueError(
            f"tracking.experiment={experiment!r} is no name for an experiment; give 1 to {LONGEST_EXPERIMENT} characters"
        )
