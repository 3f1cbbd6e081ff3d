"""A call recorded once, to be played again on other values in the same memory: as a CUDA graph, or as it is."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from libra_ray.inference.tensors import LevelInput, buffer, mapped, tensors_in

type Answers = Mapping[str, Tensor]
type Call = Callable[[LevelInput], Answers]
type Play = Callable[[], None]

WARM_UPS = 3
"""Calls before one is captured: the first ones choose kernels and claim memory."""
_one_capture = threading.Lock()
"""Only one may be under way in a process."""


class CallRecorder(Protocol):
    """Records calls. Not for two threads at a time."""

    device: torch.device

    def record(self, call: Callable[[], Answers]) -> tuple[Answers, Play]:
        """Call now, and return the answers with what computes them anew, in their place, from the same inputs' memory.

        Raises:
            RuntimeError: such a call cannot be recorded.
        """

    def at_work(self) -> AbstractContextManager[object]:
        """Within it the device does what it is asked for in the order of these calls."""

    def settle(self) -> None:
        """Wait until all of that is done."""


class CallAgain:
    """Plays by calling again: for what needs fixed sizes of batch, but no graph."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(self, call: Callable[[], Answers]) -> tuple[Answers, Play]:
        """See `CallRecorder`."""
        answers = {name: value.clone() for name, value in call().items()}

        def play() -> None:
            for name, value in call().items():
                answers[name].copy_(value)

        return answers, play

    def at_work(self) -> AbstractContextManager[object]:
        """See `CallRecorder`."""
        return nullcontext()

    def settle(self) -> None:
        """There is nothing to wait for."""


class CudaGraphs:
    """Captures CUDA graphs on a stream of its own; all share one pool of memory, for no two of them run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin()

    def record(self, call: Callable[[], Answers]) -> tuple[Answers, Play]:
        """See `CallRecorder`."""
        graph = torch.cuda.CUDAGraph()
        try:
            with _one_capture, self.at_work():
                torch.cuda.synchronize()
                for _ in range(WARM_UPS):
                    call()
                # What other threads ask of the device meanwhile is no part of this, and may go on.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    answers = dict(call())
        except RuntimeError:
            # The stream and the memory of a capture that broke off are of no use any more; the device is.
            torch.cuda.synchronize(self.device)
            self._begin()
            raise
        return answers, graph.replay

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """See `CallRecorder`."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def settle(self) -> None:
        """See `CallRecorder`."""
        self._stream.synchronize()

    def _begin(self) -> None:
        with torch.cuda.device(self.device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()


class CallRecording:
    """One level's call for one number of rows, with the memory of its inputs and answers.

    Args:
        asked: rows of the kind that it is for, at most `rows`.

    Raises:
        RuntimeError: see `CallRecorder.record`.
    """

    def __init__(self, call: Call, asked: LevelInput, rows: int, recorder: CallRecorder) -> None:
        self._rows, self._recorder = rows, recorder
        away = recorder.device.type != "cpu"
        self._staged = mapped(asked, lambda value: buffer(value, rows, pinned=away))
        self._inputs = (
            mapped(self._staged, lambda value: torch.empty_like(value, device=recorder.device)) if away else self._staged
        )
        with recorder.at_work():
            self._fill(asked)
        self._answers, self._play = recorder.record(lambda: call(self._inputs))
        self._fetched = {
            name: torch.empty_like(value, device="cpu", pin_memory=True) if away else value
            for name, value in self._answers.items()
        }

    def play(self, asked: LevelInput) -> dict[str, Tensor]:
        """The answers to as many rows or fewer, on the CPU, in memory that is nobody else's."""
        with self._recorder.at_work():
            self._fill(asked)
            self._play()
            for name, value in self._answers.items():
                if self._fetched[name] is not value:
                    self._fetched[name].copy_(value, non_blocking=True)
        self._recorder.settle()
        return {name: value[: len(asked)].clone() for name, value in self._fetched.items()}

    def _fill(self, asked: LevelInput) -> None:
        """Put the rows where they are read; what is left over repeats the last one, which is as valid as it is."""
        for given, staged, read in zip(*map(tensors_in, (asked, self._staged, self._inputs)), strict=True):
            staged[: len(given)] = given
            staged[len(given) :] = given[-1:]
            if read is not staged:
                read.copy_(staged, non_blocking=True)
