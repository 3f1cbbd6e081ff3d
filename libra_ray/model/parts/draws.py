"""Random draws of training: from a given generator, or else on the device of what they are for, where nobody waits for them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers of `like`'s type, on its device."""
    return torch.randn(*shape, generator=generator, device=_source(like, generator)).to(like)


def uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Numbers in [0, 1) of `like`'s type, on its device."""
    return torch.rand(*shape, generator=generator, device=_source(like, generator)).to(like)


def integers(end: int, shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Integers in [0, end), int64, on the device of `like`."""
    return torch.randint(0, end, tuple(shape), generator=generator, device=_source(like, generator)).to(like.device)


def _source(like: Tensor, generator: torch.Generator | None) -> torch.device:
    return like.device if generator is None else generator.device
