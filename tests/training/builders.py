"""A data set in memory, ready to train on: four short episodes, two of them held out."""

from collections.abc import Sequence

import numpy as np

from libra_ray.checkpoint import DatasetSpec
from libra_ray.config import Config
from libra_ray.data.splits import Split
from libra_ray.data.transforms import compute_stats
from libra_ray.training.data import TrainingData
from libra_ray.types import IMAGE_KEY, RobotShape
from tests.data.builders import make_frames, make_recorded


def training_data(config: Config, instructions: Sequence[str] = ("press the button", "open the drawer")) -> TrainingData:
    """Windows of two instructions; pictures of 32 pixels."""
    recorded = make_recorded([12, 9, 15, 10], [*instructions] * 2)
    return TrainingData(
        config=config,
        demonstrations=recorded,
        frames=make_frames(recorded, size=32),
        split=Split(train=np.arange(2), holdout=np.array([2, 3])),
        stats=compute_stats(recorded, recorded.rows(np.arange(2))),
        spec=DatasetSpec(
            shape=RobotShape(
                action_dim=recorded.action_dim,
                state_dim=recorded.state_dim,
                cameras=1,
                subgoals=recorded.subgoals.names,
            ),
            image_keys=(IMAGE_KEY,),
            control_hz=10,
            instructions=recorded.instructions,
        ),
    )
