"""What a job is given: a data set, a checkpoint, models; each opened with the function that the jobs open it with."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from libra_ray import config as configuration
from libra_ray.config import Config
from libra_ray.doctor import aside
from libra_ray.doctor.finding import Check, Finding


def checks_of(config: Config, data: Path, policy: Path) -> dict[str, Check]:
    """The checks of what is configured, and of what the run has made already.

    Args:
        config: the job's.
        data: the run's data set; `policy` its checkpoint. They need not exist where they are not configured.
    """
    settings = configuration.to_json(config)
    checks: dict[str, Check] = {}
    if config.data.root or data.exists():
        checks["data set"] = Check(look=partial(dataset, settings, data), fix="give another one: --data.root FOLDER")
    if config.evaluate.checkpoint or policy.exists():
        judge = partial(checkpoint, settings, policy)
        checks["checkpoint"] = Check(look=judge, fix="give another one: --evaluate.checkpoint FOLDER")
    own_encoder = config.refiner.encoder != "conv" and config.refiner.vision == "own"
    if config.planner.backbone != "tiny" or own_encoder or config.train.start_from:
        look = partial(aside.call, try_model, settings, str(data), limit_s=600)
        checks["model"] = Check(look=look, fix="give another one, or the built-in: --planner.backbone tiny")
    return checks


def dataset(config_json: str, root: Path) -> Iterable[Finding]:
    """A data set, as training reads it; every remark is a line."""
    found, *remarks = aside.call(try_dataset, config_json, str(root), limit_s=300)
    return [Finding.ok(found), *map(Finding.warning, remarks)]


def try_dataset(config_json: str, root: str) -> list[str]:
    """The data set in words, then what a reader would not expect of it. The first picture of every camera is decoded.

    Raises:
        ValueError: it cannot be trained on.
    """
    from libra_ray.data.video import decode
    from libra_ray.training.data import TrainingData

    data = TrainingData.open(configuration.from_json(config_json), Path(root), None)
    recorded = data.demonstrations
    for camera in recorded.cameras:
        if places := camera.videos:
            next(decode(recorded.layout.video(camera.stored, int(places.chunk[0]), int(places.file[0]))))
    numbers = f"{len(recorded.lengths)} episodes, {len(recorded)} frames at {recorded.fps:g} Hz"
    robot = f"state {recorded.state_dim}, action {recorded.action_dim}"
    return [f"{root}: {numbers}, {', '.join(recorded.image_keys)}, {robot}", *data.remarks()]


def checkpoint(config_json: str, folder: Path) -> Iterable[Finding]:
    """A checkpoint, and how well each of its levels keeps up with one robot on this machine."""
    found, *levels = aside.call(try_checkpoint, config_json, str(folder), limit_s=300)
    told = [Finding.warning(said, f"{remedy} would do") if remedy else Finding.ok(said) for said, remedy in levels]
    return [Finding.ok(found), *told]


def try_checkpoint(config_json: str, folder: str) -> list[Any]:
    """The checkpoint in words, after it was loaded whole; then of each level what was found, and what would do if it is late.

    Raises:
        ValueError: it is none, or was changed, or its files do not fit one another.
    """
    import torch

    from libra_ray.control.margin import margins, measure
    from libra_ray.policy import load_policy

    config = configuration.from_json(config_json)
    policy = load_policy(folder, "cuda" if config.ray.use_gpu and torch.cuda.is_available() else "cpu")
    manifest = policy.source.manifest
    steps = f"step {manifest.step} of {manifest.total_steps}"
    words = f"{folder}: {steps}, {', '.join(manifest.image_keys)}, instructions: {len(manifest.instructions)}"
    latencies = measure(policy, policy.blank())
    found = margins(policy.levels, latencies, manifest.control_hz, config.control, policy.lengthened_by)
    return [words, *([margin.found, margin.remedy] for margin in found)]


def try_model(config_json: str, root: str) -> str:
    """The model in words, after it was made as training makes it, was shown a blank picture and read every instruction.

    Args:
        config_json: the configuration.
        root: the data set; where it cannot be opened, the model is that of the simulator's robot.

    Raises:
        ValueError: a part of it cannot be loaded, or does not run.
    """
    from libra_ray.data.dataset import open_dataset
    from libra_ray.data.features import robot_to_record
    from libra_ray.model.dry_run import dry_run
    from libra_ray.sim import instructions, robot_spec
    from libra_ray.training.data import distinct_tokens, make_model, shape_of

    config = configuration.from_json(config_json)
    try:
        recorded = open_dataset(Path(root), config.data)
        shape, words = shape_of(recorded.robot, recorded.subgoals.names), recorded.instructions
    except ValueError:
        robot, words = robot_spec(config.sim), instructions(config.sim, [config.record.seed])
        # What the settings say of a data set that is somewhere else holds for no simulator.
        shape = shape_of(robot if config.data.root else robot_to_record(robot, config.data))
    model = dry_run(lambda: make_model(config, shape))
    distinct_tokens(model.tokenise, words)
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    start = f", begun with {config.train.start_from}" if config.train.start_from else ""
    return f"{config.planner.backbone} and {config.refiner.encoder}, {size:.1f} million parameters{start}"
