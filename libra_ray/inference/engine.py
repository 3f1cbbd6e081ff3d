"""The networks of a policy on a device: their precision, how they are run, and the sizes of batch they are recorded for."""

import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor

from libra_ray.common.errors import first_reason
from libra_ray.common.progress import print_status
from libra_ray.config import PolicyConfig
from libra_ray.inference.recording import Answers, CallAgain, CallRecorder, CallRecording, CudaGraphs
from libra_ray.inference.tensors import LevelInput, mapped, signature
from libra_ray.model.layers import compile_layers
from libra_ray.model.precision import computes_in_bf16, in_bf16, minds_types
from libra_ray.model.system import System

LARGEST = 256
"""Robots in the largest recorded batch; more are answered in parts."""
KINDS = 64
"""Recordings kept, those used last: levels times sizes of batch are fewer, but of what varies otherwise there is no end."""


def buckets(most: int) -> tuple[int, ...]:
    """The sizes of batch that are recorded where up to `most` robots ask at a time: 1, 2, 4, ... ."""
    sizes = [1]
    while sizes[-1] < min(most, LARGEST):
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


class InferenceEngine:
    """Runs one variant of a system on one device. Safe for several threads, of which one at a time is answered by a recording.

    A recording is made of a level when a size of batch is first asked for, and is played for every batch of up to so many
    robots: the rows left over repeat one that was asked. A level that cannot be recorded, as one that looks at values while it
    computes, is run as it is written, and that is said once.

    Args:
        model: in fp32 it is moved to the device itself; in bf16 a copy of it is made there.
        device: where it runs.
        settings: its precision, and how it is run.
        variant: of the system.
        recorder: instead of that which the settings mean.

    Attributes:
        model: as it is run.
        device: where.

    Raises:
        ValueError: CUDA graphs were asked for where there is no GPU.
    """

    def __init__(
        self,
        model: System,
        device: torch.device,
        settings: PolicyConfig,
        variant: str = "",
        recorder: CallRecorder | None = None,
    ) -> None:
        self.device, self._variant = device, variant
        narrow = settings.precision == "bf16" or (
            settings.precision == "auto" and device.type == "cuda" and computes_in_bf16(device)
        )
        self._autocast = narrow and not minds_types(model)
        self.model = (in_bf16(model, device) if narrow and not self._autocast else model.to(device)).eval()
        self._recorder = recorder or _recorder(device, settings.compile)
        self._run: Callable[[str, LevelInput], Answers] = self._call
        if settings.compile == "layers":
            compile_layers(self.model, dynamic=None)
        if settings.compile == "inductor":
            self._run = torch.compile(self._call, dynamic=False)
        self._lock = threading.Lock()
        self._recordings: dict[Hashable, CallRecording] = {}
        self._as_written: set[str] = set()

    @property
    def records(self) -> bool:
        """Whether answers are those of recordings: then new sizes of batch are slow once, and `buckets` are the sizes."""
        return self._recorder is not None

    def answer(self, level: str, asked: LevelInput) -> dict[str, Tensor]:
        """What `System.infer` answers, in fp32 where it is not whole numbers; `asked` and the answers are on the CPU."""
        if self._recorder is None or level in self._as_written:
            return self._answer_as_written(level, asked)
        parts = [self._answer_recorded(level, _rows(asked, first)) for first in range(0, len(asked), LARGEST)]
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take other weights of the same names and shapes, in the same memory: recordings go on, and answer by them."""
        with self._lock, torch.no_grad():
            for name, own in self.model.state_dict().items():
                own.copy_(weights[name])
            if self.device.type == "cuda" and torch.cuda.is_available():
                torch.cuda.synchronize(self.device)

    def _answer_recorded(self, level: str, asked: LevelInput) -> dict[str, Tensor]:
        size = buckets(len(asked))[-1]
        key = level, size, signature(asked)
        with self._lock:
            if key not in self._recordings and level not in self._as_written:
                try:
                    self._recordings[key] = self._recorded(level, asked, size)
                except RuntimeError as error:
                    self._as_written.add(level)
                    print_status(
                        f"policy: level {level} is run as it is written, for it cannot be recorded: {first_reason(error)}"
                    )
            if key in self._recordings:
                self._recordings[key] = recording = self._recordings.pop(key)
                return recording.play(asked)
        return self._answer_as_written(level, asked)

    def _recorded(self, level: str, asked: LevelInput, size: int) -> CallRecording:
        while len(self._recordings) >= KINDS:
            del self._recordings[next(iter(self._recordings))]
        with torch.compiler.config.patch(recompile_limit=KINDS):  # type: ignore[attr-defined]  # put there by torch
            return CallRecording(lambda given: self._run(level, given), asked, size, cast("CallRecorder", self._recorder))

    def _answer_as_written(self, level: str, asked: LevelInput) -> dict[str, Tensor]:
        if self.device.type == "cpu":
            return dict(self._call(level, asked))
        pinned = self.device.type == "cuda" and torch.cuda.is_available()
        there = mapped(asked, lambda value: (value.pin_memory() if pinned else value).to(self.device, non_blocking=pinned))
        return {name: value.cpu() for name, value in self._call(level, there).items()}

    def _call(self, level: str, asked: LevelInput) -> Answers:
        with torch.no_grad(), self._types():
            answers = self.model.infer(level, asked.seen, asked.above, asked.noise, self._variant)
        return {name: value.float() if value.is_floating_point() else value for name, value in answers.items()}

    def _types(self) -> AbstractContextManager[object]:
        # What autocast remembers of weights would be gone before a graph is played.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False) if self._autocast else nullcontext()


def _recorder(device: torch.device, how: str) -> CallRecorder | None:
    """What records for that setting of `policy.compile`; None where nothing is."""
    if device.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        return None if how == "none" else CudaGraphs(torch.device("cuda", index))
    if how == "graphs":
        raise ValueError("policy.compile=graphs needs a GPU, and there is none; give auto, none or inductor")
    return CallAgain(device) if how in ("inductor", "layers") else None


def _rows(asked: LevelInput, first: int) -> LevelInput:
    """The rows of one part, from `first` on."""
    return asked if len(asked) <= LARGEST else mapped(asked, lambda value: value[first : first + LARGEST])
