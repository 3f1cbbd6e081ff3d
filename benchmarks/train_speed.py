"""What makes a training step fast on a CPU? Samples per second of the real training loop, one thing changed at a time.

uv run -m benchmarks.train_speed runs/mt10
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.files import RESULTS, command_line, origin, write_result
from libra_ray import config as configuration
from libra_ray.common.progress import ProgressBar
from libra_ray.config import Config, override
from libra_ray.data.windows import Windows
from libra_ray.model.parts import attention as layers
from libra_ray.training.data import TrainingData
from libra_ray.training.fit import Trainer
from libra_ray.types import Json

WARM_UP = 20


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train.

    Attributes:
        changes: of the run's settings.
        second_pool: the thread that gathers batches also computes with torch, which opens a pool of threads of its own.
        fused: attention by torch's fused kernel, as on a GPU.
    """

    name: str
    threads: int
    changes: dict[str, Any] = field(default_factory=dict)
    second_pool: bool = False
    fused: bool = False


def ways(cpus: int) -> Sequence[Way]:
    """From the slowest to what is done, and beside it."""
    small, large = {"train.batch_size": 64}, {"train.batch_size": 128}
    return (
        Way(name="64 windows, gathered by torch, fused attention", threads=cpus, changes=small, second_pool=True, fused=True),
        Way(name="the same with one thread", threads=1, changes=small, second_pool=True, fused=True),
        Way(name="64 windows, gathered by numpy, fused attention", threads=cpus, changes=small, fused=True),
        Way(name="64 windows, gathered by numpy, plain products", threads=cpus, changes=small),
        Way(name="128 windows, gathered by numpy, plain products", threads=cpus, changes=large),
        Way(name="the same in fp32", threads=cpus, changes=large | {"train.precision": "fp32"}),
    )


@contextmanager
def as_told(way: Way) -> Iterator[None]:
    """Torch's threads, attention's kernel and the gathering thread, for a while."""
    gather, threads = Windows.batch, torch.get_num_threads()

    def computing(self: Windows, *given: Any) -> Any:
        torch.zeros(1 << 16).add_(1)
        return gather(self, *given)

    few = patch.object(layers, "FEW", 0 if way.fused else layers.FEW)
    gathering = patch.object(Windows, "batch", computing if way.second_pool else gather)
    torch.set_num_threads(way.threads)
    try:
        with few, gathering:
            yield
    finally:
        torch.set_num_threads(threads)


def measure(way: Way, base: Config, run: Path, steps: int) -> Json:
    """Samples per second over some steps after the first few."""
    config = override(base, {**way.changes, "train.validate_every": 0})
    data = TrainingData.open(config, run / "dataset", run / "frames")
    torch.manual_seed(0)
    model = data.make_model()
    trainer = Trainer(model, device=torch.device("cpu"))
    with as_told(way), data.stream(model, rank=0, world=1, start_step=0) as batches:
        for batch in islice(batches, WARM_UP):
            trainer._optimise(batch)  # noqa: SLF001  (a step without its log)
        began = time.perf_counter()
        for batch in islice(batches, steps):
            trainer._optimise(batch)  # noqa: SLF001
        seconds = time.perf_counter() - began
    samples = steps * config.train.batch_size / seconds
    return {"way": way.name, "threads": way.threads, "step_ms": 1000 * seconds / steps, "samples_per_s": samples}


def main() -> None:
    """Measure every way in turns, write the JSON, print the table."""
    parser = command_line("train_speed", __doc__)
    parser.add_argument("run", type=Path, help="folder of a run that has recorded, e.g. runs/mt10")
    parser.add_argument("--steps", type=int, default=60, help="steps measured of each way and turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="the fastest turn of each counts (default: %(default)s)")
    given = parser.parse_args()
    config = configuration.from_json((given.run / "config.json").read_text(encoding="utf-8"))
    every = ways(os.cpu_count() or 1)
    best: dict[str, Json] = {}
    with ProgressBar("train speed", given.turns * len(every), "measures") as bar:
        for _ in range(given.turns):
            for way in every:
                found = measure(way, config, given.run.resolve(), given.steps)
                best[way.name] = max(best.get(way.name, found), found, key=lambda row: row["samples_per_s"])
                bar.to(bar.count + 1)
    rows = list(best.values())
    write_result(RESULTS / "train_speed.json", {"preset": config.preset, **origin(), "rows": rows})
    print("| way | threads | ms a step | samples/s |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['way']} | {row['threads']} | {row['step_ms']:.0f} | {row['samples_per_s']:.0f} |")


if __name__ == "__main__":
    main()
