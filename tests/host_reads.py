"""A GPU that there is none of: what looks at a tensor's values there, or makes the host and it wait for one another, raises."""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
MOVES = ("_to_copy", "copy_")


class HostReadError(AssertionError):
    """The host looks at a value of the device, or waits to hand it one."""


class _Refuses(TorchDispatchMode):
    """Refuses moves from device to device: to the host, and, unless `uploads`, from it."""

    def __init__(self, *, uploads: bool) -> None:
        super().__init__()
        self._uploads = uploads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__.split(".")[0] in MOVES:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            to = torch.device(kwargs.get("device") or tensors[0].device)
            for given in tensors:
                moved = given.device.type != to.type
                if moved and not (self._uploads and to.type == GPU.type):
                    raise HostReadError(f"{func} moves {tuple(given.shape)} from {given.device.type} to {to.type}")
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostReadError(f"{error.func} needs the values of a tensor") from error


def without_host_reads[T](make: Callable[[], T], run: Callable[[T], object], *, uploads: bool = False) -> None:
    """Make something on the GPU that is none, and run it there; no values are computed.

    Args:
        make: makes it; what it makes by torch's factories is there.
        run: may not look at values.
        uploads: whether it may hand new tensors to the device, as random numbers drawn by the host.

    Raises:
        HostReadError: it looks at values.
    """
    with FakeTensorMode():
        with GPU:
            made = make()
        with _Refuses(uploads=uploads):
            run(made)


def there(value: torch.Tensor) -> torch.Tensor:
    """For `make`: a tensor like a real one."""
    return torch.empty(value.shape, dtype=value.dtype, device=GPU)
