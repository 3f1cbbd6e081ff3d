"""The application that `serve run serve_apps.libra:app checkpoint=FOLDER` starts; docs/serving.md lists its arguments."""

import sys
from collections.abc import Mapping
from typing import Any

import click
import ray
from ray.serve import Application

from libra_ray.on_ray.serving.app import build
from libra_ray.on_ray.serving.start import started
from libra_ray.serving.settings import ServingSettings
from libra_ray.serving.weights import pinned


def app(arguments: Mapping[str, Any]) -> Application:
    """A checkpoint's levels and the gateway.

    Called by the command `serve run`, it returns the application when that is running, and ends the command in one line where
    it cannot be served. After `serve deploy` it is called inside the cluster, and Serve shows the error.

    Args:
        arguments: `checkpoint=...` and, with dots, whatever else `ServingSettings` names, e.g. `levels.refiner.replicas=2`.

    Raises:
        ValueError: there is no such checkpoint, level, variant or argument.
    """
    command = click.get_current_context(silent=True)
    if ray.is_initialized() or command is None or command.info_name != "run":
        return build(pinned(ServingSettings.read(arguments)))
    try:
        return started(ServingSettings.read(arguments), command.params)
    except (ValueError, RuntimeError) as mistake:
        click.echo(f"serve run: error: {' '.join(str(mistake).split())}", err=True)
        sys.exit(2)
