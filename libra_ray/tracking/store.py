"""The store behind a tracking address: its full address, whether it answers, its client and its experiment."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from libra_ray.config import TrackingConfig
from libra_ray.tracking.faults import TrackingError, in_one_line
from libra_ray.tracking.sqlite import AN_ADDRESS, alone, is_whole, make, parsed, sqlite_file, sqlite_uri

ANSWERS_WITHIN_S = 10
AWAY = (502, 503, 504)
"""What a proxy says whose server is away."""
SERVERS = ("http://", "https://")
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Databases, with the port of each that an address may leave out."""

for _talkative in ("mlflow", "alembic"):
    logging.getLogger(_talkative).setLevel(logging.WARNING)
# A uv environment holds no pip, which is no fault.
logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
# It prints the traceback of every error that it also raises.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def tracking_uri(tracking: TrackingConfig, runs_root: Path) -> str:
    """The full address of the store, the same from every folder; that of `<runs>/mlflow.db` where none is configured.

    Raises:
        ValueError: the address is a folder, or a store in memory.
        TrackingError: it is no address.
    """
    uri = tracking.uri
    if not uri:
        return sqlite_uri(runs_root / "mlflow.db")
    if uri.startswith("file:") or ("://" not in uri and uri not in ("databricks", "uc")):
        raise ValueError(f"tracking.uri={uri!r} is a folder, which MLflow no longer takes; {AN_ADDRESS}")
    if uri.startswith("sqlite") and (parsed(uri).database or ":memory:").startswith(":memory:"):
        raise ValueError(f"tracking.uri={uri!r} is a store in memory, which ends with the job; {AN_ADDRESS}")
    file = sqlite_file(uri)
    return sqlite_uri(file) if file else uri


@contextmanager
def answering_store(uri: str) -> Iterator[None]:
    """Work on a store that answers.

    Raises:
        TrackingError: it does not, or the work in the block failed; within half a minute where nobody is there.
    """
    with in_one_line(uri, "does not answer"):
        _ask(uri)
    with in_one_line(uri):
        yield


def opened(uri: str, *, create: bool = True) -> MlflowClient:
    """A client of a store that answers and has the schema of this MLflow.

    Args:
        uri: as `tracking_uri` gives it. It becomes MLflow's global one too: logging a model has no other way to be told.
        create: make a SQLite store that is not there yet.

    Raises:
        TrackingError: there is none, or it cannot be used.
    """
    with answering_store(uri):
        file = sqlite_file(uri)
        if create:
            with alone(uri):
                if file and not is_whole(file):
                    make(file)
                client = _client(uri)
        elif file and not is_whole(file):
            raise TrackingError(f"tracking.uri={uri}: there is no MLflow store; give the address of the one that is meant")
        else:
            client = _client(uri)
        mlflow.set_tracking_uri(uri)
        return client


def check(tracking: TrackingConfig, runs_root: Path) -> None:
    """Refuse a store that cannot be used, as far as that is known without writing anything.

    Raises:
        ValueError: the address is a folder.
        TrackingError: it does not answer, or not as MLflow does, or it is a file that is no store of this MLflow.
    """
    uri = tracking_uri(tracking, runs_root)
    with answering_store(uri):
        if file := sqlite_file(uri):
            is_whole(file)
        elif uri.startswith(SERVERS):
            _client(uri).search_experiments(max_results=1)


def experiment_id(client: MlflowClient, uri: str, name: str, runs_root: Path) -> str:
    """The id of the experiment, which is made where there is none; artifacts of a database's lie in `<runs>/mlartifacts`."""
    with alone(uri):
        known = client.get_experiment_by_name(name)
        if known is None:
            is_database = uri.split("://")[0].split("+")[0] in ("sqlite", *PORTS)
            folder = (runs_root / "mlartifacts").resolve().as_uri() if is_database else None
            try:
                return str(client.create_experiment(name, artifact_location=folder))
            except MlflowException as error:
                # Another job was quicker.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                known = client.get_experiment_by_name(name)
        if known.lifecycle_stage != "active":
            client.restore_experiment(known.experiment_id)
        return str(known.experiment_id)


@cache
def _client(uri: str) -> MlflowClient:
    client = MlflowClient(tracking_uri=uri)
    if sqlite_file(uri):
        # The registry's half of the store looks for its tables when it is first asked.
        client.search_registered_models(max_results=1)
    return client


def _ask(uri: str) -> None:
    """Raise where nobody is at the address: MLflow itself would ask again for minutes, without a word."""
    if uri.startswith(SERVERS):
        creds = get_default_host_creds(uri)
        asked = {"max_retries": 0, "retry_codes": (), "raise_on_status": False, "timeout": ANSWERS_WITHIN_S}
        answer = http_request(creds, "/health", "GET", **asked)
        if answer.status_code in AWAY:
            raise ConnectionError(f"{answer.status_code} {answer.reason}")
    elif uri.startswith(tuple(PORTS)) and (url := parsed(uri)).host:
        socket.create_connection((url.host, url.port or PORTS[url.get_backend_name()]), ANSWERS_WITHIN_S).close()
