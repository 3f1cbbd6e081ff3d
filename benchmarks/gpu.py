"""What a GPU does with the models that it is for: training steps, answers, and how small models keep it busy.

One script of at most `--limit` seconds, by default under six minutes: a row that takes longer than `--row-limit` is given up,
and none begins after the end. The JSON is written after every row and says on which device; the table comes last. Random
weights: speed does not depend on them. On a machine without a GPU `--scale tiny` runs all of it, to see that it runs.

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
from benchmarks.time_limit import at_most
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
ANSWERS_S = 3.0
"""So long at most one level is asked again and again."""
Row = Callable[[], Json]


def tried(row: Row, seconds: float) -> Json:
    """A row, or why there is none: its fault must not take the others with it."""
    began = time.perf_counter()
    try:
        with at_most(seconds):
            found = row()
    except Exception as error:  # noqa: BLE001  (whatever it is)
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    _clear()
    return {**found, "took_s": time.perf_counter() - began}


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
    """Steps of one batch, again and again: milliseconds, arithmetic, memory."""
    quiet = {"train.log_every": 10**6, "train.checkpoint_every": 10**6, "train.validate_every": 0, "train.steps": 10**6}
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
    reading = {name: value for name, value in trainer.row.items() if name in SPEED}
    if profiled:
        _profile(trainer, batch)
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


class Answers:
    """Asks levels of one model, which is made when the first one is asked; the last engine is kept."""

    def __init__(self, scale: Scale, device: torch.device, times: int) -> None:
        self._scale, self._device, self._times = scale, device, times
        self._model: System | None = None
        self._engine: tuple[InferenceEngine, tuple[str, str]] | None = None

    def row(self, level: str, robots: int, precision: str, compiled: str) -> Json:
        """Milliseconds of a level's answer to so many robots, with transfers, without checks."""
        if self._model is None:
            with self._device:
                self._model = paper_system(self._scale).eval()
        if self._engine is None or self._engine[1] != (precision, compiled):
            self._engine = None
            _clear()
            settings = override(self._model.config, {"policy.precision": precision, "policy.compile": compiled}).policy
            self._engine = InferenceEngine(self._model, self._device, settings), (precision, compiled)
        named: Json = {"level": level, "robots": robots, "precision": precision, "compile": compiled}
        return {**named, **asked(self._engine[0], level, question(self._model, level, robots), self._times)}


def asked(engine: InferenceEngine, level: str, given: LevelInput, times: int) -> Json:
    """Milliseconds of so many answers, or of as many as `ANSWERS_S` allows; the first ones are not counted."""
    for _ in range(3):
        engine.answer(level, given)
    taken = list[float]()
    while len(taken) < times and sum(taken) < 1000 * ANSWERS_S:
        began = time.perf_counter()
        engine.answer(level, given)
        taken.append(1000 * (time.perf_counter() - began))
    p50, p99 = np.percentile(taken, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "answers": len(taken)}


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


def rows_of(given: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """What is measured, part by part in the given order: the name of each row, and what makes it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    making = {"train": _training_rows, "answer": _answer_rows, "small": _small_rows}
    for part in given.parts:
        yield from making[part](given, device)


def _training_rows(given: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Row]]:
    for way in given.ways:
        changes = PAPER_WAYS[way] if given.scale != "tiny" else {**PAPER_WAYS[way], "train.batch_size": 4}
        config = paper_config(given.scale, changes)
        said = ", ".join(f"{key.removeprefix('train.')} {value}" for key, value in PAPER_WAYS[way].items())
        make = partial(_with, given.scale)
        yield f"train {given.scale}, {said}", partial(training, make, config, device, given.steps, profiled=given.profile)


def _answer_rows(given: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Row]]:
    with torch.device("meta"):
        levels = [level.name for level in paper_system(given.scale).levels]
    model = Answers(given.scale, device, given.times)
    for precision, compiled in PRECISIONS:
        if device.type != "cuda" and compiled == "graphs":
            continue
        for level in levels:
            for robots in ROBOTS:
                name = f"answer {given.scale}, {level}, {robots} robots, {precision}, {compiled}"
                yield name, partial(model.row, level, robots, precision, compiled)


def _small_rows(given: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Row]]:
    for changes in SMALL_WAYS:
        if device.type != "cuda" and changes["train.graph"] == "step":
            continue
        config = override(preset("quickstart"), {**changes, "ray.use_gpu": device.type == "cuda"})
        name = f"train quickstart, batch {changes['train.batch_size']}, graph {changes['train.graph']}"
        yield name, partial(training, lambda config: make_system(config, QUICK), config, device, 10 * given.steps)


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
        shown = ", ".join(f"{key} {value:.3g}" for key, value in numbers.items())
        lines.append(f"{name:64} {row.get('error', shown)}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = command_line("gpu", __doc__)
    parser.add_argument("--scale", choices=("paper", "small", "tiny"), default="paper", help="shapes (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=("train", "answer", "small"), default=["small", "train", "answer"])
    parser.add_argument("--ways", nargs="*", type=int, default=[0, 1, 3], help="to train, by number (default: 0 1 3)")
    parser.add_argument(
        "--steps", type=int, default=6, help="timed training steps, after as many others (default: %(default)s)"
    )
    parser.add_argument("--times", type=int, default=100, help="timed answers (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=330.0, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("--row-limit", type=float, default=100.0, help="seconds for one row (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json", help="JSON to write (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="also say which kernels a training step's time goes into")
    return parser.parse_args()


now = time.perf_counter
"""Seconds, by which all of it ends."""


def main() -> None:
    """Measure, write the JSON after every row, print the table."""
    given = arguments()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    rows, end = dict[str, Json](), now() + given.limit
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    for name, row in rows_of(given):
        left = end - now()
        found = tried(row, min(left, given.row_limit)) if left > 0 else {"error": f"not begun: {given.limit:.0f} s were over"}
        rows[name] = found
        print_status(table({name: found}))
        write_result(given.out, {**origin(), "device": device, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
