"""A data set made ready to train on: checked, split by episode, normalised, decoded, and tokenised for a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from libra_ray.checkpoint import STATS_NAME, DatasetSpec
from libra_ray.config import Config, TrainConfig
from libra_ray.data.dataset import Demonstrations, open_dataset
from libra_ray.data.fingerprint import Fingerprint
from libra_ray.data.frames import frame_cache
from libra_ray.data.splits import Split, split_episodes
from libra_ray.data.stream import BatchStream
from libra_ray.data.transforms import NormStats, Pipeline, compute_stats, is_constant
from libra_ray.data.windows import Windows
from libra_ray.model.layers import pretrained_layers
from libra_ray.model.levels import check_teaching, teach_only
from libra_ray.model.parts.backbone import Text
from libra_ray.model.registry import make_system
from libra_ray.model.system import System, held_out_losses
from libra_ray.spec import RobotSpec
from libra_ray.training.fine_tuning import start_from
from libra_ray.types import ACTION_KEY, STATE_KEY, RobotShape

if TYPE_CHECKING:
    # Sharded training's libraries take long to load, and evaluation needs none of them.
    from libra_ray.training.fit import Validate

VALIDATION_WINDOWS, FEW_WINDOWS = 512, 128
"""Held-out windows that are measured at a time, and of pretrained networks, which fill a GPU beside their optimiser."""
HELD_OUT = "val_"
"""Begins the names of held-out measures in a training log."""


Tokenise = Callable[[list[str]], Text]


def shape_of(robot: RobotSpec, subgoals: tuple[str, ...] = ()) -> RobotShape:
    """What a model has to know of a robot, and of its demonstrations; these may be yet to come."""
    return RobotShape(
        action_dim=robot.action_dim,
        state_dim=robot.state_dim,
        cameras=len(robot.cameras),
        subgoals=subgoals,
        action=robot.action,
        state=robot.state,
    )


def make_model(config: Config, shape: RobotShape, *, begun: bool = False) -> System:
    """The model as its training begins: with random weights, or with those of `train.start_from`.

    Args:
        begun: the training continues with weights of its own, for which what it started from is no longer needed.

    Raises:
        ValueError: there is no such checkpoint, or it does not fit; `train.levels` cannot be trained without the others; or
            nothing would be learned.
    """
    model = make_system(config, shape)
    if config.train.start_from and not begun:
        start_from(model, Path(config.train.start_from), config.train.start_parts or tuple(model.parts()))
    if config.train.levels:
        teach_only(model, config.train.levels)
    check_teaching(model)
    return model


def stats_of(folder: Path, shape: RobotShape) -> NormStats:
    """The normalisation statistics of another run or checkpoint: `train.stats_from`.

    Raises:
        ValueError: there are none yet, they are damaged, or they are of another robot.
    """
    path = folder / STATS_NAME
    if not path.is_file():
        raise ValueError(f"train.stats_from={folder} has no {STATS_NAME}; give a checkpoint, or a run whose training has begun")
    try:
        stats = NormStats.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"train.stats_from={folder}: its {STATS_NAME} holds no statistics ({error}); restore it") from error
    stats.check_fits(shape.state_dim, shape.action_dim)
    return stats


def distinct_tokens(tokenise: Tokenise, instructions: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The token ids `(K, W)` of different instructions, and their mask.

    Raises:
        ValueError: one is too long for the tokeniser, or it makes the same tokens of two of them, as of words that it does not
            know. Capitals and spaces are no difference.
    """
    text = tokenise(list(instructions))
    same: dict[bytes, str] = {}
    for instruction, ids, mask in zip(instructions, text.ids.numpy(), text.mask.numpy(), strict=True):
        other = same.setdefault(ids[mask].tobytes(), instruction)
        if other.casefold().split() != instruction.casefold().split():
            raise ValueError(
                f"the tokeniser of planner.backbone makes the same tokens of {other!r} and {instruction!r}, so that no policy "
                "could tell them apart; take a backbone that knows their language, or word them otherwise"
            )
    return text.ids.numpy(), text.mask.numpy()


def check_shares(train: TrainConfig, workers: int) -> None:
    """Refuse a batch that cannot be shared out among the workers and their pieces.

    Raises:
        ValueError: names the numbers.
    """
    if train.batch_size % (workers * train.accumulate):
        pieces = f" times train.accumulate={train.accumulate}" if train.accumulate > 1 else ""
        raise ValueError(f"train.batch_size={train.batch_size} is not a multiple of ray.train_workers={workers}{pieces}")


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What `Fit` needs of a data set.

    Attributes:
        demonstrations: the numbers; `frames`: the decoded pictures, memory-mapped.
        split: training and held-out episodes.
        stats: statistics of the training episodes alone, or those of `train.stats_from`; they travel in the checkpoint.
        spec: what the checkpoint has to know of the robot.
    """

    config: Config
    demonstrations: Demonstrations
    frames: NDArray[np.uint8]
    split: Split
    stats: NormStats
    spec: DatasetSpec

    @classmethod
    def open(cls, config: Config, dataset: Path, frames_root: Path | None, before: Fingerprint | None = None) -> Self:
        """Check, split and decode the data set; decoding is done once and kept under `frames_root`.

        Args:
            frames_root: None leaves the pictures where they are, for who only looks at the numbers.
            before: the data set that training began with, where this is another start of it.

        Raises:
            ValueError: the data set is missing, unfinished, of an old format, another one than `before`, or holds values nobody
                can train on.
        """
        demonstrations = open_dataset(dataset, config.data)
        data = Fingerprint.of(demonstrations)
        if before is not None:
            before.check_unchanged(data, dataset)
        split = split_episodes(demonstrations, config.data.holdout_share, config.train.seed)
        spec = DatasetSpec(
            shape=shape_of(demonstrations.robot, demonstrations.subgoals.names),
            image_keys=demonstrations.image_keys,
            control_hz=demonstrations.fps,
            instructions=demonstrations.instructions,
            data=data,
        )
        frames = np.empty((len(demonstrations.cameras), 0), np.uint8)
        own = compute_stats(demonstrations, demonstrations.rows(split.train))
        return cls(
            config=config,
            demonstrations=demonstrations,
            frames=frame_cache(demonstrations, frames_root, config.data.image_size) if frames_root else frames,
            split=split,
            stats=stats_of(Path(config.train.stats_from), spec.shape) if config.train.stats_from else own,
            spec=spec,
        )

    @property
    def fingerprint(self) -> Fingerprint:
        """Which data set this is."""
        assert self.spec.data is not None, "`open` takes it"
        return self.spec.data

    def make_model(self, *, begun: bool = False) -> System:
        """The model as its training begins: with random weights, or with those of `train.start_from`.

        Args:
            begun: the training continues with weights of its own, for which what it started from is no longer needed.

        Raises:
            ValueError: there is no such checkpoint, or it does not fit.
        """
        return make_model(self.config, self.spec.shape, begun=begun)

    def remarks(self) -> list[str]:
        """What a reader of the data would not expect, one line each: what is left out, constant, or not held out."""
        found = list(self.demonstrations.notes)
        for key, stats in ((ACTION_KEY, self.stats.action), (STATE_KEY, self.stats.state)):
            if len(still := np.flatnonzero(is_constant(stats.low, stats.high))):
                shown = ", ".join(f"{key}[{i}]={stats.low[i]:g}" for i in still)
                what = "comes out of the policy as it is" if key == ACTION_KEY else "says nothing to the policy"
                found.append(f"constant in all training episodes, and so it {what}: {shown}")
            if self.config.data.normalisation == "min_max" and len(far := np.flatnonzero(stats.far_extremes())):
                shown = ", ".join(f"{key}[{i}] from {stats.low[i]:g} to {stats.high[i]:g}" for i in far)
                found.append(
                    f"single values lie far outside all others, which so share little of the range: {shown}; unless they are "
                    "meant, give --data.normalisation quantile, or leave these episodes out"
                )
        if self.config.train.stats_from:
            rows = self.demonstrations.action[self.demonstrations.rows(self.split.train)]
            beyond = float(np.mean((rows < self.stats.action.low) | (rows > self.stats.action.high)))
            found.append(f"normalised as {self.config.train.stats_from}; {beyond:.1%} of its actions' entries lie outside")
        if self.config.data.holdout_share and not len(self.split.holdout):
            found.append("nothing is held out, for no instruction has an episode to spare: there will be no offline measures")
        return found

    def stream(self, model: System, *, rank: int, world: int, start_step: int, pin: bool = False) -> BatchStream:
        """Training batches from `start_step` on: this rank's share of each; `pin` as in `BatchStream`."""
        train = self.config.train
        check_shares(train, world)
        return BatchStream(
            self.windows(model, self.split.train, max_staleness=self.config.refiner.max_staleness),
            batch_size=train.batch_size // world,
            seed=train.seed,
            rank=rank,
            world_size=world,
            start_step=start_step,
            pin=pin,
        )

    def windows(self, model: System, episodes: NDArray[np.int64], *, pictures: bool = True, max_staleness: int = 0) -> Windows:
        """All windows of the given episodes, tokenised for `model`; without `pictures` they have none and cost little."""
        return Windows(
            self.demonstrations,
            self.frames if pictures else self.frames[:0],
            Pipeline(self.stats, self.config.data.normalisation),
            action=self.config.action,
            data=self.config.data,
            episodes=episodes,
            tokens=partial(distinct_tokens, model.tokenise),
            max_staleness=max_staleness,
            hierarchy=self.config.hierarchy,
        )

    def validator(self, device: torch.device) -> "Validate | None":
        """Measures on held-out episodes, the same windows every time; None where nothing was held out."""
        if not len(self.split.holdout):
            return None

        def validate(model: System) -> dict[str, float]:
            windows = self.windows(model, self.split.holdout)
            count = FEW_WINDOWS if pretrained_layers(model) else VALIDATION_WINDOWS
            rows = np.random.default_rng(0).permutation(len(windows))[:count]
            batch = windows.batch(np.sort(rows), np.random.default_rng(0)).to(device)
            unseen = self.windows(model, self.split.holdout, pictures=False)
            everything = unseen.batch(np.arange(len(unseen)), np.random.default_rng(0)).to(device)
            found = model.measure(batch, everything) if model.learned is None else held_out_losses(model, batch)
            return {HELD_OUT + name: value for name, value in found.items()}

        return validate
