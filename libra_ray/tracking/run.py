"""One run in MLflow: parameters, metrics, artifacts. What the store does not take now is told, and published later."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from libra_ray.common.progress import print_status
from libra_ray.common.provenance import git_revision, public_config
from libra_ray.config import Config, TrackingConfig
from libra_ray.tracking.faults import TrackingError
from libra_ray.tracking.registry import ModelShape, register
from libra_ray.tracking.store import answering_store, experiment_id, opened, tracking_uri

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
LONGEST_VALUE = 6000
LONGEST_TAG = 4000


class Tracker:
    """One MLflow run. As a context manager it closes the run: FINISHED, FAILED on an exception, KILLED on Ctrl-C or exit.

    Args:
        tracking: where to, and whether the job needs it.
        runs_root: folder of all runs; holds `mlflow.db` and `mlartifacts` where `tracking.uri` is empty.
        run_name: shown in MLflow.
        run_id: an earlier run to go on with, where that still exists; empty for a new one.
        parent_id: the run that a new one is shown below, e.g. a sweep's for its trials.
        begun: called as soon as the run is open, which may be later than now.

    Attributes:
        run_id: empty as long as the store did not take the run.

    Raises:
        ValueError: the tracking address is a folder, which MLflow no longer takes.
        TrackingError: (from every method) the store does not answer, or does not take it; one line.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        runs_root: Path,
        run_name: str,
        run_id: str = "",
        parent_id: str | None = None,
        begun: Callable[["Tracker"], None] = lambda _: None,
    ) -> None:
        self.run_id = run_id
        self._uri = tracking_uri(tracking, runs_root)
        self._tracking, self._runs_root, self._run_name, self._parent_id = tracking, runs_root, run_name, parent_id
        self._begun = begun
        self._client: MlflowClient | None = None
        self._last_steps: dict[str, int] = {}
        self._closed = False
        self._missed: dict[str, TrackingError] = {}

    @classmethod
    def start(
        cls, tracking: TrackingConfig, runs_root: Path, run_name: str, run_id: str = "", parent_id: str | None = None
    ) -> Self:
        """A tracker whose run is open."""
        tracker = cls(tracking, runs_root, run_name, run_id, parent_id)
        tracker.open()
        return tracker

    def open(self) -> None:
        """Begin the run, or go on with the one of `run_id`; without effect where it is open."""
        if self._client is not None:
            return
        client = opened(self._uri)
        with answering_store(self._uri):
            group = experiment_id(client, self._uri, self._tracking.experiment, self._runs_root)
            if self.run_id and _is_active(client, self.run_id):
                client.update_run(self.run_id, status="RUNNING")
            else:
                tags = {MLFLOW_PARENT_RUN_ID: self._parent_id} if self._parent_id else {}
                self.run_id = client.create_run(group, run_name=self._run_name, tags=tags).info.run_id
            if revision := git_revision():
                client.set_tag(self.run_id, "mlflow.source.git.commit", revision.removesuffix("-dirty"))
                client.set_tag(self.run_id, "git_revision", revision)
        self._client = client
        self._begun(self)

    @contextmanager
    def _opened(self) -> Iterator[MlflowClient]:
        """The client, for calls on the open run."""
        self.open()
        assert self._client is not None
        with answering_store(self._uri):
            yield self._client

    def __enter__(self) -> Self:
        """The tracker itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the run with the status that the exception means, which stays the one that is raised.

        Raises:
            TrackingError: the block came to its end, but `publishing` missed something, and `tracking.required` is set.
        """
        try:
            self.finish("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")
        except TrackingError as failed:
            if not isinstance(error, TrackingError):
                self.missed("how the run ended", failed)
        if kind is None and self._missed and self._tracking.required:
            raise TrackingError(
                f"not in MLflow yet: {', '.join(self._missed)}; nothing of the run is lost: "
                "run the same command again (a sweep with --resume) to publish it"
            ) from next(iter(self._missed.values()))

    def missed(self, what: str, error: TrackingError) -> None:
        """Note and say that something could not be published."""
        self._missed[what] = error
        print_status(f"tracking: {what} is not in MLflow yet: {error}")

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """Close the run; one already closed by this tracker keeps its status, one that never opened has none."""
        if not self._closed and self._client is not None:
            with answering_store(self._uri):
                self._client.set_terminated(self.run_id, status)
            self._closed = True

    def log_config(self, config: Config) -> None:
        """Log the flattened configuration as parameters.

        Parameters cannot change in MLflow. After a restart with another value the old parameter stays and a tag
        `changed.<name>` tells the new value.
        """
        wanted = {name: _text(value) for name, value in public_config(config).items()}
        with self._opened() as client:
            known = client.get_run(self.run_id).data.params
            new = [Param(name, value) for name, value in wanted.items() if name not in known]
            for start in range(0, len(new), PARAMS_PER_CALL):
                client.log_batch(self.run_id, params=new[start : start + PARAMS_PER_CALL])
            changed = [RunTag(f"changed.{name}", value) for name, value in wanted.items() if known.get(name, value) != value]
            if changed:
                client.log_batch(self.run_id, tags=changed)

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log metrics of one step; values that are None and steps that a metric already reached are passed over."""
        self.log_step_metrics([(step, metrics)])

    def log_step_metrics(self, rows: Sequence[tuple[int, Mapping[str, float | None]]]) -> None:
        """Log the metrics of all steps that are not yet in the run, in few calls; values that are None are passed over.

        Safe to call again with the whole log after a resume: per metric, only steps beyond the last logged one are added.
        """
        now = int(time.time() * 1000)
        new: list[Metric] = []
        with self._opened() as client:
            for step, metrics in rows:
                for key, value in metrics.items():
                    if value is not None and step > self._last_step(client, key):
                        new.append(Metric(key, float(value), now, step))
            for start in range(0, len(new), METRICS_PER_CALL):
                client.log_batch(self.run_id, metrics=new[start : start + METRICS_PER_CALL])
        for metric in new:
            self._last_steps[metric.key] = max(metric.step, self._last_steps[metric.key])

    def _last_step(self, client: MlflowClient, key: str) -> int:
        if key not in self._last_steps:
            history = client.get_metric_history(self.run_id, key)
            self._last_steps[key] = max((metric.step for metric in history), default=-1)
        return self._last_steps[key]

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Words beside the run, e.g. how it ended; long ones are cut."""
        with self._opened() as client:
            client.log_batch(self.run_id, tags=[RunTag(name, value[:LONGEST_TAG]) for name, value in tags.items()])

    def child(self, run_name: str) -> str | None:
        """The run below this one that has that name, None where there is none."""
        name = run_name.replace("'", "")
        with self._opened() as client:
            below = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run_id}' and attributes.run_name = '{name}'"
            found = client.search_runs([client.get_run(self.run_id).info.experiment_id], below)
        return found[0].info.run_id if found else None

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or a folder under its own name, to the run's artifacts."""
        with self._opened() as client:
            if path.is_dir():
                client.log_artifacts(self.run_id, str(path), f"{folder}/{path.name}" if folder else path.name)
            else:
                client.log_artifact(self.run_id, str(path), folder)

    def register_model(self, checkpoint_dir: Path, signature: ModelShape, *, digest: str, alias: str = "champion") -> str:
        """Register a checkpoint folder as a version of `tracking.registered_model`; see `registry.register`."""
        with self._opened() as client:
            name = self._tracking.registered_model
            return register(client, self._uri, self.run_id, name, checkpoint_dir, signature, digest=digest, alias=alias)


@contextmanager
def publishing(tracker: Tracker, what: str) -> Iterator[None]:
    """Try to publish something: what the store does not take costs no work, but is said, and noted by the tracker.

    Args:
        what: in words, e.g. `the training`.
    """
    try:
        yield
    except TrackingError as error:
        tracker.missed(what, error)


def _is_active(client: MlflowClient, run_id: str) -> bool:
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _text(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"
