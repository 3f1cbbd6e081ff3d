"""`report.json`: what one run reached, how sure that is, and what it cost."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from libra_ray.common.files import write_text
from libra_ray.common.json_text import dump, plain
from libra_ray.common.provenance import git_revision, public_config
from libra_ray.config import Config
from libra_ray.runs.results import Evaluation, Rollout, TrainingLog
from libra_ray.stats.intervals import Interval, percentiles, wilson
from libra_ray.types import EpisodeResult, Json

CONTROLLERS = ("expert", "policy", "coarse_only", "zero_action")
STAGES = ("record", "train", "evaluate", "total")
LISTED_ERRORS = 20


def build_report(
    *,
    config: Config,
    evaluation: Evaluation,
    training_log: TrainingLog,
    wall_s: Mapping[str, float],
    dataset: Json,
    checkpoint: Json,
    mlflow_run_id: str | None,
    hardware: Json,
) -> Json:
    """The content of `report.json`, strict JSON values only (what is not finite or not known is None).

    `success_mean` is the mean over tasks of each evaluated controller, `success_interval` Wilson's 95 % interval over that
    controller's pooled episodes (exact for equally many episodes per task). An episode that raised counts as failed.
    `intent_age_steps` and `held_actions` speak of `policy`, or of `coarse_only` where that was not evaluated.

    Args:
        wall_s: wall time in seconds of `record`, `train`, `evaluate` and `total`.
        dataset: facts on the demonstrations, shown as they are.
        checkpoint: facts on the checkpoint, at best with its `digest`.
        hardware: as `provenance.describe_hardware` returns it.

    Raises:
        ValueError: `wall_s` lacks a stage.
    """
    missing = [stage for stage in STAGES if stage not in wall_s]
    if missing:
        raise ValueError(f"wall_s lacks {', '.join(missing)}; it must have {', '.join(STAGES)}")
    rows = _task_rows(config, evaluation.results)
    report = {
        "preset": config.preset,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_s": {stage: wall_s[stage] for stage in STAGES},
        "tasks": rows,
        "success_mean": _success_means(rows),
        "success_interval": _pooled_intervals(rows),
        "errors": _errors(evaluation.results),
        "latency_ms": {
            "planner": _latency(evaluation.planner_latency_ms, evaluation.planner_batch_sizes),
            "refiner": _latency(evaluation.refiner_latency_ms, evaluation.refiner_batch_sizes),
        },
        **_intent(evaluation.results),
        "throughput": _throughput(evaluation, training_log),
        "training": _training(training_log),
        "difficulty": _difficulty(training_log),
        "dataset": dataset,
        "checkpoint": checkpoint,
        "mlflow_run_id": mlflow_run_id,
        "hardware": hardware,
        "git_revision": git_revision(),
        "config": public_config(config),
    }
    return dict(plain(report))


def write_report(run_dir: Path, report: Json, rollouts: Sequence[Rollout], training_log: TrainingLog) -> Path:
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


def _task_rows(config: Config, results: Sequence[EpisodeResult]) -> list[Json]:
    """One row per task and controller that has episodes, in the configuration's order."""
    cells: dict[tuple[str, str], list[EpisodeResult]] = {}
    for result in results:
        cells.setdefault((result.task, result.controller), []).append(result)
    tasks = _in_order({task for task, _ in cells}, config.sim.tasks)
    controllers = _in_order({controller for _, controller in cells}, CONTROLLERS)
    return [_row(cells[task, controller]) for task in tasks for controller in controllers if (task, controller) in cells]


def _row(episodes: Sequence[EpisodeResult]) -> Json:
    successes = sum(_succeeded(episode) for episode in episodes)
    errors = [episode.error for episode in episodes if episode.error is not None]
    return {
        "task": episodes[0].task,
        "instruction": episodes[0].instruction,
        "controller": episodes[0].controller,
        "episodes": len(episodes),
        "successes": successes,
        "success": successes / len(episodes),
        "interval": _bounds(wilson(successes, len(episodes))),
        "errors": len(errors),
        "error_messages": list(dict.fromkeys(errors))[:3],
        "mean_steps": float(np.mean([episode.steps for episode in episodes])),
    }


def _succeeded(episode: EpisodeResult) -> bool:
    return episode.success and episode.error is None


def _bounds(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _success_means(rows: Sequence[Json]) -> Json:
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row["controller"], []).append(row["success"])
    return {controller: float(np.mean(shares[controller])) for controller in _in_order(shares, CONTROLLERS)}


def _pooled_intervals(rows: Sequence[Json]) -> Json:
    successes: Counter[str] = Counter()
    episodes: Counter[str] = Counter()
    for row in rows:
        successes[row["controller"]] += row["successes"]
        episodes[row["controller"]] += row["episodes"]
    names = _in_order(episodes, CONTROLLERS)
    return {controller: _bounds(wilson(successes[controller], episodes[controller])) for controller in names}


def _errors(results: Sequence[EpisodeResult]) -> Json:
    failed = [result for result in results if result.error is not None]
    keys = ("task", "controller", "seed", "error")
    return {"count": len(failed), "first": [{key: getattr(result, key) for key in keys} for result in failed[:LISTED_ERRORS]]}


def _latency(values: Sequence[float], batch_sizes: Sequence[int]) -> Json:
    """Wall time per batched call; the histogram ends at p99, what lies beyond is counted in its last bin."""
    histogram: Json = {"edges": [], "counts": []}
    if len(values):
        shown = np.minimum(values, np.percentile(values, 99))
        histogram["counts"], histogram["edges"] = np.histogram(shown, bins=min(40, max(5, len(values) // 4)))
    return {
        **percentiles(values),
        "count": len(values),
        "robots_per_call": float(np.mean(batch_sizes)) if len(batch_sizes) else None,
        "histogram": histogram,
    }


def _intent(results: Sequence[EpisodeResult]) -> Json:
    speakers = [name for name in ("policy", "coarse_only") if any(result.controller == name for result in results)]
    episodes = [result for result in results if speakers and result.controller == speakers[0]]
    ages = Counter(int(age) for result in episodes for age in result.intent_age_steps)
    flat = list(ages.elements())
    steps, held = sum(result.steps for result in episodes), sum(result.held_actions for result in episodes)
    ordered = sorted(ages)
    histogram = {"ages": ordered, "counts": [ages[age] for age in ordered]}
    return {
        "intent_age_steps": {**percentiles(flat), "count": len(flat), "histogram": histogram},
        "held_actions": {"count": held, "share": held / steps if steps else None},
    }


def _throughput(evaluation: Evaluation, log: TrainingLog) -> Json:
    """Medians over the logged rows, so that the first one, with its warm-up, does not count for more than it is."""
    _, samples = log.series("samples_per_s")
    _, waits = log.series("data_wait_share")
    return {
        "train_samples_per_s": float(np.median(samples)) if samples else None,
        "env_steps_per_s": evaluation.env_steps / evaluation.wall_s if evaluation.wall_s > 0 else None,
        "data_wait_share": float(np.median(waits)) if waits else None,
    }


def _training(log: TrainingLog) -> Json:
    """The last known value of every metric, and the step at which teacher forcing ended."""
    keys = sorted({key for row in log.rows for key in row} - {"step"})
    last = {key: values[-1] for key in keys if (values := log.series(key)[1])}
    return {"steps": log.rows[-1]["step"] if log.rows else 0, "teacher_forcing_until": log.teacher_forcing_until, "last": last}


def _difficulty(log: TrainingLog) -> Json:
    """The last held-out measures, and of both losses' gradients the median over the last tenth of the log.

    Empty where nothing was held out; the names are explained in `libra_ray.training.difficulty` and
    `libra_ray.training.loss_balance`.
    """
    names = sorted({key for row in log.rows for key in row if key.startswith("val_")})
    held_out = {name.removeprefix("val_"): values[-1] for name in names if (values := log.series(name)[1])}
    late = {name: log.series(name)[1] for name in ("grad_norm_loss_plan", "grad_norm_loss_diff", "grad_cosine_shared")}
    return held_out | {name: float(np.median(values[-max(1, len(values) // 10) :])) for name, values in late.items() if values}
