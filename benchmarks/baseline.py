"""Does the dual system beat a plain network? Behaviour cloning by one small convolutional network, beside a finished run.

The network gets what the run had: data set, held-out split, statistics, batch size, pixel augmentation, training time, seeds
and rhythm. It is a plain regression: picture, state and an embedding per instruction in, the next H actions out.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.baseline_table import beside, markdown
from benchmarks.files import RESULTS, command_line, write_result
from libra_ray import config as configuration
from libra_ray.batch import Batch
from libra_ray.checkpoint import DatasetSpec
from libra_ray.common.json_text import read
from libra_ray.common.progress import ProgressBar
from libra_ray.common.provenance import describe_hardware
from libra_ray.config import Config, override
from libra_ray.data.stream import BatchStream
from libra_ray.data.transforms import NormStats, Pipeline
from libra_ray.data.windows import Windows
from libra_ray.evaluation.log import read_evaluation
from libra_ray.model.parts.augment import shift_pictures
from libra_ray.model.parts.chunks import masked_mean
from libra_ray.model.precision import uses_bf16
from libra_ray.on_ray import evaluate as evaluation
from libra_ray.on_ray.run_data import began_with
from libra_ray.on_ray.session import connected
from libra_ray.report.records import CheckpointFacts, DatasetFacts, Report, WallTime
from libra_ray.report.run_report import build_report
from libra_ray.runs.folder import RunFolder
from libra_ray.runs.results import TrainingLog
from libra_ray.training.data import TrainingData
from libra_ray.types import ActionChunk, Intent, Level, Observation, Policy

LR, LR_FINAL_SHARE, ROWS = 1e-3, 0.01, 50
Loss = Literal["l1", "mse"]


class ConvPolicy(nn.Module):
    """Three convolutions, flattened so that *where* things are is kept, and a small head; 1.8 M weights at 64²."""

    def __init__(self, config: Config, spec: DatasetSpec, width: int = 256) -> None:
        super().__init__()
        self.horizon, self.action_dim = config.action.horizon, spec.shape.action_dim
        colours, side = 3 * spec.shape.cameras * config.data.history, math.ceil(config.data.image_size // 4 / 2)
        self.eyes = nn.Sequential(_conv(colours, 32, 6, 4), _conv(32, 64, 3, 2), _conv(64, 96, 3, 1), nn.Flatten())
        self.look = nn.Sequential(nn.Linear(96 * side * side, width), nn.ReLU())
        self.instruction = nn.Embedding(len(spec.instructions), 64)
        inputs, outputs = width + 64 + spec.shape.state_dim, self.horizon * self.action_dim
        hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.head = nn.Sequential(*hidden, nn.Linear(width, outputs))

    def forward(self, images: Tensor, state: Tensor, instruction: Tensor) -> Tensor:
        """Normalised actions `(B, H, D)`.

        Args:
            images: `(B, T, 3, height, width)` uint8.
            state: `(B, S)`, normalised.
            instruction: `(B,)`, the instruction's number.
        """
        pixels = (images.flatten(1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        seen = torch.cat([self.look(self.eyes(pixels)), self.instruction(instruction), state], dim=1)
        return self.head(seen).view(len(images), self.horizon, self.action_dim)


def _conv(before: int, after: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, kernel, stride, padding=1), nn.ReLU())


class TimedTrainer:
    """Training for a given time: the cosine runs over the share of the seconds used, or of whatever else the clock counts."""

    def __init__(
        self, network: ConvPolicy, config: Config, *, loss: Loss, seconds: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.network, self.config, self.loss, self.seconds, self.clock = network, config, loss, seconds, clock
        self.device = next(network.parameters()).device
        self.optimiser = torch.optim.Adam(network.parameters(), lr=LR, fused=True)
        self.step, self.elapsed_s = 0, 0.0

    def run(self, batches: Iterable[Batch]) -> Iterator[dict[str, float]]:
        """Train until the time is used up, and yield a row now and then and at the end; the consumer's time does not count."""
        began, logged = self.clock() - self.elapsed_s, self.elapsed_s
        for batch in batches:
            if self.elapsed_s >= self.seconds:
                return
            error = self._optimise(batch.to(self.device))
            self.step, self.elapsed_s = self.step + 1, self.clock() - began
            if self.elapsed_s >= self.seconds or self.elapsed_s - logged >= self.seconds / ROWS:
                yield {"step": self.step, "elapsed_s": self.elapsed_s, "loss": float(error)}
                began, logged = self.clock() - self.elapsed_s, self.elapsed_s

    def state(self) -> dict[str, Any]:
        """Everything needed to continue, and to refuse to continue under another loss or time."""
        numbers = {"loss": self.loss, "seconds": self.seconds, "step": self.step, "elapsed_s": self.elapsed_s}
        return {**numbers, "network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: it was taken under another loss or time.
        """
        if (state["loss"], state["seconds"]) != (self.loss, self.seconds):
            before = f"--loss {state['loss']} --seconds {state['seconds']}"
            raise ValueError(f"the folder's network was trained with {before}; give the same, another --name, or --fresh")
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]

    def _optimise(self, batch: Batch) -> Tensor:
        torch.manual_seed(self.config.train.seed + self.step)
        share = min(1.0, self.elapsed_s / self.seconds)
        for group in self.optimiser.param_groups:
            group["lr"] = LR * (LR_FINAL_SHARE + (1 - LR_FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * share)))
        images = shift_pictures(batch.plan_images, self.config.train.augment_pixels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=uses_bf16(self.config.train.precision, self.device)):
            predicted = self.network(images, batch.plan_state, batch.text[:, 0])
        error = predicted.float() - batch.actions[:, : self.network.horizon]
        size = error.abs() if self.loss == "l1" else error.square()
        loss = masked_mean(size.mean(-1), batch.action_mask[:, : self.network.horizon])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return loss.detach()


@dataclass(frozen=True, kw_only=True)
class BaselinePolicy:
    """The network as a `Policy` of one level, `policy`.

    Raises:
        ValueError: (from `infer`) an instruction that was not trained.
    """

    config: Config
    spec: DatasetSpec
    pipeline: Pipeline
    network: ConvPolicy

    @classmethod
    def untrained(cls, config: Config, spec: DatasetSpec, stats: NormStats) -> Self:
        """A random network, the same for the same seed, on the device that the run trains on."""
        torch.manual_seed(config.train.seed)
        device = "cuda" if config.ray.use_gpu and torch.cuda.is_available() else "cpu"
        network = ConvPolicy(config, spec).to(device)
        return cls(network=network, pipeline=Pipeline(stats, config.data.normalisation), spec=spec, config=config)

    @property
    def levels(self) -> tuple[Level, ...]:
        """The network, which reads no intent."""
        return (Level(name="policy", covers=self.network.horizon),)

    @torch.no_grad()
    def infer(self, level: str, observations: Sequence[Observation], above: Sequence[Intent | None]) -> list[ActionChunk]:
        """The next H actions of every robot, from its fresh picture."""
        if unknown := {o.instruction for o in observations} - set(self.spec.instructions):
            raise ValueError(f"not trained on {unknown}; trained on {', '.join(self.spec.instructions)}")
        history, device = self.config.data.history, next(self.network.parameters()).device
        seen = np.stack([[p for key in self.spec.image_keys for p in o.pictures(key, history)] for o in observations])
        normalised = self.network(
            torch.from_numpy(seen).permute(0, 1, 4, 2, 3).to(device),
            torch.from_numpy(self.pipeline.inputs_state(np.stack([o.state for o in observations]))).to(device),
            torch.tensor([self.spec.instructions.index(o.instruction) for o in observations], device=device),
        )
        actions = self.pipeline.outputs_action(normalised.cpu().numpy())
        rows = zip(actions, observations, strict=True)
        return [ActionChunk(actions=a, first_step=o.step, intent_first_step=o.step) for a, o in rows]


def train(
    folder: RunFolder, data: TrainingData, loss: Loss, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> tuple[BaselinePolicy, TimedTrainer]:
    """Train for `seconds` of the clock, or continue, or load what is finished."""
    policy = BaselinePolicy.untrained(data.config, data.spec, data.stats)
    trainer = TimedTrainer(policy.network, data.config, loss=loss, seconds=seconds, clock=clock)
    if (saved := folder.path("network.pt")).exists():
        trainer.restore(torch.load(saved, map_location=trainer.device, weights_only=True))
    if trainer.elapsed_s < seconds:
        stream = BatchStream(windows(data), data.config.train.batch_size, data.config.train.seed, start_step=trainer.step)
        with folder.stage("train"), stream as batches, ProgressBar("train", math.ceil(seconds), "s") as bar:
            for row in trainer.run(batches):
                torch.save(trainer.state(), staging := saved.with_suffix(".partial"))
                staging.replace(saved)
                bar.to(min(bar.total, math.ceil(row["elapsed_s"])), step=row["step"], loss=row["loss"])
    policy.network.eval()
    return policy, trainer


def windows(data: TrainingData) -> Windows:
    """The run's training windows, one chunk long, with the instruction's number as their only token."""

    def numbers(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        ids = np.array([[data.spec.instructions.index(text)] for text in texts])
        return ids, np.ones_like(ids, np.bool_)

    config, pipeline = data.config, Pipeline(data.stats, data.config.data.normalisation)
    action = replace(config.action, chunks=1)
    chosen, hierarchy = data.split.train, config.hierarchy
    return Windows(data.demonstrations, data.frames, pipeline, action, config.data, chosen, numbers, 0, hierarchy)


def evaluate(folder: RunFolder, policy: Policy) -> Report:
    """A policy in closed loop on the run's tasks and seeds, as a report of its own; finished episodes are not run again."""
    if not folder.done("evaluate"):
        with connected(), folder.stage("evaluate") as clock:
            evaluation.evaluate(folder, clock, lambda *_: (policy, folder.config))
    return build_report(
        config=folder.config,
        evaluation=read_evaluation(folder),
        training_log=TrainingLog(),
        wall_s=WallTime(record=0, total=0, train=folder.wall_s("train"), evaluate=folder.wall_s("evaluate")),
        levels=[level.name for level in policy.levels],
        dataset=DatasetFacts(),
        checkpoint=CheckpointFacts(),
        mlflow_run_id=None,
        hardware=describe_hardware(),
    )


def finished_run(root: Path) -> tuple[RunFolder, Report]:
    """A run and its report.

    Raises:
        ValueError: the folder holds no report on a policy.
    """
    path = root / "report.json"
    report = read(Report, path) if path.exists() else None
    if report is None or "policy" not in report.success_mean:
        raise ValueError(f"{root} has no report on a policy; finish the run first, e.g. `uv run jobs/pipeline.py quickstart`")
    return RunFolder(root.resolve(), configuration.from_json((root / "config.json").read_text(encoding="utf-8"))), report


def main() -> None:
    """Train and evaluate the baseline of one run, write the JSON and print the table."""
    parser = command_line("baseline", __doc__, epilog="Run again, the same command continues.")
    parser.add_argument("run", type=Path, help="folder of a finished run, e.g. runs/quickstart")
    parser.add_argument("--seconds", type=float, help="training time (default: the wall time of the run's training stage)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of training (default: one per CPU)")
    parser.add_argument("--loss", choices=get_args(Loss), default="l1", help="regression loss (default: %(default)s)")
    parser.add_argument("--name", default="baseline", help="folder in the run for its work (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="start over; the earlier folder is kept under another name")
    parser.add_argument("--out", type=Path, help="JSON to write (default: benchmarks/results/baseline_<run>.json)")
    given = parser.parse_args()
    run, ours = finished_run(given.run)
    seconds = given.seconds or run.wall_s("train")
    if (root := run.path(given.name)).exists() and given.fresh:
        root.rename(root.with_name(f"{root.name}.old-{int(time.time())}"))
    alone = {"evaluate.controllers": ("policy",), "control.rule": "fifo", "delay.intent_steps": 0}
    folder = RunFolder.open(root, override(run.config, alone))
    torch.set_num_threads(given.threads)
    data = TrainingData.open(run.config, run.dataset, run.path("frames"), before=began_with(run))
    policy, trainer = train(folder, data, given.loss, seconds)
    training: dict[str, dict[str, float | str]] = {
        "policy": {"seconds": run.wall_s("train"), "steps": ours.training.steps},
        "baseline": {
            "seconds": trainer.elapsed_s,
            "steps": trainer.step,
            "samples_per_s": trainer.step * data.config.train.batch_size / trainer.elapsed_s,
            "loss": given.loss,
            "threads": given.threads,
        },
    }
    result = beside(ours, evaluate(folder, policy), training)
    write_result(given.out or RESULTS / f"baseline_{run.root.name}.json", result)
    print(markdown(result))


if __name__ == "__main__":
    main()
