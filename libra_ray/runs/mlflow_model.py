"""Opens a model of the MLflow registry; MLflow finds `_load_pyfunc` by name. Free of MLflow itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libra_ray.policy import act, load_policy
from libra_ray.types import ACTION_KEY, STATE_KEY, Observation, Policy

INSTRUCTION_KEY = "instruction"


class RegisteredPolicy:
    """A policy behind MLflow's `predict`: all levels once, and the first chunk, for each robot of a batch."""

    def __init__(self, policy: Policy) -> None:
        """Wrap a loaded policy."""
        self.policy = policy

    def predict(
        self, model_input: Mapping[str, NDArray[Any]], params: Mapping[str, Any] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Actions of the next `H` control steps.

        Args:
            model_input: `observation.state` `(B, S)` float32, `instruction` `(B,)` text, and every camera of the checkpoint by
                its name: `(B, height, width, 3)` uint8, or its last pictures, oldest first, `(B, T, height, width, 3)`.
            params: unused; part of MLflow's interface.

        Returns:
            `action` `(B, H, D)` float32, in the robot's own units.

        Raises:
            ValueError: a camera is missing, or pictures or states are not as the checkpoint needs them.
        """
        cameras = {name: _histories(value) for name, value in model_input.items() if name not in (STATE_KEY, INSTRUCTION_KEY)}
        steps, observations = _steps(cameras), []
        robots = zip(model_input[STATE_KEY], model_input[INSTRUCTION_KEY], *cameras.values(), strict=True)
        for state, words, *histories in robots:
            *past, now = [dict(zip(cameras, (row[step] for row in histories), strict=True)) for step in range(steps)]
            observations.append(Observation(images=now, past=past, state=state, instruction=str(words)))
        return {ACTION_KEY: np.stack([chunk.actions for chunk in act(self.policy, observations)])}


def _histories(pictures: NDArray[Any]) -> NDArray[np.uint8]:
    """`(B, T, height, width, 3)` of pictures that came without their history."""
    return pictures if pictures.ndim == 5 else pictures[:, None]


def _steps(cameras: Mapping[str, NDArray[np.uint8]]) -> int:
    """The history that all cameras have, at least 1.

    Raises:
        ValueError: they have different ones.
    """
    found = {name: histories.shape[1] for name, histories in cameras.items()}
    if len(set(found.values())) > 1:
        raise ValueError(f"all cameras need pictures of the same steps; got {found}")
    return max([1, *found.values()])


def _load_pyfunc(data_path: str) -> RegisteredPolicy:
    return RegisteredPolicy(load_policy(Path(data_path)))
