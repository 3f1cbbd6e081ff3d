"""Opens a model of the MLflow registry; MLflow finds `_load_pyfunc` by name. Free of MLflow itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libra_ray.policy import load_policy
from libra_ray.types import ACTION_KEY, IMAGE_KEY, STATE_KEY, Observation, Policy


class RegisteredPolicy:
    """A policy behind MLflow's `predict`: one plan and its first chunk for each robot of a batch."""

    def __init__(self, policy: Policy) -> None:
        """Wrap a loaded policy."""
        self.policy = policy

    def predict(
        self, model_input: Mapping[str, NDArray[Any]], params: Mapping[str, Any] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Actions of the next `H` control steps.

        Args:
            model_input: `observation.image` `(B, height, width, 3)` uint8, `observation.state` `(B, S)` float32 and
                `instruction` `(B,)` text.
            params: unused; part of MLflow's interface.

        Returns:
            `action` `(B, H, D)` float32, in the robot's own units.
        """
        observations = [
            Observation(images={IMAGE_KEY: image}, state=state, instruction=str(instruction))
            for image, state, instruction in zip(
                model_input[IMAGE_KEY], model_input[STATE_KEY], model_input["instruction"], strict=True
            )
        ]
        chunks = self.policy.refine(observations, self.policy.plan(observations))
        return {ACTION_KEY: np.stack([chunk.actions for chunk in chunks])}


def _load_pyfunc(data_path: str) -> RegisteredPolicy:
    return RegisteredPolicy(load_policy(Path(data_path)))
