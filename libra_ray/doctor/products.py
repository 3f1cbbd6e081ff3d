"""What a job is given: a data set, a checkpoint, models; each opened with the function that the jobs open it with."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from libra_ray import config as configuration
from libra_ray.config import Config
from libra_ray.doctor import aside
from libra_ray.doctor.finding import Check, Finding

BLANK_PROMPT = "open the drawer"


def checks_of(config: Config, data: Path, policy: Path, start_from: str) -> dict[str, Check]:
    """The checks of what is configured, and of what the run has made already.

    Args:
        data: the run's data set; `policy` its checkpoint. They need not exist where they are not configured.
        start_from: the checkpoint to fine-tune, empty where there is none.
    """
    checks: dict[str, Check] = {}
    if config.data.root or data.exists():
        checks["data set"] = partial(dataset, config, data)
    if config.evaluate.checkpoint or policy.exists():
        checks["checkpoint"] = partial(checkpoint, policy)
    if start_from:
        checks["start from"] = partial(checkpoint, Path(start_from), "start from")
    if config.planner.backbone != "tiny":
        checks["backbone"] = partial(backbone, config)
    if config.refiner.encoder != "conv" and config.refiner.vision == "own":
        checks["encoder"] = partial(encoder, config)
    return checks


def dataset(config: Config, root: Path, limit_s: float = 300) -> Iterable[Finding]:
    """A data set, as training reads it; every remark is a line."""
    try:
        found, *remarks = aside.call(try_dataset, configuration.to_json(config), str(root), limit_s=limit_s)
    except aside.AsideError as error:
        return [Finding.refused("data set", error, "give another one: --data.root FOLDER")]
    return [Finding.ok("data set", found), *(Finding.warning("data set", text, "") for text in remarks)]


def try_dataset(config_json: str, root: str) -> list[str]:
    """The data set in words, then what is to be remarked.

    Raises:
        ValueError: it cannot be trained on.
    """
    from libra_ray.data.dataset import open_dataset
    from libra_ray.data.video import decode

    recorded = open_dataset(Path(root))
    for key in recorded.image_keys:
        for path in sorted((recorded.root / "videos" / key).rglob("*.mp4"))[:1]:
            next(decode(path))
    cameras = ", ".join(recorded.image_keys)
    numbers = f"{len(recorded.lengths)} episodes, {len(recorded)} frames at {recorded.fps:g} Hz"
    return [f"{root}: {numbers}, {cameras}, state {recorded.state_dim}, action {recorded.action_dim}"]


def checkpoint(folder: Path, name: str = "checkpoint", limit_s: float = 300) -> Finding:
    """A checkpoint, loaded whole."""
    try:
        return Finding.ok(name, aside.call(try_checkpoint, str(folder), limit_s=limit_s))
    except aside.AsideError as error:
        return Finding.refused(name, error, "give another one, a folder that training wrote")


def try_checkpoint(folder: str) -> str:
    """The checkpoint in words.

    Raises:
        ValueError: it is none, or was changed, or its files do not fit one another.
    """
    from libra_ray.checkpoint import load

    manifest = load(folder).manifest
    steps = f"step {manifest.step} of {manifest.total_steps}"
    return f"{folder}: {steps}, {', '.join(manifest.image_keys)}, instructions: {len(manifest.instructions)}"


def backbone(config: Config, limit_s: float = 600) -> Finding:
    """The planner's model, loaded, with one blank picture gone through it."""
    return _model("backbone", try_backbone, config, limit_s)


def try_backbone(config_json: str) -> str:
    """The model in words.

    Raises:
        ValueError: it cannot be loaded, or does not take a picture and an instruction.
    """
    import torch

    from libra_ray.model.parts.backbone import make_backbone

    config = configuration.from_json(config_json)
    size = config.sim.image_size
    model = make_backbone(config.planner, size, 1)
    with torch.no_grad():
        features = model(torch.zeros(1, 1, 3, size, size, dtype=torch.uint8), model.tokenise([BLANK_PROMPT]))
    _, tokens, width = features.tokens.shape
    return f"{config.planner.backbone}: {tokens} tokens of width {width}"


def encoder(config: Config, limit_s: float = 600) -> Finding:
    """The refiner's own encoder, likewise."""
    return _model("encoder", try_encoder, config, limit_s)


def try_encoder(config_json: str) -> str:
    """The model in words.

    Raises:
        ValueError: it cannot be loaded, or does not take a picture.
    """
    import torch

    from libra_ray.model.parts.vision import make_encoder

    config = configuration.from_json(config_json)
    size = config.sim.image_size
    model = make_encoder(config.refiner.encoder, size, config.refiner.width)
    with torch.no_grad():
        _, tokens, width = model(torch.zeros(1, 1, 3, size, size, dtype=torch.uint8)).shape
    return f"{config.refiner.encoder}: {tokens} tokens of width {width}"


def _model(name: str, tried: Callable[[str], str], config: Config, limit_s: float) -> Finding:
    try:
        return Finding.ok(name, aside.call(tried, configuration.to_json(config), limit_s=limit_s))
    except aside.AsideError as error:
        return Finding.refused(name, error, "give another model, or the built-in one")
