"""What a run leaves for people: the report, the page, and the run in MLflow."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from libra_ray import checkpoint
from libra_ray.common.json_text import plain
from libra_ray.common.provenance import describe_hardware
from libra_ray.control.margin import Margin
from libra_ray.data.dataset import open_dataset
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.report.asynchrony import figures
from libra_ray.report.measures import mean_measures
from libra_ray.report.records import CheckpointFacts, DatasetFacts, Report, WallTime
from libra_ray.report.run_report import POLICY, build_report, write_report
from libra_ray.runs.folder import RunFolder
from libra_ray.runs.results import Evaluation, RolloutVideo, TrainingLog
from libra_ray.stats.intervals import PERCENTILES
from libra_ray.tracking import Tracker, TrackingError, check, observation_action_schema, publishing

RUN_ID = "mlflow_run_id"
MARKS = tuple(f"p{p}" for p in PERCENTILES)


def tracked(folder: RunFolder) -> Tracker:
    """The run's MLflow run, the same one after every restart.

    Raises:
        ValueError: the tracking address is a folder.
        TrackingError: the store cannot be used, and `tracking.required` is set; otherwise that is said, and tried again
            whenever there is something to publish.
    """

    def begun(tracker: Tracker) -> None:
        folder.note(RUN_ID, tracker.run_id)
        tracker.log_config(folder.config)

    tracking = folder.config.tracking
    tracker = Tracker(tracking, folder.root.parent, folder.root.name, run_id=folder.fact(RUN_ID, str) or "", begun=begun)
    if tracking.required:
        with _remedy():
            tracker.open()
    else:
        with publishing(tracker, "how the run began"):
            tracker.open()
    return tracker


def check_store(folder: RunFolder) -> None:
    """Refuse a store that a job needs and cannot use, before anything is written; the run's folder need not exist yet.

    Raises:
        ValueError: the tracking address is a folder.
        TrackingError: the store cannot be used.
    """
    if folder.config.tracking.required:
        with _remedy():
            check(folder.config.tracking, folder.root.parent)


@contextmanager
def _remedy() -> Iterator[None]:
    try:
        yield
    except TrackingError as error:
        raise TrackingError(f"{error}; mend that, or give --tracking.required false to go on and publish later") from error


def publish_training(folder: RunFolder, tracker: Tracker, log: TrainingLog, margins: Sequence[Margin] = ()) -> None:
    """Loss curves, the levels' margins, and the trained model, registered with its observation and action schema."""
    path = folder.path("checkpoint")
    manifest, trained = checkpoint.read_manifest(path), checkpoint.read_config(path)
    signature = observation_action_schema(
        image_keys=manifest.image_keys,
        image_size=trained.data.image_size,
        history=trained.data.history,
        state_dim=manifest.shape.state_dim,
        horizon=trained.action.horizon,
        action_dim=manifest.shape.action_dim,
    )
    with publishing(tracker, "the training"):
        if margins:
            tracker.log_step_metrics([(0, margin_figures(margins))])
        tracker.log_step_metrics([(row.step, row.metrics) for row in log.rows])
        tracker.register_model(path, signature, digest=manifest.digest)


def publish_joined(folder: RunFolder, tracker: Tracker) -> None:
    """A checkpoint whose levels were trained one by one: registered, and where each comes from."""
    publish_training(folder, tracker, TrainingLog())
    origins = checkpoint.read_manifest(folder.path("checkpoint")).joined
    told = {f"joined.{o.level}": f"{o.folder} (step {o.step}, digest {o.digest[:12]}, data {o.data})" for o in origins}
    with publishing(tracker, "where the levels come from"):
        tracker.set_tags(told)


def margin_figures(margins: Sequence[Margin], prefix: str = "") -> dict[str, float]:
    """How well each level keeps up, by the metrics' names."""
    figures = {f"{prefix}margin_steps_{margin.level}": float(margin.margin_steps) for margin in margins}
    return figures | {f"{prefix}latency_p95_ms_{margin.level}": margin.p95_ms for margin in margins}


def publish_evaluation(
    folder: RunFolder,
    tracker: Tracker,
    log: TrainingLog,
    evaluation: Evaluation,
    rollouts: list[RolloutVideo],
    trained_margins: Sequence[Margin] = (),
    evaluated_margins: Sequence[Margin] = (),
) -> Report:
    """Write `report.json` and `report.html`, and put both and their figures into MLflow; returns the report.

    Args:
        trained_margins: of the levels as they were measured before training.
        evaluated_margins: by the evaluation's calls.
    """
    record, train, evaluate = folder.wall_s("record"), folder.wall_s("train"), folder.wall_s("evaluate")
    # The pipeline's own clock also counts imports, starting Ray and publishing; jobs run one by one have only their stages.
    total = round(max(folder.wall_s("total"), record + train + evaluate), 2)
    manifest = checkpoint.read_manifest(folder.checkpoint)
    report = build_report(
        config=folder.config,
        evaluation=evaluation,
        training_log=log,
        wall_s=WallTime(record=record, train=train, evaluate=evaluate, total=total),
        levels=[level.name for level in manifest.levels] or list(evaluation.latencies),
        dataset=dataset_facts(folder),
        checkpoint=checkpoint_facts(folder.checkpoint),
        mlflow_run_id=tracker.run_id or None,
        hardware=describe_hardware(),
        margins=[*trained_margins, *evaluated_margins],
        covered_ms={level.name: 1000 * level.covers / manifest.control_hz for level in manifest.levels},
    )
    page = write_report(folder.root, report, rollouts, log)
    with publishing(tracker, "the evaluation"):
        tracker.log_metrics(manifest.step, figures_of(report) | margin_figures(evaluated_margins, "evaluated_"))
        tracker.log_artifact(page)
        tracker.log_artifact(folder.path("report.json"))
    return report


def figures_of(report: Report) -> dict[str, float | None]:
    """What of a report is a metric of its run in MLflow."""
    found: dict[str, float | None] = {f"success_{name}": value for name, value in report.success_mean.items()}
    found |= {f"wall_s_{name}": value for name, value in vars(report.wall_s).items()}
    found |= {f"intent_age_steps_{mark}": getattr(report.intent_age_steps, mark) for mark in MARKS}
    found |= {f"latency_ms_{level}_{m}": getattr(marks, m) for level, marks in report.latency_ms.items() for m in MARKS}
    found |= {f"measure_{name}": value for name, value in mean_measures(report.tasks, POLICY).items()}
    return found | {"held_share": report.held_actions.share} | figures(report.asynchrony)


def dataset_facts(folder: RunFolder) -> DatasetFacts:
    """Size and shape of the demonstrations, and what the evaluated policy was trained on where that was another data set."""
    if not folder.dataset.exists():
        return DatasetFacts()
    recorded = open_dataset(folder.dataset, folder.config.data)
    trained = checkpoint.read_manifest(folder.checkpoint).data
    return DatasetFacts(
        episodes=len(recorded.lengths),
        frames=len(recorded),
        fps=recorded.fps,
        state_dim=recorded.state_dim,
        action_dim=recorded.action_dim,
        cameras=recorded.image_keys,
        instructions=recorded.instructions,
        checkpoint_trained_on_another=None if trained == Fingerprint.of(recorded) else trained,
    )


def checkpoint_facts(path: Path) -> CheckpointFacts:
    """Step, digest and what else the manifest of the evaluated checkpoint says."""
    manifest = plain(checkpoint.read_manifest(path))
    own = {name: manifest.pop(name) for name in ("step", "digest")}
    return CheckpointFacts(path=f"{path.parent.name}/{path.name}", **own, manifest=manifest)
