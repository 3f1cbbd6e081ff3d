"""The trained weights: what the model computes with, what the optimiser changes, and their moving average."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from libra_ray import shards
from libra_ray.shards import Stored, local

LARGE = 1 << 16
"""Entries from which on a matrix is kept in bf16 beside its fp32 master: to cast it anew at every use would cost more than to
compute with it. Smaller ones autocast handles."""
PORTION = 1 << 28
"""Entries whose gradients are copied into fp32 at a time: the copies of all of them would take the memory of the masters."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedWeight:
    """One weight, or this worker's shard of it.

    Attributes:
        name: of the model.
        parameter: what the model computes with.
        master: fp32, what the optimiser changes; where it is not the parameter's own memory, `TrainedWeights.apply` copies it.
        average: fp32, the moving average of `master`.
    """

    name: str
    parameter: nn.Parameter
    master: Tensor
    average: Tensor

    @property
    def apart(self) -> bool:
        """Whether the master is a copy."""
        return self.master.data_ptr() != local(self.parameter).data_ptr()

    def part(self, shard: Tensor) -> Tensor:
        """This worker's shard of something, in its place in the whole; the memory is shared."""
        found = self.parameter
        if not isinstance(found, DTensor):
            return shard
        return DTensor.from_local(
            shard, found.device_mesh, found.placements, run_check=False, shape=found.shape, stride=found.stride()
        )

    def whole(self, shard: Tensor) -> Tensor:
        """From every worker's shard of something, all of it, on the CPU where it was sharded; every worker must ask."""
        found = self.part(shard)
        return found.full_tensor().cpu() if isinstance(found, DTensor) else found


def _portions(weights: Sequence[TrainedWeight]) -> list[list[TrainedWeight]]:
    """The weights in groups of about `PORTION` entries."""
    found: list[list[TrainedWeight]] = []
    size = PORTION
    for weight in weights:
        if size >= PORTION:
            found.append([])
            size = 0
        found[-1].append(weight)
        size += weight.master.numel()
    return found


class TrainedWeights:
    """All weights of a model that learn.

    Args:
        model: on its device, and sharded already where it is.
        bf16: keep large matrices in bf16, with masters apart. Frozen ones too: without a master, as their source mostly has
            them. Sharded weights stay fp32; whoever gathers them casts them.

    Attributes:
        mixed: whether the model computes with weights of different types, for which it needs autocast.
    """

    def __init__(self, model: nn.Module, *, bf16: bool) -> None:
        self.model = model
        self._of: dict[int, TrainedWeight] = {}
        for name, parameter in model.named_parameters():
            casts = bf16 and parameter.ndim >= 2 and parameter.numel() >= LARGE and not isinstance(parameter, DTensor)
            if parameter.requires_grad:
                master = local(parameter)
                average = master.clone()
                if casts:
                    parameter.data = master.bfloat16()
                self._of[id(parameter)] = TrainedWeight(name=name, parameter=parameter, master=master, average=average)
            elif casts:
                parameter.data = parameter.data.bfloat16()
        self.all: Sequence[TrainedWeight] = list(self._of.values())
        self._masters, self._averages = [w.master for w in self.all], [w.average for w in self.all]
        self._apart = [w for w in self.all if w.apart]
        self._portions = [[w for w in self.all if not w.apart], *_portions(self._apart)]
        self.mixed = bf16 and any(p.dtype == torch.bfloat16 or isinstance(p, DTensor) for p in model.parameters())
        self._group = next((w.parameter.device_mesh.get_group() for w in self.all if isinstance(w.parameter, DTensor)), None)

    def of(self, module: nn.Module) -> list[TrainedWeight]:
        """Those of a part of the model."""
        return [self._of[id(p)] for p in module.parameters() if id(p) in self._of]

    @property
    def sharded(self) -> bool:
        """Whether workers have shards."""
        return self._group is not None

    @torch.no_grad()
    def share_gradients(self) -> None:
        """Of weights that every worker has beside its shards, the mean of all workers' gradients."""
        for weight in self.all:
            if not isinstance(weight.parameter, DTensor) and weight.parameter.grad is not None:
                distributed.all_reduce(weight.parameter.grad, group=self._group)
                weight.parameter.grad /= distributed.get_world_size(self._group)

    def gradients(self) -> Iterator[None]:
        """Hand the parameters' gradients to the masters, in fp32, some at a time: who iterates lets the optimiser step."""
        for weights in self._portions:
            for weight in weights:
                gradient = weight.parameter.grad
                weight.master.grad = None if gradient is None else local(gradient).float()
            yield
            for weight in weights:
                weight.master.grad = None
                if weight.apart:
                    weight.parameter.grad = None

    def norms(self, parts: Mapping[str, Sequence[TrainedWeight]]) -> dict[str, Tensor]:
        """The norm of the parameters' gradients, part by part; 0 where there is none."""
        whole = torch.stack([self._square(w for w in of if not isinstance(w.parameter, DTensor)) for of in parts.values()])
        if self._group is not None:
            shards = torch.stack([self._square(w for w in of if isinstance(w.parameter, DTensor)) for of in parts.values()])
            distributed.all_reduce(shards, group=self._group)
            whole += shards
        return dict(zip(parts, whole.sqrt().unbind(), strict=True))

    def _square(self, weights: Iterable[TrainedWeight]) -> Tensor:
        """The sum of all squares of the gradients that this worker has."""
        found = [local(w.parameter.grad) for w in weights if w.parameter.grad is not None]
        norms = torch._foreach_norm(found, 2, dtype=torch.float32) if found else ()  # noqa: SLF001
        return torch.stack(norms).square().sum() if norms else torch.zeros((), device=self._masters[0].device)

    @torch.no_grad()
    def apply(self) -> None:
        """Let the model compute with what the masters are now."""
        if self._apart:
            torch._foreach_copy_([local(w.parameter) for w in self._apart], [w.master for w in self._apart])

    @torch.no_grad()
    def average(self, rate: float | Tensor) -> None:
        """Move the average by `rate` of the way to the masters."""
        if isinstance(rate, float):
            torch._foreach_lerp_(self._averages, self._masters, rate)
            return
        small = [w for w in self.all if w.master.numel() < LARGE]
        for weight in self.all:
            if weight.master.numel() >= LARGE:
                weight.average.lerp_(weight.master, rate)
        if small:
            ways = torch._foreach_sub([w.master for w in small], [w.average for w in small])  # noqa: SLF001
            torch._foreach_mul_(ways, rate)
            torch._foreach_add_([w.average for w in small], ways)

    @torch.no_grad()
    def settle(self, weights: Sequence[TrainedWeight]) -> None:
        """Make the average of some weights what the model learns on with."""
        for weight in weights:
            weight.master.copy_(weight.average)
        self.apply()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Meanwhile the model computes with the averages."""
        kept = [None if w.apart else w.master.clone() for w in self.all]
        with torch.no_grad():
            for weight in self.all:
                local(weight.parameter).copy_(weight.average)
        try:
            yield
        finally:
            if isinstance(self.model, FSDPModule):
                # Whole weights that were gathered would be trained on.
                self.model.reshard()
            with torch.no_grad():
                for weight, before in zip(self.all, kept, strict=True):
                    local(weight.parameter).copy_(weight.master if before is None else before)

    def bytes(self, *, trained: int, frozen: int) -> int:
        """The size of so many copies of all trained weights in fp32, and of the other weights and buffers."""
        others = sum(v.nbytes for v in self.model.state_dict(keep_vars=True).values() if id(v) not in self._of)
        return 4 * trained * sum(weight.parameter.numel() for weight in self.all) + frozen * others

    def everything(self) -> dict[str, Tensor]:
        """The averages, the frozen weights and the buffers, whole: what a policy runs with. Every worker must ask."""
        found = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if (weight := self._of.get(id(value))) is not None:
                found[name] = weight.whole(weight.average)
            else:
                found[name] = value.full_tensor().cpu() if isinstance(value, DTensor) else value.detach()
        return found

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The masters, their averages, and the frozen weights and buffers, by the model's names; of sharded ones the shards."""
        found: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "frozen": {}}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if (weight := self._of.get(id(value))) is not None:
                found["model"][name], found["average"][name] = weight.part(weight.master), weight.part(weight.average)
            else:
                found["frozen"][name] = value.detach()
        return found

    def restore(self, state: Mapping[str, Mapping[str, Tensor | Stored]]) -> None:
        """Take what `state` gave, perhaps of other shards.

        Raises:
            ValueError: a weight is not in it, or of another shape.
        """
        own = self.state()
        # Earlier versions had the buffers, and some of them frozen weights too, with the masters.
        known = {**state["model"], **state.get("frozen", {})}
        pairs = [(value, known[name]) for name, value in own["frozen"].items() if name in known]
        for kind in ("model", "average"):
            if lacking := own[kind].keys() - state[kind].keys():
                raise ValueError(f"the trainer's state has no weight {min(lacking)}; give one of the same model")
            pairs += [(value, state[kind][name]) for name, value in own[kind].items()]
        shards.fill(pairs)
        self.apply()
