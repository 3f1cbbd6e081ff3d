"""What `sweep.json` holds. Its keys are the fields' names; `common.json_text` writes and reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libra_ray.common.provenance import Hardware
from libra_ray.report.records import Bounds
from libra_ray.runs.trials import Settings, TrialResult
from libra_ray.stats.granularity_peak import Peak


@dataclass(frozen=True, kw_only=True)
class ConfigurationRow:
    """One configuration of a sweep over its seeds; see `runs.trials.Configuration`.

    Attributes:
        seeds: those that finished; `stopped` and `failed` count the others.
        errors: the different ones.
    """

    number: int
    values: Mapping[str, Any]
    success: float | None
    interval: Bounds | None
    latency_ms: float | None
    seeds: Sequence[int]
    stopped: int
    failed: int
    errors: Sequence[str]
    measures: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class CurveRow:
    """Success over N: its points by their N and by their configurations' numbers, and the peak where there are three."""

    label: str
    bins: Sequence[int]
    numbers: Sequence[int]
    peak: Peak | None


@dataclass(frozen=True, kw_only=True)
class TrialCounts:
    """Trials that were planned, and how those that ended did."""

    planned: int
    finished: int
    stopped: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """What a sweep found.

    Attributes:
        space: dotted name -> distribution in words.
        settings: how it searched.
        objectives: `success`, and `latency_ms` where both were sought.
        best: the number of the best configuration; None where nothing finished.
        front: numbers of the configurations that none beats in both objectives.
        importance: objective -> parameter -> share; empty where too little was tried.
    """

    preset: str
    space: Mapping[str, str]
    settings: Settings
    objectives: Sequence[str]
    counts: TrialCounts
    best: int | None
    configurations: Sequence[ConfigurationRow]
    front: Sequence[int]
    importance: Mapping[str, Mapping[str, float]]
    curves: Sequence[CurveRow]
    trials: Sequence[TrialResult]
    wall_s: float
    hardware: Hardware
    git_revision: str | None
    mlflow_run_id: str | None
    config: Mapping[str, Any]
