"""One answer to blank pictures before anything long begins: whether a model loads and runs."""

from collections.abc import Callable, Mapping

import torch

from libra_ray.model.registry import said
from libra_ray.model.system import System, SystemInput


@torch.no_grad()
def dry_run(make: Callable[[], System]) -> System:
    """Make a model, pretrained parts included, and ask it once.

    What comes from outside is loaded here, and a second time by whoever trains it: of a large model that is some seconds, and
    its memory for so long. The built-in parts take some hundredths of a second.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: a part cannot be loaded, does not run, or answers something else than it promises.
    """
    try:
        model = make().eval()
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"the model cannot be made here ({said(error)}); give a smaller one") from error
    try:
        _answer(model)
    except Exception as error:
        config = model.config
        sources = {
            "model.system": config.model.system,
            "planner.backbone": config.planner.backbone,
            "refiner.encoder": config.refiner.encoder,
        }
        named = ", ".join(f"{name}={source!r}" for name, source in sources.items())
        raise ValueError(
            f"the model of {named} does not answer a picture of {config.data.image_size} pixels here ({said(error)}); "
            "give a smaller or another one, or a machine with more memory"
        ) from error
    return model


def _answer(system: System) -> None:
    config, shape = system.config, system.shape
    size = config.data.image_size
    pictures = torch.zeros(1, shape.cameras * config.data.history, 3, size, size, dtype=torch.uint8)
    seen = SystemInput(images=pictures, state=torch.zeros(1, shape.state_dim), text=system.tokenise([""]))
    intents: dict[str, Mapping[str, torch.Tensor]] = {}
    for level in system.levels:
        above = {} if level.reads is None else system.aligned(level, intents[level.reads], torch.zeros(1, dtype=torch.long))
        noise = system.noise_shape(level.name)
        answer = system.infer(level.name, seen, above, None if noise is None else torch.zeros(1, *noise))
        promised: dict[str, tuple[int, ...]] = {"actions": (level.covers, shape.action_dim)}
        if level is not system.levels[-1]:
            promised = {name: tuple(value.shape) for name, value in system.intents[level.name].items()}
        else:
            # What it measures of its answers: a number each.
            promised = dict.fromkeys(answer, ()) | promised
        if (found := {name: tuple(value.shape[1:]) for name, value in answer.items()}) != promised:
            raise ValueError(f"level {level.name} answers {found}, and promises {promised}")
        intents[level.name] = answer
