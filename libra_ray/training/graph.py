"""The optimiser step as a CUDA graph: one launch in place of a thousand, for models so small that launching takes longest."""

from collections import Counter
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from libra_ray.batch import Batch
from libra_ray.common.errors import first_reason
from libra_ray.common.progress import print_status
from libra_ray.training.speed import on_gpu
from libra_ray.training.step import OptimiserStep, StepFindings, StepKind, StepNumbers

EAGER = 3
"""Steps of each kind before it is captured: libraries choose their kernels and take their memory in the first ones."""


@dataclass(frozen=True, kw_only=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    numbers: StepNumbers
    result: StepFindings


class GraphedStep:
    """An `OptimiserStep`, captured once for every kind and shape, and then replayed.

    A result's tensors hold until the next step. Random draws are those of an eager step after the same seed. A step that cannot
    be captured, as one that looks at values while it computes, is taken as it is written, and that is said once.
    """

    def __init__(self, step: OptimiserStep) -> None:
        self._step = step
        self._seen: Counter[object] = Counter()
        self._captured: dict[object, _Captured] = {}
        self._fails = False
        self._begin()

    def __call__(self, batch: Batch, kind: StepKind, numbers: StepNumbers) -> StepFindings:
        """Take the step."""
        key = (kind, *(getattr(batch, f.name).shape for f in fields(batch)))
        if (found := self._captured.get(key)) is None:
            self._seen[key] += 1
            if self._seen[key] <= EAGER or self._fails:
                return self._eager(batch, kind, numbers)
            try:
                found = self._captured[key] = self._capture(batch, kind, numbers)
            except RuntimeError as error:
                self._give_up(error)
                return self._eager(batch, kind, numbers)
        for f in fields(batch):
            getattr(found.batch, f.name).copy_(getattr(batch, f.name), non_blocking=True)
        _fill(found.numbers, numbers)
        found.graph.replay()
        return found.result

    def _eager(self, batch: Batch, kind: StepKind, numbers: StepNumbers) -> StepFindings:
        """On the stream of the capture, with which autograd's own state then agrees."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._step(batch, kind, _tensors(numbers))
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _give_up(self, error: RuntimeError) -> None:
        """Say why, and leave the device as it was before."""
        self._fails = True
        print_status(f"train.graph: steps are taken as they are written, for they cannot be captured: {first_reason(error)}")
        torch.cuda.synchronize()
        # After a capture that broke off, random numbers wait for its end for ever; after one that went well they do not.
        self._begin()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=self._pool, stream=self._stream):
            torch.rand(1, device="cuda")

    def _begin(self) -> None:
        # One pool of memory for all kinds: no two of them are under way at a time.
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def _capture(self, batch: Batch, kind: StepKind, numbers: StepNumbers) -> _Captured:
        """Nothing is computed here."""
        still = Batch(**{f.name: getattr(batch, f.name).clone() for f in fields(batch)})
        dials, graph = _tensors(numbers), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # The thread that gathers batches may ask for memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = self._step(still, kind, dials)
        return _Captured(graph=graph, batch=still, numbers=dials, result=result)


def _tensors(numbers: StepNumbers) -> StepNumbers:
    """The numbers on the device, where a graph reads them anew."""

    def tensor(value: float | Tensor) -> Tensor:
        return torch.tensor(float(value), device="cuda")

    return StepNumbers(
        loss_weights={name: tensor(value) for name, value in numbers.loss_weights.items()},
        average_rate=tensor(numbers.average_rate),
    )


def _fill(dials: StepNumbers, numbers: StepNumbers) -> None:
    for dial, value in (
        *((dials.loss_weights[name], value) for name, value in numbers.loss_weights.items()),
        (dials.average_rate, numbers.average_rate),
    ):
        assert isinstance(dial, Tensor)
        dial.fill_(float(value))


def is_graph(setting: str, device: torch.device, world: int, *, sharded: bool) -> bool:
    """`train.graph` with `auto` resolved. The exchanges of shards, also of one worker alone, are no part of a graph.

    Raises:
        ValueError: a graph where there can be none.
    """
    check_graph(setting, gpu=on_gpu(device), world=world, sharded=sharded)
    return on_gpu(device) and world == 1 and not sharded and setting != "none"


def check_graph(setting: str, *, gpu: bool, world: int, sharded: bool) -> None:
    """Refuse `train.graph=step` where workers could not follow it.

    Args:
        setting: `train.graph`.
        gpu: whether each worker has one.
        world: number of workers.
        sharded: whether they share a model by `ray.parallel=fsdp`.

    Raises:
        ValueError: says what is in the way.
    """
    if setting == "step" and not (gpu and world == 1):
        raise ValueError("train.graph=step needs one worker on a CUDA device; give auto or none")
    if setting == "step" and sharded:
        raise ValueError("train.graph=step cannot record what ray.parallel=fsdp exchanges; give train.graph=auto, or ddp")
