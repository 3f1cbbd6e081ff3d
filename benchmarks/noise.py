"""Is the noise that the refiner starts from worth anything? A finished run's policy with it and from the mean.

On the tasks where the run is weakest, and on seeds of neither its training nor its evaluation: what is chosen here must be
judged elsewhere. Run again, the same command continues.

    uv run benchmarks/noise.py runs/mt10
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from results_table import RESULTS

from libra_ray import checkpoint
from libra_ray import config as configuration
from libra_ray.config import Config, override
from libra_ray.intervals import wilson
from libra_ray.on_ray import evaluate as evaluation
from libra_ray.on_ray.evaluation_log import read_evaluation
from libra_ray.on_ray.session import connected
from libra_ray.policy import LibraPolicy
from libra_ray.provenance import describe_hardware, git_revision
from libra_ray.results import dump
from libra_ray.run_folder import RunFolder, write_text
from libra_ray.types import EpisodeResult, Json

TASKS = ("push-v3", "pick-place-v3", "peg-insert-side-v3", "door-open-v3")
SCALES = (1.0, 0.0)
SEED, EPISODES = 300_000, 100


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A scale of the starting noise and what the policy came to with it."""

    sample_noise: float
    results: Sequence[EpisodeResult]

    def rows(self) -> list[Json]:
        """A row per task, and one over all of them."""
        tasks = sorted({result.task for result in self.results})
        return [self._row(task, [r for r in self.results if r.task == task]) for task in tasks] + [
            self._row("all", self.results)
        ]

    def _row(self, task: str, results: Sequence[EpisodeResult]) -> Json:
        successes = sum(result.success and result.error is None for result in results)
        found = wilson(successes, len(results))
        interval = [found.low, found.high] if found else None
        counted = {"episodes": len(results), "successes": successes, "success": successes / len(results)}
        return {"sample_noise": self.sample_noise, "task": task, **counted, "interval": interval}


def measure(run: Path, trained: Config, scale: float, episodes: int) -> Cell:
    """The run's policy with its starting noise scaled."""
    wanted = {
        "sim.tasks": TASKS,
        "evaluate.controllers": ("policy",),
        "evaluate.seed": SEED,
        "evaluate.episodes_per_task": episodes,
        "evaluate.videos_per_task": 0,
        "refiner.sample_noise": scale,
    }
    folder = RunFolder.open(run / "noise" / f"{scale:g}", override(trained, wanted))
    source = checkpoint.load(run / "checkpoint")
    policy = LibraPolicy(replace(source, config=override(source.config, {"refiner.sample_noise": scale})))
    if not folder.done("evaluate"):
        with folder.stage("evaluate") as clock:
            evaluation.evaluate(folder, clock, lambda *_: (policy, folder.config))
    return Cell(sample_noise=scale, results=read_evaluation(folder).results)


def main() -> None:
    """Evaluate, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run, e.g. runs/mt10")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="per task and scale (default: %(default)s)")
    given = parser.parse_args()
    trained = configuration.from_json((given.run / "config.json").read_text())
    with connected():
        cells = [measure(given.run.resolve(), trained, scale, given.episodes) for scale in SCALES]
    rows = [row for cell in cells for row in cell.rows()]
    found = {"hardware": describe_hardware(), "git_revision": git_revision(), "seed": SEED, "rows": rows}
    write_text(RESULTS / f"noise_{given.run.resolve().name}.json", dump(found))
    print("| starting noise | task | success |\n|---|---|---|")
    for row in rows:
        low, high = row["interval"]
        print(f"| {row['sample_noise']:g} | {row['task']} | {row['success']:.2f} ({low:.2f}–{high:.2f}) |")


if __name__ == "__main__":
    main()
