"""Runs, metrics and registered models in MLflow. The only part that imports MLflow."""

import os

# Before MLflow is imported: it neither reports home, nor runs `uv export` on whatever project the current folder holds.
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_UV_AUTO_DETECT": "false"}
# A server that goes away in the middle of a call is asked for half a minute; by default it would be four.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")

from libra_ray.tracking.faults import TrackingError
from libra_ray.tracking.registry import Registered, checkpoint_from_registry, observation_action_schema, registered
from libra_ray.tracking.run import Tracker, publishing
from libra_ray.tracking.store import check, tracking_uri

__all__ = [
    "Registered",
    "Tracker",
    "TrackingError",
    "check",
    "checkpoint_from_registry",
    "observation_action_schema",
    "publishing",
    "registered",
    "tracking_uri",
]
