"""Trees of tensors: mappings, records and single tensors, as a level is given them."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from libra_ray.model.system import SystemInput


@dataclass(frozen=True, kw_only=True)
class LevelInput:
    """What one level is asked, see `System.infer`; a row of every tensor is one robot's."""

    seen: SystemInput
    above: Mapping[str, Tensor]
    noise: Tensor | None = None

    def __len__(self) -> int:
        """The number of robots."""
        return len(self.seen)


def mapped[Tree](tree: Tree, change: Callable[[Tensor], Tensor]) -> Tree:
    """The same tree of changed tensors."""
    if isinstance(tree, Tensor):
        return cast("Tree", change(tree))
    if isinstance(tree, Mapping):
        return cast("Tree", {name: mapped(value, change) for name, value in tree.items()})
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: mapped(getattr(tree, f.name), change) for f in fields(tree)})
    return tree


def tensors_in(tree: object) -> Iterator[Tensor]:
    """The tensors, in a fixed order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif is_dataclass(tree):
        for f in fields(tree):
            yield from tensors_in(getattr(tree, f.name))


def signature(tree: Any) -> Hashable:
    """What two trees have in common that differ in nothing but the number and the values of their rows."""
    if isinstance(tree, Tensor):
        return tree.shape[1:], tree.dtype
    if isinstance(tree, Mapping):
        return tuple((name, signature(value)) for name, value in tree.items())
    if is_dataclass(tree):
        return tuple((f.name, signature(getattr(tree, f.name))) for f in fields(tree))
    return tree


def buffer(like: Tensor, rows: int, *, pinned: bool = False) -> Tensor:
    """Memory for `rows` rows of that kind, laid out as they are."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda axis: (-strides[axis], axis))
    return torch.empty_permuted((rows, *like.shape[1:]), order, dtype=like.dtype, pin_memory=pinned)
