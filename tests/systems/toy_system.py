"""A system of a user's own, three levels of linear maps: all that is needed to train, sweep, evaluate, serve and report it."""

import torch
from torch import nn

from libra_ray.model.parts.backbone import Text
from libra_ray.model.parts.chunks import chunk_of, masked_mean
from libra_ray.model.system import IntentValue, Losses, System, seen_first, seen_now
from libra_ray.types import Level


class Toy(System):
    """Where the hand shall go on average, at which pace, and by which actions."""

    def __init__(self, config, shape, folder=None):
        super().__init__(config, shape, folder)
        self.horizon, dims = config.action.horizon, shape.action_dim
        self.levels = (
            Level(name="goal", covers=4 * self.horizon),
            Level(name="path", covers=2 * self.horizon, reads="goal"),
            Level(name="motor", covers=self.horizon, reads="path"),
        )
        real = {"low": -1e3, "high": 1e3, "unknown": 0.0, "dtype": "float32"}
        self.intents = {
            "goal": {"mean": IntentValue(shape=(dims,), per_step=False, **real)},
            "path": {"pace": IntentValue(shape=(2 * self.horizon, dims), **real)},
        }
        self.goal = nn.Linear(shape.state_dim, dims)
        self.path = nn.Linear(dims + shape.state_dim, 2 * self.horizon * dims)
        self.motor = nn.Linear(dims + shape.state_dim, dims)

    def losses(self, batch, phase, generator=None):
        goal = batch.actions.mean(dim=1)
        path, steps = self.infer("path", seen_first(batch), {"mean": goal})["pace"], 2 * self.horizon
        chunk = chunk_of(batch, self.horizon)
        motor = self.infer("motor", seen_now(batch), {"pace": chunk.actions})["actions"]
        said = {"goal": self.goal(batch.plan_state) - goal, "motor": masked_mean((motor - chunk.actions).mean(-1), chunk.mask)}
        said["path"] = masked_mean((path - batch.actions[:, :steps]).mean(-1), batch.action_mask[:, :steps])
        return Losses(terms={name: error.square().mean() for name, error in said.items()})

    def infer(self, level, seen, above, noise=None, variant=""):
        if level == "goal":
            return {"mean": self.goal(seen.state)}
        if level == "path":
            return {"pace": self.path(torch.cat([above["mean"], seen.state], -1)).view(len(seen), 2 * self.horizon, -1)}
        state = seen.state[:, None].expand(-1, self.horizon, -1)
        return {"actions": self.motor(torch.cat([above["pace"], state], dim=-1)).clamp(-1, 1)}

    def loss_weights(self):
        return {"goal": 1.0, "path": 1.0, "motor": 1.0}

    def taught_by(self):
        return {"goal": ("goal",), "path": ("path",), "motor": ("motor",)}

    def reached(self):
        return {name: list(part.parameters()) for name, part in self.parts().items()}

    @classmethod
    def lengthened_by(cls, config, level, *, acts):
        """The levels above the last are as long by themselves."""
        return ("action.horizon", 1) if acts else None

    def parts(self):
        return {"goal": self.goal, "path": self.path, "motor": self.motor}

    def tokenise(self, instructions):
        ids = torch.tensor([list(words.encode()[:200].ljust(200, b"\0")) for words in instructions])
        return Text(ids=ids, mask=ids > 0)

    def save_processor(self, folder):
        """Nothing to write."""
