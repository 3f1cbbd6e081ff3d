"""The repeated layers of a system's networks: what is compiled, sharded and recomputed one by one."""

import torch
from torch import nn

from libra_ray.model.parts.attention import ModulatedBlock

KINDS = 64
"""Forms that torch.compile keeps of one function: kinds of layers times shapes."""


def pretrained_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of pretrained networks: nearly all weights of a large model, each called as a whole."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            layers = [layer for layer in module if type(layer).__module__.startswith("transformers.")]
            found += layers
            inside.update(id(below) for layer in layers for below in layer.modules())
    return found


def compile_layers(model: nn.Module, *, dynamic: bool | None) -> None:
    """Have the repeated layers, a system's own too, compiled when they are first called, each kind once.

    Args:
        dynamic: as in `torch.compile`: for one shape, for any, or, None, for any from the second one on.
    """
    torch._dynamo.config.recompile_limit = max(KINDS, torch._dynamo.config.recompile_limit)  # noqa: SLF001
    for layer in pretrained_layers(model):
        layer.compile(dynamic=dynamic)
    for module in model.modules():
        if isinstance(module, ModulatedBlock):
            module.modulated = torch.compile(module.modulated, dynamic=dynamic)  # type: ignore[method-assign]
