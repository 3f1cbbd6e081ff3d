"""A model made ready for many workers and large shapes: sharded or replicated, recomputed, compiled; names stay."""

from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import register_dataclass
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from libra_ray.model.layers import pretrained_layers
from libra_ray.model.system import Losses, System
from libra_ray.training.speed import COMMUNICATION, StepTimer

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


EXCHANGES = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")
"""Where FSDP2 gathers weights, reduces gradients, and has the device wait for either; torch has no public place for it."""


def check_sharded(system: System) -> None:
    """Refuse a training of shards (`ray.parallel=fsdp`) that cannot measure what it is to go by.

    The gradient of one loss alone on weights that others reach too is not to be had where these are sharded.

    Raises:
        ValueError: names the losses, and what would be valid.
    """
    config = system.config
    if config.ray.parallel != "fsdp" or config.train.balance != "gradient":
        return
    reached = {name: {*map(id, of)} for name, of in system.reached().items() if system.teaches(name)}
    if sharing := [" and ".join(pair) for pair in combinations(reached, 2) if reached[pair[0]] & reached[pair[1]]]:
        raise ValueError(
            f"train.balance=gradient cannot measure losses that share weights ({', '.join(sharing)}) with ray.parallel=fsdp; "
            "give ray.parallel=ddp, or train.balance=fixed or uncertainty"
        )


def shard(model: System, device: torch.device, timer: StepTimer, *, bf16: bool) -> None:
    """Shard a model's weights over all workers (FSDP2): layer by layer, and the rest together.

    The shards stay fp32; with `bf16` they are gathered, and computed with, in bf16, and gradients summed up in fp32. What the
    device waits for others is told to `timer`.
    """
    # Single numbers cannot be sharded: every worker has them, see `TrainedWeights.share_gradients`.
    single = {weight for weight in model.parameters() if not weight.ndim}
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else MixedPrecisionPolicy()
    for layer in pretrained_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=single)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=single)
    for name in ASKED:
        register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group  # noqa: SLF001
            for name in EXCHANGES if group is not None else ():
                setattr(group, name, _timed(getattr(group, name), timer))


def _timed(exchange: Callable[..., Any], timer: StepTimer) -> Callable[..., Any]:
    def timed(*args: Any, **more: Any) -> Any:
        with timer.within(COMMUNICATION):
            return exchange(*args, **more)

    return timed


def replicate(model: System, device: torch.device, timer: StepTimer) -> nn.Module:
    """A model in DDP; pretrained networks carry weights (a pooler, a last norm) that take no part in our losses.

    Nor do the parts that learn in another phase. Whenever some gradients are ready, that is told to `timer`: what comes after
    the last ones is waiting for others.
    """
    unused = bool(pretrained_layers(model)) or not all(map(model.schedule().learns, model.parts()))
    devices = [device] if device.type == "cuda" else None
    found = DistributedDataParallel(model, device_ids=devices, find_unused_parameters=unused)

    def reduce(
        group: distributed.ProcessGroup,
        bucket: distributed.GradBucket,  # type: ignore[name-defined]  # it comes from torch's compiled part
    ) -> torch.futures.Future[torch.Tensor]:
        timer.interrupt()
        return allreduce_hook(group, bucket)

    found.register_comm_hook(found.process_group, reduce)
    return found


def recompute(model: nn.Module, how: str) -> None:
    """Let large layers compute again in the backward pass what they would have to keep: `train.checkpointing`."""
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _saved)
    for layer in pretrained_layers(model):
        # To draw the same numbers again the host has to read where the drawing began, which no graph can hold.
        layer.forward = _again(layer.forward, {**options, "preserve_rng_state": draws(layer)})


def draws(layer: nn.Module) -> bool:
    """Whether a layer drops anything at random in training."""
    shares = [module.p for module in layer.modules() if isinstance(module, nn.Dropout)]
    shares += [getattr(module, "attention_dropout", None) or 0.0 for module in layer.modules()]
    return any(isinstance(share, float) and share > 0 for share in shares)


def _saved(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def _again(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def computed(*args: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **more)
        return checkpoint(forward, *args, **options, **more)

    return computed
