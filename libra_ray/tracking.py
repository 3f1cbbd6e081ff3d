"""One run in MLflow: parameters, metrics, artifacts, the registered model. The only file that imports MLflow."""

import logging
import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

# Before MLflow is imported: it neither reports home, nor runs `uv export` on whatever project the current folder holds.
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_UV_AUTO_DETECT": "false"}

import mlflow
import mlflow.artifacts
import mlflow.pyfunc
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from libra_ray.config import Config, TrackingConfig
from libra_ray.provenance import git_revision, library_versions, public_config
from libra_ray.types import ACTION_KEY, IMAGE_KEY, STATE_KEY, Json

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
LOADER_MODULE = "libra_ray.registered_model"
"""Opens a registered model; named, not imported, because it needs torch."""
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
LONGEST_VALUE = 6000
LONGEST_TAG = 4000

for _talkative in ("mlflow", "alembic"):
    logging.getLogger(_talkative).setLevel(logging.WARNING)
# A uv environment holds no pip, which is no fault.
logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)


class Tracker:
    """One MLflow run. As a context manager it closes the run: FINISHED, FAILED on an exception, KILLED on Ctrl-C or exit."""

    def __init__(self, *, client: MlflowClient, run_id: str, tracking: TrackingConfig) -> None:
        """Use `Tracker.start`."""
        self.run_id = run_id
        self._client = client
        self._tracking = tracking
        self._last_steps: dict[str, int] = {}
        self._closed = False

    @classmethod
    def start(
        cls, tracking: TrackingConfig, runs_root: Path, run_name: str, run_id: str | None = None, parent_id: str | None = None
    ) -> Self:
        """Open a new run, or the one of `run_id` again where that still exists.

        Args:
            runs_root: folder of all runs; holds `mlflow.db` and `mlartifacts` where `tracking.uri` is empty.
            parent_id: the run that a new one is shown below, e.g. a sweep's for its trials.

        Raises:
            ValueError: the tracking address is a folder, which MLflow no longer takes.
        """
        uri = tracking_uri(tracking, runs_root)
        client = _client(uri)
        experiment_id = _experiment_id(client, tracking.experiment, uri, runs_root)
        if run_id is None or not _is_active(client, run_id):
            tags = {MLFLOW_PARENT_RUN_ID: parent_id} if parent_id else {}
            run_id = client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
        else:
            client.update_run(run_id, status="RUNNING")
        revision = git_revision()
        if revision:
            client.set_tag(run_id, "mlflow.source.git.commit", revision.removesuffix("-dirty"))
            client.set_tag(run_id, "git_revision", revision)
        return cls(client=client, run_id=run_id, tracking=tracking)

    def __enter__(self) -> Self:
        """The tracker itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the run with the status that the exception means."""
        if kind is None:
            self.finish("FINISHED")
        else:
            # What ended the run is to be told, not that the store could not be told so (it may lie on the same full disk).
            with suppress(Exception):
                self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """Close the run; a run already closed by this tracker keeps its status."""
        if not self._closed:
            self._client.set_terminated(self.run_id, status)
            self._closed = True

    def log_config(self, config: Config) -> None:
        """Log the flattened configuration as parameters.

        Parameters cannot change in MLflow. After a restart with another value the old parameter stays and a tag
        `changed.<name>` tells the new value.
        """
        wanted = {name: _text(value) for name, value in public_config(config).items()}
        known = self._client.get_run(self.run_id).data.params
        new = [Param(name, value) for name, value in wanted.items() if name not in known]
        for start in range(0, len(new), PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=new[start : start + PARAMS_PER_CALL])
        changed = [RunTag(f"changed.{name}", value) for name, value in wanted.items() if known.get(name, value) != value]
        if changed:
            self._client.log_batch(self.run_id, tags=changed)

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log metrics of one step; values that are None and steps that a metric already reached are passed over."""
        self.log_step_metrics([{"step": step, **metrics}])

    def log_step_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log all rows (`step` and numbers) that are not yet in the run, in few calls.

        Safe to call again with the whole log after a resume: per metric, only steps beyond the last logged one are added.
        """
        now = int(time.time() * 1000)
        new: list[Metric] = []
        for row in rows:
            step = int(row["step"])
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float) and step > self._last_step(key):
                    new.append(Metric(key, float(value), now, step))
        for start in range(0, len(new), METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=new[start : start + METRICS_PER_CALL])
        for metric in new:
            self._last_steps[metric.key] = max(metric.step, self._last_steps[metric.key])

    def _last_step(self, key: str) -> int:
        if key not in self._last_steps:
            history = self._client.get_metric_history(self.run_id, key)
            self._last_steps[key] = max((metric.step for metric in history), default=-1)
        return self._last_steps[key]

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Words beside the run, e.g. how it ended; long ones are cut."""
        self._client.log_batch(self.run_id, tags=[RunTag(name, value[:LONGEST_TAG]) for name, value in tags.items()])

    def child(self, run_name: str) -> str | None:
        """The run below this one that has that name, None where there is none."""
        name = run_name.replace("'", "")
        below = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run_id}' and attributes.run_name = '{name}'"
        found = self._client.search_runs([self._client.get_run(self.run_id).info.experiment_id], below)
        return found[0].info.run_id if found else None

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or a folder under its own name, to the run's artifacts."""
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), f"{folder}/{path.name}" if folder else path.name)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    def register_model(self, checkpoint_dir: Path, signature: Json, *, digest: str, alias: str = "champion") -> str:
        """Register a checkpoint folder as a version of `tracking.registered_model` and point `alias` at it.

        The same digest is registered once per run. Needs no torch: the checkpoint is copied as it is, and opened by
        `libra_ray.registered_model` only when somebody loads it.

        Args:
            signature: as `observation_action_schema` makes it.
            alias: `latest` is reserved by MLflow.

        Returns:
            The address, `models:/<name>@<alias>`.
        """
        name = self._tracking.registered_model
        if alias.lower() == "latest" or re.fullmatch(r"v\d+", alias.lower()):
            raise ValueError(f"alias {alias!r} is reserved by MLflow; choose another word, e.g. champion")
        version = self._registered_version(name, digest) or self._register(name, checkpoint_dir, signature, digest)
        self._client.set_registered_model_alias(name, alias, version)
        return f"models:/{name}@{alias}"

    def _registered_version(self, name: str, digest: str) -> str | None:
        versions = self._client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'")
        return next((str(version.version) for version in versions if version.tags.get("checkpoint_digest") == digest), None)

    def _register(self, name: str, checkpoint_dir: Path, signature: Json, digest: str) -> str:
        experiment_id = self._client.get_run(self.run_id).info.experiment_id
        model = self._client.create_logged_model(experiment_id, name=name, source_run_id=self.run_id)
        with warnings.catch_warnings():
            # An input example would be run through the model, which needs torch here.
            warnings.filterwarnings("ignore", message=".*input example was not provided", category=UserWarning)
            logged = Model.log(
                artifact_path=None,
                flavor=mlflow.pyfunc,
                run_id=self.run_id,
                model_id=model.model_id,
                loader_module=LOADER_MODULE,
                data_path=str(checkpoint_dir),
                signature=_model_signature(signature),
                pip_requirements=[
                    f"{library}=={version}" for library, version in library_versions("libra-ray", "torch").items()
                ],
                metadata={"checkpoint_digest": digest},
            )
        with suppress(MlflowException):
            self._client.create_registered_model(name)
        tags = {"checkpoint_digest": digest, "git_revision": git_revision() or "unknown"}
        version = self._client.create_model_version(
            name, logged.model_uri, run_id=self.run_id, tags=tags, model_id=logged.model_id, await_creation_for=0
        )
        return str(version.version)


def tracking_uri(tracking: TrackingConfig, runs_root: Path) -> str:
    """The address of the tracking store; `sqlite:///<runs>/mlflow.db` where none is configured.

    Raises:
        ValueError: the address is a folder.
    """
    uri = tracking.uri
    if not uri:
        runs_root.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{runs_root.resolve() / 'mlflow.db'}"
    if uri.startswith("file:") or ("://" not in uri and uri not in ("databricks", "uc")):
        raise ValueError(
            f"tracking.uri={uri!r} is a folder, which MLflow no longer takes; "
            "write sqlite:///<path>/mlflow.db or the address of a server"
        )
    return uri


def observation_action_schema(*, image_shape: tuple[int, int, int], state_dim: int, horizon: int, action_dim: int) -> Json:
    """What the model takes and gives, batched over robots: name -> `dtype` and `shape`, -1 for the batch."""
    return {
        "inputs": {
            IMAGE_KEY: {"dtype": "uint8", "shape": [-1, *image_shape]},
            STATE_KEY: {"dtype": "float32", "shape": [-1, state_dim]},
            "instruction": {"dtype": "str", "shape": [-1]},
        },
        "outputs": {ACTION_KEY: {"dtype": "float32", "shape": [-1, horizon, action_dim]}},
    }


def checkpoint_from_registry(uri: str, tracking: TrackingConfig, runs_root: Path) -> Path:
    """The local checkpoint folder behind a registry address, e.g. `models:/libra@champion` or `models:/libra/3`.

    Raises:
        ValueError: there is no such model; the message names those that exist.
    """
    store = tracking_uri(tracking, runs_root)
    client = _client(store)
    try:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, tracking_uri=store))
    except MlflowException as error:
        known = [f"models:/{model.name}@{alias}" for model in client.search_registered_models() for alias in model.aliases]
        raise ValueError(f"no model {uri!r} ({error.message}); registered: {', '.join(known) or 'none'}") from error
    return folder / Model.load(str(folder)).flavors[mlflow.pyfunc.FLAVOR_NAME]["data"]


def _model_signature(signature: Json) -> ModelSignature:
    def schema(side: Json) -> Schema:
        return Schema([TensorSpec(np.dtype(spec["dtype"]), tuple(spec["shape"]), name=name) for name, spec in side.items()])

    return ModelSignature(inputs=schema(signature["inputs"]), outputs=schema(signature["outputs"]))


def _client(uri: str) -> MlflowClient:
    """A client; the global address is set too, because logging a model has no other way to be told."""
    mlflow.set_tracking_uri(uri)
    return MlflowClient(tracking_uri=uri)


def _experiment_id(client: MlflowClient, name: str, uri: str, runs_root: Path) -> str:
    known = client.get_experiment_by_name(name)
    if known is not None:
        if known.lifecycle_stage != "active":
            client.restore_experiment(known.experiment_id)
        return str(known.experiment_id)
    is_database = uri.split("://")[0].split("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")
    folder = (runs_root / "mlartifacts").resolve().as_uri() if is_database else None
    return str(client.create_experiment(name, artifact_location=folder))


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
