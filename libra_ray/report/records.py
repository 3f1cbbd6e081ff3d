"""What `report.json` holds. Its keys are the fields' names; `common.json_text` writes and reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BeforeValidator, GetCoreSchemaHandler

from libra_ray.common.json_text import ABSENT, Flat
from libra_ray.common.provenance import Hardware
from libra_ray.control.margin import Margin
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.report.asynchrony import Asynchrony
from libra_ray.runs.results import PhaseStart
from libra_ray.stats.intervals import Percentiles

Bounds = tuple[float, float]
"""The two ends of an interval of 95 %."""
FORMER_CHANGE = "teacher_forcing_until"
"""What earlier versions wrote of a change of phase: the first step with the planner's own tokens."""


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One task under one controller.

    Attributes:
        success: share of the episodes; `interval`: Wilson's.
        errors: episodes that raised, which count as failed; `error_messages`: the first different ones.
        mean_steps: control steps of an episode.
        measures: means over its episodes of what the last level measured of its answers, by name; left out where nothing was.
    """

    task: str
    instruction: str
    controller: str
    episodes: int
    successes: int
    success: float
    interval: Bounds
    errors: int
    error_messages: Sequence[str]
    mean_steps: float
    measures: Mapping[str, float] | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class EpisodeError:
    """An episode that raised."""

    task: str
    controller: str
    seed: int
    error: str


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How many episodes raised, and the first of them."""

    count: int
    first: Sequence[EpisodeError]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """`counts` between neighbouring `edges`, of which there is one more; both empty where nothing was counted."""

    edges: Sequence[float] = ()
    counts: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class LevelLatency(Percentiles):
    """Wall time of one level's batched calls, in milliseconds.

    Attributes:
        count: calls.
        robots_per_call: their mean; None without a call.
        histogram: ends at p99, what lies beyond is counted in its last bin.
    """

    count: int
    robots_per_call: float | None
    histogram: Histogram


@dataclass(frozen=True, kw_only=True)
class AgeHistogram:
    """How many actions were executed at each age."""

    ages: Sequence[int]
    counts: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class IntentAge(Percentiles):
    """Control steps between the picture behind an intent and each action that was executed under it."""

    count: int
    histogram: AgeHistogram


@dataclass(frozen=True, kw_only=True)
class HeldActions:
    """Executed actions for which there was no fresh one; `share` of all, None where none was executed."""

    count: int
    share: float | None


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Rates; None where it was not measured. Of training, medians over the logged rows."""

    train_samples_per_s: float | None
    env_steps_per_s: float | None
    data_wait_share: float | None
    training: Mapping[str, float] | None = field(default=None, metadata=ABSENT)
    """What else the log says of speed and memory, by name (`libra_ray.runs.results.SPEED`)."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How training went: optimiser steps, the phases that it went through, and the last known value of every metric."""

    steps: int
    phases: Sequence[PhaseStart] = ()
    last: Mapping[str, float]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """How pydantic reads the record: earlier versions knew one change of phase, the end of teacher forcing, or None."""

        def upgraded(tree: Any) -> Any:
            if not isinstance(tree, dict) or tree.get(FORMER_CHANGE) is None:
                return tree
            return tree | {"phases": [{"name": "sampled", "first_step": tree[FORMER_CHANGE]}]}

        return BeforeValidator(upgraded).__get_pydantic_core_schema__(source, handler)


@dataclass(frozen=True, kw_only=True)
class WallTime:
    """Seconds of each stage, and of all with what lay between them."""

    record: float
    train: float
    evaluate: float
    total: float


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """Size and shape of the demonstrations; nothing where there are none.

    Attributes:
        checkpoint_trained_on_another: the data set that the evaluated policy was trained on, where it was not this one.
    """

    episodes: int | None = field(default=None, metadata=ABSENT)
    frames: int | None = field(default=None, metadata=ABSENT)
    fps: float | None = field(default=None, metadata=ABSENT)
    state_dim: int | None = field(default=None, metadata=ABSENT)
    action_dim: int | None = field(default=None, metadata=ABSENT)
    cameras: Sequence[str] | None = field(default=None, metadata=ABSENT)
    instructions: Sequence[str] | None = field(default=None, metadata=ABSENT)
    checkpoint_trained_on_another: Fingerprint | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts(Flat):
    """The evaluated checkpoint; nothing where there is none.

    Attributes:
        path: its folder below that of all runs.
        step: optimiser steps behind its weights.
        digest: sha256 of its content.
        manifest: what else its manifest says.
    """

    path: str | None = field(default=None, metadata=ABSENT)
    step: int | None = field(default=None, metadata=ABSENT)
    digest: str | None = field(default=None, metadata=ABSENT)
    manifest: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A job measured from outside: seconds from its start to its end, and the most memory of all it started, in GiB."""

    wall_s: float
    peak_memory_gb: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one run reached, how sure that is, and what it cost.

    Attributes:
        tasks: a row per task and controller, in the configuration's order.
        success_mean: controller -> mean over tasks.
        success_interval: controller -> Wilson's interval over the pooled episodes (exact for equally many per task).
        latency_ms: level -> its calls.
        intent_age_steps: speaks of `policy`, or of `coarse_only` where that was not evaluated, as does `held_actions`.
        difficulty: held-out measures and gradient norms by name; empty where nothing was held out.
        config: dotted name -> value.
        measured: only where a benchmark has measured the job.
        margins: how well each level keeps up with its robots: before training with one, then with those of the evaluation.

        asynchrony: of whom `intent_age_steps` speaks; left out where nothing of it was measured.
    """

    preset: str
    created_at: str
    wall_s: WallTime
    tasks: Sequence[TaskRow]
    success_mean: Mapping[str, float]
    success_interval: Mapping[str, Bounds]
    errors: Errors
    latency_ms: Mapping[str, LevelLatency]
    intent_age_steps: IntentAge
    held_actions: HeldActions
    throughput: Throughput
    training: Training
    difficulty: Mapping[str, float]
    dataset: DatasetFacts
    checkpoint: CheckpointFacts
    mlflow_run_id: str | None
    hardware: Hardware
    git_revision: str | None
    config: Mapping[str, Any]
    measured: Measured | None = field(default=None, metadata=ABSENT)
    margins: Sequence[Margin] | None = field(default=None, metadata=ABSENT)

    asynchrony: Asynchrony | None = field(default=None, metadata=ABSENT)
