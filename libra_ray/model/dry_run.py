"""One answer to blank pictures before anything long begins: whether a configuration's model loads, runs and takes the words."""

from collections.abc import Sequence

import torch

from libra_ray.config import Config
from libra_ray.model.backbone import Text
from libra_ray.model.libra import Libra, RobotShape

LONGEST_REASON = 300


@torch.no_grad()
def dry_run(config: Config, shape: RobotShape, instructions: Sequence[str]) -> None:
    """Build the model, pretrained parts included, and ask it once.

    What comes from outside is loaded here, and a second time by whoever trains it: of a large model that is some seconds, and
    its memory for so long. The built-in parts take some hundredths of a second.

    Args:
        shape: of the robot.
        instructions: all that are known; each is tokenised.

    Raises:
        ValueError: a part cannot be loaded, does not run, or does not take one of the instructions.
    """
    try:
        model = Libra(config, shape).eval()
    except (RuntimeError, MemoryError) as error:
        raise _refusal(config, error) from error
    texts = [model.planner.tokenise([instruction]) for instruction in dict.fromkeys(["", *instructions])]
    try:
        _answer(model, texts[-1])
    except Exception as error:
        raise _refusal(config, error) from error


def _refusal(config: Config, error: Exception) -> ValueError:
    sources = f"planner.backbone={config.planner.backbone!r} and refiner.encoder={config.refiner.encoder!r}"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
    return ValueError(
        f"the model of {sources} does not answer a picture of {config.sim.image_size} pixels here ({reason}); give a smaller "
        "or another one, or a machine with more memory"
    )


def _answer(model: Libra, text: Text) -> None:
    config, shape = model.config, model.shape
    size = config.sim.image_size
    pictures = torch.zeros(1, shape.cameras * config.data.history, 3, size, size, dtype=torch.uint8)
    state = torch.zeros(1, shape.state_dim)
    tokens = model.plan(pictures, state, text)[:, : config.action.horizon]
    model.refine(pictures, state, text, tokens, torch.zeros(tokens.shape))
