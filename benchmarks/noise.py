"""Is the noise that the refiner starts from worth anything? A finished run's policy with it and from the mean.

On the tasks where the run is weakest, and on seeds of neither its training nor its evaluation: what is chosen here must be
judged elsewhere. Run again, the same command continues.

    uv run -m benchmarks.noise runs/mt10
"""

from dataclasses import replace
from pathlib import Path

from benchmarks.baseline import evaluate
from benchmarks.files import RESULTS, command_line, origin, write_result
from libra_ray import config as configuration
from libra_ray.common.json_text import plain
from libra_ray.config import Config, override
from libra_ray.model.parts.refiner import Refiner
from libra_ray.policy import SystemPolicy, load_policy
from libra_ray.report.records import Report
from libra_ray.runs.folder import RunFolder
from libra_ray.types import Json

TASKS = ("push-v3", "pick-place-v3", "peg-insert-side-v3", "door-open-v3")
SCALES = (1.0, 0.0)
SEED, EPISODES = 300_000, 100


def measure(run: Path, trained: Config, scale: float, episodes: int) -> Report:
    """The report on the run's policy with its starting noise scaled."""
    wanted = {
        "sim.tasks": TASKS,
        "evaluate.controllers": ("policy",),
        "evaluate.seed": SEED,
        "evaluate.episodes_per_task": episodes,
        "evaluate.videos_per_task": 0,
        "refiner.sample_noise": scale,
    }
    folder = RunFolder.open(run / "noise" / f"{scale:g}", override(trained, wanted))
    return evaluate(folder, with_noise(run / "checkpoint", scale))


def with_noise(checkpoint: Path, scale: float) -> SystemPolicy:
    """The policy of a checkpoint with its starting noise scaled."""
    policy = load_policy(checkpoint)
    refiner = policy.model.parts()["refiner"]
    assert isinstance(refiner, Refiner), "other systems have no noise to scale"
    refiner.config = replace(refiner.config, sample_noise=scale)
    return policy


def rows(scale: float, report: Report) -> list[Json]:
    """A row of the JSON per task, and one over all of them."""
    pooled = {"task": "all", "success": report.success_mean["policy"], "interval": report.success_interval["policy"]}
    return [{"sample_noise": scale} | row for row in [*map(plain, report.tasks), pooled]]


def main() -> None:
    """Evaluate, write the JSON, print the table."""
    parser = command_line("noise", __doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run, e.g. runs/mt10")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="per task and scale (default: %(default)s)")
    given = parser.parse_args()
    run = given.run.resolve()
    trained = configuration.from_json((run / "config.json").read_text(encoding="utf-8"))
    found = [row for scale in SCALES for row in rows(scale, measure(run, trained, scale, given.episodes))]
    write_result(RESULTS / f"noise_{run.name}.json", {**origin(), "seed": SEED, "rows": found})
    print("| starting noise | task | success |\n|---|---|---|")
    for row in found:
        low, high = row["interval"]
        print(f"| {row['sample_noise']:g} | {row['task']} | {row['success']:.2f} ({low:.2f}–{high:.2f}) |")


if __name__ == "__main__":
    main()
