"""A second device on a machine that has none: it computes on the CPU, and refuses to mix with what was never moved to it.

Real hardware lets single numbers of the CPU through in some operations and not in others. Here none pass, so the law is a
little stricter than the hardware: what holds here holds there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

EMULATED = torch.device("cuda", 0)
"""Its name: what the code is told to compute on."""
INNER = torch.device("meta")
"""What PyTorch's C++ code is told instead, where the outer name would have it look for a driver."""
MAY_MIX = ("_to_copy", "copy_")
"""What moves tensors from device to device."""


class Elsewhere(torch.Tensor):
    """A tensor on the emulated device; `elem` holds its values."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem):
        layout = {"strides": elem.stride(), "storage_offset": elem.storage_offset(), "dtype": elem.dtype, "layout": elem.layout}
        made = torch.Tensor._make_wrapper_subclass(cls, elem.shape, **layout, device=INNER)
        made.elem = elem
        return made

    device = property(lambda self: EMULATED)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def numpy(self, *args, **options):
        raise TypeError(f"can't convert {EMULATED} device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self):
        return self.detach().cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.elem.detach().__reduce_ex__(protocol)

    def __repr__(self, **options):
        return f"Elsewhere({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Has what is made there made there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Renamed(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [_inner(value) if isinstance(value, torch.device) else value for value in args]
        kwargs = {name: _inner(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == INNER:
            # Of numbers C++ would make a tensor without values.
            return func(*args, **{**kwargs, "device": torch.device("cpu")}).to(INNER)
        return func(*args, **kwargs)


def _inner(device: Any) -> Any:
    return INNER if device is not None and torch.device(device).type == EMULATED.type else device


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    away = {id(t.elem): t for t in tensors if isinstance(t, Elsewhere)}
    there = bool(away)
    if there and not all(isinstance(t, Elsewhere) for t in tensors) and func.overloadpacket.__name__ not in MAY_MIX:
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found at least two, {EMULATED} and cpu")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]) == INNER
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(Elsewhere, lambda t: t.elem, (args, kwargs))
    here = {id(t): t for t in tensors}

    def placed(made: torch.Tensor) -> torch.Tensor:
        # What was changed in place comes back as the object that it was.
        known = {**here, **away}
        return known[id(made)] if id(made) in known else Elsewhere(made) if there else made

    return tree_map_only(torch.Tensor, placed, func(*args, **kwargs))


@contextmanager
def emulated_device() -> Iterator[torch.device]:
    """The device, for as long as the block lasts and in the thread that opened it."""
    with _Factories(), _Renamed():
        yield EMULATED
