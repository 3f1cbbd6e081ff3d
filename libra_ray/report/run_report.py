"""The report of one run: from its episodes and its training log to `report.json` and the page."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from libra_ray.common.files import write_text
from libra_ray.common.json_text import dump, plain
from libra_ray.common.provenance import Hardware, git_revision, public_config
from libra_ray.config import Config
from libra_ray.control.margin import Margin
from libra_ray.report.asynchrony import measured_asynchrony
from libra_ray.report.measures import means_by_name
from libra_ray.report.records import (
    AgeHistogram,
    Bounds,
    CheckpointFacts,
    DatasetFacts,
    EpisodeError,
    Errors,
    HeldActions,
    Histogram,
    IntentAge,
    LevelLatency,
    Report,
    TaskRow,
    Throughput,
    Training,
    WallTime,
)
from libra_ray.runs.results import SPEED, EpisodeResult, Evaluation, LevelLatencies, RolloutVideo, TrainingLog
from libra_ray.stats.intervals import Interval, percentiles, wilson

EXPERT, POLICY, ZERO_ACTION = "expert", "policy", "zero_action"
LISTED_ERRORS = 20
HELD_OUT = "val_"
LOSS_GRADIENTS = ("grad_norm_loss_", "grad_cosine_")


def build_report(
    *,
    config: Config,
    evaluation: Evaluation,
    training_log: TrainingLog,
    wall_s: WallTime,
    levels: Sequence[str],
    dataset: DatasetFacts,
    checkpoint: CheckpointFacts,
    mlflow_run_id: str | None,
    hardware: Hardware,
    margins: Sequence[Margin] = (),
    covered_ms: Mapping[str, float] | None = None,
) -> Report:
    """The report of a run. An episode that raised counts as failed.

    Args:
        levels: the policy's, in the order in which they are shown; one that was never called has no latencies.
        hardware: as `provenance.describe_hardware` returns it.
        margins: of the levels, as they are to be shown.

        covered_ms: level -> how long what one of its answers covers lasts, where that is known.
    """
    rows = _task_rows(config, evaluation.results)
    speakers = _speakers(evaluation.results)
    return Report(
        preset=config.preset,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=wall_s,
        tasks=rows,
        success_mean=_success_means(rows),
        success_interval=_pooled_intervals(rows),
        errors=_errors(evaluation.results),
        latency_ms={level: _latency(evaluation.latencies.get(level, LevelLatencies())) for level in levels},
        intent_age_steps=_intent_age(speakers),
        held_actions=_held_actions(speakers),
        throughput=_throughput(evaluation, training_log),
        training=_training(training_log),
        difficulty=_difficulty(training_log),
        dataset=dataset,
        checkpoint=checkpoint,
        mlflow_run_id=mlflow_run_id,
        hardware=hardware,
        git_revision=git_revision(),
        config=plain(public_config(config)),
        margins=list(margins) or None,
        asynchrony=measured_asynchrony(speakers, evaluation.latencies, covered_ms or {}),
    )


def write_report(run_dir: Path, report: Report, rollouts: Sequence[RolloutVideo], training_log: TrainingLog) -> Path:
    """Write `report.json` and the page `report.html` into `run_dir`, each whole or not at all; returns the page's path."""
    # Here, because it brings matplotlib, which costs every job seconds that draws nothing.
    from libra_ray.report.page import render_page

    run_dir.mkdir(parents=True, exist_ok=True)
    page = run_dir / "report.html"
    write_text(page, render_page(report, rollouts, training_log))
    write_text(run_dir / "report.json", dump(report))
    return page


def _in_order(names: Mapping[str, object] | set[str], known: Sequence[str]) -> list[str]:
    return [name for name in known if name in names] + sorted(name for name in names if name not in known)


def _controllers(names: Iterable[str]) -> list[str]:
    """The ceiling, the policy, its variants, the floor."""
    found = set(names)
    variants = sorted(found - {EXPERT, POLICY, ZERO_ACTION})
    return [name for name in (EXPERT, POLICY, *variants, ZERO_ACTION) if name in found]


def _task_rows(config: Config, results: Sequence[EpisodeResult]) -> list[TaskRow]:
    """One row per task and controller that has episodes, in the configuration's order."""
    cells: dict[tuple[str, str], list[EpisodeResult]] = {}
    for result in results:
        cells.setdefault((result.task, result.controller), []).append(result)
    tasks = _in_order({task for task, _ in cells}, config.sim.tasks)
    controllers = _controllers({controller for _, controller in cells})
    return [_row(cells[task, controller]) for task in tasks for controller in controllers if (task, controller) in cells]


def _row(episodes: Sequence[EpisodeResult]) -> TaskRow:
    successes = sum(episode.succeeded for episode in episodes)
    errors = [episode.error for episode in episodes if episode.error is not None]
    return TaskRow(
        task=episodes[0].task,
        instruction=episodes[0].instruction,
        controller=episodes[0].controller,
        episodes=len(episodes),
        successes=successes,
        success=successes / len(episodes),
        interval=_bounds(wilson(successes, len(episodes))),
        errors=len(errors),
        error_messages=list(dict.fromkeys(errors))[:3],
        mean_steps=float(np.mean([episode.steps for episode in episodes])),
        measures=means_by_name(episode.measures or {} for episode in episodes) or None,
    )


def _bounds(interval: Interval | None) -> Bounds:
    assert interval is not None, "a row has episodes"
    return interval.low, interval.high


def _success_means(rows: Sequence[TaskRow]) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row.controller, []).append(row.success)
    return {controller: float(np.mean(shares[controller])) for controller in _controllers(shares)}


def _pooled_intervals(rows: Sequence[TaskRow]) -> dict[str, Bounds]:
    successes: Counter[str] = Counter()
    episodes: Counter[str] = Counter()
    for row in rows:
        successes[row.controller] += row.successes
        episodes[row.controller] += row.episodes
    names = _controllers(episodes)
    return {controller: _bounds(wilson(successes[controller], episodes[controller])) for controller in names}


def _errors(results: Sequence[EpisodeResult]) -> Errors:
    raised = [
        EpisodeError(task=result.task, controller=result.controller, seed=result.seed, error=result.error)
        for result in results
        if result.error is not None
    ]
    return Errors(count=len(raised), first=raised[:LISTED_ERRORS])


def _latency(calls: LevelLatencies) -> LevelLatency:
    histogram = Histogram()
    if len(calls.ms):
        shown = np.minimum(calls.ms, np.percentile(calls.ms, 99))
        counts, edges = np.histogram(shown, bins=min(40, max(5, len(calls.ms) // 4)))
        histogram = Histogram(edges=edges.tolist(), counts=counts.tolist())
    return LevelLatency(
        **vars(percentiles(calls.ms)),
        count=len(calls.ms),
        robots_per_call=float(np.mean(calls.robots)) if len(calls.robots) else None,
        histogram=histogram,
    )


def _speakers(results: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    """The episodes of the controller whose intents are spoken of."""
    names = _controllers(result.controller for result in results)
    spoken_of = next((name for name in names if name not in (EXPERT, ZERO_ACTION)), None)
    return [result for result in results if result.controller == spoken_of]


def _intent_age(episodes: Sequence[EpisodeResult]) -> IntentAge:
    ages = Counter(int(age) for result in episodes for age in result.intent_age_steps)
    flat, ordered = list(ages.elements()), sorted(ages)
    histogram = AgeHistogram(ages=ordered, counts=[ages[age] for age in ordered])
    return IntentAge(**vars(percentiles(flat)), count=len(flat), histogram=histogram)


def _held_actions(episodes: Sequence[EpisodeResult]) -> HeldActions:
    steps, held = sum(result.steps for result in episodes), sum(result.held_actions for result in episodes)
    return HeldActions(count=held, share=held / steps if steps else None)


def _throughput(evaluation: Evaluation, log: TrainingLog) -> Throughput:
    """Medians over the logged rows, so that the first one, with its warm-up, does not count for more than it is."""
    _, samples = log.series("samples_per_s")
    _, waits = log.series("data_wait_share")
    others = {name: log.series(name)[1] for name in SPEED if name not in ("samples_per_s", "data_wait_share")}
    return Throughput(
        train_samples_per_s=float(np.median(samples)) if samples else None,
        env_steps_per_s=evaluation.env_steps / evaluation.wall_s if evaluation.wall_s > 0 else None,
        data_wait_share=float(np.median(waits)) if waits else None,
        training={name: float(np.median(values)) for name, values in others.items() if values} or None,
    )


def _training(log: TrainingLog) -> Training:
    last = {name: value for name in log.names if (value := log.last(name)) is not None}
    return Training(steps=log.rows[-1].step if log.rows else 0, phases=log.phases, last=last)


def _difficulty(log: TrainingLog) -> dict[str, float]:
    """The last held-out measures, and of the losses' gradients the median over the last tenth of the log.

    The names are explained in `System.measure` and `libra_ray.training.loss_balance`.
    """
    held_out = {name.removeprefix(HELD_OUT): log.last(name) for name in log.names if name.startswith(HELD_OUT)}
    gradients = {name: log.late_median(name) for name in log.names if name.startswith(LOSS_GRADIENTS)}
    return {name: value for name, value in (held_out | gradients).items() if value is not None}
