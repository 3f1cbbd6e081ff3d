"""Publishes a sweep: MLflow's child runs while it goes, the table, `sweep.json`, `best.yaml` and the page at its end."""

from collections.abc import Mapping
from typing import Any

import yaml

from libra_ray.common.files import write_text
from libra_ray.common.provenance import describe_hardware
from libra_ray.config import Config, preset
from libra_ray.config.overrides import flatten
from libra_ray.on_ray.sweep.importance import parameter_importance
from libra_ray.on_ray.sweep.sweep_folder import SweepFolder, TrialFolder
from libra_ray.report.sweep.records import SweepReport
from libra_ray.report.sweep.report import build_sweep, write_sweep
from libra_ray.runs.trials import TrialResult, best, configurations
from libra_ray.tracking import Tracker, publishing

PUBLISHED = "mlflow_run_id.txt"


def publish_trial(sweep: SweepFolder, parent: Tracker, trial: TrialFolder, result: TrialResult) -> None:
    """A child run in MLflow; one that was published before is left alone, one that a kill left half-way is completed."""
    note = trial.root / PUBLISHED
    if note.exists():
        return
    name = f"{sweep.run.root.name}/{trial.root.name}"
    with publishing(parent, f"trial {trial.root.name}"):
        write_text(note, _published(sweep, parent, name, trial, result))


def _published(sweep: SweepFolder, parent: Tracker, name: str, trial: TrialFolder, result: TrialResult) -> str:
    """The id of the trial's own run."""
    run = sweep.run
    parent.open()
    begun = parent.child(name) or ""
    child = Tracker.start(run.config.tracking, run.root.parent, name, run_id=begun, parent_id=parent.run_id)
    with child:
        child.log_config(trial.spec().config_with())
        for rung in result.rungs:
            child.log_metrics(rung.step, {"rung_success": rung.success})
        figures = dict(result.measures) | {"latency_ms": result.latency_ms, "wall_s_trial": result.wall_s}
        if result.status == "finished":
            figures |= {f"success_{name}": result.success_of(name) for name in result.episodes}
        child.log_metrics(result.rungs[-1].step if result.rungs else 0, figures)
        child.set_tags({"status": result.status, "error": result.error or ""})
        child.finish("FAILED" if result.status == "failed" else "FINISHED" if result.status == "finished" else "KILLED")
    return child.run_id


def publish_sweep(sweep: SweepFolder, tracker: Tracker) -> SweepReport:
    """Write the sweep's results and put them into its MLflow run; returns the content of `sweep.json`."""
    run, trials = sweep.run, sweep.results()
    found = configurations(trials)
    report = build_sweep(
        config=run.config,
        space=sweep.space.text,
        settings=sweep.settings,
        trials=trials,
        objectives=sweep.space.objectives,
        importance=parameter_importance(sweep.space, found),
        wall_s=run.wall_s("total"),
        hardware=describe_hardware(),
        mlflow_run_id=tracker.run_id or None,
    )
    page = write_sweep(run.root, report)
    kept = [page, run.path("sweep.json")]
    if chosen := best(found):
        write_text(run.path("best.yaml"), best_yaml(run.config, chosen.values))
        kept.append(run.path("best.yaml"))
    with publishing(tracker, "the sweep"):
        if chosen:
            tracker.log_metrics(0, {"success_best": chosen.success, "latency_ms_best": chosen.latency_ms})
        for path in kept:
            tracker.log_artifact(path)
    return report


def best_yaml(config: Config, values: Mapping[str, Any]) -> str:
    """A file for `--config` of every job: the preset, what the user changed of it, and the values found."""
    plain = flatten(preset(config.preset))
    changed = {name: value for name, value in flatten(config).items() if value != plain[name]} | dict(values)
    rows = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    return str(yaml.safe_dump({"preset": config.preset, **rows}, sort_keys=False, allow_unicode=True))
