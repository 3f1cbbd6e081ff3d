"""A data set made ready to train on: checked, split by episode, normalised, decoded, and tokenised for a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from libra_ray.checkpoint import Facts, start_from
from libra_ray.config import Config
from libra_ray.data.dataset import Recorded, open_dataset
from libra_ray.data.frames import frame_cache
from libra_ray.data.splits import Split, split_episodes
from libra_ray.data.stream import BatchStream
from libra_ray.data.transforms import NormStats, Pipeline, compute_stats
from libra_ray.data.windows import Windows
from libra_ray.difficulty import measure_difficulty
from libra_ray.model.libra import Libra, RobotShape
from libra_ray.training import Validate

VALIDATION_WINDOWS = 512


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What `Fit` needs of a data set.

    Attributes:
        recorded: the numbers; `frames`: the decoded pictures, memory-mapped.
        split: training and held-out episodes.
        stats: statistics of the training episodes alone; they travel in the checkpoint.
        facts: what the checkpoint has to know of the robot.
    """

    config: Config
    recorded: Recorded
    frames: NDArray[np.uint8]
    split: Split
    stats: NormStats
    facts: Facts

    @classmethod
    def open(cls, config: Config, dataset: Path, frames_root: Path) -> Self:
        """Check, split and decode the data set; decoding is done once and kept under `frames_root`.

        Raises:
            ValueError: the data set is missing, unfinished, of an old format, or holds values nobody can train on.
        """
        recorded = open_dataset(dataset)
        split = split_episodes(recorded, config.data.holdout_share, config.train.seed)
        shape = RobotShape(action_dim=recorded.action_dim, state_dim=recorded.state_dim, cameras=len(recorded.image_keys))
        facts = Facts(
            shape=shape,
            image_keys=recorded.image_keys,
            control_hz=recorded.fps,
            instructions=recorded.instructions,
        )
        return cls(
            config=config,
            recorded=recorded,
            frames=frame_cache(recorded, frames_root, config.sim.image_size),
            split=split,
            stats=compute_stats(recorded, recorded.rows(split.train)),
            facts=facts,
        )

    def make_model(self, *, begun: bool = False) -> Libra:
        """The model as its training begins: with random weights, or with those of `train.start_from`.

        Args:
            begun: the training continues with weights of its own, for which what it started from is no longer needed.

        Raises:
            ValueError: there is no such checkpoint, or nothing in it fits.
        """
        model, train = Libra(self.config, self.facts.shape), self.config.train
        if train.start_from and not begun:
            start_from(model, Path(train.start_from), train.start_parts)
        return model

    def stream(self, model: Libra, *, rank: int, world: int, start_step: int) -> BatchStream:
        """Training batches from `start_step` on: this rank's share of each."""
        train = self.config.train
        if train.batch_size % world:
            raise ValueError(f"train.batch_size={train.batch_size} is not a multiple of ray.train_workers={world}")
        return BatchStream(
            self.windows(model, self.split.train),
            batch_size=train.batch_size // world,
            seed=train.seed,
            rank=rank,
            world_size=world,
            start_step=start_step,
        )

    def windows(self, model: Libra, episodes: NDArray[np.int64], *, pictures: bool = True) -> Windows:
        """All windows of the given episodes, tokenised for `model`; without `pictures` they have none and cost little."""

        def tokens(instructions: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
            text = model.planner.tokenise(list(instructions))
            return text.ids.numpy(), text.mask.numpy()

        return Windows(
            self.recorded,
            self.frames if pictures else self.frames[:0],
            Pipeline(self.stats, self.config.data.normalisation),
            action=self.config.action,
            data=self.config.data,
            episodes=episodes,
            tokens=tokens,
            max_staleness=self.config.refiner.max_staleness,
        )

    def validator(self, device: torch.device) -> Validate | None:
        """Measures on held-out episodes, the same windows every time; None where nothing was held out."""
        if not len(self.split.holdout):
            return None

        def validate(model: Libra) -> dict[str, float]:
            windows = self.windows(model, self.split.holdout)
            rows = np.random.default_rng(0).permutation(len(windows))[:VALIDATION_WINDOWS]
            batch = windows.batch(np.sort(rows), np.random.default_rng(0)).to(device)
            unseen = self.windows(model, self.split.holdout, pictures=False)
            everything = unseen.batch(np.arange(len(unseen)), np.random.default_rng(0)).to(device)
            return measure_difficulty(model, batch, everything).row()

        return validate
