"""How long the levels of a policy of the study of systems take."""

from collections.abc import Sequence
from dataclasses import dataclass

from libra_ray.budget.records import Candidate, ComponentProfile

LATENCY_BATCHES = (1, 16)


@dataclass(frozen=True, kw_only=True)
class LevelTime:
    """Milliseconds of one call of a level for so many robots."""

    level: str
    batch: int
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, kw_only=True)
class SystemTime:
    """How long the levels of a policy take on one thread or a GPU, and what `jobs/budget.py` proposes for 20 Hz.

    Attributes:
        setting: of the denoising steps; empty where nothing is denoised.
        rule: of control.
        proposal: None where nothing fits.
        least_chunks: M that it needs; None where no plan is waited for.
    """

    variant: str
    machine: str
    setting: str
    denoising_steps: int
    rule: str
    levels: Sequence[LevelTime]
    proposal: Candidate | None
    least_chunks: int | None


def level_times(profile: ComponentProfile) -> list[LevelTime]:
    """Whole calls of every level with the checkpoint's own denoising steps, for one robot and for many."""
    return [
        LevelTime(level=level, batch=call.batch, p50_ms=round(call.p50_ms, 3), p95_ms=round(call.p95_ms, 3))
        for level, calls in profile.calls.items()
        for call in calls
        if call.batch in LATENCY_BATCHES and call.steps in (0, profile.denoising_steps)
    ]
