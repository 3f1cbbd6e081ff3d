"""Where models that were registered by the first edition name their loader; `libra_ray.runs.mlflow_model` is the one in use."""

from libra_ray.runs.mlflow_model import _load_pyfunc

__all__ = ["_load_pyfunc"]
