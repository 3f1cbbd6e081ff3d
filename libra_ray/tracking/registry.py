"""Checkpoints in MLflow's model registry: registered with what they take and give, and found again."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import mlflow.artifacts
import mlflow.pyfunc
import numpy as np
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.types.schema import Schema, TensorSpec
from mlflow.utils.uri import is_local_uri

from libra_ray.common.provenance import git_revision, library_versions, masked
from libra_ray.config import TrackingConfig
from libra_ray.tracking.sqlite import alone
from libra_ray.tracking.store import answering_store, opened, tracking_uri
from libra_ray.types import ACTION_KEY, STATE_KEY

REGISTRY = "models:/"
LOADER_MODULE = "libra_ray.runs.mlflow_model"
"""Opens a registered model; named, not imported, because it needs torch."""
NEEDED = {"libra-ray": "libra-ray[policy]", "torch": "torch"}
"""Installed library -> what a registered model asks for, with that version."""
UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True, kw_only=True)
class ArrayShape:
    """One array that a model takes or gives; -1 in `shape` is the batch."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a model takes and gives, batched over robots, by name."""

    inputs: Mapping[str, ArrayShape]
    outputs: Mapping[str, ArrayShape]


def observation_action_schema(
    *, image_keys: Sequence[str], image_size: int, history: int, state_dim: int, horizon: int, action_dim: int
) -> ModelShape:
    """The shape of a policy with these cameras and sizes.

    Every camera has an input of its name: one picture, or with a history above 1 the last `history` ones, oldest first, as
    another dimension after the batch.
    """
    pictures = (history,) if history > 1 else ()
    camera = ArrayShape(dtype="uint8", shape=(-1, *pictures, image_size, image_size, 3))
    return ModelShape(
        inputs={
            **dict.fromkeys(image_keys, camera),
            STATE_KEY: ArrayShape(dtype="float32", shape=(-1, state_dim)),
            "instruction": ArrayShape(dtype="str", shape=(-1,)),
        },
        outputs={ACTION_KEY: ArrayShape(dtype="float32", shape=(-1, horizon, action_dim))},
    )


def register(
    client: MlflowClient,
    uri: str,
    run_id: str,
    name: str,
    checkpoint_dir: Path,
    signature: ModelShape,
    *,
    digest: str,
    alias: str,
) -> str:
    """Register a checkpoint folder as a version of the model `name`, and point `alias` at it.

    The same digest is registered once per run. Needs no torch: the checkpoint is copied as it is, and opened by
    `libra_ray.runs.mlflow_model` only when somebody loads it.

    Args:
        signature: as `observation_action_schema` makes it.
        alias: `latest` is reserved by MLflow.

    Returns:
        The address, `models:/<name>@<alias>`.
    """
    if alias.lower() == "latest" or re.fullmatch(r"v\d+", alias.lower()):
        raise ValueError(f"alias {alias!r} is reserved by MLflow; choose another word, e.g. champion")
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = next((str(v.version) for v in versions if v.tags.get("checkpoint_digest") == digest), None)
    if version is None:
        logged = _log(client, uri, run_id, name, checkpoint_dir, signature, digest)
        with alone(uri):
            version = _new_version(client, name, logged, run_id, digest)
    client.set_registered_model_alias(name, alias, version)
    return f"models:/{name}@{alias}"


def _log(
    client: MlflowClient, uri: str, run_id: str, name: str, checkpoint_dir: Path, signature: ModelShape, digest: str
) -> Model:
    experiment = client.get_run(run_id).info.experiment_id
    model = client.create_logged_model(experiment, name=name, source_run_id=run_id)
    mlflow.set_tracking_uri(uri)
    with warnings.catch_warnings():
        # An input example would be run through the model, which needs torch here.
        warnings.filterwarnings("ignore", message=".*input example was not provided", category=UserWarning)
        return Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            model_id=model.model_id,
            loader_module=LOADER_MODULE,
            data_path=str(checkpoint_dir),
            signature=_model_signature(signature),
            pip_requirements=[f"{NEEDED[name]}=={version}" for name, version in library_versions(*NEEDED).items()],
            metadata={"checkpoint_digest": digest},
        )


def _new_version(client: MlflowClient, name: str, logged: Model, run_id: str, digest: str) -> str:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {"checkpoint_digest": digest, "git_revision": git_revision() or "unknown"}
    version = client.create_model_version(
        name, logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id, await_creation_for=0
    )
    return str(version.version)


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A checkpoint of the registry.

    Attributes:
        address: the one version that was meant, e.g. `models:/libra/3`; it names the same files for ever.
        folder: the checkpoint's, on this machine.
        in_place: the folder is the store's own; else it is a copy of this process's.
    """

    address: str
    folder: Path
    in_place: bool


def registered(address: str, tracking: TrackingConfig, runs_root: Path) -> Registered:
    """The checkpoint behind a registry address, e.g. `models:/libra@champion` or `models:/libra/3`.

    What an alias points at is asked once.

    Raises:
        ValueError: there is no such model, or it is none of ours; the message names the store and what is registered there.
        TrackingError: the store cannot be used.
    """
    uri = tracking_uri(tracking, runs_root)
    client = opened(uri, create=False)
    with answering_store(uri):
        fixed = _version(client, address, uri)
        files = ModelsArtifactRepository.get_underlying_uri(fixed)
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=files, tracking_uri=uri))
        flavor = Model.load(str(folder)).flavors.get(mlflow.pyfunc.FLAVOR_NAME, {})
        if flavor.get("loader_module") != LOADER_MODULE:
            raise ValueError(f"{address} in {masked(uri)} is no policy of libra_ray; registered there: {_known(client)}")
    return Registered(address=fixed, folder=folder / flavor["data"], in_place=is_local_uri(files))


def checkpoint_from_registry(address: str, tracking: TrackingConfig, runs_root: Path) -> Path:
    """The folder of `registered`: where the store keeps its files on this machine it is theirs, else a copy."""
    return registered(address, tracking, runs_root).folder


def _version(client: MlflowClient, address: str, uri: str) -> str:
    """The address of the version that is meant now; raises where no such model is registered."""
    try:
        named = get_model_name_and_version(client, address)
        if len(named) == 1:
            client.get_logged_model(*named)
            return address
        version = client.get_model_version(*named)
    except MlflowException as error:
        if error.error_code not in UNKNOWN:
            raise
        raise ValueError(
            f"no model {address!r} in {masked(uri)} ({error.message}); registered there: {_known(client)}"
        ) from error
    return f"{REGISTRY}{version.name}/{version.version}"


def _known(client: MlflowClient) -> str:
    models = client.search_registered_models()
    known = [f"models:/{model.name}@{alias}" for model in models for alias in model.aliases or ()]
    return ", ".join(known + [f"models:/{model.name}/latest" for model in models if not model.aliases]) or "none"


def _model_signature(signature: ModelShape) -> ModelSignature:
    def schema(side: Mapping[str, ArrayShape]) -> Schema:
        return Schema([TensorSpec(np.dtype(array.dtype), array.shape, name=name) for name, array in side.items()])

    return ModelSignature(inputs=schema(signature.inputs), outputs=schema(signature.outputs))
