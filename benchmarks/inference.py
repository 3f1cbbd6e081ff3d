"""How are a policy's networks run fastest? Every level by each way, whole and without what goes before it.

uv run -m benchmarks.inference [runs/quickstart/checkpoint] [--device cuda]

`infer` is `Policy.infer`, from observations to answers; `level` the engine's part of it: the way to the device, the networks
and the way back. Without a checkpoint the quickstart's networks are measured with random weights.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.files import RESULTS, command_line, origin, write_result
from libra_ray import checkpoint as checkpoints
from libra_ray.common.progress import ProgressBar
from libra_ray.config import preset
from libra_ray.data.transforms import NormStats, VectorStats
from libra_ray.model.registry import make_system
from libra_ray.policy import SystemPolicy, load_policy
from libra_ray.types import IMAGE_KEY, Intent, Json, RobotShape

SHAPE = RobotShape(action_dim=4, state_dim=4, cameras=1)
WARM, CALLS, LONGEST_S = 3, 200, 2.0
"""Something is called so often, or for so long."""
UNIT = {"low": -1, "high": 1, "q01": -1, "q99": 1, "mean": 0, "std": 1}
"""Statistics of what is normalised already."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """Settings of `PolicyConfig`."""

    precision: str
    compile: str

    @property
    def changes(self) -> dict[str, str]:
        """For `load_policy`."""
        return {"policy.precision": self.precision, "policy.compile": self.compile}


def ways(device: str) -> Sequence[Way]:
    """Those that there are on a device."""
    compiled = ("none", "graphs", "inductor") if device == "cuda" else ("none", "inductor")
    return [Way(precision=precision, compile=how) for how in compiled for precision in ("fp32", "bf16")]


def timed(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of repeated calls: their median and 99th percentile. The first ones are not counted."""
    for _ in range(WARM):
        call()
    ms: list[float] = []
    while len(ms) < CALLS and (len(ms) < WARM or sum(ms) < 1000 * LONGEST_S):
        began = time.perf_counter()
        call()
        ms.append(1000 * (time.perf_counter() - began))
    p50, p99 = map(float, np.percentile(ms, (50, 99)))
    return {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3), "calls": len(ms)}


def measured(policy: SystemPolicy, batches: Sequence[int]) -> Iterator[Json]:
    """A row for every level and size of batch, each level with the intents of that which it reads."""
    seen, intents = policy.blank(), dict[str | None, Intent | None]({None: None})
    for level in policy.levels:
        above = intents[level.reads]
        [answer] = policy.infer(level.name, [seen], [above])
        intents[level.name] = answer if isinstance(answer, Intent) else None
        for robots in batches:
            given = [seen] * robots, [above] * robots
            began = time.perf_counter()
            policy.infer(level.name, *given)
            first_s = time.perf_counter() - began
            asked = policy.asked(level.name, *given)
            whole = timed(partial(policy.infer, level.name, *given))
            bare = timed(partial(policy.engine.answer, level.name, asked))
            yield {"level": level.name, "robots": robots, "first_s": round(first_s, 3), "infer": whole, "level_call": bare}


def untrained(folder: Path) -> Path:
    """A checkpoint of the quickstart's networks with random weights."""
    torch.manual_seed(0)
    model = make_system(preset("quickstart"), SHAPE)
    state, action = (
        VectorStats(**{name: np.full(dims, value, np.float32) for name, value in UNIT.items()})
        for dims in (SHAPE.state_dim, SHAPE.action_dim)
    )
    stats = NormStats(state=state, action=action)
    spec = checkpoints.DatasetSpec(shape=SHAPE, image_keys=(IMAGE_KEY,), control_hz=10, instructions=("open the drawer",))
    checkpoints.save(folder, model, model.state_dict(), stats, spec, step=0)
    return folder


def main() -> None:
    """Measure every way, write the JSON, print the table."""
    parser = command_line("inference", __doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="its folder (default: the quickstart's networks, untrained)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it computes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of one call on a CPU, as a replica's (default: %(default)s)")
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 16], help="in one call (default: 1 16)")
    parser.add_argument("--compile", nargs="+", default=None, help="ways of policy.compile (default: all there are)")
    parser.add_argument("--out", type=Path, help="the JSON (default: benchmarks/results/inference_DEVICE.json)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    every, rows = [way for way in ways(given.device) if way.compile in (given.compile or (way.compile,))], list[Json]()
    with tempfile.TemporaryDirectory() as place, ProgressBar("inference", len(every), "ways") as bar:
        folder = given.checkpoint or untrained(Path(place) / "checkpoint")
        for way in every:
            policy = load_policy(folder, given.device, changes=way.changes)
            rows += [{"precision": way.precision, "compile": way.compile, **row} for row in measured(policy, given.robots)]
            bar.to(bar.count + 1)
    result = {"device": given.device, "threads": given.threads, **origin(), "rows": rows}
    write_result(given.out or RESULTS / f"inference_{given.device}.json", result)
    print("| precision | compile | level | robots | infer p50, p99 ms | level alone p50, p99 ms | first call s |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        pairs = [f"{row[of]['p50_ms']:.2f}, {row[of]['p99_ms']:.2f}" for of in ("infer", "level_call")]
        print("|", " | ".join(str(row[name]) for name in ("precision", "compile", "level", "robots")), end=" | ")
        print(" | ".join([*pairs, str(row["first_s"])]), "|")


if __name__ == "__main__":
    main()
