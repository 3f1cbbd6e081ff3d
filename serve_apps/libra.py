"""The application that `serve run serve_apps.libra:app checkpoint=FOLDER` starts; docs/serving.md lists its arguments."""

from ray.serve import Application

from libra_ray.on_ray.serving.app import build
from libra_ray.on_ray.serving.settings import Settings
from libra_ray.on_ray.serving.weights import located


def app(arguments: Settings) -> Application:
    """Planner, Refiner and Gateway of a checkpoint.

    Args:
        arguments: `checkpoint=...` and, with dots, whatever else `Settings` names, e.g. `refiner.replicas=2`.

    Raises:
        ValueError: there is no such checkpoint.
    """
    return build(arguments.model_copy(update={"checkpoint": located(arguments.checkpoint)}))
