"""A budget's answer as one SVG file that stands alone: success or robots over latency, and each level's time by batch."""

import io
from collections.abc import Sequence
from itertools import groupby

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from libra_ray.budget.records import BATCHES, BudgetReport, Candidate
from libra_ray.report.interval_plot import INK, LINE, STYLE

LIMIT = "#b3261e"
MOST_TICKS = 8
COLOURS = ("#0b62a4", "#c05717", "#2d7d46", "#7a4fa3", "#8a6d00", "#3c7f8c")
"""Of series, in their order."""


def budget_plot(report: BudgetReport) -> str:
    """SVG text with its own background."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
        _draw_candidates(left, report)
        _draw_levels(right, report)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
        return buffer.getvalue()


def _draw_candidates(axes: Axes, report: BudgetReport) -> None:
    """Each candidate by its latency: its success, or without one the robots that it serves."""
    shown = [c for c in report.candidates if c.success is not None] if report.measured else list(report.candidates)
    by_steps = sorted(shown, key=lambda c: (c.execute_steps, c.denoising_steps))
    for (executed, group), colour in zip(groupby(by_steps, lambda c: c.execute_steps), COLOURS, strict=False):
        row = list(group)
        axes.plot([c.ms for c in row], [_height(c) for c in row], "-", color=colour, linewidth=0.8, alpha=0.5)
        for c in row:
            if c.success is not None:
                axes.plot([c.ms] * 2, [c.success.low, c.success.high], "-", color=colour, linewidth=1.2, alpha=0.6)
            face = "white" if not c.fits else colour
            axes.plot([c.ms], [_height(c)], "o", color=colour, markerfacecolor=face, markersize=6 if c.front else 4)
            if c.denoising_steps:
                place = (0, 7) if c.success is None else (7, 3)
                axes.annotate(
                    str(c.denoising_steps),
                    (c.ms, _height(c)),
                    place,
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color=INK,
                )
        axes.plot([], [], "o-", color=colour, markersize=4, label=f"{executed} step{'s' * (executed > 1)} executed")
    if report.measured:
        best = sorted((c for c in shown if c.front), key=lambda c: c.ms)
        axes.step(
            [c.ms for c in best], [_height(c) for c in best], where="post", color=INK, linewidth=1, linestyle=":", label="front"
        )
        axes.set_ylim(-0.03, 1.05)
        axes.set_ylabel("success", color=INK)
    else:
        axes.set_ylim(0, 1.12 * max(1, *(_height(c) for c in shown)))
        axes.set_ylabel("robots", color=INK)
    if report.proposal is not None:
        axes.plot(
            [report.proposal.ms], [_height(report.proposal)], "o", markersize=13, markerfacecolor="none", color=INK,
            markeredgewidth=1.2, linestyle="none", label="proposed",
        )  # fmt: skip
    axes.axvline(report.budget_ms, color=LIMIT, linewidth=1, linestyle="--", label=f"budget, {report.budget_ms:g} ms")
    axes.set_xscale("log")
    _numbers(axes.xaxis, [*(c.ms for c in shown), report.budget_ms])
    what = "success, simulated with these delays" if report.measured else "robots that one replica of each level serves in time"
    axes.set_title(what, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel("ms a control decision (p95); numbers: denoising steps; hollow: does not fit", color=INK)
    axes.legend(frameon=False, fontsize=7.5, loc="best")
    _plain(axes)


def _draw_levels(axes: Axes, report: BudgetReport) -> None:
    """Measured whole calls, and the models fitted to them."""
    calls = [(name, k, list(v)) for name, rows in report.profile.calls.items() for k, v in groupby(rows, lambda c: c.steps)]
    batches = np.array(BATCHES)
    for (name, steps, rows), colour in zip(calls, COLOURS, strict=False):
        label = name + (f", {steps} denoising step{'s' * (steps > 1)}" if steps else "")
        axes.plot([c.batch for c in rows], [c.p95_ms for c in rows], "o", color=colour, markersize=4, label=label)
        axes.plot(batches, [report.models[name].ms(int(b), steps) for b in batches], "-", color=colour, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    _numbers(axes.yaxis, [max(c.p95_ms, 1e-3) for _, _, rows in calls for c in rows])
    axes.set_title("whole levels: measured p95 (dots), fitted model (lines)", loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel("robots in one call", color=INK)
    axes.set_ylabel("ms", color=INK)
    axes.legend(frameon=False, fontsize=7.5, loc="best")
    _plain(axes)


def _height(c: Candidate) -> float:
    return c.most_robots if c.success is None else c.success.rate


def _numbers(axis: Axis, values: Sequence[float]) -> None:
    """Round numbers along a logarithmic axis, however short a piece of it is shown."""
    low, high = min(values) / 1.15, max(values) * 1.15
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [m * 10.0**d for d in decades for m in range(1, 10) if low <= m * 10.0**d <= high]
    shown = [t for t in ticks if f"{t:e}"[0] in "125"] if len(ticks) > MOST_TICKS else ticks
    axes = axis.axes
    (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(low, high)
    axis.set_ticks(shown, [f"{t:g}" for t in shown])
    axis.set_minor_locator(NullLocator())


def _plain(axes: Axes) -> None:
    axes.grid(visible=True, color=LINE, linewidth=0.6)
    axes.tick_params(color=LINE, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
