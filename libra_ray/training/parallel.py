"""A model made ready for many workers and large shapes: sharded or replicated, recomputed, compiled; names stay."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import register_dataclass
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from libra_ray.config import TrainConfig
from libra_ray.model.parts.attention import ModulatedBlock
from libra_ray.model.system import Losses, System

ASKED = ("measure", "infer")
"""What else of a system is called beside `forward`."""
# So that FSDP finds the tensors in what a forward pass returns.
register_dataclass(Losses)
SAVED = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}
"""What `train.checkpointing=selective` does not compute twice."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of pretrained networks: nearly all weights of a large model, each called as a whole."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            layers = [layer for layer in module if type(layer).__module__.startswith("transformers.")]
            found += layers
            inside.update(id(below) for layer in layers for below in layer.modules())
    return found


def shard(model: System, device: torch.device, *, bf16: bool) -> None:
    """Shard a model's weights over all workers (FSDP2): layer by layer, and the rest together.

    The shards stay fp32; with `bf16` they are gathered, and computed with, in bf16, and gradients summed up in fp32.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else MixedPrecisionPolicy()
    for layer in blocks(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for name in ASKED:
        register_fsdp_forward_method(model, name)


def replicate(model: System, device: torch.device) -> nn.Module:
    """A model in DDP; pretrained networks carry weights (a pooler, a last norm) that take no part in our losses.

    Nor do the parts that learn in another phase.
    """
    unused = bool(blocks(model)) or not all(map(model.schedule().learns, model.parts()))
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=unused)


def recompute(model: nn.Module, how: str) -> None:
    """Let large layers compute again in the backward pass what they would have to keep: `train.checkpointing`."""
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _saved)
    for layer in blocks(model):
        layer.forward = _again(layer.forward, options)


def compile_layers(model: nn.Module) -> None:
    """Compile repeated layers, each kind once."""
    for layer in blocks(model):
        layer.compile(dynamic=False)
    for module in model.modules():
        if isinstance(module, ModulatedBlock):
            module.modulated = torch.compile(module.modulated, dynamic=False)  # type: ignore[method-assign]


def compiled_as(config: TrainConfig, model: nn.Module, device: torch.device, world: int) -> str:
    """`train.compile` with `auto` resolved: `none`, `blocks` or `graph`.

    Raises:
        ValueError: a graph where there can be none.
    """
    if config.compile == "graph" and (device.type != "cuda" or world > 1):
        raise ValueError("train.compile=graph needs one worker on a CUDA device; give auto, blocks or none")
    if config.compile != "auto":
        return config.compile
    if device.type != "cuda":
        return "none"
    if blocks(model):
        return "blocks"
    return "graph" if world == 1 else "none"


def _saved(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def _again(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def computed(*args: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **more)
        return checkpoint(forward, *args, **options, **more)

    return computed
