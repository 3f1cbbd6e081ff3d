"""The dual system and the plain network beside each other: what `baseline_<run>.json` holds, and its table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from libra_ray.common.provenance import Hardware
from libra_ray.report.records import Bounds, Report, TaskRow


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two policies on the same tasks and seeds, `policy` and `baseline`; everything by their names."""

    preset: str
    created_at: str
    git_revision: str | None
    hardware: Hardware
    seeds: Mapping[str, int]
    tasks: Sequence[TaskRow]
    success_mean: Mapping[str, float]
    success_interval: Mapping[str, Bounds]
    training: Mapping[str, Mapping[str, float | str]]


def beside(ours: Report, theirs: Report, training: Mapping[str, Mapping[str, float | str]]) -> Comparison:
    """The `policy` rows of two reports, as `policy` and `baseline`, with seeds, machine and revision."""
    sides = {"policy": ours, "baseline": theirs}
    return Comparison(
        preset=theirs.preset,
        created_at=theirs.created_at,
        git_revision=theirs.git_revision,
        hardware=theirs.hardware,
        seeds={name: theirs.config[name] for name in ("train.seed", "evaluate.seed", "evaluate.episodes_per_task")},
        tasks=[replace(r, controller=name) for name, side in sides.items() for r in side.tasks if r.controller == "policy"],
        success_mean={name: side.success_mean["policy"] for name, side in sides.items()},
        success_interval={name: side.success_interval["policy"] for name, side in sides.items()},
        training=training,
    )


def markdown(result: Comparison) -> str:
    """The result as a table: success rates with Wilson 95 % intervals, pooled over the tasks beside the mean."""

    def cell(success: float, interval: Sequence[float]) -> str:
        return f"{success:.2f} ({interval[0]:.2f}–{interval[1]:.2f})"

    lines = ["| task | dual system | plain behaviour cloning |", "|---|---|---|"]
    for task in dict.fromkeys(row.task for row in result.tasks):
        cells = {row.controller: cell(row.success, row.interval) for row in result.tasks if row.task == task}
        lines.append(f"| {task} | {cells['policy']} | {cells['baseline']} |")
    means = [cell(result.success_mean[name], result.success_interval[name]) for name in ("policy", "baseline")]
    return "\n".join([*lines, f"| **mean** | {' | '.join(means)} |"])
