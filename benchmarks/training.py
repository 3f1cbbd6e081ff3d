"""Does training waste time around the model? Against a bare PyTorch loop, and its data against LeRobot's own loader.

The same model and the same batches, in turns on the same machine, so that only ratios count.

    uv run -m benchmarks.training runs/quickstart
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

from benchmarks.files import RESULTS, command_line, origin, write_result
from libra_ray import config as configuration
from libra_ray.common.progress import ProgressBar
from libra_ray.config import Config, override
from libra_ray.model.precision import uses_bf16
from libra_ray.training.data import TrainingData
from libra_ray.training.fit import Trainer
from libra_ray.types import Json

WARM_UP = 10
"""Steps before the clock is read."""


def ours(data: TrainingData, device: torch.device, steps: int) -> float:
    """Windows per second of the training loop, with its log, average and measures; without checkpoints and validation."""
    torch.manual_seed(0)
    model = data.make_model()
    trainer = Trainer(model, device=device)
    with data.stream(model, rank=0, world=1, start_step=0, pin=device.type == "cuda") as batches:
        for _ in trainer.run(batches, until=WARM_UP):
            pass
        began = time.perf_counter()
        for _ in trainer.run(batches, until=WARM_UP + steps):
            pass
        return _rate(data, steps, began, device)


def bare(data: TrainingData, device: torch.device, steps: int) -> float:
    """Windows per second of the shortest loop that trains: forward, backward, clipping, AdamW."""
    torch.manual_seed(0)
    model, train = data.make_model().to(device).train(), data.config.train
    optimiser = torch.optim.AdamW(model.parameters(), lr=train.lr, betas=(0.9, 0.95), fused=True)
    phase, began = model.schedule().phases[0], 0.0
    with data.stream(model, rank=0, world=1, start_step=0, pin=device.type == "cuda") as batches:
        for step, batch in enumerate(batches):
            if step == WARM_UP:
                began = time.perf_counter()
            if step == WARM_UP + steps:
                return _rate(data, steps, began, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(train.precision, device)):
                loss = torch.stack(list(model(batch.to(device), phase).terms.values())).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
            optimiser.step()
    raise AssertionError("the stream has no end")


def _rate(data: TrainingData, steps: int, began: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return steps * data.config.train.batch_size / (time.perf_counter() - began)


def our_batches(data: TrainingData, steps: int) -> float:
    """Windows per second of the stream alone."""
    with data.stream(data.make_model(), rank=0, world=1, start_step=0) as batches:
        return _drawn(iter(batches), steps, data.config.train.batch_size)


def lerobot_batches(data: TrainingData, steps: int) -> float:
    """Windows per second of `LeRobotDataset` in torch's `DataLoader`: the same pictures, states and actions."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    action, fps = data.config.action, data.demonstrations.fps
    ahead = [step / fps for step in range(action.plan_steps + action.horizon)]
    cameras = {camera.key: [0.0, action.horizon / fps] for camera in data.demonstrations.cameras}
    root = data.demonstrations.root
    dataset = LeRobotDataset(f"local/{root.name}", root=root, delta_timestamps={"action": ahead, **cameras})
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=data.config.train.batch_size, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True
    )
    return _drawn(iter(loader), steps, data.config.train.batch_size)


def _drawn(batches: Iterator[object], steps: int, size: int) -> float:
    for _ in range(2):
        next(batches)
    began = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * size / (time.perf_counter() - began)


def measure(config: Config, run: Path, steps: int, turns: int) -> Json:
    """Medians over turns of both pairs, and their ratios turn by turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = TrainingData.open(config, run / "dataset", run / "frames")
    ways: dict[str, Callable[[], float]] = {
        "training loop": lambda: ours(data, device, steps),
        "bare loop": lambda: bare(data, device, steps),
        "stream": lambda: our_batches(data, steps),
        "LeRobotDataset, DataLoader": lambda: lerobot_batches(data, max(2, steps // 20)),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    with ProgressBar("training", total=turns * len(ways), unit="measures") as bar:
        for _ in range(turns):
            for name, way in ways.items():
                found[name].append(way())
                bar.to(bar.count + 1)
    rows = [{"way": name, "windows_per_s": median(rates), "turns": rates} for name, rates in found.items()]

    def ratio(one: str, other: str) -> float:
        return median(a / b for a, b in zip(found[one], found[other], strict=True))

    ratios = {
        "training loop / bare loop": ratio("training loop", "bare loop"),
        "stream / LeRobotDataset": ratio("stream", "LeRobotDataset, DataLoader"),
    }
    return {"batch_size": config.train.batch_size, "steps": steps, "ratios": ratios, "ways": rows}


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = command_line("training", __doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run, e.g. runs/quickstart")
    parser.add_argument("--steps", type=int, default=100, help="timed optimiser steps of a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "training.json", help="JSON to write (default: %(default)s)")
    given = parser.parse_args()
    saved = configuration.read_saved(given.run / "config.json")
    quiet = {"train.validate_every": 0, "train.checkpoint_every": 10**6, "train.steps": 10**6}
    result = measure(override(saved, quiet), given.run, given.steps, given.turns)
    write_result(given.out, {**origin(), **result})
    for row in result["ways"]:
        print(f"{row['way']:32} {row['windows_per_s']:10,.0f} windows/s")
    for name, value in result["ratios"].items():
        print(f"{name:32} {value:10.2f}")


if __name__ == "__main__":
    main()
