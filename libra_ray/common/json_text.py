"""JSON for reports."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from libra_ray.types import Json


def plain(value: Any) -> Any:
    """The value as strict JSON has it: numpy scalars and tuples become plain, what is not finite becomes None.

    Raises:
        TypeError: a value that JSON has no word for.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a report")


def dump(report: Json) -> str:
    """The report as indented strict JSON text."""
    return json.dumps(plain(report), indent=2, allow_nan=False)
