"""The application that `serve run serve_apps.libra:app checkpoint=FOLDER` starts; docs/serving.md lists its arguments."""

import sys
from collections.abc import Mapping
from typing import Any

import click
import ray
from ray.serve import Application

from libra_ray.on_ray import session
from libra_ray.on_ray.serving.app import build
from libra_ray.serving.settings import Settings
from libra_ray.serving.weights import pinned


def app(arguments: Mapping[str, Any]) -> Application:
    """A checkpoint's levels and the gateway.

    Built by the command `serve run`, it ends that in one line where it cannot be served, and sees to it that the command
    connects to Ray as the jobs do. After `serve deploy` it is built inside the cluster, and Serve shows the error.

    Args:
        arguments: `checkpoint=...` and, with dots, whatever else `Settings` names, e.g. `levels.refiner.replicas=2`.

    Raises:
        ValueError: there is no such checkpoint, level, variant or argument.
    """
    if ray.is_initialized():
        return build(pinned(Settings.read(arguments)))
    try:
        session.prepare_serve_run(_address())
        settings = pinned(Settings.read(arguments))
    except (ValueError, RuntimeError) as mistake:
        sys.exit(f"serve run: error: {' '.join(str(mistake).split())}")
    return build(settings)


def _address() -> str | None:
    """What `serve run` was given as `--address`, which is RAY_ADDRESS by default."""
    command = click.get_current_context(silent=True)
    return command.params.get("address") if command else None
