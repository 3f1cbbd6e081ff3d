"""A slow planner in real time: simulated robots at a server whose planner takes so many milliseconds, and the same offline.

Each row is one server. Beside what its robots reached stands what the same policy reaches in simulated time with the latencies
that they met, drawn from their own log (`delay.trace`): whether the two agree shows whether simulated delays can be trusted.

    uv run -m benchmarks.asynchrony_served runs/quickstart
"""

import argparse
import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.asynchrony_page import PAGE
from benchmarks.baseline import evaluate, finished_run
from benchmarks.files import RESULTS, command_line, origin, write_result
from benchmarks.results_table import write_between
from benchmarks.serving_servers import Way, ours
from benchmarks.slow_planner import SLOW_MS
from libra_ray.common.files import write_text
from libra_ray.common.json_text import dump, plain
from libra_ray.common.progress import ProgressBar
from libra_ray.config import override
from libra_ray.fleet.run import DriveResult, LoadSpec, run
from libra_ray.policy import load_policy
from libra_ray.runs.folder import RunFolder
from libra_ray.stats.intervals import percentiles
from libra_ray.types import Json

PLANNER_MS = (0, 25, 50, 100, 200)
SEED = 500_000
START_S = 3.0
"""Of driving that is not counted."""


def served(trained: RunFolder, ms: int, given: argparse.Namespace) -> DriveResult:
    """Robots at a server whose levels above the last take at least `ms`."""
    sim, way = trained.config.sim, Way(serve={SLOW_MS: str(ms)})
    settings = {"rule": given.rule, "control_hz": given.hz}
    with ours(trained.path("checkpoint"), 1, settings, way, "benchmarks.slow_planner:app") as server:
        load = LoadSpec(
            endpoint=f"ws://127.0.0.1:{server.port}",
            robots=given.robots,
            hz=given.hz,
            seconds=given.seconds,
            warmup_s=START_S,
            family=sim.family,
            tasks=sim.tasks,
            max_steps=sim.max_steps,
            seed=SEED,
        )
        with ProgressBar(f"{ms} ms", round(START_S + given.seconds), "s") as bar:
            return asyncio.run(run(load, None, lambda seconds: bar.to(min(bar.total, round(seconds)))))


def row(trained: RunFolder, ms: int, given: argparse.Namespace) -> Json:
    """A row: what robots reached and met, and what is reached offline under the same latencies."""
    result = served(trained, ms, given)
    trace = trained.path("served") / f"{given.hz:g}-{ms}.json"
    trace.parent.mkdir(exist_ok=True)
    write_text(trace, dump(result))
    wanted = {
        "evaluate.controllers": "policy",
        "evaluate.seed": SEED,
        "evaluate.episodes_per_task": given.episodes,
        "evaluate.videos_per_task": 0,
        "control.rule": given.rule,
        "delay.trace": str(trace),
        # Its robots move as slowly as those of the server did.
        "delay.control_hz": given.hz,
    }
    root = trained.path("served") / f"offline-{given.hz:g}-{ms}"
    # What was evaluated before met the latencies of an earlier run.
    shutil.rmtree(root, ignore_errors=True)
    folder = RunFolder.open(root, override(trained.config, wanted))
    report = evaluate(folder, load_policy(trained.path("checkpoint")))
    done = result.actions_per_s * result.seconds + result.held_actions
    held = result.held_actions - result.awaited_actions
    *_, last = result.level_latencies_ms
    return {
        "planner_ms": ms,
        "control_hz": given.hz,
        "robots": given.robots,
        "success": result.success.rate,
        "interval": result.success.interval,
        "episodes": result.success.episodes,
        "held_share": held / done if done else None,
        "awaited_share": result.awaited_actions / done if done else None,
        "offline_held_share": report.held_actions.share,
        "missed_share": result.deadlines.share,
        "intent_ms": {name: percentiles(found) for name, found in result.level_latencies_ms.items() if name != last},
        "intent_age_steps": result.intent_age_steps,
        "offline": report.success_mean["policy"],
        "offline_interval": report.success_interval["policy"],
        "offline_episodes": sum(task.episodes for task in report.tasks),
        "driver_cpu_share": result.driver_cpu_share,
    }


def markdown(rows: Sequence[Json]) -> str:
    """A row a server."""
    names = (
        "planner, ms",
        "picture to plan, ms (p50/p95)",
        "in steps",
        "served",
        "offline, same latencies",
        "held",
        "held at first",
    )
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for found in rows:
        marks = next(iter(found["intent_ms"].values()))
        steps = marks["p95"] * found["control_hz"] / 1000
        served = _rate(found["success"], found["interval"], found["episodes"])
        offline = _rate(found["offline"], found["offline_interval"], found["offline_episodes"])
        lines.append(
            f"| {found['planner_ms']} | {marks['p50']:.0f}/{marks['p95']:.0f} | {steps:.1f} | {served} | {offline} | "
            f"{found['held_share']:.2%} | {found['awaited_share']:.2%} |"
        )
    return "\n".join(lines)


def _rate(rate: float | None, interval: Sequence[float] | None, episodes: int) -> str:
    return "–" if rate is None or interval is None else f"{rate:.2f} ({interval[0]:.2f}–{interval[1]:.2f}), {episodes} episodes"


def main() -> None:
    """Measure row by row, write JSON and page, print the table."""
    parser = command_line("asynchrony_served", __doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run, e.g. runs/quickstart")
    parser.add_argument("--ms", type=int, nargs="+", default=PLANNER_MS, help="of the planner (default: 0 25 50 100 200)")
    parser.add_argument("--hz", type=float, default=20.0, help="control rate of the robots (default: %(default)s)")
    parser.add_argument("--robots", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, help="measured time of a row (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=25, help="offline, per task (default: %(default)s)")
    parser.add_argument("--rule", default="overlap", help="when a new intent is asked for (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "asynchrony_served.json", help="JSON to write")
    given = parser.parse_args()
    trained, _ = finished_run(given.run)
    rows: list[Json] = []
    for ms in given.ms:
        rows.append(row(trained, ms, given))
        settings = {"preset": trained.config.preset, "rule": given.rule, "seconds": given.seconds, "seed": SEED}
        write_result(given.out, {**origin(), **settings, "rows": rows})
    table = markdown([plain(found) for found in rows])
    if given.out.parent.resolve() == RESULTS:
        write_between(PAGE, "asynchrony_served.py", table)
    print(table)


if __name__ == "__main__":
    main()
