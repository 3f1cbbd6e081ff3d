"""What a training step costs: floating-point operations, time by its parts, memory, and the share of the hardware's peak."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from libra_ray.batch import Batch
from libra_ray.model.system import System

PEAK_SIZE, PEAK_TIMES = 8192, 10
GIB, TERA = 2**30, 1e12
COMMUNICATION = "communication"


def on_gpu(device: torch.device) -> bool:
    """Whether it is a GPU that this process can time."""
    return device.type == "cuda" and torch.cuda.is_available()


def flops_per_window(model: System, batch: Batch, phase: str, *, bf16: bool) -> float:
    """Floating-point operations of the forward and backward pass, per window; nothing of them is kept.

    Of the arithmetic that the losses need, whatever is computed twice to save memory: ask before `parallel.recompute`.
    """
    training = model.training
    model.eval()
    device = batch.actions.device
    counter = FlopCounterMode(display=False)
    # Attention as plain products: of fused kernels with fewer keys than queries the counter knows nothing.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), plain, counter:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            terms = model(batch, phase).terms
        torch.stack([term.float() for term in terms.values()]).sum().backward()
    for weight in model.parameters():
        weight.grad = None
    model.train(training)
    return counter.get_total_flops() / len(batch)


def matmul_peak(device: torch.device) -> float:
    """TFLOP/s that this device reaches in a large bf16 matrix product: what `mfu` is a share of."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(PEAK_TIMES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000)
    return 2 * PEAK_SIZE**3 / best / TERA


class StepTimer:
    """Seconds by parts of a step. On a GPU by its own events, so that nobody waits for it until `take`."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._cuda, self._enabled = on_gpu(device), enabled
        self._marks: list[tuple[str, Any]] = []
        self._present = ""
        self._sums: dict[str, float] = defaultdict(float)

    def begin(self) -> None:
        """What comes now belongs to what is marked next."""
        if self._enabled:
            self._marks.append(("", self._now()))

    def enter(self, part: str) -> None:
        """What comes now is `part`, of which blocks `within` it are none."""
        self._present = part

    def mark(self, part: str) -> None:
        """What came since the last mark was `part`; it is over."""
        self._note(part)
        self._present = ""

    def interrupt(self) -> None:
        """What came since the last mark was the part that was entered; what comes now belongs to what is marked next."""
        if self._present:
            self._note(self._present)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What the block takes is `part`, and none of the part that was entered; without such a part nothing is counted."""
        self.interrupt()
        yield
        if self._present:
            self._note(part)

    def _note(self, part: str) -> None:
        if not self._enabled:
            return
        self._marks.append((part, self._now()))
        if not self._cuda:
            self._sum()

    def take(self) -> dict[str, float]:
        """Seconds by part since the last reading; on a GPU it waits for the last mark."""
        self._sum()
        found, self._sums = dict(self._sums), defaultdict(float)
        return found

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _sum(self) -> None:
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            if part:
                self._sums[part] += begin.elapsed_time(end) / 1000 if self._cuda else end - begin
        self._marks = self._marks[-1:]


class Meter:
    """Samples per second, and where the time goes, since the last reading.

    Args:
        parts: whether a step's parts can be told apart.
    """

    def __init__(self, device: torch.device, *, parts: bool) -> None:
        self.timer = StepTimer(device, enabled=parts)
        self.device, self.flops, self.peak = device, 0.0, 0.0
        self.restart()

    def learn(self, flops_per_window: float) -> None:
        """From now on say FLOP/s, and on a GPU the share of its peak."""
        self.flops = flops_per_window
        self.peak = matmul_peak(self.device) if on_gpu(self.device) else 0.0

    def restart(self) -> None:
        """Also after a checkpoint, a validation, a report: what they took is nobody's waiting for data."""
        self.samples, self.waited, self.began = 0, 0.0, time.perf_counter()
        self.timer.take()
        self._idle = self.began

    def add(self, samples: int, data_ready: float) -> None:
        """A step over so many windows, of all workers, is done; its data were there at `data_ready`."""
        self.samples += samples
        self.waited += data_ready - self._idle
        self._idle = time.perf_counter()

    def take(self, world: int) -> dict[str, float]:
        """The reading: `samples_per_s` of all workers, shares of the time, `tflops` of one worker, `memory_gib`, `mfu`.

        `communication_share` is what the device stands still for until others have what it needs or it has theirs; what goes on
        beside computing is none of it.
        """
        parts = self.timer.take()
        elapsed = time.perf_counter() - self.began
        speed = self.samples / elapsed
        reading = {"samples_per_s": speed, "data_wait_share": self.waited / elapsed}
        if world == 1 or parts:
            parts.setdefault(COMMUNICATION, 0.0)
        reading |= {f"{part}_share": seconds / elapsed for part, seconds in parts.items()}
        if self.flops:
            reading["tflops"] = self.flops * speed / world / TERA
        if self.peak:
            reading |= {"mfu": reading["tflops"] / self.peak, "peak_tflops": self.peak}
        if on_gpu(self.device):
            reading["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        self.restart()
        return reading
