"""What a policy's last level measured of its answers, as an evaluation's tables and figures have it."""

from collections.abc import Iterable, Mapping

import numpy as np

from libra_ray.report.records import TaskRow


def means_by_name(measured: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over those that have it, in the order in which they are named."""
    found: dict[str, list[float]] = {}
    for measures in measured:
        for name, value in measures.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def mean_measures(rows: Iterable[TaskRow], controller: str) -> dict[str, float]:
    """The means over tasks of one controller's measures."""
    return means_by_name(row.measures or {} for row in rows if row.controller == controller)
