"""What a sweep leaves for people: `sweep.json`, the table, and one page."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from libra_ray.common.files import write_text
from libra_ray.common.json_text import dump, plain
from libra_ray.common.provenance import git_revision, public_config
from libra_ray.config import Config
from libra_ray.report.page import duration, page_environment
from libra_ray.report.sweep_plots import BINS, Curve, granularity_plot, importance_plot, pareto_plot
from libra_ray.runs.trials import (
    PLAN_RESOLVED,
    VARIANCE_EXPLAINED,
    Configuration,
    TrialResult,
    best,
    configurations,
    pareto_front,
)
from libra_ray.stats.granularity_peak import Peak, estimate_peak
from libra_ray.types import Json

Importance = Mapping[str, Mapping[str, float]]


def build_sweep(
    *,
    config: Config,
    space: Mapping[str, str],
    settings: Json,
    trials: Sequence[TrialResult],
    objectives: Sequence[str],
    importance: Importance,
    wall_s: float,
    hardware: Json,
    mlflow_run_id: str | None,
) -> Json:
    """The content of `sweep.json`, strict JSON values only.

    Args:
        space: dotted name -> distribution in words.
        settings: how the sweep searched; holds `trials` and `seeds`.
        objectives: `success`, and `latency_ms` where both were sought.
        importance: objective -> parameter -> share; empty where too little was tried.
    """
    found = configurations(trials)
    chosen = best(found)
    counts = {status: sum(t.status == status for t in trials) for status in ("finished", "stopped", "failed")}
    return dict(
        plain(
            {
                "preset": config.preset,
                "space": dict(space),
                "settings": settings,
                "objectives": list(objectives),
                "counts": {"planned": settings["trials"] * settings["seeds"], **counts},
                "best": chosen.number if chosen else None,
                "configurations": [configuration_row(c) for c in found],
                "front": front(found) if "latency_ms" in objectives else [],
                "importance": importance,
                "curves": [curve_row(curve) for curve in curves(found)],
                "trials": [asdict(trial) for trial in trials],
                "wall_s": round(wall_s, 2),
                "hardware": hardware,
                "git_revision": git_revision(),
                "mlflow_run_id": mlflow_run_id,
                "config": public_config(config),
            }
        )
    )


def configuration_row(found: Configuration) -> Json:
    """One configuration over its seeds."""
    measures = sorted({name for trial in found.finished for name in trial.measures})
    return {
        "number": found.number,
        "values": found.values,
        "success": found.success,
        "interval": found.interval,
        "latency_ms": found.latency_ms,
        "seeds": [trial.seed for trial in found.finished],
        "stopped": found.count("stopped"),
        "failed": found.count("failed"),
        "errors": list(dict.fromkeys(trial.error for trial in found.trials if trial.error)),
        "measures": {name: found.measure(name) for name in measures},
    }


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


def curve_row(curve: Curve) -> Json:
    """A curve with its peak, as JSON."""
    peak = asdict(curve.peak) | {"inverted_u": curve.peak.inverted_u} if curve.peak else None
    return {"label": curve.label, "bins": curve.bins, "numbers": [point.number for point in curve.points], "peak": peak}


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.split('.')[-1]} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def sweep_table(report: Json, width: int | None = None) -> str:
    """The configurations, best first, then what failed and where the peak is, as plain text.

    Args:
        width: columns of the terminal; by default wide enough that no cell is broken.
    """
    names = list(report["space"])
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
    table = Table(*heads, title=f"{report['preset']}: configurations by success", title_justify="left")
    for row in sorted(
        report["configurations"], key=lambda row: (row["success"] is None, -(row["success"] or 0), row["number"])
    ):
        interval = f"{row['interval'][0]:.2f}–{row['interval'][1]:.2f}" if row["interval"] else "–"
        shown = [_cell(row["measures"].get(name)) for name, _ in measures]
        notes = [f"{row[word]} {word}" for word in ("stopped", "failed") if row[word]]
        notes += ["best"] if row["number"] == report["best"] else []
        notes += ["front"] if row["number"] in report["front"] else []
        values = [_short(row["values"].get(name, "–")) for name in names]
        cells = [_cell(row["success"]), interval, _cell(row["latency_ms"]), *shown, str(len(row["seeds"])), ", ".join(notes)]
        table.add_row(str(row["number"]), *values, *cells)
    text = io.StringIO()
    Console(file=text, width=width or 100 + 14 * len(names), color_system=None).print(table)
    return text.getvalue() + "\n".join(facts(report)) + "\n"


def facts(report: Json) -> list[str]:
    """What the sweep says in sentences."""
    counts = report["counts"]
    ended = ", ".join(f"{counts[word]} {word}" for word in ("finished", "stopped", "failed") if counts[word]) or "none"
    lines = [f"trials: {counts['planned']} planned, {ended}; {duration(report['wall_s'])}"]
    failed = [(row["number"], error) for row in report["configurations"] for error in row["errors"]]
    lines += [f"configuration {number} failed: {' '.join(error.split())[:160]}" for number, error in failed]
    for curve in report["curves"]:
        if peak := curve["peak"]:
            lines.append(peak_words(peak) + (f" ({curve['label']})" if curve["label"] else ""))
    return lines


def peak_words(peak: Json) -> str:
    """The peak and both contrasts in one sentence."""
    n, rise, fall = peak["n"], peak["rise"], peak["fall"]
    shape = "an inverted U" if peak["inverted_u"] else "no inverted U beyond doubt"
    return (
        f"peak is at N = {n['value']:.3g} (95 %: {n['low']:.3g} to {n['high']:.3g}); N = {peak['reference']} against the "
        f"smallest {_signed(rise)}, against the largest {_signed(fall)}: {shape}"
    )


def _signed(estimate: Json) -> str:
    return f"{estimate['value']:+.2f} ({estimate['low']:+.2f} to {estimate['high']:+.2f})"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def write_sweep(root: Path, report: Json, trials: Sequence[TrialResult]) -> Path:
    """Write `sweep.json` and `report.html`, each whole or not at all; returns the page's path."""
    found = configurations(trials)
    pareto = pareto_plot(found, report["front"]) if report["front"] else ""
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
                "What success and latency depend on": importance_plot(report["importance"]),
            },
            rows=sorted(
                report["configurations"], key=lambda row: (row["success"] is None, -(row["success"] or 0), row["number"])
            ),
        )
    )
    write_text(root / "report.html", page)
    write_text(root / "sweep.json", dump(report))
    return root / "report.html"
