"""The main job's results as tables, made from the committed JSON: in short for the README, whole for docs/results.md.

`uv run -m benchmarks.results_table` writes both between their markers; with runs, as in
`uv run -m benchmarks.results_table runs/quickstart`, it first takes their `report.json` into `benchmarks/results/`.
A baseline's row comes from `benchmarks/baseline.py` (`benchmarks/results/baseline_<preset>.json`).
"""

from dataclasses import replace
from pathlib import Path

from benchmarks.baseline_table import Comparison
from benchmarks.files import RESULTS, ROOT, command_line, write_result
from libra_ray.common.files import write_text
from libra_ray.common.json_text import read
from libra_ray.report.records import Measured, Report, TaskRow
from libra_ray.stats.intervals import Percentiles

BEGIN, END = "<!-- results: written by benchmarks/{} -->", "<!-- /results -->"
"""Between these lines a page shows what a script has written."""
MEASURED = ("quickstart", "mt10")
COLUMNS = {"expert": "expert", "policy": "**dual system**", "coarse_only": "coarse only", "zero_action": "zero action"}


def take(run: Path, measured: Measured | None = None) -> Path:
    """Copy a finished run's report into the results, with what was measured of it from outside.

    Raises:
        ValueError: it is none; names the file and the field.
    """
    report = read(Report, run / "report.json")
    target = RESULTS / f"{report.preset}.json"
    write_result(target, replace(report, measured=measured or report.measured))
    return target


def section(preset: str) -> str:
    """One preset's table and facts as Markdown; empty where nothing has been measured."""
    report, baseline = _report(preset), _baseline(preset)
    if report is None:
        return ""
    rows = _rows(report, baseline)
    names = [*COLUMNS.values(), *(["plain behaviour cloning"] if baseline else [])]
    lines = [
        f"**`{preset}`**: {_facts(report)}",
        "",
        f"| task | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        *rows,
    ]
    return "\n".join(lines)


def document() -> str:
    """Every preset's table, for docs/results.md."""
    return "\n\n".join(text for text in map(section, MEASURED) if text)


def summary() -> str:
    """One line a preset, for the README."""
    names = [*COLUMNS.values(), "plain behaviour cloning", "wall time"]
    rows = [_summary_row(preset) for preset in MEASURED if (RESULTS / f"{preset}.json").exists()]
    return "\n".join([f"| preset | {' | '.join(names)} |", f"|---|{'---|' * len(names)}", *rows])


def write_pages() -> None:
    """Put the tables into their pages."""
    write_between(ROOT / "README.md", Path(__file__).name, summary())
    write_between(ROOT / "docs" / "results.md", Path(__file__).name, document())


def write_between(page: Path, script: str, text: str) -> None:
    """Replace what `script` has written into a page."""
    begin = BEGIN.format(script)
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    if not found:
        raise ValueError(f"{page.name} has no line {begin}")
    write_text(page, f"{before}{begin}\n\n{text.strip()}\n\n{END}{rest.partition(END)[2]}")


def read_between(page: Path, script: str) -> str:
    """What `script` has written into a page."""
    return page.read_text(encoding="utf-8").partition(BEGIN.format(script))[2].partition(END)[0].strip()


def _report(preset: str) -> Report | None:
    path = RESULTS / f"{preset}.json"
    return read(Report, path) if path.exists() else None


def _baseline(preset: str) -> Comparison | None:
    path = RESULTS / f"baseline_{preset}.json"
    return read(Comparison, path) if path.exists() else None


def _summary_row(preset: str) -> str:
    report, baseline = _report(preset), _baseline(preset)
    assert report is not None
    cells = [_mean(report, controller) for controller in COLUMNS]
    cells += [_mean(baseline, "baseline") if baseline else "–", _minutes(report.wall_s.total)]
    return f"| `{preset}` | {' | '.join(cells)} |"


def _mean(report: Report | Comparison, controller: str) -> str:
    low, high = report.success_interval[controller]
    return f"{report.success_mean[controller]:.2f} ({low:.2f}–{high:.2f})"


def _rows(report: Report, baseline: Comparison | None) -> list[str]:
    tasks = dict.fromkeys(row.task for row in report.tasks)
    cells = {(row.task, row.controller): row for row in report.tasks}
    other = {row.task: row for row in baseline.tasks if row.controller == "baseline"} if baseline else {}
    lines = []
    for task in tasks:
        found = [_cell(cells.get((task, controller))) for controller in COLUMNS]
        found += [_cell(other.get(task))] if baseline else []
        lines.append(f"| {task} | {' | '.join(found)} |")
    means = [f"{report.success_mean[controller]:.2f}" for controller in COLUMNS]
    means += [f"{sum(row.success for row in other.values()) / len(other):.2f}"] if other else []
    return [*lines, f"| **mean** | {' | '.join(means)} |"]


def _cell(row: TaskRow | None) -> str:
    if row is None:
        return "–"
    low, high = row.interval
    return f"{row.success:.2f} ({low:.2f}–{high:.2f})"


def _facts(report: Report) -> str:
    wall, hardware, age = report.wall_s, report.hardware, report.intent_age_steps
    episodes = {row.episodes for row in report.tasks}
    latencies = ", ".join(f"{level} {_percentiles(latency)} ms" for level, latency in report.latency_ms.items())
    return (
        f"{report.dataset.episodes} demonstrations, {report.checkpoint.step:,} optimiser steps, "
        f"{'/'.join(map(str, sorted(episodes)))} unseen seeds per task; {_minutes(wall.total)} in all "
        f"(record {_minutes(wall.record)}, train {_minutes(wall.train)}, evaluate {_minutes(wall.evaluate)}) on "
        f"{hardware.cores} cores of {hardware.cpu}, no GPU{_memory(report)}; "
        f"training {report.throughput.train_samples_per_s:.0f} samples/s with "
        f"{100 * (report.throughput.data_wait_share or 0):.1f} % of the time waiting for data; "
        f"latency p50/p95/p99 {latencies}; intent age p50/p99 {age.p50:.0f}/{age.p99:.0f} control steps."
    )


def _memory(report: Report) -> str:
    return f", at most {report.measured.peak_memory_gb:.1f} GiB of memory" if report.measured else ""


def _percentiles(latency: Percentiles) -> str:
    return f"{latency.p50:.0f}/{latency.p95:.0f}/{latency.p99:.0f}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def main() -> None:
    """Take the given runs and write the pages."""
    parser = command_line("results_table", __doc__)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs, e.g. runs/quickstart")
    for run in parser.parse_args().runs:
        print(f"took {take(run).name}")
    write_pages()
    print(document())


if __name__ == "__main__":
    main()
