"""Any simulated robot behind the interface of `gymnasium.Env`, for the libraries that expect it."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from libra_ray.spec import VectorSpec
from libra_ray.types import STATE_KEY, Environment, Observation

LONGEST_INSTRUCTION = 512
MAX_SEED = 2**31


class GymEnvironment(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """A `libra_ray.types.Environment` as Gymnasium has them.

    Observations are dictionaries: the camera features, `observation.state`, and `instruction`. A success terminates the
    episode, `max_steps` truncates it; `info` holds `success`, and, where the environment has them, `position_error_mm`
    and `parts_done`. Action and state are boxes of the declared ranges, and `metadata` has what else is declared of them.

    Args:
        environment: is driven, and closed, by this one.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  (Gymnasium's own declaration)

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.render_mode = "rgb_array"
        said = {"action_spec": environment.action_spec, "state_spec": environment.state_spec}
        self.metadata = {**self.metadata, "render_fps": environment.control_hz, **said}
        self.action_space = _box(environment.action_spec, environment.action_dim)
        pictures = {key: spaces.Box(0, 255, shape, np.uint8) for key, shape in environment.image_shapes.items()}
        state = _box(environment.state_spec, environment.state_dim)
        words = spaces.Text(LONGEST_INSTRUCTION, charset=frozenset(map(chr, range(32, 127))))
        self.observation_space = spaces.Dict({**pictures, STATE_KEY: state, "instruction": words})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the seed's episode; without a seed, one drawn after the last seed given. `options` go to the environment."""
        super().reset(seed=seed)
        episode = int(self.np_random.integers(MAX_SEED)) if seed is None else seed
        return _dictionary(self.environment.reset(episode, **(options or {}))), self._info(success=False)

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step: observation, reward, terminated (by success), truncated, info."""
        after = self.environment.step(action)
        truncated = after.truncated and not after.success
        return _dictionary(after.observation), after.reward, after.success, truncated, self._info(success=after.success)

    def render(self) -> NDArray[np.uint8]:
        """The main camera's `(height, width, 3)` uint8 picture."""
        return self.environment.render()

    def close(self) -> None:
        """Free the rendering contexts."""
        self.environment.close()

    def _info(self, *, success: bool) -> dict[str, Any]:
        measures = ("position_error_mm", "parts_done")
        return {"success": success} | {m: getattr(self.environment, m) for m in measures if hasattr(self.environment, m)}


def _box(spec: VectorSpec, dims: int) -> spaces.Space[NDArray[np.float32]]:
    """As many numbers, within what is declared of them."""
    low, high = np.array([pair or (-np.inf, np.inf) for pair in spec.ranges or (None,) * dims], np.float32).T
    return spaces.Box(low, high, dtype=np.float32)


def _dictionary(seen: Observation) -> dict[str, Any]:
    return {**seen.images, STATE_KEY: seen.state, "instruction": seen.instruction}
