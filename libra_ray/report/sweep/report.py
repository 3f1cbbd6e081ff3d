"""What a sweep leaves for people: `sweep.json`, the table, and one page."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from libra_ray.common.files import write_text
from libra_ray.common.json_text import dump, plain
from libra_ray.common.provenance import Hardware, git_revision, public_config
from libra_ray.config import Config
from libra_ray.report.page import duration, page_environment
from libra_ray.report.sweep.plots import BINS, Curve, granularity_plot, importance_plot, pareto_plot
from libra_ray.report.sweep.records import ConfigurationRow, CurveRow, SweepReport, TrialCounts
from libra_ray.runs.trials import (
    PLAN_RESOLVED,
    VARIANCE_EXPLAINED,
    Configuration,
    Settings,
    TrialResult,
    best,
    configurations,
    pareto_front,
)
from libra_ray.stats.granularity_peak import Estimate, Peak, estimate_peak

Importance = Mapping[str, Mapping[str, float]]


def build_sweep(
    *,
    config: Config,
    space: Mapping[str, str],
    settings: Settings,
    trials: Sequence[TrialResult],
    objectives: Sequence[str],
    importance: Importance,
    wall_s: float,
    hardware: Hardware,
    mlflow_run_id: str | None,
) -> SweepReport:
    """What a sweep found; see `SweepReport` for what it is given."""
    found = configurations(trials)
    chosen = best(found)
    return SweepReport(
        preset=config.preset,
        space=space,
        settings=settings,
        objectives=objectives,
        counts=TrialCounts(
            planned=settings.trials * settings.seeds,
            finished=sum(t.status == "finished" for t in trials),
            stopped=sum(t.status == "stopped" for t in trials),
            failed=sum(t.status == "failed" for t in trials),
        ),
        best=chosen.number if chosen else None,
        configurations=[configuration_row(c) for c in found],
        front=front(found) if "latency_ms" in objectives else [],
        importance=importance,
        curves=[curve_row(curve) for curve in curves(found)],
        trials=trials,
        wall_s=round(wall_s, 2),
        hardware=hardware,
        git_revision=git_revision(),
        mlflow_run_id=mlflow_run_id,
        config=plain(public_config(config)),
    )


def configuration_row(found: Configuration) -> ConfigurationRow:
    """One configuration over its seeds."""
    measures = sorted({name for trial in found.finished for name in trial.measures})
    return ConfigurationRow(
        number=found.number,
        values=found.values,
        success=found.success,
        interval=found.interval,
        latency_ms=found.latency_ms,
        seeds=[trial.seed for trial in found.finished],
        stopped=found.count("stopped"),
        failed=found.count("failed"),
        errors=list(dict.fromkeys(trial.error for trial in found.trials if trial.error)),
        measures={name: found.measure(name) for name in measures},
    )


def front(found: Sequence[Configuration]) -> list[int]:
    """Numbers of the configurations that none beats in both success and latency."""
    known = [c for c in found if c.success is not None and c.latency_ms is not None]
    points = np.array([[c.success, -(c.latency_ms or 0.0)] for c in known], dtype=np.float64).reshape(-1, 2)
    return [known[index].number for index in pareto_front(points)]


def curves(found: Sequence[Configuration]) -> list[Curve]:
    """Success over N, a curve for every combination of the other values that has at least two N; the longest first."""
    groups: dict[str, list[Configuration]] = {}
    for c in found:
        if BINS in c.values and c.success is not None:
            groups.setdefault(_words({n: v for n, v in c.values.items() if n != BINS}), []).append(c)
    lines = []
    for label, points in groups.items():
        by_n = {int(c.values[BINS]): c for c in sorted(points, key=lambda c: -c.number)}
        if len(by_n) > 1:
            ordered = [by_n[n] for n in sorted(by_n)]
            lines.append(Curve(label=label if len(groups) > 1 else "", points=ordered, peak=peak_of(ordered)))
    return sorted(lines, key=lambda curve: -len(curve.points))


def peak_of(points: Sequence[Configuration]) -> Peak | None:
    """The peak over N of configurations that differ in nothing else; None for fewer than three."""
    cells = {int(c.values[BINS]): [t.outcomes(c.controller) for t in c.finished] for c in points if c.finished}
    return estimate_peak(cells) if len(cells) > 2 else None


def curve_row(curve: Curve) -> CurveRow:
    """A curve with its peak; its points by their numbers."""
    return CurveRow(label=curve.label, bins=curve.bins, numbers=[point.number for point in curve.points], peak=curve.peak)


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.split('.')[-1]} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def sweep_table(report: SweepReport, width: int | None = None) -> str:
    """The configurations, best first, then what failed and where the peak is, as plain text.

    Args:
        width: columns of the terminal; by default wide enough that no cell is broken.
    """
    names = list(report.space)
    measures = [(PLAN_RESOLVED, "plan resolved"), (VARIANCE_EXPLAINED, "variance explained")]
    heads = [
        "#",
        *(name.split(".")[-1] for name in names),
        "success",
        "95 %",
        "ms/step",
        *(head for _, head in measures),
        "seeds",
        "notes",
    ]
    table = Table(*heads, title=f"{report.preset}: configurations by success", title_justify="left")
    for row in _best_first(report.configurations):
        interval = f"{row.interval[0]:.2f}–{row.interval[1]:.2f}" if row.interval else "–"
        shown = [_cell(row.measures.get(name)) for name, _ in measures]
        notes = [f"{count} {word}" for word, count in (("stopped", row.stopped), ("failed", row.failed)) if count]
        notes += ["best"] if row.number == report.best else []
        notes += ["front"] if row.number in report.front else []
        values = [_short(row.values.get(name, "–")) for name in names]
        cells = [_cell(row.success), interval, _cell(row.latency_ms), *shown, str(len(row.seeds)), ", ".join(notes)]
        table.add_row(str(row.number), *values, *cells)
    text = io.StringIO()
    Console(file=text, width=width or 100 + 14 * len(names), color_system=None).print(table)
    return text.getvalue() + "\n".join(facts(report)) + "\n"


def _best_first(rows: Sequence[ConfigurationRow]) -> list[ConfigurationRow]:
    return sorted(rows, key=lambda row: (row.success is None, -(row.success or 0), row.number))


def facts(report: SweepReport) -> list[str]:
    """What the sweep says in sentences."""
    ended = {name: count for name, count in vars(report.counts).items() if name != "planned" and count}
    words = ", ".join(f"{count} {name}" for name, count in ended.items()) or "none"
    lines = [f"trials: {report.counts.planned} planned, {words}; {duration(report.wall_s)}"]
    failed = [(row.number, error) for row in report.configurations for error in row.errors]
    lines += [f"configuration {number} failed: {' '.join(error.split())[:160]}" for number, error in failed]
    for curve in report.curves:
        if curve.peak:
            lines.append(peak_words(curve.peak) + (f" ({curve.label})" if curve.label else ""))
    return lines


def peak_words(peak: Peak) -> str:
    """The peak and both contrasts in one sentence."""
    shape = "an inverted U" if peak.inverted_u else "no inverted U beyond doubt"
    return (
        f"peak is at N = {peak.n.value:.3g} (95 %: {peak.n.low:.3g} to {peak.n.high:.3g}); N = {peak.reference} against the "
        f"smallest {signed(peak.rise)}, against the largest {signed(peak.fall)}: {shape}"
    )


def signed(estimate: Estimate) -> str:
    """A difference with its interval, e.g. `+0.24 (+0.15 to +0.32)`."""
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def write_sweep(root: Path, report: SweepReport) -> Path:
    """Write `sweep.json` and `report.html`, each whole or not at all; returns the page's path."""
    found = configurations(report.trials)
    pareto = pareto_plot(found, report.front) if report.front else ""
    page = (
        page_environment()
        .get_template("sweep.html.j2")
        .render(
            report=report,
            name=root.name,
            facts=facts(report),
            plots={
                "Success over N, and how much of its problem each system has solved": granularity_plot(curves(found)),
                "Success against latency": pareto,
                "What success and latency depend on": importance_plot(report.importance),
            },
            rows=_best_first(report.configurations),
        )
    )
    write_text(root / "report.html", page)
    write_text(root / "sweep.json", dump(report))
    return root / "report.html"
