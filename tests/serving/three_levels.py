"""A system of three levels, as small as one can be: what each level says depends on all that it was given."""

from pathlib import Path

import torch
from torch import nn

from libra_ray.config import Config
from libra_ray.model.parts.backbone import Text
from libra_ray.model.system import IntentValue, Losses, System, seen_now
from libra_ray.types import Level, RobotShape

WORDS = 64


class ThreeLevels(System):
    """A director says in which direction, a planner where to at every step, a refiner how."""

    def __init__(self, config: Config, shape: RobotShape, folder: Path | None = None) -> None:
        super().__init__(config, shape, folder)
        horizon, dims = config.action.horizon, shape.action_dim
        self.levels = (
            Level(name="director", covers=4 * horizon),
            Level(name="planner", covers=2 * horizon, reads="director"),
            Level(name="refiner", covers=horizon, reads="planner"),
        )
        limits = {"low": -1.0, "high": 1.0, "unknown": 0.0, "dtype": "float32"}
        self.intents = {
            "director": {"direction": IntentValue(shape=(dims,), per_step=False, **limits)},
            "planner": {"goals": IntentValue(shape=(2 * horizon, dims), **limits)},
        }
        seen = shape.state_dim + WORDS + 3
        self.director = nn.Linear(seen, dims)
        self.planner = nn.Linear(seen + dims, 2 * horizon * dims)
        self.refiner = nn.Linear(seen + 2 * horizon * dims, horizon * dims)

    def losses(self, batch, phase, generator=None):
        seen, zeros = seen_now(batch), torch.zeros
        goals = zeros(len(batch), self.levels[-1].covers, self.shape.action_dim)
        actions = self.infer("refiner", seen, {"goals": goals}, torch.zeros_like(goals))["actions"]
        return Losses(terms={"action": (actions - batch.actions[:, : actions.shape[1]]).abs().mean()})

    def infer(self, level, seen, above, noise=None, variant=""):
        words = nn.functional.one_hot(seen.text.ids % WORDS, WORDS).float().mean(1)
        given = [seen.images.float().mean((1, 3, 4)) / 255, seen.state, words, *(value.flatten(1) for value in above.values())]
        given += [] if noise is None else [noise.flatten(1)]
        said = torch.tanh(getattr(self, level)(torch.cat(given, 1)))
        name = {"director": "direction", "planner": "goals", "refiner": "actions"}[level]
        return {name: said if level == "director" else said.unflatten(1, (-1, self.shape.action_dim))}

    def parts(self):
        return {name: getattr(self, name) for name in ("director", "planner", "refiner")}

    def tokenise(self, instructions):
        ids = [[*text.encode()[:80], *[0] * (80 - len(text.encode()[:80]))] for text in instructions]
        return Text(ids=torch.tensor(ids), mask=torch.ones(len(ids), 80, dtype=torch.bool))

    def save_processor(self, folder):
        """Words are bytes."""
