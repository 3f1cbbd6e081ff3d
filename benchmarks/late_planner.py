"""What does a late planner cost? A finished run's policy with its intents late by some control steps, under two rules.

In simulated time, so that the answer does not depend on the machine, on seeds of neither training nor evaluation. Run again,
the same command continues.

    uv run -m benchmarks.late_planner runs/quickstart
"""

from itertools import product
from pathlib import Path

from benchmarks.baseline import evaluate, finished_run
from benchmarks.files import RESULTS, ROOT, command_line, origin, write_result
from benchmarks.results_table import write_between
from libra_ray.config import override
from libra_ray.policy import load_policy
from libra_ray.runs.folder import RunFolder
from libra_ray.types import Json

RULES, DELAYS = ("overlap", "fifo"), (0, 5, 10, 15, 20)
SEED, EPISODES = 400_000, 25
PAGE = ROOT / "docs" / "asynchrony.md"


def measure(run: RunFolder, rule: str, delay: int, episodes: int) -> Json:
    """A cell: success with its interval, and what was held."""
    wanted = {
        "evaluate.controllers": "policy",
        "evaluate.seed": SEED,
        "evaluate.episodes_per_task": episodes,
        "evaluate.videos_per_task": 0,
        "control.rule": rule,
        "delay.intent_steps": delay,
    }
    folder = RunFolder.open(run.path("late") / f"{rule}-{delay}", override(run.config, wanted))
    report = evaluate(folder, load_policy(run.path("checkpoint")))
    low, high = report.success_interval["policy"]
    return {
        "rule": rule,
        "delay_steps": delay,
        "success": report.success_mean["policy"],
        "interval": [low, high],
        "episodes": sum(row.episodes for row in report.tasks),
        "intent_age_p50": report.intent_age_steps.p50,
        "held_share": report.held_actions.share,
    }


def markdown(cells: list[Json]) -> str:
    """A row a rule, a column a delay."""
    lines = ["| rule | " + " | ".join(f"{d} steps late" for d in DELAYS) + " |", "|---" * (len(DELAYS) + 1) + "|"]
    for rule in RULES:
        mine = [cell for cell in cells if cell["rule"] == rule]
        shown = [f"{c['success']:.2f} ({c['interval'][0]:.2f}–{c['interval'][1]:.2f})" for c in mine]
        lines.append(f"| `{rule}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Evaluate, write JSON and page, print the table."""
    parser = command_line("late_planner", __doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run, e.g. runs/quickstart")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="per task and cell (default: %(default)s)")
    given = parser.parse_args()
    run, _ = finished_run(given.run)
    cells = [measure(run, rule, delay, given.episodes) for rule, delay in product(RULES, DELAYS)]
    facts = {"preset": run.config.preset, "train_seed": run.config.train.seed, "seed": SEED}
    write_result(RESULTS / f"late_planner_{run.root.name}.json", {**origin(), **facts, "cells": cells})
    table = markdown(cells)
    if run.root.name == "quickstart":
        write_between(PAGE, "late_planner.py", table)
    print(table)


if __name__ == "__main__":
    main()
