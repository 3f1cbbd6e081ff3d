"""The MLflow store that the jobs would write to."""

import os
from pathlib import Path

from libra_ray import config as configuration
from libra_ray.common.provenance import masked
from libra_ray.config import Config
from libra_ray.doctor import aside
from libra_ray.doctor.finding import Finding
from libra_ray.doctor.machine import obstacle

FIX = "mend that, or give another one: --tracking.uri sqlite:///FOLDER/mlflow.db"


def store(config: Config, runs: Path, limit_s: float = 120) -> str | Finding:
    """Whether it answers, has a schema that the installed MLflow knows, and can be written to.

    Raises:
        AsideError: it cannot be used, and `tracking.required` is set.
    """
    try:
        return aside.call(try_store, configuration.to_json(config), str(runs), limit_s=limit_s)
    except aside.AsideError as error:
        if config.tracking.required:
            raise
        return Finding.refused(error, FIX, level="warning")


def try_store(config_json: str, runs: str) -> str:
    """The store in words.

    Raises:
        ValueError: it cannot be used; a RuntimeError likewise.
    """
    from libra_ray.tracking import check, tracking_uri
    from libra_ray.tracking.sqlite import is_whole, sqlite_file

    tracking = configuration.from_json(config_json).tracking
    check(tracking, Path(runs))
    uri = tracking_uri(tracking, Path(runs))
    file = sqlite_file(uri)
    if file is None:
        return f"{masked(uri)} answers"
    fault = f"{file} cannot be written to" if file.exists() and not os.access(file, os.W_OK) else obstacle(file.parent)
    if fault:
        raise ValueError(f"{fault}; give another store: --tracking.uri sqlite:///FOLDER/mlflow.db")
    return str(file) if is_whole(file) else f"{file} will be made by the first job"
