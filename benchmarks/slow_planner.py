"""The application with levels above the last that take at least so many milliseconds, for `benchmarks/asynchrony_served.py`."""

import asyncio
import os
import time
from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from libra_ray.on_ray.serving.app import build
from libra_ray.serving.batches import InferenceBatch, InferenceResult
from libra_ray.serving.replica import LevelReplica
from libra_ray.serving.settings import ServingSettings
from libra_ray.serving.weights import pinned

SLOW_MS = "LIBRA_SLOW_MS"
"""The environment variable that says how many."""


class SlowLevel(LevelReplica):
    """A level whose larger network is elsewhere: what is missing of its time it waits, and uses no processor."""

    async def infer(self, batch: InferenceBatch) -> InferenceResult:
        """As `LevelReplica.infer`, no sooner than that."""
        began = time.perf_counter()
        result = await super().infer(batch)
        *above, _ = self._settings.levels
        if self._level in above:
            await asyncio.sleep(max(0.0, float(os.environ[SLOW_MS]) / 1000 - (time.perf_counter() - began)))
        return result


def app(arguments: Mapping[str, Any]) -> Application:
    """As `serve_apps.libra:app` inside a cluster."""
    return build(pinned(ServingSettings.read(arguments)), SlowLevel)
