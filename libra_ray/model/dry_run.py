"""One answer to blank pictures before anything long begins: whether a model loads and runs."""

from collections.abc import Callable

import torch

from libra_ray.model.system import System, SystemInput, asked

LONGEST_REASON = 300


@torch.no_grad()
def dry_run(make: Callable[[], System]) -> System:
    """Make a model, pretrained parts included, and ask it once.

    What comes from outside is loaded here, and a second time by whoever trains it: of a large model that is some seconds, and
    its memory for so long. The built-in parts take some hundredths of a second.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: a part cannot be loaded, or does not run.
    """
    try:
        model = make().eval()
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"the model cannot be made here ({_reason(error)}); give a smaller one") from error
    try:
        _answer(model)
    except Exception as error:
        config = model.config
        sources = f"planner.backbone={config.planner.backbone!r} and refiner.encoder={config.refiner.encoder!r}"
        raise ValueError(
            f"the model of {sources} does not answer a picture of {config.sim.image_size} pixels here ({_reason(error)}); "
            "give a smaller or another one, or a machine with more memory"
        ) from error
    return model


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]


def _answer(system: System) -> None:
    config, shape = system.config, system.shape
    size = config.sim.image_size
    pictures = torch.zeros(1, shape.cameras * config.data.history, 3, size, size, dtype=torch.uint8)
    seen = SystemInput(images=pictures, state=torch.zeros(1, shape.state_dim), text=system.tokenise([""]))
    noise = system.noise_shape(system.levels[-1].name)
    asked(system, seen, None if noise is None else torch.zeros(1, *noise))
