"""In what networks compute: fp32, or bf16 with what must not be rounded left in fp32.

A module names in `STAYS_FP32` those of its own parts and weights that stay, and minds their types itself (`matched`). Buffers
always stay: tables of positions and of noise levels are among them. A system without that name, as a user's own, keeps all of
its weights in fp32, and computes in bf16 by autocast, as in training.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

NARROW = torch.bfloat16


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware does; elsewhere it is emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())  # noqa: SLF001


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: asked for, or `auto` on hardware that computes in it."""
    return computes_in_bf16(device) if precision == "auto" else precision == "bf16"


def minds_types(model: nn.Module) -> bool:
    """Whether a system computes with weights of `in_bf16`."""
    return hasattr(model, "STAYS_FP32")


def in_bf16[Net: nn.Module](model: Net, device: torch.device) -> Net:
    """A copy of `model` on `device` whose weights are bf16, except those that stay; `model` is left as it is."""
    kept = {id(weight) for weight in _kept(model)}
    memo = {}
    for weight in model.parameters():
        value = weight.detach().to(device, torch.float32 if id(weight) in kept else NARROW)
        memo[id(weight)] = nn.Parameter(value, requires_grad=False)
    return copy.deepcopy(model, memo).to(device)


def reads_are_free(value: Tensor) -> bool:
    """Whether the values may be looked at to save work: elsewhere than on a CPU one waits, and no graph can be made of it."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def matched(x: Tensor, weight: Tensor) -> Tensor:
    """`x` in the type of the weight that it meets; under autocast, which minds types itself, as it is."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def _kept(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that stay in fp32: those named, and of norms over a batch, whose statistics do."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001
            yield from module.parameters()
        for name in getattr(module, "STAYS_FP32", ()):
            part = getattr(module, name)
            if isinstance(part, nn.Module):
                yield from part.parameters()
            elif part is not None:
                yield part
