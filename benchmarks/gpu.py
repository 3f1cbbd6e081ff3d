"""What a GPU does with the models that it is for: training steps, answers, and how small models keep it busy.

One script of a few minutes; the table comes last, and the JSON says on which device. Random weights: speed does not depend on
them. On a machine without a GPU `--scale tiny` runs all of it, to see that it runs.

    uv run -m benchmarks.gpu
"""

import argparse
import gc
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.files import RESULTS, command_line, origin, write_result
from benchmarks.paper_shapes import Scale, paper_config, paper_system
from libra_ray.batch import Batch
from libra_ray.common.progress import print_status
from libra_ray.config import Config, override, preset
from libra_ray.inference.engine import InferenceEngine
from libra_ray.inference.tensors import LevelInput
from libra_ray.model.registry import make_system
from libra_ray.model.system import System, SystemInput
from libra_ray.runs.results import SPEED
from libra_ray.training.fit import Trainer
from libra_ray.types import Json, RobotShape

PAPER_WAYS: Sequence[Mapping[str, Any]] = (
    {"train.accumulate": 4},
    {"train.accumulate": 2, "train.checkpointing": "selective"},
    {"train.accumulate": 2, "train.checkpointing": "full"},
    {"train.accumulate": 1, "train.checkpointing": "full"},
    {"train.accumulate": 4, "train.graph": "none"},
    {"train.accumulate": 4, "train.graph": "none", "train.compile": "none"},
)
"""Ways to take a step of 32 windows at paper shapes."""
SMALL_WAYS: Sequence[Mapping[str, Any]] = tuple(
    {"train.batch_size": size, "train.graph": how} for size in (128, 1024) for how in ("step", "none")
)
ROBOTS = (1, 32)
PRECISIONS: Sequence[tuple[str, str]] = (("bf16", "graphs"), ("bf16", "layers"), ("bf16", "none"), ("fp32", "none"))
QUICK = RobotShape(action_dim=4, state_dim=4, cameras=1)


def windows(model: System, size: int) -> Batch:
    """Random windows for a model, in memory from which a GPU fetches them."""
    config, shape, draw = model.config, model.shape, torch.Generator().manual_seed(0)
    side = config.data.image_size
    pictures = (size, shape.cameras * config.data.history, 3, side, side)
    steps = config.action.plan_steps + config.action.horizon
    text = model.tokenise(["open the drawer", "push the button down"][:1] * size)

    def seen() -> torch.Tensor:
        return torch.randint(0, 256, pictures, generator=draw, dtype=torch.uint8)

    batch = Batch(
        plan_images=seen(),
        plan_state=torch.randn(size, shape.state_dim, generator=draw),
        images=seen(),
        state=torch.randn(size, shape.state_dim, generator=draw),
        text=text.ids,
        text_mask=text.mask,
        actions=torch.rand(size, steps, shape.action_dim, generator=draw) * 2 - 1,
        action_mask=torch.ones(size, steps, dtype=torch.bool),
        offset=torch.randint(0, config.action.plan_steps + 1, (size,), generator=draw),
        path=torch.randn(size, config.action.plan_steps, shape.state_dim, generator=draw),
        subgoals=torch.zeros(size, config.hierarchy.subgoals, dtype=torch.long),
        heard_subgoals=torch.zeros(size, config.hierarchy.subgoals, dtype=torch.long),
    )
    return batch.pinned() if torch.cuda.is_available() else batch


def training(
    make: Callable[[Config], System], config: Config, device: torch.device, steps: int, *, profiled: bool = False
) -> Json:
    """Steps of one batch, again and again: milliseconds, arithmetic, memory; or why not."""
    quiet = {"train.log_every": 10**6, "train.checkpoint_every": 10**6, "train.validate_every": 0, "train.steps": 10**6}
    try:
        with device:
            model = make(override(config, quiet))
        weights = sum(weight.numel() for weight in model.parameters())
        batch, trainer = windows(model, config.train.batch_size), Trainer(model, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        _steps(trainer, batch, steps)
        warm = time.perf_counter() - began
        began = time.perf_counter()
        _steps(trainer, batch, steps)
        seconds = (time.perf_counter() - began) / steps
        if profiled:
            _profile(trainer, batch)
        reading = {name: value for name, value in trainer.row.items() if name in SPEED}
    except Exception as error:  # noqa: BLE001  (one row's fault must not take the others with it)
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    found = {
        "weights": weights,
        "step_ms": 1000 * seconds,
        "windows_per_s": config.train.batch_size / seconds,
        "warm_up_s": warm,
    }
    return found | reading


def _steps(trainer: Trainer, batch: Batch, count: int) -> None:
    """So many steps, the last one waited for."""
    until = trainer.step + count
    for _ in trainer.run((batch for _ in range(count + 1)), until=until):
        pass


def _profile(trainer: Trainer, batch: Batch) -> None:
    """Print the kernels of one step by their time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        _steps(trainer, batch, 1)
    print_status(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=70))


def answers(model: System, device: torch.device, times: int) -> Iterator[Json]:
    """Milliseconds of every level's answer, by number of robots and precision, with transfers, without checks."""
    for precision, compiled in PRECISIONS:
        settings = override(model.config, {"policy.precision": precision, "policy.compile": compiled}).policy
        engine = InferenceEngine(model, device, settings)
        for level in model.levels:
            for robots in ROBOTS:
                asked = question(model, level.name, robots)
                for _ in range(3):
                    engine.answer(level.name, asked)
                taken = []
                for _ in range(times):
                    began = time.perf_counter()
                    engine.answer(level.name, asked)
                    taken.append(1000 * (time.perf_counter() - began))
                p50, p99 = np.percentile(taken, [50, 99])
                yield {
                    "level": level.name,
                    "robots": robots,
                    "precision": precision,
                    "compile": compiled,
                    "p50_ms": float(p50),
                    "p99_ms": float(p99),
                }
        del engine
        _clear()


def question(model: System, level: str, robots: int) -> LevelInput:
    """What a level is asked, on the CPU."""
    batch = windows(model, robots)
    asked = model.level(level)
    seen = SystemInput(images=batch.images, state=batch.state, text=model.tokenise(["open the drawer"] * robots))
    above = {}
    if asked.reads is not None:
        spec = model.intents[asked.reads]
        blank = {n: torch.full((robots, *v.shape), v.low, dtype=getattr(torch, v.dtype)) for n, v in spec.items()}
        above = model.aligned(asked, blank, torch.zeros(robots, dtype=torch.long))
    shape = model.noise_shape(level)
    return LevelInput(seen=seen, above=above, noise=None if shape is None else torch.randn(robots, *shape))


def _clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured(given: argparse.Namespace) -> Iterator[tuple[str, Json]]:
    """Part by part, as it is known."""
    scale, parts, steps = given.scale, given.parts, given.steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "train" in parts:
        for way in given.ways:
            changes = PAPER_WAYS[way] if scale != "tiny" else {**PAPER_WAYS[way], "train.batch_size": 4}
            config = paper_config(scale, changes)
            name = f"train {scale}, " + ", ".join(
                f"{key.removeprefix('train.')} {value}" for key, value in PAPER_WAYS[way].items()
            )
            yield name, training(partial(_with, scale), config, device, steps, profiled=given.profile)
            _clear()
    if "answer" in parts:
        with device:
            model = paper_system(scale).eval()
        for row in answers(model, device, given.times):
            yield f"answer {scale}, {row['level']}, {row['robots']} robots, {row['precision']}, {row['compile']}", row
        del model
        _clear()
    if "small" in parts:
        for changes in SMALL_WAYS:
            if device.type != "cuda" and changes["train.graph"] == "step":
                continue
            config = override(preset("quickstart"), {**changes, "ray.use_gpu": device.type == "cuda"})
            name = f"train quickstart, batch {changes['train.batch_size']}, graph {changes['train.graph']}"
            yield name, training(lambda config: make_system(config, QUICK), config, device, 10 * steps)
            _clear()


def _with(scale: Scale, config: Config) -> System:
    """The model of that scale, with further settings of training."""
    model = paper_system(scale)
    model.config = config
    return model


def table(rows: Mapping[str, Json]) -> str:
    """What was measured, one line each."""
    lines = []
    for name, row in rows.items():
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        shown = ", ".join(f"{key} {value:.3g}" for key, value in numbers.items()) or str(row.get("error"))
        lines.append(f"{name:64} {shown}")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = command_line("gpu", __doc__)
    parser.add_argument("--scale", choices=("paper", "small", "tiny"), default="paper", help="shapes (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=("train", "answer", "small"), default=["train", "answer", "small"])
    parser.add_argument("--ways", nargs="*", type=int, default=[0, 1, 3], help="to train, by number (default: 0 1 3)")
    parser.add_argument(
        "--steps", type=int, default=6, help="timed training steps, after as many others (default: %(default)s)"
    )
    parser.add_argument("--times", type=int, default=100, help="timed answers (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json", help="JSON to write (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="also say which kernels a training step's time goes into")
    given: argparse.Namespace = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    rows: dict[str, Json] = {}
    for name, row in measured(given):
        rows[name] = row
        print_status(table({name: row}))
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        write_result(given.out, {**origin(), "device": device, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
