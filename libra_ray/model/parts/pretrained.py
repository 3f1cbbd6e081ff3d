"""Models from outside: each is loaded whole, has one answer to one question, and is otherwise refused in one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

SHOWN_NAMES = 3
LONGEST_REASON = 400
SAME = 1e-3
"""Largest difference of two answers to one question, as a share of the largest value: what summing in another order can do."""


@contextmanager
def cannot_load(key: str, source: str, kind: str, builtin: str) -> Iterator[None]:
    """Turn whatever a library raises over a model that it cannot load or run into a ValueError that says what would be valid.

    A folder from outside may hold anything: damaged weights, a configuration of other types, code for a library that is not
    installed, more than the memory takes. Each comes as another exception of another library.
    """
    try:
        with _quiet():
            yield
    except Exception as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON].rstrip(". ") or type(error).__name__
        raise ValueError(
            f"{key}={source!r} cannot be loaded as a Hugging Face {kind} model ({reason}); "
            f"give `{builtin}`, the name of a model that this machine has or can download, or a local model folder"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own lines, on every retry of a hub that is away and all that did not fit: ours is one."""
    import huggingface_hub
    import transformers

    loggers = (huggingface_hub.utils.logging, transformers.logging)
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)


def load_checked(auto_class: Any, source: str, *, forward: Callable[[Any], Tensor] | None = None, **options: Any) -> Any:
    """`auto_class.from_pretrained(source)` in evaluation mode, no weight that is used left random.

    Args:
        auto_class: of `transformers`, e.g. `AutoModel`.
        source: name or folder.
        forward: the only use that is made of the model, if no more than one: a weight without a part in it may be missing.
            Without it, all weights of the base model are needed; those of a head that is put upon it are not.
        options: more of `from_pretrained`'s.

    Raises:
        ValueError: weights are missing, or have another shape than the configuration says; names them.
    """
    options = {"dtype": torch.float32, "trust_remote_code": False, **options}
    model, told = auto_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    model.eval()
    wrong = {name: f"{name} is missing" for name in told["missing_keys"]}
    wrong |= {name: f"{name} is {_shape(found)}, not {_shape(wanted)}" for name, found, wanted in told["mismatched_keys"]}
    if wrong:
        used = _used(model, forward) if forward else _below_the_head(model)
        texts = [wrong[name] for name in sorted(wrong) if name in used]
        if texts:
            more = f" and {len(texts) - SHOWN_NAMES} more" if len(texts) > SHOWN_NAMES else ""
            raise ValueError(f"its weights do not fit its configuration: {', '.join(texts[:SHOWN_NAMES])}{more}")
    return model


def same_twice(forward: Callable[[], Tensor]) -> Tensor:
    """The answer of `forward`, which is asked twice, without gradients.

    Raises:
        ValueError: the second answer is another one, as where a model masks at random what it is shown; or it is not finite.
    """
    with torch.no_grad():
        first, second = forward(), forward()
    if not first.isfinite().all():
        raise ValueError("its answer is not finite: its weights are damaged")
    if first.shape != second.shape or (first - second).abs().max() > SAME * first.abs().max():
        raise ValueError("it answers the same question differently each time: something in it is drawn at random")
    return first


@dataclass(frozen=True, kw_only=True)
class Colours:
    """What a processor makes of pictures: `size` (height, width), and `mean` and `std` `(1, 3, 1, 1)` of colours in [0, 1]."""

    size: tuple[int, int]
    mean: Float[Tensor, "1 3 1 1"]
    std: Float[Tensor, "1 3 1 1"]


def colours_of(processor: Any, image_size: int) -> Colours:
    """Found by showing it pictures of one colour: what it calls its sizes and scales is of no consequence."""
    shown = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.4, 0.2]])
    pictures = [np.tile((255 * colour).byte().numpy(), (image_size, image_size, 1)) for colour in shown]
    seen = torch.stack([processor(images=picture, return_tensors="pt")["pixel_values"][0] for picture in pictures]).float()
    if seen.ndim != 4 or seen.shape[1] != 3:
        raise ValueError(f"its processor makes {tuple(seen.shape[1:])} of a picture, and not (3, height, width) pixels")
    black, white, orange = seen[:, :, seen.shape[2] // 2, seen.shape[3] // 2]
    scale = white - black
    if not (scale > 0).all() or not torch.allclose(black + scale * shown[2], orange, atol=0.02):
        raise ValueError("its processor does more with colours than to scale each of red, green and blue")
    mean, std = (values.view(1, 3, 1, 1) for values in (-black / scale, 1 / scale))
    return Colours(size=(seen.shape[2], seen.shape[3]), mean=mean, std=std)


def _used(model: nn.Module, forward: Callable[[Any], Tensor]) -> set[str]:
    """The names of the weights that an answer depends on."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(forward(model).sum(), list(weights.values()), allow_unused=True)
    reached = {name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}
    return reached | {name for name, _ in model.named_buffers()}


def _below_the_head(model: Any) -> set[str]:
    """The names of the weights that a head is put upon: all, where there is no head."""
    inside = "" if model.base_model is model else f"{model.base_model_prefix}."
    return {name for name in model.state_dict() if name.startswith(inside)}


def _shape(size: Any) -> str:
    return "x".join(map(str, size))
